"""Self-supervised methods: each a Lightning module that wires the parts and holds no formula."""

from mlflow_ssl.methods.base import SSLMethod
from mlflow_ssl.methods.byol import BYOL

__all__ = ["BYOL", "SSLMethod"]

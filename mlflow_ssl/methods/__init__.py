"""Methods: each a Lightning module that wires the parts and holds no formula."""

from mlflow_ssl.methods.base import Method, SSLMethod
from mlflow_ssl.methods.byol import BYOL
from mlflow_ssl.methods.classifier import Classifier

__all__ = ["BYOL", "Classifier", "Method", "SSLMethod"]

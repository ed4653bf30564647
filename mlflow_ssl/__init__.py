"""Self-supervised image training whose every run lives in MLflow."""

import os

__version__ = "0.1.0"

# albumentations asks the network for a newer version of itself at import otherwise
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

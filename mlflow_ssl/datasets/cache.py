"""Where this user's caches are."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of this user's caches: ``MLFLOW_SSL_CACHE``, or ours below ``XDG_CACHE_HOME``.

    Raises:
        RuntimeError: if neither is set and the user has no home.
    """
    if given := os.environ.get("MLFLOW_SSL_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlflow_ssl"

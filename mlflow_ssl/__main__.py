"""``python -m mlflow_ssl``: what the MLproject runs."""

import sys

from mlflow_ssl.cli import main

if __name__ == "__main__":
    sys.exit(main())

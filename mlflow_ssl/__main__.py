"""``python -m mlflow_ssl``: what the MLproject runs."""

import os
import sys
from typing import NoReturn

from mlflow_ssl.cli import main


def run() -> NoReturn:
    """Run the program and leave with its exit code."""
    code = main()
    if code > 128:  # stopped by a signal: threads that still draw or send are not waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()

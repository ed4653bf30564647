"""What a pod of MLflow's Kubernetes backend runs, in place of ``python -m mlflow_ssl``.

MLflow quotes each word of a pod's command as for a shell, and no shell reads it.
"""

import os
import shlex
import sys
from collections.abc import Sequence


def unquoted(words: Sequence[str]) -> list[str]:
    """Return the words that `shlex.quote` was given.

    Example:
        >>> unquoted(["--experiment", "byol", "--data_path", "''", "'[a, b]'"])
        ['--experiment', 'byol', '--data_path', '', '[a, b]']
    """
    return ["".join(shlex.split(word)) if word.startswith("'") else word for word in words]


if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "mlflow_ssl", *unquoted(sys.argv[1:])])

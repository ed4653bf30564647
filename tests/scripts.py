"""Trainings by several processes, as scripts of their own beside the tests."""

import os
import subprocess
import sys
from pathlib import Path


def run_script(name, *words):
    """Run a script of this folder, which finds what the tests find, to its good end."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / name), *map(str, words)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]

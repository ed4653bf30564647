"""Environments of the peers that this package is measured beside: each in a folder of its own, made on first use.

They lie in the user's cache (``MLFLOW_SSL_CACHE``), below ``benchmarks``; removing that folder makes them anew. uv is
what makes them, and has to be on the PATH.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from mlflow_ssl.datasets.cache import cache_folder


class NotInstalledError(RuntimeError):
    """A peer cannot be had on this machine."""


@dataclass(frozen=True)
class Peer:
    """What a peer's environment is made of.

    Attributes:
        name: of the peer, with its version.
        requirements: for uv.
        python: version it needs; None for the one that runs this.
    """

    name: str
    requirements: tuple[str, ...]
    python: str | None = None


# the same torch as here: else torch would be measured
LIGHTLY = Peer("lightly 1.6.0", ("lightly==1.6.0", "pytorch-lightning", f"torch=={version('torch').partition('+')[0]}"))
# it allows Python 3.10 only, and its torchmetrics needs a module that later setuptools have not
QUADRA = Peer("quadra 2.9.0", ("quadra==2.9.0", "setuptools<81"), python="3.10")


def peer_python(peer: Peer) -> str:
    """Return the interpreter of the environment that a peer is in, which is made if it is not there.

    Raises:
        NotInstalledError: if that fails, with the reason.
    """
    folder = cache_folder() / "benchmarks" / "-".join(peer.name.split())
    python, complete = folder / "bin" / "python", folder / "complete"
    wanted = "\n".join(peer.requirements)
    if complete.exists() and complete.read_text() == wanted:
        return str(python)
    shutil.rmtree(folder, ignore_errors=True)  # half made, or of another torch
    folder.parent.mkdir(parents=True, exist_ok=True)
    _uv("venv", "--python", _interpreter(peer.python), str(folder))
    _uv("pip", "install", "--python", str(python), *peer.requirements)
    complete.write_text(wanted)
    return str(python)


def _interpreter(wanted: str | None) -> str:
    """Return an interpreter of a version, or the version where none is known, for uv to find or fetch."""
    if wanted is None:
        return sys.executable
    # pyenv's are looked for by place: the python3.10 that it has on the PATH works only where it is chosen
    installed = sorted(Path.home().glob(f".pyenv/versions/{wanted}.*/bin/python"))
    return str(installed[-1]) if installed else wanted


def _uv(*words: str) -> None:
    if shutil.which("uv") is None:
        raise NotInstalledError("uv is not on the PATH")
    done = subprocess.run(["uv", *words], capture_output=True, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise NotInstalledError(
            next((line for line in lines if line.startswith("error")), lines[-1] if lines else "uv failed")
        )

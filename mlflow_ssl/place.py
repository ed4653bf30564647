"""Where in the program a thread is, and what it may be waiting for there."""

import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

WAITING = ("/torch/distributed/", "/torch/nn/parallel/", "/torch/autograd/graph.py", "/mlflow_ssl/processes.py")
"""Parts of the name of the file that a process is in while it waits for others; in the backward pass it may wait."""
COMPILING = ("/torch/_dynamo/convert_frame.py", "/torch/_inductor/compile_fx.py")
"""The like of those that it has come through while it compiles, which takes minutes."""
ASKING = (
    *("/socket.py", "/http/client.py", "/asyncio/", "/subprocess.py", "/filelock/"),
    *("/urllib3/", "/requests/", "/httpcore/", "/grpc/", "/s3transfer/", "/fsspec/", "/sqlalchemy/"),
)
"""Likewise while it waits for a server, a program or a lock, and may have nothing else to do for long."""

_STANDARD = sysconfig.get_paths()["stdlib"]


@dataclass(frozen=True)
class Place:
    """Where a thread is.

    Attributes:
        words: function, file and line, of the innermost code that is not Python's own.
        waiting: whether it waits for other processes of the training.
        compiling: whether it compiles.
        asking: whether it waits for something else outside this program.
    """

    words: str = ""
    waiting: bool = False
    compiling: bool = False
    asking: bool = False


def place_of(thread: int) -> Place:
    """Return where a thread of this process is, by Python's number of it."""
    files, here, words = [], "", ""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        file = frame.f_code.co_filename
        if not words and not _is_pythons_own(file):
            here, words = file, f"{frame.f_code.co_name} ({Path(file).name}:{frame.f_lineno})"
        files.append(file)
        frame = frame.f_back
    compiling = _are_in(files, COMPILING)
    return Place(words, not compiling and _are_in([here], WAITING), compiling, _are_in(files, ASKING))


def _is_pythons_own(file: str) -> bool:
    return file.startswith((_STANDARD, "<")) and "site-packages" not in file


def _are_in(files: Iterable[str], parts: Iterable[str]) -> bool:
    return any(part in file for file in files for part in parts)

"""The output folder of a run: what is written there, and its log."""

import contextlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import joblib

from mlflow_ssl.datamodules import ClassificationDataModule
from mlflow_ssl.datasets.bad_images import BadImageList
from mlflow_ssl.errors import InputError
from mlflow_ssl.processes import from_first, is_first_process
from mlflow_ssl.secret import RedactingFormatter
from mlflow_ssl.siblings import FOLDER as PROCESSES

BAD_IMAGES = "bad_images.csv"

SHARED_VARIABLE = "MLFLOW_SSL_OUTPUT_DIR"
"""Tells the other processes of a distributed training where the first one writes."""
ATTEMPT_VARIABLE = "MLFLOW_SSL_ATTEMPT"
"""Tells them which attempt at the training they are part of."""


def shared_output() -> str | None:
    """Return the output folder that the first process of a distributed training has made; None in that one itself."""
    return None if is_first_process() else os.environ.get(SHARED_VARIABLE)


@contextlib.contextmanager
def open_output(folder: Path, *, log_level: str, resumed: bool = False) -> Iterator[None]:
    """Make the output folder, and have everything that is logged meanwhile written to its ``main.log`` too.

    Args:
        folder: the output folder.
        log_level: of our own messages.
        resumed: go on in a folder that is there already.

    Raises:
        InputError: if the folder is there already and holds something, or cannot be made.
    """
    if not shared_output():
        os.environ[ATTEMPT_VARIABLE] = from_first(lambda: _make(folder, resumed=resumed))
        os.environ[SHARED_VARIABLE] = str(folder)
    handlers = [(logging.getLogger(), _file_handler(folder / "main.log"))]
    if is_first_process():
        handlers.append((logging.getLogger("mlflow_ssl"), _console_handler()))
    logging.getLogger("mlflow_ssl").setLevel(log_level.upper())
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    for logger, handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logging.captureWarnings(capture=False)
        for logger, handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        os.environ.pop(SHARED_VARIABLE, None)
        os.environ.pop(ATTEMPT_VARIABLE, None)


def process_folder(output: Path) -> Path:
    """Return where the processes of this attempt at a training tell each other how they are."""
    return output / PROCESSES / os.environ.get(ATTEMPT_VARIABLE, "0")


def _make(folder: Path, *, resumed: bool) -> str:
    """Make the output folder, and return a name for this attempt at the training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir()) and not resumed
    except OSError as error:
        raise InputError(f"core.output_dir cannot be made: {folder}: {error.strerror}") from error
    if occupied:
        raise InputError(f"core.output_dir must be new or empty, got {folder}")
    return secrets.token_hex(4)


def _file_handler(file: Path) -> logging.Handler:
    handler = logging.FileHandler(file, encoding="utf-8")
    formatter = RedactingFormatter("%(asctime)sZ %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    return handler


class _Console(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 knows no such argument
    """Write to what is standard error at the time: a progress bar takes its place, and puts lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


def _console_handler() -> logging.Handler:
    handler = _Console()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    return handler


def write_data(datamodule: ClassificationDataModule, folder: Path) -> None:
    """Write the index, the datamodule, its splits as text, and the images left out, with the reasons."""
    folder.mkdir(exist_ok=True)
    datamodule.index.write_parquet(folder / "index.parquet")
    datamodule.index.write_csv(folder / "splits.csv")
    joblib.dump(datamodule, folder / "datamodule.joblib")
    BadImageList(folder / BAD_IMAGES).start(datamodule.bad_images)

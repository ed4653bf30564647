"""The output folder of a run: what is written there, and its log."""

import contextlib
import csv
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import joblib
from omegaconf import DictConfig

from mlflow_ssl.datamodules import ClassificationDataModule
from mlflow_ssl.errors import InputError
from mlflow_ssl.tracking.run import is_first_process

_SHARED = "MLFLOW_SSL_OUTPUT_DIR"
"""Tells the other processes of a distributed training where the first one writes."""


@contextlib.contextmanager
def open_output(core: DictConfig) -> Iterator[Path]:
    """Make the output folder, and have everything that is logged meanwhile written to its ``main.log`` too.

    Raises:
        InputError: if the folder is there already and holds something, or cannot be made.
    """
    shared = None if is_first_process() else os.environ.get(_SHARED)
    folder = Path(shared or core.output_dir).expanduser().resolve()
    if not shared:
        _make_empty(folder)
        os.environ[_SHARED] = str(folder)
    handlers = [(logging.getLogger(), _file_handler(folder / "main.log"))]
    if not shared:
        handlers.append((logging.getLogger("mlflow_ssl"), _console_handler()))
    logging.getLogger("mlflow_ssl").setLevel(core.log_level.upper())
    for name in ("pytorch_lightning", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    for logger, handler in handlers:
        logger.addHandler(handler)
    try:
        yield folder
    finally:
        logging.captureWarnings(capture=False)
        for logger, handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        os.environ.pop(_SHARED, None)


def _make_empty(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise InputError(f"core.output_dir cannot be made: {folder}: {error.strerror}") from error
    if occupied:
        raise InputError(f"core.output_dir must be new or empty, got {folder}")


def _file_handler(file: Path) -> logging.Handler:
    handler = logging.FileHandler(file, encoding="utf-8")
    formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    return handler


def _console_handler() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler


def write_data(datamodule: ClassificationDataModule, folder: Path) -> None:
    """Write the datamodule, its splits as text, and the images left out, with the reasons."""
    folder.mkdir()
    datamodule.index.write_csv(folder / "splits.csv")
    joblib.dump(datamodule, folder / "datamodule.joblib")
    with (folder / "bad_images.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "reason"])
        writer.writerows((image.path, image.reason) for image in datamodule.bad_images)

"""Checkpoints on disk: written whole or not at all, and read without unpickling."""

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from mlflow_ssl.errors import MachineError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside, have the disk hold it, and rename: a full disk or a dead machine leaves the former checkpoint."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            MachineError: if the disk does not take it.
        """
        target = Path(path)
        scratch = target.with_name(target.name + ".part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with scratch.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
            _sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                scratch.unlink()
            reason = " ".join(str(error).split())[:200]
            former = "; the former one is as it was" if target.exists() else ""
            raise MachineError(f"the checkpoint {target} cannot be written: {reason}{former}") from error

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint: tensors and plain values, nothing that runs.

        Raises:
            MachineError: if the file is damaged, or holds anything else.
        """
        try:
            loaded: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:  # a damaged file makes torch raise nearly anything
            raise MachineError(f"the checkpoint {path} cannot be read: {_unread_words(error)}") from error
        return loaded


def _unread_words(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to unpickle it all the same
        return "it is damaged, or holds more than tensors and plain values"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Every few epochs the checkpoints as they are then are handed to the run."""

from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import Logger
from tiny import fit, pairs, tiny_method

from mlflow_ssl.callbacks import CheckpointUpload, LastCheckpoint
from mlflow_ssl.errors import InputError


class RecordingRun:
    """Remembers which state there was to upload."""

    def __init__(self, folder):
        self.folder = folder
        self.uploads = []

    def log_checkpoints(self):
        last = torch.load(self.folder / "last.ckpt", weights_only=True)
        self.uploads.append((last["epoch"], last["global_step"]))


class RecordingLogger(Logger):
    name, version = "recording", "0"

    def __init__(self, run):
        super().__init__()
        self.run = run

    def log_metrics(self, *_, **__): ...

    def log_hyperparams(self, *_, **__): ...


def uploads(folder, *, every_n_epochs, max_epochs):
    run = RecordingRun(folder)
    callbacks = [LastCheckpoint(str(folder)), CheckpointUpload(every_n_epochs)]
    fit(
        tiny_method(),
        pairs(2),
        max_epochs=max_epochs,
        callbacks=callbacks,
        logger=RecordingLogger(run),
        log_every_n_steps=1,
    )
    return run.uploads


@pytest.mark.parametrize(
    ("every", "max_epochs", "epochs"), [(1, 4, [1, 2, 3]), (2, 5, [2, 4]), (3, 3, []), (10, 4, [])]
)
def test_every_n_epochs_the_state_of_that_moment_is_uploaded(tmp_path, every, max_epochs, epochs):
    found = uploads(tmp_path, every_n_epochs=every, max_epochs=max_epochs)
    assert found == [(epoch, 2 * epoch) for epoch in epochs]


@pytest.mark.parametrize("every_n_epochs", [0, -1])
def test_less_than_every_epoch_is_refused(every_n_epochs):
    with pytest.raises(InputError, match=rf"every_n_epochs must be at least 1, got {every_n_epochs}"):
        CheckpointUpload(every_n_epochs)


def test_without_a_run_the_state_is_saved_and_nothing_else(tmp_path):
    callbacks = [LastCheckpoint(str(tmp_path)), CheckpointUpload(1)]
    fit(tiny_method(), pairs(1), max_epochs=3, callbacks=callbacks, logger=False)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["last.ckpt"]

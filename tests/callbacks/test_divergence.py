import logging

import albumentations as A
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback
from tiny import fit, labelled, pairs, quiet_trainer, tiny_datamodule, tiny_method

from mlflow_ssl.callbacks import Health, LastCheckpoint
from mlflow_ssl.callbacks import divergence as module
from mlflow_ssl.callbacks.divergence import DivergedError
from mlflow_ssl.checkpoint_io import AtomicCheckpointIO
from mlflow_ssl.cli import main

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def test_a_loss_that_is_not_finite_ends_the_epoch_it_comes_in():
    batches = pairs(7)
    batches.batches[4][0][0][0] = torch.nan
    method, health = tiny_method(), Health()
    with pytest.raises(
        DivergedError,
        match=r"^the loss must be finite, got nan at step 5, epoch 0, batch 4; lower optimizer.lr, .*; no checkpoint",
    ):
        fit(method, batches, max_epochs=2, callbacks=[health])
    assert method.trainer.global_step == 7


def test_losses_are_looked_at_now_and_then(monkeypatch):
    monkeypatch.setattr(module, "CHECK_EVERY", 3)
    batches = pairs(9)
    batches.batches[4][0][0][0] = torch.nan
    method = tiny_method()
    with pytest.raises(DivergedError, match="at step 5, epoch 0, batch 4"):
        fit(method, batches, max_epochs=1, callbacks=[Health()])
    assert method.trainer.global_step == 6


class Save(Callback):
    """Write the checkpoint of a training before some of its steps."""

    def __init__(self, *steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step in self.steps:
            next(each for each in trainer.callbacks if isinstance(each, LastCheckpoint)).save(trainer)


def test_the_last_checkpoint_is_a_good_one(tmp_path):
    batches = pairs(9)
    batches.batches[4][0][0][0] = torch.nan
    callbacks = [Health(), LastCheckpoint(str(tmp_path)), Save(2, 6)]
    with pytest.raises(DivergedError, match=rf"at step 5, .*; the last good checkpoint is {tmp_path}/last.ckpt$"):
        fit(tiny_method(), batches, max_epochs=1, callbacks=callbacks)
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 2
    assert all(each.isfinite().all() for each in stored["state_dict"].values())


class Poison(Callback):
    """Make a weight infinite after a step whose loss was finite."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 3:
            pl_module.online.backbone.conv.weight.data[0] = torch.inf


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    callbacks = [Health(), Poison(), LastCheckpoint(str(tmp_path)), Save(2, 3)]
    with pytest.raises(DivergedError, match=r"^the weights must be finite, got NaN or infinity after step 3; "):
        fit(tiny_method(), pairs(9), max_epochs=1, callbacks=callbacks)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


def test_embeddings_that_are_not_finite_end_the_training():
    queries = labelled(2)
    queries.batches[0][0][0] = torch.inf
    with pytest.raises(DivergedError, match=r"^the embeddings must be finite, got NaN or infinity at step 1, of val"):
        fit(tiny_method(), pairs(1), [queries], max_epochs=1, callbacks=[Health()])


# the images of a batch


@pytest.fixture
def grey_images(tmp_path):
    """Return a folder of 22 grey images, each of a grey of its own, which is its name."""
    for grey in range(22):
        file = tmp_path / "images" / "ab"[grey % 2] / f"{grey * 11}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (grey * 11,) * 3).save(file)
    return tmp_path / "images"


GREY = A.Compose([A.Resize(8, 8), A.Normalize(mean=[0.0] * 3, std=[1.0] * 3)])


class Ruin(Callback):
    """Ruin a batch, and remember its images by their grey."""

    def __init__(self, epoch, batch_idx):
        self.place, self.greys = (epoch, batch_idx), None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            (view_1, _), _ = batch
            self.greys = [round(float(image.mean()) * 255) for image in view_1]
            view_1.fill_(torch.nan)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 3)])
def test_the_images_of_the_batch_are_named(grey_images, num_workers, place):
    ruin = Ruin(*place)
    trainer = quiet_trainer(max_epochs=3, callbacks=[Health(), ruin], limit_val_batches=0)
    datamodule = tiny_datamodule(grey_images, GREY, num_workers=num_workers)
    with pytest.raises(DivergedError) as caught:
        trainer.fit(tiny_method(), datamodule=datamodule)
    named = str(caught.value).partition("(")[2].partition(")")[0].split(", ")
    assert named == [f"{'ab'[grey // 11 % 2]}/{grey}.png" for grey in ruin.greys]
    assert len(named) > 1


def test_after_a_resume_within_an_epoch_they_are_the_same(grey_images, tmp_path):
    def training(*callbacks):
        callbacks = [Health(), *callbacks, LastCheckpoint(str(tmp_path))]
        return quiet_trainer(max_epochs=2, callbacks=callbacks, limit_val_batches=0, plugins=[AtomicCheckpointIO()])

    class Stop(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        training(Save(2), Stop()).fit(tiny_method(), datamodule=tiny_datamodule(grey_images, GREY))
    ruin, resumed = Ruin(0, 3), training()
    resumed.callbacks.insert(1, ruin)
    with pytest.raises(DivergedError, match="at step 4, epoch 0, batch 3 ") as caught:
        resumed.fit(
            tiny_method(),
            datamodule=tiny_datamodule(grey_images, GREY),
            ckpt_path=tmp_path / "last.ckpt",
            weights_only=True,
        )
    assert all(f"/{grey}.png" in str(caught.value) for grey in ruin.greys)


def test_of_many_images_a_few_are_named_and_the_others_logged(grey_images, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "NAMED_IMAGES", 2)
    trainer = quiet_trainer(max_epochs=1, callbacks=[Health(), Ruin(0, 0)], limit_val_batches=0)
    with pytest.raises(DivergedError, match=r"batch 0 \([ab]/\d+.png, [ab]/\d+.png and 2 more\)"):
        trainer.fit(tiny_method(), datamodule=tiny_datamodule(grey_images, GREY))
    (line,) = [record.getMessage() for record in caplog.records if "is not finite" in record.getMessage()]
    assert line.count(".png") == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy warn about themselves
def test_a_rate_far_too_high_ends_the_run_with_one_line(store, capsys):
    words = ["experiment=byol", "optimizer=sgd", "scheduler.init_lr=[1e30]", "scheduler.warmup_epochs=0"]
    quick = ["trainer.max_epochs=2", "trainer.precision=32-true", "callbacks.pictures=null"]
    assert main([*words, *quick]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "must be finite, got " in error
    assert "lower optimizer.lr" in error
    (run,) = store.search_runs([store.get_experiment_by_name("byol").experiment_id])
    assert run.info.status == "FAILED"
    assert "lower optimizer.lr" in run.data.tags["mlflow_ssl.reason"]

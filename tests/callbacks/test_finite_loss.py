import logging
import math
import re

import pytest
import torch
from tiny import fit, pairs, quiet_trainer, tiny_method

from mlflow_ssl.callbacks import FiniteLoss, LastCheckpoint
from mlflow_ssl.callbacks.finite_loss import DivergedError
from mlflow_ssl.cli import main
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset
from mlflow_ssl.losses import byol_loss
from mlflow_ssl.views import RandomResizedCrop


class BreaksAt:
    """A loss that is another number at one of its calls; BYOL calls it twice a step."""

    def __init__(self, step, value):
        self.call, self.value, self.calls = 2 * step, value, 0

    def __call__(self, prediction, projection):
        self.calls += 1
        loss = byol_loss(prediction, projection)
        return loss + self.value if self.calls == self.call else loss


def breaking(step, value, num_batches=8, **options):
    return fit(tiny_method(loss=BreaksAt(step, value)), pairs(num_batches), max_epochs=1, **options)


@pytest.mark.parametrize(("value", "said"), [(math.nan, "nan"), (math.inf, "inf")])
@pytest.mark.parametrize("check_every", [1, 3, 50])
def test_the_step_that_broke_is_named_whenever_it_is_looked_for(value, said, check_every):
    with pytest.raises(DivergedError, match=rf"^the loss became {said} at step 5, on batch 4 of epoch 0; there"):
        breaking(5, value, callbacks=[FiniteLoss(check_every)])


def test_a_sound_training_goes_on():
    assert fit(tiny_method(), pairs(7), max_epochs=2, callbacks=[FiniteLoss(3)]).global_step == 14


def test_no_checkpoint_of_ruined_weights_takes_the_place_of_a_good_one(tmp_path):
    checkpoint = LastCheckpoint(str(tmp_path), every_seconds=0)
    with pytest.raises(
        DivergedError, match=rf"the last good checkpoint is {re.escape(str(tmp_path))}/last.ckpt; lower"
    ):
        breaking(5, math.nan, callbacks=[checkpoint, FiniteLoss()])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert all(value.isfinite().all() for value in saved["state_dict"].values() if value.is_floating_point())


def test_weights_that_break_without_the_loss_are_found_before_a_checkpoint(tmp_path):
    method = tiny_method()
    checkpoint = LastCheckpoint(str(tmp_path), every_seconds=3600)

    def ruin(*_):
        if method.global_step == 3:
            with torch.no_grad():
                method.online.backbone.conv.weight[0] = math.inf
            checkpoint.save(method.trainer)

    method.on_train_batch_end = ruin
    with pytest.raises(
        DivergedError, match=r"^the weights became infinite or NaN at step 3; there is no checkpoint yet"
    ):
        fit(method, pairs(6), max_epochs=1, callbacks=[checkpoint, FiniteLoss()])
    assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_images_of_the_batch_are_named(image_folder, num_workers):
    folder = image_folder({"a": 15, "b": 15})
    crop = RandomResizedCrop(size=(8, 8))
    datamodule = SSLDataModule(
        str(folder),
        TwoAugmentationDataset([crop, crop]),
        batch_size=10,
        num_workers=num_workers,
        val_size=0.0,
        test_size=0.0,
    )
    seen, source = {}, SSLDataModule.setup

    def setup(self, stage=None):
        source(self, stage)
        finish = self.augmentation_dataset.views
        paths = self.index.split("train").paths
        self.augmentation_dataset.views = lambda sample, key: (finish(sample, key)[0], key[1])
        seen["paths"] = paths

    datamodule.setup = setup.__get__(datamodule)
    rows = {}

    class Watch(FiniteLoss):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rows[trainer.current_epoch, batch_idx] = batch[1].tolist()

    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=[Watch()])
    with pytest.raises(DivergedError) as error:
        trainer.fit(tiny_method(loss=BreaksAt(5, math.nan)), datamodule)
    expected = [seen["paths"][row] for row in rows[1, 1]]
    assert len(expected) == 10
    assert f"the loss became nan at step 5, on {', '.join(expected[:8])} and 2 more; " in str(error.value)


@pytest.mark.slow
def test_a_rate_far_too_high_ends_the_run_with_one_line(store, capsys, caplog):
    caplog.set_level(logging.ERROR)
    words = ["experiment=byol", "optimizer=sgd", "scheduler.init_lr=[1e30]", "scheduler.warmup_epochs=0"]
    quick = [
        "trainer.max_epochs=2",
        "trainer.precision=32-true",
        "callbacks.pictures=null",
        "tracking.system_metrics=false",
    ]
    assert main([*words, *quick]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "became" in errors[0]
    assert "lower scheduler.init_lr" in errors[0]
    (run,) = store.search_runs([store.get_experiment_by_name("byol").experiment_id])
    assert run.info.status == "FAILED"
    assert "lower scheduler.init_lr" in run.data.tags["mlflow_ssl.reason"]


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match=r"^check_every must be at least 1, got 0$"):
        FiniteLoss(0)

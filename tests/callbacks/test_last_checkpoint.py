"""To stop and go on is not to stop: weights, optimizer, steps, data and random numbers."""

import os
import random
import signal
from functools import partial

import albumentations as A
import numpy as np
import pytest
import torch
from pytorch_lightning import Callback
from tiny import quiet_trainer, tiny_method

from mlflow_ssl.callbacks import CheckpointUpload, KNNEvaluation, LastCheckpoint
from mlflow_ssl.callbacks import last_checkpoint as module
from mlflow_ssl.callbacks.last_checkpoint import random_state, set_random_state
from mlflow_ssl.checkpoint_io import AtomicCheckpointIO
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset
from mlflow_ssl.errors import Interrupted
from mlflow_ssl.schedules import warmup_cosine_scheduler
from mlflow_ssl.signals import stop_signals

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

NUM_EPOCHS, NUM_BATCHES = 3, 5
CROP = A.Compose([A.RandomResizedCrop(size=(8, 8)), A.Normalize()])
CLEAN = A.Compose([A.Resize(8, 8), A.Normalize()])


class Witness(Callback):
    """Remember what a training does, and draw random numbers as it goes."""

    def __init__(self):
        self.batches, self.drawn, self.validations = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        views, _ = batch
        self.batches.append((trainer.current_epoch, batch_idx, float(views[0].sum())))

    def on_train_batch_end(self, *_):
        self.drawn.append((random.random(), np.random.random(), torch.rand(()).item()))  # noqa: NPY002

    def on_validation_end(self, trainer, pl_module):
        self.validations.append((trainer.global_step, trainer.callback_metrics["val_acc"].item()))


class Terminate(Callback):
    """Send this process SIGTERM as a batch begins."""

    def __init__(self, position):
        self.left = position

    def on_train_batch_start(self, *_):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        self.left -= 1


class Training:
    """A training of three epochs of five batches, the last of which is smaller."""

    def __init__(self, images, folder, witness, *callbacks, **settings):
        self.path = folder / "last.ckpt"
        self.witness = witness
        self.method = tiny_method(
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
            scheduler=partial(warmup_cosine_scheduler, init_lr=0.1, warmup_epochs=1, reference_batch=None),
        )
        self.datamodule = SSLDataModule(
            str(images),
            TwoAugmentationDataset([CROP, CROP]),
            num_workers=0,
            batch_size=4,
            val_transform=CLEAN,
            test_transform=CLEAN,
        )
        self.trainer = quiet_trainer(
            plugins=[AtomicCheckpointIO()],
            callbacks=[*callbacks, KNNEvaluation(num_neighbours=1), LastCheckpoint(str(folder)), witness],
            **{"max_epochs": NUM_EPOCHS} | settings,
        )

    def fit(self, *, resume=False):
        with stop_signals.raised(), stop_signals.awaited():
            ckpt_path = self.path if resume else None
            self.trainer.fit(self.method, self.datamodule, ckpt_path=ckpt_path, weights_only=True)
        return self

    def state(self):
        """Return all that a training comes to."""
        (optimizer,), (scheduler,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        return {
            "weights": self.method.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.scheduler.state_dict(),
            "steps": self.trainer.global_step,
            "epochs": self.trainer.current_epoch,
        }


@pytest.fixture
def images(image_folder):
    return image_folder({"a": 15, "b": 15}, size=8)  # 18 of them to train on


@pytest.fixture
def training(images, tmp_path):
    """Return a function that makes a training; it begins with the same random numbers each time."""

    def make(name, *callbacks, seed=0, witness=None, **settings):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        return Training(images, tmp_path / name, witness or Witness(), *callbacks, **settings)

    return make


def assert_same(one, other):
    assert one.witness.batches == other.witness.batches
    assert one.witness.drawn == other.witness.drawn
    assert one.witness.validations == other.witness.validations
    torch.testing.assert_close(one.state(), other.state(), rtol=0, atol=0)


ALL, SOME = range(NUM_EPOCHS * NUM_BATCHES), range(1, NUM_EPOCHS * NUM_BATCHES, 4)  # not at the same batch of each
CASES = {
    "every batch a step": ({}, ALL),
    "two batches a step": ({"accumulate_grad_batches": 2}, ALL),
    "no validation": ({"limit_val_batches": 0}, SOME),
    "validation within the epoch": ({"val_check_interval": 2}, SOME),
    "validation every other epoch": ({"check_val_every_n_epoch": 2}, SOME),
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_that_was_stopped_anywhere_ends_as_if_it_never_was(training, case):
    settings, positions = CASES[case]
    whole = training("whole", **settings).fit()
    assert len(whole.witness.batches) == NUM_EPOCHS * NUM_BATCHES
    for position in positions:
        witness = Witness()
        stopped = training(f"{position}", Terminate(position), witness=witness, **settings)
        with pytest.raises(Interrupted):
            stopped.fit()
        assert len(witness.batches) >= position
        # other random numbers to begin with: those of the checkpoint count
        resumed = training(f"{position}", seed=1, witness=witness, **settings).fit(resume=True)
        assert_same(resumed, whole)


def test_a_training_that_was_stopped_at_each_step_ends_as_if_it_never_was(training):
    whole = training("whole").fit()
    witness, attempts = Witness(), 0
    while True:
        attempt = training("often", Terminate(1), witness=witness, seed=attempts)
        try:
            attempt.fit(resume=attempts > 0)
            break
        except Interrupted:
            attempts += 1
    assert attempts == NUM_EPOCHS * NUM_BATCHES - 1
    assert_same(attempt, whole)


def test_a_signal_ends_the_training_before_the_next_step(training):
    stopped = training("stopped", Terminate(7))
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        stopped.fit()
    assert stopped.trainer.global_step == 7


def test_steps_are_never_torn_apart(training):
    stopped = training("stopped", Terminate(1), accumulate_grad_batches=2)
    with pytest.raises(Interrupted):
        stopped.fit()
    assert len(stopped.witness.batches) == 2


def test_the_end_is_saved_and_more_epochs_go_on_from_it(training):
    short = training("short", max_epochs=2).fit()
    resumed = training("short", witness=short.witness, seed=1).fit(resume=True)
    assert resumed.trainer.global_step == NUM_EPOCHS * NUM_BATCHES
    unbroken = training("unbroken").fit()
    # the schedule is another one, but the images are the same
    assert resumed.witness.batches == unbroken.witness.batches
    assert resumed.witness.drawn == unbroken.witness.drawn


def test_an_ended_training_resumed_does_nothing(training):
    ended = training("ended").fit()
    again = training("ended", seed=1).fit(resume=True)
    assert again.witness.batches == []
    torch.testing.assert_close(again.method.state_dict(), ended.method.state_dict(), rtol=0, atol=0)


class Copy(Callback):
    """Keep a copy of ``last.ckpt`` as an epoch begins."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        (last,) = [each for each in trainer.callbacks if isinstance(each, LastCheckpoint)]
        if trainer.current_epoch == self.epoch:
            (last.path.parent / "copy.ckpt").write_bytes(last.path.read_bytes())


@pytest.mark.parametrize("epoch", [1, 2])
def test_the_state_uploaded_between_two_epochs_is_gone_on_from_too(training, epoch):
    whole = training("whole", CheckpointUpload(every_n_epochs=1), Copy(epoch)).fit()
    (whole.path.parent / "copy.ckpt").replace(whole.path)
    resumed = training("whole", seed=1).fit(resume=True)
    torch.testing.assert_close(resumed.state(), whole.state(), rtol=0, atol=0)
    assert resumed.witness.batches == whole.witness.batches[epoch * NUM_BATCHES :]
    assert resumed.witness.validations == whole.witness.validations[epoch:]


class Saves(Callback):
    """Count checkpoints by the step at which they are written."""

    def __init__(self):
        self.steps = []

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.steps.append(trainer.global_step)


def test_it_is_saved_when_time_has_passed_and_at_the_end(training, monkeypatch):
    saves = Saves()
    slow = training("slow", saves, max_epochs=1)
    (last,) = [each for each in slow.trainer.callbacks if isinstance(each, LastCheckpoint)]
    seconds = iter(range(0, 10**6, 30))  # half a minute passes at each look at the clock
    with monkeypatch.context() as patch:
        patch.setattr(module.time, "monotonic", lambda: next(seconds))
        last.every_seconds = 60
        slow.fit()
    assert 1 < len(saves.steps) < NUM_BATCHES + 1
    assert saves.steps[-1] == NUM_BATCHES


def test_a_long_validation_has_the_state_saved_before_its_last_step(training, monkeypatch):
    saves = Saves()
    monkeypatch.setattr(module, "LONG_VALIDATION", 0.0)
    training("long", saves).fit()
    # how long a validation takes is not known before the first
    assert saves.steps == [4, 9, 14, 15]


class TerminateInValidation(Callback):
    def on_validation_batch_start(self, trainer, *_):
        if trainer.state.fn == "fit" and trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_ends_a_long_validation_and_it_is_done_again(training, monkeypatch):
    monkeypatch.setattr(module, "LONG_VALIDATION", 0.0)
    whole, witness = training("whole").fit(), Witness()
    with pytest.raises(Interrupted):
        training("stopped", TerminateInValidation(), witness=witness).fit()
    assert len(witness.validations) == 1
    resumed = training("stopped", seed=1).fit(resume=True)
    torch.testing.assert_close(resumed.state(), whole.state(), rtol=0, atol=0)
    assert witness.validations + resumed.witness.validations == whole.witness.validations


def test_random_states_are_put_back_bit_for_bit(tmp_path):
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    np.random.standard_normal()  # noqa: NPY002 of which it keeps a second one for later
    torch.manual_seed(3)

    def draw():
        return random.random(), np.random.standard_normal(2).tolist(), torch.rand(3).tolist()  # noqa: NPY002

    torch.save(random_state(), tmp_path / "state")
    first = draw()
    assert draw() != first
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == first


# another number of processes


@pytest.mark.parametrize(
    ("before", "now", "done", "expected"), [(1, 2, 7, 4), (2, 1, 3, 6), (4, 4, 5, 5), (2, 3, 4, 3)]
)
def test_batches_are_counted_anew_for_another_number_of_processes(before, now, done, expected):
    counts = {"ready": done, "started": done, "processed": done, "completed": done}
    fit_loop = {"epoch_loop.batch_progress": {"current": counts, "total": {"completed": 40}}}
    module.count_anew(fit_loop, before=before, now=now)
    assert set(counts.values()) == {expected}
    assert fit_loop["epoch_loop.batch_progress"]["total"] == {"completed": 40}


class Schedules(Callback):
    """Remember learning rate and tau of each step, by epoch and batch."""

    def __init__(self):
        self.rates, self.taus = {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates[trainer.current_epoch, batch_idx] = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.taus[trainer.current_epoch, batch_idx] = pl_module.tau


@pytest.mark.parametrize(("position", "goes_on"), [(1, (0, 2)), (4, (1, 2)), (6, (2, 0))])
def test_half_as_many_processes_go_on_as_if_they_had_made_all_of_it(training, position, goes_on):
    """Two processes with batches of 4 have seen what one with batches of 8 has."""

    def with_batches(training, size):
        training.datamodule.batch_size = training.method.batch_size = size
        training.method._make_scheduler.keywords["reference_batch"] = 8
        return training

    whole, seen = with_batches(training("whole", expected := Schedules()), 4).fit(), Witness()
    with pytest.raises(Interrupted):
        with_batches(training("two", Terminate(position), witness=seen), 8).fit()
    half = with_batches(training("two", Terminate(2), found := Schedules(), witness=(witness := Witness())), 4)
    saved = torch.load(half.path, weights_only=True)
    saved["callbacks"]["LastCheckpoint"]["world_size"] = 2
    torch.save(saved, half.path)
    with pytest.raises(Interrupted):
        half.fit(resume=True)
    resumed = with_batches(training("two", found, witness=witness), 4).fit(resume=True)

    rest = [batch for batch in whole.witness.batches if batch[:2] >= goes_on]
    assert _once(witness.batches) == rest
    assert found.rates == pytest.approx({key: rate for key, rate in expected.rates.items() if key >= goes_on})
    assert found.taus == pytest.approx({key: tau for key, tau in expected.taus.items() if key >= goes_on})
    assert resumed.trainer.global_step == position + len(rest)


def _once(batches):
    """Return batches without the one that a signal came before."""
    return list(dict.fromkeys(batches))

import logging
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, Trainer
from tiny import Batches, fit, labelled, pairs, quiet_trainer, tiny_datamodule, tiny_method
from torch import nn
from torch.utils.data import DataLoader

from mlflow_ssl.callbacks import Health, KNNEvaluation, LastCheckpoint
from mlflow_ssl.checkpoint_io import AtomicCheckpointIO
from mlflow_ssl.datasets.bad_images import BAD_LABEL
from mlflow_ssl.datasets.sampler import DealtBatches
from mlflow_ssl.errors import InputError
from mlflow_ssl.evaluation import health as formulas
from mlflow_ssl.evaluation.verdict import judge

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def logged(validation, **options):
    """Train one batch and return the method, what was logged, and the callback."""
    health = Health(**options)
    trainer = fit(tiny_method(), pairs(1), validation, max_epochs=1, callbacks=[health])
    return trainer.lightning_module, trainer.callback_metrics, health


def embedded(method, batches):
    method.eval()
    with torch.no_grad():
        return [method.embed(images) for images, _ in batches]


# what is measured


def test_all_is_measured_of_the_query_images():
    bank, queries = labelled(2, seed=1), labelled(3, seed=2)
    method, metrics, _ = logged([bank, queries])
    embeddings = torch.cat(embedded(method, queries))
    expected = {
        "embedding/rankme": formulas.rankme(embeddings),
        "embedding/deviation": formulas.deviation_per_dimension(embeddings),
        "embedding/mean_cosine": formulas.mean_cosine(embeddings),
        "embedding/uniformity": formulas.uniformity(embeddings),
    }
    with torch.no_grad():
        expected["projection/deviation"] = formulas.deviation_per_dimension(method.online.projector(embeddings))
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-4), name


def test_the_agreement_is_that_of_the_last_batches():
    _, metrics, health = logged([labelled(2)])
    method, ((view_1, view_2), _) = tiny_method(), pairs(1).batches[0]
    directions = [
        F.cosine_similarity(method.predictor(method.online(one)), method.target(other)).mean().item()
        for one, other in ((view_1, view_2), (view_2, view_1))
    ]
    assert metrics["embedding/agreement"].item() == pytest.approx(np.mean(directions), abs=1e-5)
    assert health.history[-1].agreement == pytest.approx(np.mean(directions), abs=1e-5)
    assert health.history[-1].loss == pytest.approx(4 - 4 * np.mean(directions), abs=1e-4)


def test_of_a_loss_that_is_no_distance_there_is_no_agreement():
    _, metrics, health = logged([labelled(2)], loss_ceiling=None)
    assert "embedding/agreement" not in metrics
    assert health.history[-1].agreement is None


def test_accumulated_batches_count_whole():
    losses = []
    for accumulated in (1, 2):
        health = Health()
        # no step moves the network, so that both see the same
        method = tiny_method(optimizer=partial(torch.optim.SGD, lr=0.0))
        fit(
            method,
            pairs(2),
            [labelled(2)],
            max_epochs=1,
            callbacks=[health],
            accumulate_grad_batches=accumulated,
        )
        losses.append(health.history[-1].loss)
    assert losses[0] == pytest.approx(losses[1])


def test_of_many_images_some_of_each_batch_are_taken():
    queries = labelled(3)
    method, metrics, health = logged([queries], max_images=6)
    some = torch.cat([batch[:2] for batch in embedded(method, queries)])
    assert metrics["embedding/deviation"].item() == pytest.approx(formulas.deviation_per_dimension(some), rel=1e-5)
    assert health.history[-1].num_images == 6


def test_of_no_images_nothing_is_measured():
    _, metrics, health = logged([labelled(3)], max_images=0, loss_ceiling=None)
    assert not any(name.startswith("embedding/") for name in metrics)
    assert health.history == []


def test_processes_take_as_many_together_as_one_alone():
    images = [sample for batch in labelled(3) for sample in zip(*batch, strict=True)]
    counts = []
    for rank in (0, 1):
        dealt = DataLoader(images, batch_sampler=DealtBatches(len(images), 4, rank, world_size=2))
        counts.append(logged(dealt, max_images=7)[2].history[-1].num_images)
    assert counts == [2 + 3, 2]  # of the first and last batch, and of the second


@pytest.mark.parametrize("max_images", [2, 7, 11, 12])
def test_there_are_never_more_than_so_many(max_images):
    assert logged([labelled(3)], max_images=max_images)[2].history[-1].num_images == max_images
    assert logged([labelled(5, batch_size=2)], max_images=2)[2].history[-1].num_images == 2


def test_images_that_could_not_be_read_do_not_count():
    queries = labelled(2)
    queries.batches[0][1][1] = BAD_LABEL
    method, metrics, _ = logged([queries])
    first, second = embedded(method, queries)
    good = torch.cat([first[[0, 2, 3]], second])
    assert metrics["embedding/rankme"].item() == pytest.approx(formulas.rankme(good), rel=1e-5)


def test_without_validation_there_is_nothing():
    _, metrics, health = logged(None)
    assert not [name for name in metrics if name.startswith("embedding/")]
    assert health.verdict is None


def test_the_alignment_is_that_of_two_views_of_some_training_images(image_folder):
    datamodule, health = tiny_datamodule(image_folder({"a": 15, "b": 15}, size=8)), Health(views=6)
    trainer = quiet_trainer(max_epochs=1, callbacks=[health])
    trainer.fit(tiny_method(), datamodule=datamodule)
    views = datamodule.drawn_views()
    samples = [views[0, row][0] for row in range(0, len(datamodule.augmentation_dataset), 3)]
    assert len(samples) == 6
    one, other = (torch.stack(images) for images in zip(*samples, strict=True))
    method = trainer.lightning_module.eval()
    with torch.no_grad():
        expected = formulas.alignment(method.embed(one), method.embed(other))
    assert trainer.callback_metrics["embedding/alignment"].item() == pytest.approx(expected, rel=1e-4)


# what comes of it


class Recorder:
    """The logger and the run that a callback talks to."""

    def __init__(self):
        self.run, self.tags = self, []

    def set_tags(self, tags):
        self.tags.append(tags)

    def log_metrics(self, metrics, step=None):
        pass


def collapsing_method():
    """Return a method without predictor whose target is the online network."""
    method = tiny_method(optimizer=partial(torch.optim.SGD, lr=1.0, momentum=0.9), base_tau=0.0)
    method.predictor = nn.Identity()
    return method


def train(method, health, monkeypatch, num_epochs=6, **settings):
    recorder = Recorder()
    trainer = quiet_trainer(max_epochs=num_epochs, callbacks=[health], **settings)
    monkeypatch.setattr(type(trainer), "logger", recorder)
    monkeypatch.setattr(type(trainer), "loggers", [])
    batches, queries = pairs(30, batch_size=16), labelled(4, batch_size=16, seed=5)
    trainer.validate(method, [queries], verbose=False)
    trainer.fit(method, batches, [queries])
    return trainer, recorder


def test_a_collapse_is_said_once_and_tagged(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    health = Health()
    trainer, recorder = train(collapsing_method(), health, monkeypatch)
    assert trainer.global_step == 180
    assert health.history[0].step == 0
    assert [tags["health"] for tags in recorder.tags] == ["improving", "collapsing"]
    assert recorder.tags[-1]["health.reason"] in health.verdict.reason or health.verdict.state == "collapsing"
    assert caplog.text.count("the training is collapsing: all ") == 1
    assert "model.base_tau" in caplog.text


@pytest.mark.parametrize("num_processes", [1, 2])
def test_synchronized_batchnorm_is_advised_where_several_processes_have_none(num_processes, monkeypatch, caplog):
    monkeypatch.setattr(Trainer, "world_size", num_processes)
    train(collapsing_method(), Health(), monkeypatch)
    assert ("trainer.sync_batchnorm" in caplog.text) == (num_processes > 1)
    assert "the training is collapsing" in caplog.text


def test_a_healthy_training_is_not_flagged(monkeypatch, caplog):
    health = Health()
    train(tiny_method(), health, monkeypatch)
    assert health.verdict.state == "improving"
    assert "collapsing" not in caplog.text


def test_a_collapse_stops_the_training_if_asked(monkeypatch):
    health = Health(on_collapse="stop")
    trainer, _ = train(collapsing_method(), health, monkeypatch)
    assert trainer.global_step < 180
    assert health.stopped.startswith("collapsing: all ")
    assert trainer.global_step == health.history[-1].step


def test_the_monitor_is_val_acc_where_it_is_logged():
    bank, queries = labelled(2, seed=1), labelled(3, seed=2)
    health = Health()
    callbacks = [health, KNNEvaluation(num_neighbours=1)]
    trainer = fit(tiny_method(), pairs(1), [bank, queries], max_epochs=1, callbacks=callbacks)
    assert health.history[-1].monitor == trainer.callback_metrics["val_acc"].item()


def test_a_monitor_that_is_not_logged_is_refused():
    with pytest.raises(InputError, match=r"^callbacks.health.monitor must be a metric that is logged, got 'acc'; logg"):
        logged([labelled(2)], monitor="acc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_collapse": "die"}, r"^callbacks.health.on_collapse must be warn or stop, got 'die'$"),
        ({"max_images": -1}, r"^callbacks.health.max_images must be at least 0, got -1$"),
        ({"patience": 0}, r"^callbacks.health.patience must be at least 1, got 0$"),
        ({"views": -1}, r"^callbacks.health.views must be at least 0, got -1$"),
        ({"loss_ceiling": 0.0}, r"^callbacks.health.loss_ceiling must be greater than 0, got 0.0$"),
    ],
)
def test_mistakes_in_the_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Health(**options)


# to stop and go on


class StoppedError(Exception):
    pass


class StopsAfter(Callback):
    """Write a checkpoint after some epochs and end the training."""

    def __init__(self, checkpoint, epochs):
        self.checkpoint, self.epochs = checkpoint, epochs

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epochs:
            self.checkpoint.save(trainer)
            raise StoppedError


def test_readings_and_losses_survive_a_resume(tmp_path):
    settings = {"max_epochs": 3, "plugins": [AtomicCheckpointIO()]}
    whole, before, after = Health(), Health(), Health()
    queries = [labelled(2, seed=2)]

    def loaders():
        return pairs(4), queries

    fit(tiny_method(), *loaders(), callbacks=[whole], **settings)
    with pytest.raises(StoppedError):
        fit(tiny_method(), *loaders(), callbacks=[before, StopsAfter(LastCheckpoint(str(tmp_path)), 2)], **settings)
    trainer = quiet_trainer(callbacks=[after, LastCheckpoint(str(tmp_path))], **settings)
    trainer.fit(tiny_method(), *loaders(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert [reading.step for reading in after.history] == [4, 8, 12]
    assert after.history == whole.history
    assert after.state_dict() == whole.state_dict()
    assert after.verdict == whole.verdict


def test_a_validation_that_is_done_again_counts_once():
    health = Health()
    health.history = []
    trainer = quiet_trainer(max_epochs=1, callbacks=[health])
    for _ in range(2):
        trainer.validate(tiny_method(), [labelled(2)], verbose=False)
    assert [reading.step for reading in health.history] == [0]
    assert health.verdict == judge(health.history)


def test_a_batch_without_a_loss_tells_nothing():
    health = Health()
    health.on_train_batch_end(quiet_trainer(), tiny_method(), None, Batches([]), 0)
    assert health.state_dict() == {"history": [], "first": [], "recent": [], "stopped": None}

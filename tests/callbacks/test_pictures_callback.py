import logging
import random
import re
import threading
import time
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.loggers import Logger
from tiny import labelled, pairs, quiet_trainer, tiny_method

from mlflow_ssl import callbacks, pictures
from mlflow_ssl.callbacks import KNNEvaluation, Pictures
from mlflow_ssl.callbacks.pictures import spread
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset
from mlflow_ssl.pictures import grids

NORMALIZED = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
CLEAN = A.Compose([A.Resize(16, 16), A.Normalize(**NORMALIZED)])
CROP = A.Compose([A.RandomResizedCrop(size=(16, 16)), A.HorizontalFlip(p=0.5), A.Normalize(**NORMALIZED)])

VIEWS, NEIGHBOURS, PROJECTION = "views/pairs", "embedding/neighbours", "embedding/projection"
CONFUSION = "evaluation/confusion_matrix"

# lightning warns of loaders without workers and of empty ones, both of which are meant
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning")


class Run:
    """Takes what a run takes, and remembers it; keeps pictures as a run does."""

    picture_folder: Path

    def __init__(self):
        self.pictures = []
        self.texts = []

    def log_picture(self, image, *, key, step):
        self.pictures.append((key, step, image))
        image.save(self.picture_folder / f"{key.replace('/', '~')}+step+{step}+timestamp+0+x+compressed.webp")

    def log_text(self, text, artifact_file):
        self.texts.append((artifact_file, text))

    def named(self, key):
        """Return step and picture of each of a name."""
        return [(step, image) for name, step, image in self.pictures if name == key]


@pytest.fixture(autouse=True)
def picture_folder(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    monkeypatch.setattr(Run, "picture_folder", folder, raising=False)


class Recorder(Logger):
    name, version = "recorder", "0"

    def __init__(self, run=None):
        super().__init__()
        self.run = run or Run()

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, *args, **kwargs):
        pass


def datamodule(root, **options):
    views = TwoAugmentationDataset([CROP, CROP])
    sizes = {"num_workers": 0, "batch_size": 4, "val_size": 0.3, "test_size": 0.2}
    return SSLDataModule(
        str(root), augmentation_dataset=views, val_transform=CLEAN, test_transform=CLEAN, **sizes | options
    )


@pytest.fixture
def images(image_folder):
    """Return a folder of three classes: 24 images to train on, 15 to validate and 9 to test."""
    return image_folder({"a": 16, "b": 16, "c": 16}, size=20)


def trainer_of(run, *more, max_epochs=2, show=None, **settings):
    shown = show or Pictures(**NORMALIZED, num_pairs=3, num_queries=3, num_neighbours=2)
    settings = {"logger": Recorder(run), "log_every_n_steps": 1} | settings
    return quiet_trainer(callbacks=[KNNEvaluation(num_neighbours=3), shown, *more], max_epochs=max_epochs, **settings)


class Patience(Callback):
    """Train on only when all is drawn, so that no picture is skipped."""

    def __init__(self, show):
        self.show = show

    def on_train_batch_start(self, *_):
        self.show._painter.finish()


def held_images(page):
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)
    return data.count("data:image/png;base64,")


def test_each_picture_comes_before_training_at_each_validation_and_at_the_test(images):
    run, data, method = Run(), datamodule(images), tiny_method()
    show = Pictures(**NORMALIZED)
    trainer = trainer_of(run, Patience(show), show=show)
    trainer.validate(method, data, verbose=False)
    trainer.fit(method, data)
    trainer.test(method, data, verbose=False)
    steps = [0, 6, 12]  # of two epochs
    assert {key for key, _, _ in run.pictures} == {VIEWS, NEIGHBOURS, PROJECTION, CONFUSION}
    assert [step for step, _ in run.named(VIEWS)] == steps
    assert [step for step, _ in run.named(NEIGHBOURS)] == steps
    assert [step for step, _ in run.named(PROJECTION)] == steps
    assert [step for step, _ in run.named(CONFUSION)] == [12]
    pages = {"pictures/projection.html", "pictures/steps.html"}
    assert {file for file, _ in run.texts} == pages | {"evaluation/per_class.csv"}
    steps_page = [text for file, text in run.texts if file == "pictures/steps.html"][-1]
    assert "const steps = [0, 6, 12]" in steps_page
    assert all(f'"{key}": {{"0": ' in steps_page for key in (VIEWS, NEIGHBOURS, PROJECTION))
    page = [text for file, text in run.texts if file == "pictures/projection.html"][-1]
    assert held_images(page) == 15
    assert "step 12 (PCA)" in page
    (table,) = (text for file, text in run.texts if file == "evaluation/per_class.csv")
    assert [line.split(",")[:2] for line in table.splitlines()[1:]] == [["a", "3"], ["b", "3"], ["c", "3"]]


def test_the_views_are_those_of_the_epoch_that_was_trained(images):
    run, data = Run(), datamodule(images)
    trainer_of(run, max_epochs=2).fit(tiny_method(), data)
    labels = torch.tensor(data.index.split("train").labels)
    for (_, picture), epoch in zip(run.named(VIEWS), (0, 0, 1), strict=True):
        seen = [data.augmentation_dataset[(epoch, number)][0] for number in spread(labels, 3)]
        expected = pictures.view_pairs(*(torch.stack(views) for views in zip(*seen, strict=True)), **NORMALIZED)
        assert picture == expected


def test_the_queries_stay_the_same_and_are_of_all_classes(images):
    run, data = Run(), datamodule(images)
    trainer_of(run, max_epochs=2).fit(tiny_method(), data)
    first, second = (image for _, image in run.named(NEIGHBOURS))
    side = 64 + 2 * grids.FRAME
    column = (grids.TILE_GAP, grids.HEADER, grids.TILE_GAP + side, first.height)
    assert first.crop(column) == second.crop(column)
    truth = torch.tensor(data.queries.labels)
    asked = torch.stack([data.evaluated_images("val")[row][0] for row in spread(truth, 3)])
    for row, image in enumerate(asked):
        y = row * (side + grids.CAPTION + grids.TILE_GAP) + grids.FRAME
        seen = np.asarray(first.crop(column).crop((grids.FRAME, y, grids.FRAME + 64, y + 64)))
        expected = (image * 0.5 + 0.5).mul(255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(seen, expected.repeat(4, axis=0).repeat(4, axis=1))


def test_pictures_of_unlabelled_images_are_views_at_the_cadence_of_validation(image_folder):
    run = Run()
    root = image_folder({"": 12})
    trainer_of(run, max_epochs=5, check_val_every_n_epoch=2).fit(
        tiny_method(), datamodule(root, val_size=0, test_size=0)
    )
    assert [(key, step) for key, step, _ in run.pictures] == [(VIEWS, step) for step in (0, 6, 12, 15)]


def test_without_images_there_is_a_projection_alone():
    run = Run()
    loaders = [labelled(5), labelled(4)]
    trainer_of(run, max_epochs=1).fit(tiny_method(), pairs(2), loaders)
    assert [(key, step) for key, step, _ in run.pictures] == [(PROJECTION, 2)]
    assert held_images(dict(run.texts)["pictures/projection.html"]) == 0


def test_a_resumed_training_does_not_show_its_first_views_again(images, tmp_path):
    first = trainer_of(Run(), max_epochs=1)
    first.fit(tiny_method(), datamodule(images))
    first.save_checkpoint(tmp_path / "half.ckpt")
    run = Run()
    trainer_of(run, max_epochs=2).fit(tiny_method(), datamodule(images), ckpt_path=tmp_path / "half.ckpt")
    assert [step for step, _ in run.named(VIEWS)] == [12]


def test_another_process_than_the_first_draws_nothing(images, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", False)
    run = Run()
    trainer_of(run, max_epochs=1).fit(tiny_method(), datamodule(images))
    assert run.pictures == run.texts == []


def test_without_a_run_nothing_is_drawn(images, monkeypatch):
    def refuse():
        raise AssertionError

    monkeypatch.setattr(callbacks.pictures, "Painter", refuse)
    trainer_of(None, max_epochs=1, logger=False).fit(tiny_method(), datamodule(images))


def weights_after(root, *shown):
    """Return all weights after a training, and the numbers that each generator would draw next."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    method = tiny_method()
    trainer = quiet_trainer(
        callbacks=[KNNEvaluation(num_neighbours=3), *shown], max_epochs=3, logger=Recorder(), log_every_n_steps=1
    )
    data = datamodule(root)
    trainer.validate(method, data, verbose=False)
    trainer.fit(method, data)
    return method.state_dict(), (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())  # noqa: NPY002


def test_a_training_is_the_same_to_the_bit_with_and_without_pictures(images):
    plain, next_plain = weights_after(images)
    shown, next_shown = weights_after(images, Pictures(**NORMALIZED))
    assert all(plain[name].equal(shown[name]) for name in plain)
    assert next_plain == next_shown


def test_a_picture_that_fails_is_said_once_and_ends_nothing(images, caplog):
    class Broken(Run):
        def log_picture(self, image, *, key, step):
            raise OSError("no space left")

    trainer = trainer_of(Broken(), max_epochs=2)
    trainer.fit(tiny_method(), datamodule(images))
    assert trainer.global_step == 12
    warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "picture" in r.getMessage()]
    assert warned == ["a picture could not be drawn: OSError: no space left"]


def test_what_fails_while_gathering_ends_nothing(images, monkeypatch):
    def refuse(*_):
        raise TypeError("cannot be copied")

    monkeypatch.setattr(SSLDataModule, "drawn_views", refuse)
    trainer = trainer_of(Run(), max_epochs=1)
    trainer.fit(tiny_method(), datamodule(images))
    assert trainer.global_step == 6


class Slow(Run):
    """Takes the first picture only when it is told to."""

    def __init__(self):
        super().__init__()
        self.ready = threading.Event()

    def log_picture(self, image, *, key, step):
        assert self.ready.wait(30)
        super().log_picture(image, key=key, step=step)


class Release(Callback):
    def on_train_end(self, trainer, pl_module):
        trainer.logger.run.ready.set()


def test_a_training_does_not_wait_for_its_pictures_and_still_ends_with_a_page(images):
    run = Slow()
    trainer_of(run, Release(), max_epochs=6).fit(tiny_method(), datamodule(images))
    assert run.pictures[0][:2] == (VIEWS, 0)
    steps = [step for step, _ in run.named(PROJECTION)]
    assert steps[-1] == 36
    assert len(steps) < 6
    pages = [text for file, text in run.texts if file == "pictures/projection.html"]
    assert len(pages) == 1
    assert "step 36" in pages[0]


def test_a_failing_training_waits_a_moment_only(images, monkeypatch):
    monkeypatch.setattr(callbacks.pictures, "GRACE_SECONDS", 0.2)
    run, data = Slow(), datamodule(images)
    method = tiny_method(loss=lambda prediction, projection: 1 / 0)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        trainer_of(run, max_epochs=1).fit(method, data)
    assert time.monotonic() - began < 20
    assert run.pictures == []
    run.ready.set()


def test_no_picture_keeps_what_was_evaluated(images):
    show = Pictures(**NORMALIZED)
    trainer = trainer_of(Run(), show=show, max_epochs=1)
    trainer.fit(tiny_method(), datamodule(images))
    assert not [value for value in vars(show).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("labels", "count", "places"), [([1, 0, 1, 0], 2, [3, 2]), ([0, 0], 5, [0, 1]), ([0, 1, 2], 1, [1])]
)
def test_spread_takes_images_of_all_classes(labels, count, places):
    assert spread(torch.tensor(labels), count) == places


def test_an_unknown_projection_is_refused():
    with pytest.raises(ValueError, match="projection must be one of auto, pca, umap, got 'tsne'"):
        Pictures(**NORMALIZED, projection="tsne")


def test_umap_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(callbacks.pictures, "umap_installed", lambda: False)
    with pytest.raises(ValueError, match="projection must be pca or auto without the package umap-learn, got 'umap'"):
        Pictures(**NORMALIZED, projection="umap")


@pytest.mark.parametrize("name", ["num_pairs", "num_queries", "num_neighbours", "max_points"])
def test_numbers_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Pictures(**NORMALIZED, **{name: 0})

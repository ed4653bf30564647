import logging

import pytest
from pytorch_lightning import LightningDataModule
from tiny import pairs, quiet_trainer, tiny_method

from mlflow_ssl.callbacks import BadImages
from mlflow_ssl.datasets.bad_images import BadImage, BadImageList

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Recorder:
    """The logger and the run that a callback talks to."""

    def __init__(self):
        self.run, self.metrics, self.files = self, [], []

    def log_metrics(self, metrics, step):
        self.metrics.append((metrics, step))

    def log_file(self, file, folder):
        self.files.append((file.name, folder))


class Finding(LightningDataModule):
    """Two batches an epoch; an image goes bad in the second epoch."""

    def __init__(self, file):
        super().__init__()
        self.bad_image_list = BadImageList(file)
        self.bad_image_list.start([BadImage("known.png", "is empty")])
        self.epochs = 0

    def train_dataloader(self):
        self.epochs += 1
        if self.epochs == 2:
            self.bad_image_list.add(BadImage("gone, really.png", "cannot be read: No such file"))
        return pairs(2)


def test_an_image_that_goes_bad_is_counted_said_and_the_list_sent_again(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    recorder = Recorder()
    trainer = quiet_trainer(max_epochs=3, callbacks=[BadImages()], reload_dataloaders_every_n_epochs=1)
    monkeypatch.setattr(type(trainer), "logger", recorder)
    monkeypatch.setattr(type(trainer), "loggers", [])
    trainer.fit(tiny_method(), datamodule=Finding(tmp_path / "bad_images.csv"))
    assert recorder.metrics == [({"data/bad_images": 2}, 4)]
    assert recorder.files == [("bad_images.csv", "data")]
    assert (
        "1 images can no longer be read, 2 in all: gone, really.png (cannot be read: No such file) ..." in caplog.text
    )


def test_a_list_is_read_back_as_it_was_written_each_image_once(tmp_path):
    listed = BadImageList(tmp_path / "list.csv")
    assert listed.read() == []
    images = [BadImage('a, "b"\nc.png', "is truncated"), BadImage("d.png", "is empty")]
    listed.start(images[:1])
    for worker in (BadImageList(listed.file), BadImageList(listed.file)):
        worker.add(images[1])
    assert listed.read() == images


def test_a_list_that_was_not_started_can_be_added_to(tmp_path):
    listed = BadImageList(tmp_path / "list.csv")
    listed.add(BadImage("d.png", "is empty"))
    assert listed.read() == [BadImage("d.png", "is empty")]


def test_without_a_list_there_is_nothing_to_say(caplog):
    trainer = quiet_trainer(max_epochs=1, callbacks=[BadImages()])
    trainer.fit(tiny_method(), pairs(1))
    assert trainer.global_step == 1
    assert "can no longer be read" not in caplog.text

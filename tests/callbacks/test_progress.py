import io
import logging
import re
import sys
from itertools import count
from types import SimpleNamespace

import pytest
from tiny import fit, labelled, pairs, quiet_trainer, tiny_method

from mlflow_ssl.callbacks import KNNEvaluation, Progress
from mlflow_ssl.callbacks.progress import clock
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset
from mlflow_ssl.views import RandomResizedCrop


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def train(caplog, monkeypatch):
    """Return a function that trains two epochs of two steps and returns the lines logged and what stderr got."""

    def train(progress, stderr, ckpt_path=None):
        monkeypatch.setattr(sys, "stderr", stderr)
        callbacks = [KNNEvaluation(num_neighbours=1), progress]
        with caplog.at_level(logging.INFO, logger="mlflow_ssl.callbacks.progress"):
            fit(
                tiny_method(),
                pairs(2),
                [labelled(1), labelled(1)],
                ckpt_path=ckpt_path,
                max_epochs=2,
                enable_progress_bar=True,
                callbacks=callbacks,
            )
        lines = [r.getMessage() for r in caplog.records if r.name == "mlflow_ssl.callbacks.progress"]
        return lines, stderr.getvalue()

    return train


def test_without_a_terminal_each_line_says_epoch_loss_step_and_time_left(train):
    (first, *_, last), drawn = train(Progress(every_seconds=0), io.StringIO())
    assert re.fullmatch(r"epoch 1/2  loss \d\.\d{3}  step 1/4  0:00:\d\d left", first)
    assert re.fullmatch(r"epoch 2/2  loss \d\.\d{3}  val_acc [01]\.\d{3}  step 4/4  0:00:00 left", last)
    assert drawn == ""


def set_slow_clock(monkeypatch):
    """Let ten seconds pass between two looks at the clock."""
    ticks = count(0.0, 10.0)
    slow = SimpleNamespace(monotonic=lambda: next(ticks))
    monkeypatch.setattr("mlflow_ssl.callbacks.progress.time", slow)


def test_the_time_left_is_that_of_the_steps_left(train, monkeypatch):
    set_slow_clock(monkeypatch)
    lines, _ = train(Progress(every_seconds=0), io.StringIO())
    assert [line.split("  ")[-1] for line in lines] == [f"0:00:{seconds:02d} left" for seconds in (30, 20, 10, 0)]


def test_the_time_left_after_a_resume_is_by_the_steps_since(train, monkeypatch, tmp_path):
    fit(tiny_method(), pairs(2), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    set_slow_clock(monkeypatch)
    lines, _ = train(Progress(every_seconds=0), io.StringIO(), ckpt_path=tmp_path / "half.ckpt")
    assert [line.split("  ")[-1] for line in lines] == ["0:00:10 left", "0:00:00 left"]


def test_a_line_is_written_only_when_one_is_due(train):
    assert train(Progress(every_seconds=3600), io.StringIO()) == ([], "")


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_a_disabled_progress_shows_nothing(stderr, train):
    progress = Progress(every_seconds=0)
    progress.disable()
    assert train(progress, stderr()) == ([], "")


def test_a_terminal_gets_a_bar_that_ends_full_and_no_lines(train, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    lines, drawn = train(Progress(), Terminal())
    assert lines == []
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn).splitlines()[-1]
    assert "epoch 2/2" in last
    assert "4/4" in last


def fill_a_cache(folder, progress):
    datamodule = SSLDataModule(
        str(folder),
        TwoAugmentationDataset(RandomResizedCrop(size=(8, 8))),
        cache="disk",
        cache_shorter_side=8,
        num_workers=0,
        batch_size=4,
        val_size=0.0,
        test_size=0.0,
    )
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0, enable_progress_bar=True, callbacks=[progress])
    trainer.fit(tiny_method(), datamodule)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
def test_the_filling_of_a_cache_is_shown(image_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    folder = image_folder({"a": 6, "b": 6})
    caplog.set_level(logging.INFO, logger="mlflow_ssl.callbacks.progress")
    fill_a_cache(folder, Progress(every_seconds=0))
    lines = [r.getMessage() for r in caplog.records if r.name == "mlflow_ssl.callbacks.progress"]
    assert [line.partition("  cache ")[2].partition("  ")[0] for line in lines] == ["4/12", "8/12", ""]
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "stderr", Terminal())
    fill_a_cache(folder, Progress())
    assert "images in the cache" in sys.stderr.getvalue()


def test_a_terminal_is_given_back_when_a_training_fails(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    method = tiny_method(loss=lambda prediction, projection: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(method, pairs(1), max_epochs=1, enable_progress_bar=True, callbacks=[Progress()])
    hide, show = "\x1b[?25l", "\x1b[?25h"  # the cursor
    assert sys.stderr.getvalue().rfind(show) > sys.stderr.getvalue().rfind(hide) >= 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (360000, "100:00:00")]
)
def test_clock_is_hours_minutes_and_seconds(seconds, text):
    assert clock(seconds) == text

import io
import logging
import re
import sys
from itertools import count
from types import SimpleNamespace

import pytest
from pytorch_lightning import Callback
from tiny import fit, labelled, pairs, quiet_trainer, tiny_method

from mlflow_ssl.callbacks import Health, KNNEvaluation, Progress
from mlflow_ssl.callbacks.progress import clock, status
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset
from mlflow_ssl.evaluation.verdict import Verdict
from mlflow_ssl.tasks.output import open_output
from mlflow_ssl.views import RandomResizedCrop


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def train(caplog, monkeypatch):
    """Return a function that trains two epochs of two steps and returns the lines logged and what stderr got."""

    def train(progress, stderr, ckpt_path=None, others=None):
        monkeypatch.setattr(sys, "stderr", stderr)
        with caplog.at_level(logging.INFO, logger="mlflow_ssl.callbacks.progress"):
            fit(
                tiny_method(),
                pairs(2),
                [labelled(1), labelled(1)],
                ckpt_path=ckpt_path,
                max_epochs=2,
                enable_progress_bar=True,
                callbacks=[*(others or [KNNEvaluation(num_neighbours=1)]), progress],
            )
        lines = [r.getMessage() for r in caplog.records if r.name == "mlflow_ssl.callbacks.progress"]
        return lines, stderr.getvalue()

    return train


def test_without_a_terminal_each_line_says_epoch_loss_step_and_time_left(train):
    (first, *_, last), drawn = train(Progress(every_seconds=0), io.StringIO())
    assert re.fullmatch(r"epoch 1/2  loss \d\.\d{3}  step 1/4  0:00:\d\d left", first)
    assert re.fullmatch(r"epoch 2/2  loss \d\.\d{3}  val_acc [01]\.\d{3}  step 4/4  0:00:00 left", last)
    assert drawn == ""


class Judge(Health):
    """Say one thing at each validation."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def _judged(self):
        return Verdict(self.state, "a reason")


def test_the_state_is_shown_from_the_first_validation_of_a_training_on(train):
    callbacks = [KNNEvaluation(num_neighbours=1), Judge("plateau")]
    lines, _ = train(Progress(every_seconds=0), io.StringIO(), others=callbacks)
    assert ["plateau" in line for line in lines] == [False, False, True, True]
    assert re.search(r"  val_acc [01]\.\d{3}  plateau  step 4/4", lines[-1])


def test_the_untrained_network_has_no_state_to_show():
    judge = Judge("plateau")
    trainer = quiet_trainer(max_epochs=1, callbacks=[judge])
    trainer.validate(tiny_method(), [labelled(1)], verbose=False)
    assert judge.verdict is not None
    assert status(trainer) == "epoch 1/1  rank 3.1"


def test_without_labels_the_rank_is_shown(train):
    lines, _ = train(Progress(every_seconds=0), io.StringIO(), others=[Health()])
    assert re.search(r"  rank \d\.\d  improving  step 4/4", lines[-1])


@pytest.mark.parametrize(
    ("state", "escape"), [("collapsing", "\x1b[1;31m"), ("diverging", "\x1b[1;31m"), ("plateau", "")]
)
def test_an_alarm_stands_out_on_a_terminal(state, escape, train, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    _, drawn = train(Progress(), Terminal(), others=[Judge(state)])
    assert f"  {escape}{state}" in drawn


def drawn_lines(text):
    """Return what stands on each line of a terminal, with colours and movements left out."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n").splitlines()


def test_on_a_narrow_terminal_the_bar_gets_short_and_not_the_counts(train, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    _, drawn = train(Progress(), Terminal(), others=[KNNEvaluation(num_neighbours=1), Judge("collapsing")])
    assert re.search(r"val_acc [01]\.\d{3}  collapsing .*4/4 \d:\d\d:\d\d$", drawn_lines(drawn)[-1])


class Remark(Callback):
    """Log a line in the middle of a training."""

    def on_train_batch_end(self, *_):
        logging.getLogger("mlflow_ssl.remark").info("a remark")


def test_what_is_logged_stands_above_the_bar(train, monkeypatch, tmp_path):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with open_output(tmp_path / "output", log_level="info"):
        _, drawn = train(Progress(), Terminal(), others=[Remark()])
    remarks = [line for line in drawn_lines(drawn) if "a remark" in line]
    assert remarks == ["a remark"] * 4


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

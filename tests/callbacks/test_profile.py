"""``profile=true``: a trace and a table."""

import gzip
import json
import logging
import re

import pytest
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.profilers import PassThroughProfiler
from tiny import fit, labelled, pairs, tiny_method

from mlflow_ssl.callbacks import Profile
from mlflow_ssl.config import compose_config
from mlflow_ssl.errors import InputError


def profiled(folder, batches=12, **settings):
    """Train with a trace and return trainer and method."""
    callback = Profile(enabled=True, **{"skip_steps": 2, "steps": 3} | settings.pop("profile", {}))
    method = tiny_method()
    trainer = fit(
        method, pairs(batches), **{"max_epochs": 1, "callbacks": [callback], "default_root_dir": folder} | settings
    )
    return trainer, method


def traced_steps(folder):
    with gzip.open(folder / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    return [event["name"] for event in events if event["name"].startswith("ProfilerStep#")]


def test_the_trace_is_of_the_steps_that_were_asked_for(tmp_path):
    profiled(tmp_path)
    assert sorted(traced_steps(tmp_path)) == ["ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"]


def test_the_table_has_all_parts_of_a_step_and_their_shares_are_all_of_it(tmp_path):
    profiled(tmp_path)
    text = (tmp_path / "profile" / "steps.md").read_text()
    assert "the mean of 3 steps" in text
    parts = dict(re.findall(r"^\| ([^|`]+) \| [\d.]+ \| ([\d.]+)% \|$", text, re.MULTILINE))
    expected = {"waiting for data", "to the device", "loss", "backward", "optimizer", "target update", "callbacks"}
    expected |= {"forward online", "forward predictor", "forward target", "Lightning's loop and logging"}
    assert set(parts) == expected
    assert sum(map(float, parts.values())) == pytest.approx(100, abs=1)
    assert "| `aten::convolution_backward` | 2 |" in text


def test_a_validation_ends_the_trace_and_is_not_in_it(tmp_path):
    profiled(tmp_path, batches=6, validation=labelled(2), max_epochs=2)
    assert sorted(traced_steps(tmp_path)) == ["ProfilerStep#4", "ProfilerStep#5"]
    assert "validation_step" not in gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()).decode()


def test_a_trace_may_begin_in_a_later_epoch(tmp_path):
    profiled(tmp_path, batches=3, max_epochs=3)
    assert sorted(traced_steps(tmp_path)) == ["ProfilerStep#4", "ProfilerStep#5"]


def test_a_training_that_is_too_short_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="mlflow_ssl"):
        profiled(tmp_path, batches=4)
    assert "nothing is traced in 4 batches, 5 are needed; lower callbacks.profile.skip_steps" in caplog.text
    assert not (tmp_path / "profile").exists()


def test_the_training_is_the_same_with_a_trace_and_nothing_of_it_stays(tmp_path):
    trainer, method = profiled(tmp_path)
    plain = tiny_method()
    fit(plain, pairs(12), max_epochs=1)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(method.state_dict()[name], value, rtol=0, atol=0)
    assert isinstance(trainer.profiler, PassThroughProfiler)
    assert not [module for module in method.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_without_it_lightnings_profiler_stays_and_no_module_has_a_hook(tmp_path):
    method, seen = tiny_method(), []

    class Look(Profile):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append((trainer.profiler, [m for m in pl_module.modules() if m._forward_hooks], self._profiler))

    trainer = fit(method, pairs(9), max_epochs=1, callbacks=[Look(skip_steps=1, steps=1)], default_root_dir=tmp_path)
    assert seen == [(trainer.profiler, [], None)] * 9
    assert isinstance(trainer.profiler, PassThroughProfiler)
    assert not (tmp_path / "profile").exists()


def test_a_training_that_fails_is_left_without_marks(tmp_path):
    method = tiny_method()
    method.loss = lambda *_: 1 / 0
    callback = Profile(enabled=True)
    with pytest.raises(ZeroDivisionError):
        fit(method, pairs(3), max_epochs=1, callbacks=[callback], default_root_dir=tmp_path)
    assert not [module for module in method.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_trace_and_table_go_into_the_run(tmp_path):
    files = []

    class Run:
        def log_file(self, file, folder):
            files.append((file.relative_to(tmp_path).as_posix(), folder))

    logger = DummyLogger()
    logger.run = Run()
    profiled(tmp_path, logger=logger, log_every_n_steps=1)
    assert files == [("profile/trace.json.gz", "profile"), ("profile/steps.md", "profile")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"enabled": "yes"}, "profile must be true or false, got 'yes'"),
        ({"skip_steps": -1}, "callbacks.profile.skip_steps must be at least 0, got -1"),
        ({"steps": 0}, "callbacks.profile.steps must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(settings, words):
    with pytest.raises(InputError, match=words):
        Profile(**settings)


def test_the_short_word_turns_it_on():
    assert compose_config(["profile=true"]).callbacks.profile.enabled is True
    assert compose_config([]).callbacks.profile.enabled is False

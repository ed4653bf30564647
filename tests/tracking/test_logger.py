"""Metrics arrive, all of them, at the step they belong to."""

import os

import pytest
from pytorch_lightning.utilities import rank_zero_only
from tiny import fit, pairs, tiny_method

from mlflow_ssl.callbacks import LastCheckpoint
from mlflow_ssl.tracking.logger import MLflowLogger
from mlflow_ssl.tracking.run import Run, RunRecord

pytestmark = pytest.mark.filterwarnings("default")  # SQLAlchemy's notices to MLflow


@pytest.fixture
def run(store, tmp_path):
    run_id = store.create_run("0").info.run_id
    opened = Run(store, RunRecord(run_id, "0", store.tracking_uri), tmp_path / "out")
    yield opened
    opened.close()


def history(store, run, name):
    assert run.drain(patience=20)
    return [(point.step, point.value) for point in store.get_metric_history(run.run_id, name)]


def test_metrics_are_logged_at_the_optimizer_step_not_at_lightnings(store, run):
    logger, steps = MLflowLogger(run), iter([1, 2])
    run.step = lambda: next(steps)
    logger.log_metrics({"train/loss": 0.5}, step=0)
    logger.log_metrics({"train/loss": 0.25}, step=1)
    assert history(store, run, "train/loss") == [(1, 0.5), (2, 0.25)]


def test_a_training_logs_each_step_once_when_it_is_done(store, run):
    settings = {"max_epochs": 2, "log_every_n_steps": 1, "accumulate_grad_batches": 2}
    method = tiny_method()
    run.step = lambda: method.trainer.global_step
    assert fit(method, pairs(6), logger=MLflowLogger(run), **settings).global_step == 6
    assert [step for step, _ in history(store, run, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert store.get_run(run.run_id).info.status == "RUNNING"  # it is not Lightning's to end


def test_more_than_one_request_may_hold_arrives(store, run):
    logger, steps = MLflowLogger(run), iter(range(2500))
    run.step = lambda: next(steps)
    for number in range(2500):
        logger.log_metrics({"a": float(number)})
    assert history(store, run, "a") == [(number, float(number)) for number in range(2500)]


def test_the_same_thing_said_twice_is_logged_once(store, run):
    logger = MLflowLogger(run)
    for _ in range(3):
        logger.log_metrics({"epoch": 1.0})
    assert history(store, run, "epoch") == [(0, 1.0)]


def test_many_metrics_make_few_requests(store, run, monkeypatch):
    requests, log_batch = [], run.client.log_batch
    monkeypatch.setattr(run.client, "log_batch", lambda *a, **k: requests.append(k["metrics"]) or log_batch(*a, **k))
    logger, steps = MLflowLogger(run), iter(range(500))
    run.step = lambda: next(steps)
    for number in range(500):
        logger.log_metrics({"a": float(number)})
    assert len(history(store, run, "a")) == 500
    assert len(requests) <= 5


def test_the_disk_is_waited_for_before_a_checkpoint_and_at_no_step(run, monkeypatch, tmp_path):
    held = []
    monkeypatch.setattr(os, "fsync", held.append)
    trainer = fit(tiny_method(), pairs(3), logger=MLflowLogger(run), log_every_n_steps=1, max_epochs=1)
    assert held == []
    LastCheckpoint(str(tmp_path)).save(trainer)
    assert len([number for number in held if number in (run._records.journal._lines, run._files.journal._lines)]) == 2


def test_in_another_process_of_the_training_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    run = Run(None, RunRecord("", "", ""), tmp_path)
    logger = MLflowLogger(run)
    logger.log_metrics({"a": 1.0})
    logger.sync()
    run.log_checkpoints()
    assert list(tmp_path.iterdir()) == []
    assert (logger.name, logger.version, run.first) == ("mlflow", "", {})

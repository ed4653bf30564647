"""Metrics arrive, all of them, at the step they belong to."""

import pytest

from mlflow_ssl.tracking import logger as logger_module
from mlflow_ssl.tracking.logger import MLflowLogger
from mlflow_ssl.tracking.run import Run

pytestmark = pytest.mark.filterwarnings("default")  # SQLAlchemy's notices to MLflow


@pytest.fixture
def run(store):
    created = store.create_run("0")
    return Run(store, created.info.run_id, "0")


def history(store, run, name):
    return [(point.step, point.value) for point in store.get_metric_history(run.run_id, name)]


def test_metrics_are_logged_at_the_optimizer_step_not_at_lightnings(store, run):
    logger, steps = MLflowLogger(run), iter([1, 2])
    logger.optimizer_steps = lambda: next(steps)
    logger.log_metrics({"train/loss": 0.5}, step=0)
    logger.log_metrics({"train/loss": 0.25}, step=1)
    logger.finalize("success")
    assert history(store, run, "train/loss") == [(1, 0.5), (2, 0.25)]


def test_finalize_waits_for_all_and_leaves_the_run_open(store, run):
    logger, steps = MLflowLogger(run), iter(range(2500))  # more than one request may hold
    logger.optimizer_steps = lambda: next(steps)
    for number in range(2500):
        logger.log_metrics({"a": float(number)})
    logger.finalize("success")
    assert history(store, run, "a") == [(number, float(number)) for number in range(2500)]
    assert store.get_run(run.run_id).info.status == "RUNNING"


def test_the_same_thing_said_twice_is_logged_once(store, run):
    logger = MLflowLogger(run)
    for _ in range(3):
        logger.log_metrics({"epoch": 1.0})
    logger.finalize("success")
    assert history(store, run, "epoch") == [(0, 1.0)]


def test_many_metrics_make_few_requests(store, run, monkeypatch):
    requests = []
    monkeypatch.setattr(run.client, "log_batch", lambda *_, **kwargs: requests.append(kwargs["metrics"]) or Done())
    monkeypatch.setattr(logger_module, "FLUSH_SECONDS", 3600.0)
    logger = MLflowLogger(run)
    for number in range(50):
        logger.log_metrics({"a": float(number)})
    assert requests == []
    logger.finalize("success")
    assert [[metric.value for metric in batch] for batch in requests] == [[float(number) for number in range(50)]]


class Done:
    def wait(self):
        return None

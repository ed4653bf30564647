from functools import partial
from itertools import chain, count

import pytest
from pytorch_lightning import Callback
from tiny import fit, pairs, tiny_method

from mlflow_ssl.callbacks import StepMetrics, step_metrics
from mlflow_ssl.schedules import warmup_cosine, warmup_cosine_scheduler


class Logged(Callback):
    """Remember a metric as each batch leaves it."""

    def __init__(self, name):
        self.name = name
        self.values = []

    def on_train_batch_end(self, trainer, *_):
        self.values.append(trainer.callback_metrics[self.name].item())


def test_the_logged_rate_is_the_one_that_the_step_used():
    logged = Logged("train/lr")
    scheduler = partial(warmup_cosine_scheduler, init_lr=0.4, warmup_epochs=0.5, reference_batch=None)
    fit(tiny_method(scheduler=scheduler), pairs(4), max_epochs=1, callbacks=[StepMetrics(), logged])
    assert logged.values == pytest.approx([0.4 * warmup_cosine(k, total_steps=4, warmup_steps=2) for k in range(4)])


def test_the_speed_is_images_of_the_window_by_its_seconds(monkeypatch):
    # the training begins, then its epoch, then each step and its end
    ticks = iter([-9.0, 0.0, *(0.5, 1.0), *(1.5, 2.0), *(3.0, 4.0), *(5.0, 8.0)])
    monkeypatch.setattr(step_metrics.time, "perf_counter", lambda: next(ticks))
    logged = Logged("train/images_per_second")
    fit(tiny_method(), pairs(4, batch_size=6), max_epochs=1, callbacks=[StepMetrics(window=2), logged])
    assert logged.values == pytest.approx([6 / 1, 12 / 2, 12 / 3, 12 / 6])


def test_the_speed_begins_anew_with_each_epoch(monkeypatch):
    # an hour passes at every fifth look at the clock: between two epochs of two steps
    ticks = chain([-9.0], (3600.0 * (n // 5) + n % 5 / 2 for n in count()))
    monkeypatch.setattr(step_metrics.time, "perf_counter", lambda: next(ticks))
    logged = Logged("train/images_per_second")
    fit(tiny_method(), pairs(2, batch_size=6), max_epochs=2, callbacks=[StepMetrics(), logged])
    assert logged.values == pytest.approx([6.0] * 4)


def test_the_share_of_time_that_data_were_waited_for_is_of_the_window(monkeypatch):
    ticks = iter([-9.0, 0.0, *(0.5, 1.0), *(1.0, 2.0), *(3.0, 4.0), *(4.0, 8.0)])
    monkeypatch.setattr(step_metrics.time, "perf_counter", lambda: next(ticks))
    logged = Logged("train/data_wait_share")
    fit(tiny_method(), pairs(4), max_epochs=1, callbacks=[StepMetrics(window=2), logged])
    assert logged.values == pytest.approx([0.5 / 1, 0.5 / 2, 1 / 3, 1 / 6])

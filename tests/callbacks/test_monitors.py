import re

import pytest
import training
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from tiny import fit, labelled, pairs, tiny_method

from mlflow_ssl.callbacks import Health, KNNEvaluation, Monitors
from mlflow_ssl.errors import InputError


def train(num_epochs=2, **callbacks):
    """Train as a config with such callbacks does, of two steps an epoch, and return the trainer."""
    return fit(
        tiny_method(),
        pairs(2),
        [labelled(2, seed=1), labelled(3, seed=2)],
        max_epochs=num_epochs,
        callbacks=[Monitors(callbacks), KNNEvaluation(num_neighbours=1), Health(), *callbacks.values()],
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks.values()),
    )


def best(folder, monitor, **options):
    return ModelCheckpoint(dirpath=folder, filename="best", monitor=monitor, **options)


LOGGED = (
    "embedding/agreement, embedding/deviation, embedding/mean_cosine, embedding/rankme, embedding/uniformity, "
    "projection/deviation, train/loss, train/tau, val_acc"
)


def test_a_best_checkpoint_by_what_is_not_logged_is_refused_with_what_is(tmp_path):
    message = f"callbacks.model_checkpoint.monitor must be a metric that is logged, got 'val_loss'; logged are {LOGGED}"
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        train(model_checkpoint=best(tmp_path, "val_loss"))


@pytest.mark.parametrize("options", [{}, {"check_on_train_epoch_end": True}, {"check_on_train_epoch_end": False}])
def test_an_early_stop_by_what_is_not_logged_is_refused_with_what_is(options):
    message = "callbacks.early_stop.monitor must be a metric that is logged, got 'val_loss'; logged are embedding/agree"
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        train(early_stop=EarlyStopping("val_loss", **options))


def test_what_can_do_without_its_monitor_is_let_be(tmp_path):
    trainer = train(
        early_stop=EarlyStopping("val_loss", strict=False), model_checkpoint=ModelCheckpoint(tmp_path, monitor=None)
    )
    assert trainer.global_step == 4


def test_a_best_checkpoint_may_be_by_epoch_or_step(tmp_path):
    assert train(model_checkpoint=best(tmp_path, "step", mode="max")).checkpoint_callback.best_model_score == 4


METRICS = LOGGED.split(", ")


@pytest.mark.parametrize("monitor", METRICS)
def test_the_best_checkpoint_is_that_of_any_logged_metric(monitor, tmp_path):
    trainer = train(model_checkpoint=best(tmp_path, monitor, mode="min"))
    assert trainer.checkpoint_callback.best_model_score.isfinite()
    assert (tmp_path / "best.ckpt").is_file()


@pytest.mark.parametrize("monitor", METRICS)
def test_any_logged_metric_stops_early(monitor):
    never = EarlyStopping(monitor, patience=1, min_delta=1e9, mode="max")  # nothing is such an improvement
    assert train(num_epochs=9, early_stop=never).current_epoch == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy warn about themselves
def test_a_run_that_watches_what_is_not_logged_ends_with_one_line(store, image_folder, capsys):
    stop = "+callbacks.early_stop={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val_acc, mode: max}"
    words = ["datamodule.labels=none", "callbacks.pictures=null", stop]
    assert training.train(image_folder({"a": 20, "b": 20}), *words) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "callbacks.early_stop.monitor must be a metric that is logged, got 'val_acc'; logged are embed" in error
    assert training.only_run(store).info.status == "FAILED"

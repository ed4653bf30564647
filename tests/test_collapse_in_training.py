"""Trainings on the digits that are made to collapse on purpose, and one that is not."""

import pytest
import torch.nn.functional as F
from training import only_run

from mlflow_ssl.cli import main
from mlflow_ssl.methods import BYOL

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

QUICK = (
    "experiment=byol",
    "trainer.check_val_every_n_epoch=1",
    "callbacks.health.on_collapse=stop",
    "callbacks.pictures=null",
    "callbacks.pixel_baseline=null",
    "callbacks.linear_probe=null",
    "tracking.system_metrics=false",
)


class Siamese(BYOL):
    """Both views through the online network, and the gradient through both: Chen and He 2021, sec. 4.1."""

    def _bootstrap(self, view, other):
        prediction, projection = self.predictor(self.online(view)), self.online(other)
        return 2 - 2 * F.cosine_similarity(prediction.float(), projection.float(), dim=-1)


@pytest.mark.parametrize(
    "recipe",
    [
        ("model.predictor={_target_: torch.nn.Identity}", "model.base_tau=0"),
        ("model._target_=test_collapse_in_training.Siamese",),
    ],
    ids=["no predictor", "no stop-gradient"],
)
def test_a_training_made_to_collapse_is_stopped_within_its_first_validations(store, recipe):
    assert main([*QUICK, *recipe]) == 0
    run = only_run(store)
    steps = [entry.step for entry in store.get_metric_history(run.info.run_id, "projection/deviation")]
    assert steps in ([0, 20, 40], [0, 20, 40, 60])  # the untrained network, and the ends of epochs
    assert run.data.tags["health"] == "collapsing"
    assert run.data.tags["health.reason"].startswith("all projections are nearly one")


def test_the_same_training_left_alone_is_healthy(store, caplog):
    assert main([*QUICK, "trainer.max_epochs=3"]) == 0
    run = only_run(store)
    assert run.data.tags["health"] == "improving"
    assert "the training is collapsing" not in caplog.text
    assert len(store.get_metric_history(run.info.run_id, "val_acc")) == 4

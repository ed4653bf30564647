"""A whole training of seconds, for tests that look at what one leaves behind."""

from pathlib import Path

from mlflow_ssl.cli import main

SMALL = (
    "experiment=byol",
    "trainer=lightning_cpu",
    "trainer.precision=32-true",
    "backbone.model_name=test_resnet",  # a thirteenth of the demonstration's weights
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "datamodule.num_workers=0",
    "datamodule.batch_size=8",
    "callbacks.knn.num_neighbours=3",
    "transforms.input_height=16",
    "transforms.input_width=16",
    "model.encoder.projector.hidden_features=16",
    "tracking.system_metrics=false",
)


def train(data_path: Path, *words: str) -> int:
    """Train on a folder with small settings and return the exit code."""
    return main([*SMALL, "--data_path", str(data_path), *words])


def only_run(client):
    """Return the one run of the store."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    return run


def only_output() -> Path:
    """Return the one output folder below the current folder."""
    (log,) = Path("outputs").rglob("main.log")
    return log.parent

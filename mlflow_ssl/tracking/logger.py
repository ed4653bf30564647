"""Lightning's metrics in an open run."""

from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers import Logger

from mlflow_ssl.tracking.run import Run


class MLflowLogger(Logger):
    """Hand metrics to a run, at the number of optimizer steps that are done.

    Lightning's own MLflow logger ends the run after every fit, makes the training wait for the server, and ends it
    with an error where there is none; autologging counts epochs for steps.

    Args:
        run: the open run.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "mlflow"

    @property
    def version(self) -> str:
        """The run."""
        return self.run.run_id

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the resolved config is the record."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of this moment; Lightning's own count of steps is one behind during an epoch."""
        self.run.log_metrics(metrics, self.run.step())

    def save(self) -> None:
        """Do nothing: Lightning calls it after all metrics of a step, and a disk takes milliseconds to hold them."""

    def sync(self) -> None:
        """Have the disk hold what was logged: a checkpoint is about to be written that goes on after it."""
        self.run.sync()

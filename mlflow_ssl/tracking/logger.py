"""Lightning's metrics in an open run."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from mlflow.entities import Metric
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from mlflow_ssl.tracking.run import Run

FLUSH_SECONDS = 1.0


class MLflowLogger(Logger):
    """Send metrics to a run in batches, about once a second, without making the training wait.

    Lightning's own MLflow logger ends the run after every fit, and autologging counts epochs for steps.

    Args:
        run: the open run.

    Attributes:
        optimizer_steps: says how many optimizer steps are done: the step that metrics are logged at. Lightning's own
            count is one behind it during an epoch.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self.optimizer_steps: Callable[[], int] = int
        self._waiting: list[Metric] = []
        self._sent: list[Any] = []
        self._last: dict[str, tuple[int, float]] = {}
        self._flushed = time.monotonic()

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "mlflow"

    @property
    def version(self) -> str:
        """The run."""
        return self._run.run_id

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the resolved config is the record."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep metrics of this moment, and send what has gathered if a second has passed."""
        now, done = int(time.time() * 1000), self.optimizer_steps()
        for key, value in metrics.items():
            # Lightning says the epoch with everything; a store refuses a batch that holds the same thing twice
            if self._last.get(key) != (done, value):
                self._last[key] = (done, value)
                self._waiting.append(Metric(key, float(value), now, done))
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered, in the background."""
        self._flushed = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), 1000):
            batch = waiting[start : start + 1000]
            self._sent.append(self._run.client.log_batch(self._run.run_id, metrics=batch, synchronous=False))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Wait until all is sent; the run goes on."""
        self.flush()
        sent, self._sent = self._sent, []
        for operations in sent:
            operations.wait()

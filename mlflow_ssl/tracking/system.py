"""What the machine does meanwhile."""

import logging
import threading
from typing import Any

from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from mlflow_ssl.tracking.run import Run

log = logging.getLogger(__name__)


class SystemMetrics(threading.Thread):
    """Log ``system/*`` against optimizer steps, as all metrics are; MLflow's own logging counts its samples.

    Args:
        run: the open run.
        every_seconds: time between two samples.
    """

    def __init__(self, run: Run, every_seconds: float = 10.0) -> None:
        super().__init__(name="system-metrics", daemon=True)
        self._run = run
        self._every_seconds = every_seconds
        self._stopped = threading.Event()
        monitors: list[Any] = [CPUMonitor, DiskMonitor, NetworkMonitor]
        self._monitors: list[Any] = [monitor() for monitor in monitors]
        try:
            self._monitors.append(GPUMonitor())  # type: ignore[no-untyped-call]
        except (ImportError, RuntimeError):
            log.debug("no GPU is watched: there is none, or nvidia-ml-py is missing")

    def run(self) -> None:
        """Take samples until stopped."""
        while not self._stopped.wait(self._every_seconds):
            for monitor in self._monitors:
                monitor.collect_metrics()
                values = monitor.aggregate_metrics()
                monitor.clear_metrics()
                self._run.log_metrics({f"system/{key}": value for key, value in values.items()}, self._run.step())

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self.join(timeout=2)

"""What is particular to one kind of training; `mlflow_ssl.tasks.training` tells what all have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning import Callback

from mlflow_ssl.datamodules import ClassificationDataModule
from mlflow_ssl.methods import Method
from mlflow_ssl.tasks.deploy import Deployable
from mlflow_ssl.tracking.run import Run


class Task(ABC):
    """A kind of training, which a config names under ``task``."""

    look: str
    """Where a finished run's page says that there is something to see."""
    network_follows_data = False
    """Whether the data decide about the network; otherwise it is built while they are read."""

    @abstractmethod
    def fit_to_data(self, config: DictConfig, datamodule: ClassificationDataModule) -> None:
        """Check a resolved config against its data, and fill in, in place, what the data decide.

        Raises:
            InputError: if the training cannot work.
        """

    @abstractmethod
    def begin(self, run: Run, config: DictConfig, datamodule: ClassificationDataModule) -> None:
        """Say what is to be said of a run when it begins."""

    @abstractmethod
    def report(
        self, run: Run, config: DictConfig, datamodule: ClassificationDataModule, callbacks: Mapping[str, Callback]
    ) -> None:
        """Put on record what the test has found, beside its metrics."""

    @abstractmethod
    def deployable(
        self, config: DictConfig, method: Method, datamodule: ClassificationDataModule, callbacks: Mapping[str, Any]
    ) -> Deployable:
        """Return the trained network as others are to have it."""

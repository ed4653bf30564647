"""Train self-supervised: a network whose embeddings are to be of use, from images alone."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning import Callback

from mlflow_ssl.callbacks.embeddings import Evaluated
from mlflow_ssl.datamodules import ClassificationDataModule
from mlflow_ssl.export import DeploymentNetwork
from mlflow_ssl.tasks.checks import fit_to_data, warn_of_demonstration
from mlflow_ssl.tasks.deploy import Deployable, model_card
from mlflow_ssl.tasks.task import Task
from mlflow_ssl.tracking.packaging import LabelledEmbeddings
from mlflow_ssl.tracking.run import Run


class SSL(Task):
    """Which method it trains is the config's to say."""

    look = "Pictures over the steps: artifact `pictures/steps.html`; the embeddings: `pictures/projection.html`."

    def fit_to_data(self, config: DictConfig, datamodule: Any) -> None:
        """Check batch size, neighbours, normalization and exports; choose the monitor that the data allow."""
        fit_to_data(config, datamodule)

    def begin(self, run: Run, config: DictConfig, datamodule: ClassificationDataModule) -> None:
        """Warn where the demonstration's settings meet other data."""
        warn_of_demonstration(config, datamodule)

    def report(
        self, run: Run, config: DictConfig, datamodule: ClassificationDataModule, callbacks: Mapping[str, Callback]
    ) -> None:
        """Leave that to the callback that draws pictures."""

    def deployable(
        self, config: DictConfig, method: Any, datamodule: ClassificationDataModule, callbacks: Mapping[str, Any]
    ) -> Deployable:
        """Return the online backbone, and what the test looked for neighbours among."""
        transforms = config.transforms
        network = DeploymentNetwork(method.online.backbone, transforms.mean, transforms.std)
        evaluated = callbacks["knn"].evaluated if "knn" in callbacks else None
        return Deployable(network, model_card(config, network, datamodule), bank=_bank(evaluated, datamodule.classes))


BYOL = SSL
"""The tutorial's name of the task."""


def _bank(evaluated: Evaluated | None, classes: list[str]) -> LabelledEmbeddings | None:
    if evaluated is None:
        return None
    return LabelledEmbeddings(evaluated.bank.numpy(), evaluated.labels.numpy(), tuple(classes))

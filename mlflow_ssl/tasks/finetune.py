"""Make a classifier of a registered network and labelled images."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from mlflow_ssl.datamodules import ClassificationDataModule
from mlflow_ssl.export import DeploymentNetwork
from mlflow_ssl.tasks.checks import fit_to_labels
from mlflow_ssl.tasks.classes import write_classes
from mlflow_ssl.tasks.deploy import Deployable, model_card
from mlflow_ssl.tasks.task import Task
from mlflow_ssl.tracking.run import Run


class Finetune(Task):
    """The network is the config's ``source``; what is registered is a new model, which names it."""

    look = "What is taken for what: artifacts `evaluation/confusion_matrix.png` and `evaluation/worst_confused.html`."
    network_follows_data = True  # as many outputs as classes

    def fit_to_data(self, config: DictConfig, datamodule: Any) -> None:
        """Check batch size, normalization and exports; fill in the number of classes and their weights."""
        fit_to_labels(config, datamodule)

    def begin(self, run: Run, config: DictConfig, datamodule: ClassificationDataModule) -> None:
        """Link the run to the network that it starts from."""
        run.set_tags({"source_model": config.source.uri})
        if config.source.model_id is not None:
            run.log_model_input(config.source.model_id)

    @rank_zero_only
    def report(
        self, run: Run, config: DictConfig, datamodule: ClassificationDataModule, callbacks: Mapping[str, Any]
    ) -> None:
        """Write which test images are taken for which class."""
        evaluated = callbacks["evaluation"].evaluated if "evaluation" in callbacks else None
        if evaluated is None or not len(datamodule.images_of("test")):
            return
        paths = datamodule.images_of("test").column("path").take(evaluated.rows.numpy())
        title = f"Confused most among the test images of {datamodule.root.name}"
        folder = run.output / "evaluation"
        folder.mkdir(exist_ok=True)
        write_classes(folder, evaluated.truth, evaluated.predicted, datamodule.classes, paths, datamodule.root, title)
        run.log_file(folder, "evaluation")

    def deployable(
        self, config: DictConfig, method: Any, datamodule: ClassificationDataModule, callbacks: Mapping[str, Any]
    ) -> Deployable:
        """Return backbone and head as one network that gives logits."""
        transforms = config.transforms
        network = DeploymentNetwork(method.backbone, transforms.mean, transforms.std, head=method.head.folded())
        tags = {"source_model": config.source.uri}
        return Deployable(network, model_card(config, network, datamodule), tags=tags)

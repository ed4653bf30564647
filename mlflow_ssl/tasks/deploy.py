"""The trained network made ready for others: exported, packaged and registered."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from mlflow_ssl.datamodules import ClassificationDataModule
from mlflow_ssl.export import DeploymentNetwork, ModelCard, export_network
from mlflow_ssl.tracking.packaging import LabelledEmbeddings, Registration, package_network
from mlflow_ssl.tracking.run import Run

FIGURES = ("val_acc", "test_acc", "test_acc_linear", "test_f1", "baseline_acc_knn", "baseline_acc_linear")
"""Metrics that become tags of the version, those that there are."""


@dataclass(frozen=True)
class Deployable:
    """What a training hands over.

    Attributes:
        network: what is exported and registered.
        card: what it takes and gives.
        bank: what the service looks for neighbours among; None for a service without.
        tags: of the version, beside its figures.
    """

    network: DeploymentNetwork
    card: ModelCard
    bank: LabelledEmbeddings | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


@rank_zero_only
def deploy(
    config: DictConfig,
    deployable: Deployable,
    datamodule: ClassificationDataModule,
    run: Run,
    metrics: Mapping[str, float],
    *,
    steps: int,
) -> str | None:
    """Export the network, send checkpoints and exports to MLflow, and register it.

    Args:
        config: resolved config.
        deployable: the network.
        datamodule: what it was trained on.
        run: the open run.
        metrics: what the run comes to.
        steps: optimizer steps that the training took.

    Returns:
        The version; None if MLflow does not answer, where ``registry.register`` is false, and in the other processes
        of a distributed training.
    """
    folder = run.output / "deployment_model"
    export_network(deployable.network, deployable.card, types=config.export.types, folder=folder)
    run.log_checkpoints()
    run.log_file(folder, "deployment_model")
    package = run.output / "registration" / f"step-{steps}"
    if not package.exists():  # a run that is resumed may have come this far
        figures = {name: f"{metrics[name]:.6f}" for name in FIGURES if name in metrics}
        package_network(
            package,
            deployable.network,
            card=deployable.card,
            registration=Registration(
                name=config.registry.name,
                promote=config.registry.promote,
                tags=figures | dict(deployable.tags) | {"data.digest": datamodule.index.digest},
            ),
            transform=datamodule.val_transform,
            bank=deployable.bank,
            example=datamodule.example_image(),
        )
    if not config.registry.get("register", True):
        return None
    return run.registered_version(package, patience=config.tracking.wait_at_end_seconds)


def model_card(config: DictConfig, network: DeploymentNetwork, datamodule: ClassificationDataModule) -> ModelCard:
    """Return what a caller of a network has to know."""
    transforms: Any = config.transforms
    return ModelCard(
        backbone=config.backbone.model_name,
        state_dict_fits=network.made_by,
        input_size=(transforms.input_height, transforms.input_width),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        embedding_size=network.backbone.num_features,  # type: ignore[arg-type]
        classes=tuple(datamodule.classes),
        output=network.output,
    )

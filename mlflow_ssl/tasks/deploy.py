"""The trained network made ready for others: exported, packaged and registered."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from mlflow_ssl.callbacks.embeddings import Evaluated
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.export import DeploymentNetwork, ModelCard, export_network
from mlflow_ssl.methods import SSLMethod
from mlflow_ssl.tracking.packaging import LabelledEmbeddings, Registration, package_network
from mlflow_ssl.tracking.run import Run

FIGURES = ("val_acc", "test_acc", "test_acc_linear")
"""Metrics that become tags of the version."""


@rank_zero_only
def deploy(
    config: DictConfig,
    method: SSLMethod,
    datamodule: SSLDataModule,
    run: Run,
    metrics: dict[str, float],
    evaluated: Evaluated | None,
    *,
    steps: int,
) -> str | None:
    """Export the network, send checkpoints and exports to MLflow, and register it.

    Args:
        config: resolved config.
        method: holds the network.
        datamodule: what it was trained on.
        run: the open run.
        metrics: what the run comes to.
        evaluated: what the test looked for neighbours among; None where nothing was tested.
        steps: optimizer steps that the training took.

    Returns:
        The version; None if MLflow does not answer, and in the other processes of a distributed training.
    """
    transforms = config.transforms
    network = DeploymentNetwork(method.online.backbone, transforms.mean, transforms.std)  # type: ignore[arg-type]
    card = _card(config, network, datamodule)
    folder = run.output / "deployment_model"
    export_network(network, card, types=config.export.types, folder=folder)
    run.log_checkpoints()
    run.log_file(folder, "deployment_model")
    package = run.output / "registration" / f"step-{steps}"
    if not package.exists():  # a run that is resumed may have come this far
        figures = {name: f"{metrics[name]:.6f}" for name in FIGURES if name in metrics}
        package_network(
            package,
            network,
            card=card,
            registration=Registration(
                name=config.registry.name,
                promote=config.registry.promote,
                tags=figures | {"data.digest": datamodule.index.digest},
            ),
            transform=datamodule.val_transform,
            bank=_bank(evaluated, card.classes),
            example=datamodule.example_image(),
        )
    return run.registered_version(package, patience=config.tracking.wait_at_end_seconds)


def _card(config: DictConfig, network: DeploymentNetwork, datamodule: SSLDataModule) -> ModelCard:
    transforms: Any = config.transforms
    return ModelCard(
        backbone=config.backbone.model_name,
        state_dict_fits=str(network.backbone.made_by),
        input_size=(transforms.input_height, transforms.input_width),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        embedding_size=network.backbone.num_features,  # type: ignore[arg-type]
        classes=tuple(datamodule.classes),
    )


def _bank(evaluated: Evaluated | None, classes: Sequence[str]) -> LabelledEmbeddings | None:
    if evaluated is None:
        return None
    return LabelledEmbeddings(evaluated.bank.numpy(), evaluated.labels.numpy(), tuple(classes))

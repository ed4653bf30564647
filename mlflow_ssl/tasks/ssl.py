"""Train self-supervised: from a config to a registered network."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.utilities import rank_zero_only

from mlflow_ssl.config import build, resolve, write_record
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.export import DeploymentNetwork, ModelCard, export_network
from mlflow_ssl.machine import settle
from mlflow_ssl.methods import SSLMethod
from mlflow_ssl.tasks.checks import fit_to_data, warn_of_demonstration
from mlflow_ssl.tasks.output import open_output, write_data
from mlflow_ssl.tasks.summary import Outcome, closing_words
from mlflow_ssl.tracking.logger import MLflowLogger
from mlflow_ssl.tracking.registry import register_network
from mlflow_ssl.tracking.run import Run, tracked_run
from mlflow_ssl.tracking.source import installed_packages

log = logging.getLogger(__name__)

CONFIG_FILES = (
    "config_resolved.yaml",
    "config_tree.txt",
    "config_unresolved.yaml",
    "overrides.yaml",
    "packages.txt",
)


class SSL:
    """Train the method that a config describes.

    Args:
        config: composed config, interpolations included.
        overrides: the words that it was composed from.
    """

    def __init__(self, config: DictConfig, overrides: Sequence[str] = ()) -> None:
        self.unresolved = config
        self.overrides = list(overrides)

    def run(self) -> Outcome | None:
        """Train, test, export and register; return what came of it, in the first process.

        Raises:
            InputError: for a mistake in config, data or tracking store, before any training.
        """
        began = time.monotonic()
        config = resolve(self.unresolved)
        with open_output(config.core) as output:
            settle(config)
            datamodule: SSLDataModule = build(config.datamodule)
            fit_to_data(config, datamodule)
            with tracked_run(_plain(config), main_log=output / "main.log") as run:
                warn_of_demonstration(config, datamodule)
                self._describe(run, config, datamodule, output)
                seed_everything(config.core.seed, workers=True, verbose=False)
                method: SSLMethod = build(config.model)
                callbacks = {name: build(node) for name, node in config.callbacks.items() if node is not None}
                trainer = _build_trainer(config, run, callbacks, output)

                untrained = _merged(trainer.validate(method, datamodule, verbose=False))
                trainer.fit(method, datamodule)
                val_acc = _take_best(method, trainer, callbacks, output / "checkpoints")
                tested = _merged(trainer.test(method, datamodule, verbose=False))

                metrics = _summarized(untrained, val_acc, tested)
                version = _deploy(config, method, datamodule, run, metrics, output)
                if version is None:
                    return None
                outcome = Outcome(
                    metrics=metrics,
                    name=config.registry.name,
                    version=version,
                    link=run.link,
                    ui_command=run.ui_command,
                    output=output,
                    seconds=time.monotonic() - began,
                )
                log.info("%s", closing_words(outcome))
        return outcome

    @rank_zero_only
    def _describe(self, run: Run, config: DictConfig, datamodule: SSLDataModule, output: Path) -> None:
        """Put config, packages and data on record: in the output folder first, then in MLflow."""
        write_record(self.unresolved, config, self.overrides, output)
        (output / "packages.txt").write_text(installed_packages())
        write_data(datamodule, output / "data")
        run.log_params(_plain(config))
        for name in CONFIG_FILES:
            run.log_file(output / name, "config")
        run.log_folder(output / "data", "data")
        index = datamodule.index
        run.set_tags({"data.digest": index.digest, "data.path": str(datamodule.root)})
        run.log_metrics({"data/images": len(index), "data/bad_images": len(datamodule.bad_images)})
        run.log_dataset(name=datamodule.root.name, source=str(datamodule.root), digest=index.digest)


BYOL = SSL
"""The tutorial's name of the task; which method it trains is the config's to say."""


def _build_trainer(config: DictConfig, run: Run, callbacks: dict[str, Callback], output: Path) -> Trainer:
    logger = MLflowLogger(run)
    trainer: Trainer = build(
        config.trainer,
        logger=logger,
        callbacks=list(callbacks.values()),
        default_root_dir=str(output),
    )
    logger.optimizer_steps = lambda: trainer.global_step
    return trainer


def _take_best(method: SSLMethod, trainer: Trainer, callbacks: dict[str, Any], folder: Path) -> float | None:
    """Save the last checkpoint, give ``method`` the best one's weights, and return its ``val_acc``.

    Without a choice the last is the best.
    """
    trainer.save_checkpoint(folder / "last.ckpt")
    best, knn = callbacks.get("model_checkpoint"), callbacks.get("knn")
    if best is None or not best.best_model_path:
        return None
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    method.load_state_dict(checkpoint["state_dict"])
    log.info("best checkpoint: step %d, %s %.4f", checkpoint["global_step"], best.monitor, best.best_model_score)
    val_acc: float | None = checkpoint["callbacks"][knn.state_key]["val_acc"] if knn else None
    return val_acc


@rank_zero_only
def _deploy(
    config: DictConfig,
    method: SSLMethod,
    datamodule: SSLDataModule,
    run: Run,
    metrics: dict[str, float],
    output: Path,
) -> str | None:
    """Export the network, send checkpoints and exports to MLflow, register, and return the version."""
    transforms = config.transforms
    network = DeploymentNetwork(method.online.backbone, transforms.mean, transforms.std)  # type: ignore[arg-type]
    card = ModelCard(
        backbone=config.backbone.model_name,
        state_dict_fits=str(network.backbone.made_by),
        input_size=(transforms.input_height, transforms.input_width),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        embedding_size=network.backbone.num_features,  # type: ignore[arg-type]
        classes=tuple(datamodule.classes),
    )
    folder = output / "deployment_model"
    export_network(network, card, types=config.export.types, folder=folder)
    run.log_folder(output / "checkpoints", "checkpoints")
    run.log_folder(folder, "deployment_model")
    tags = {name: f"{metrics[name]:.6f}" for name in ("val_acc", "test_acc", "test_acc_linear") if name in metrics}
    return register_network(
        network,
        card=card,
        name=config.registry.name,
        example=_example(datamodule, network),
        tags=tags | {"data.digest": datamodule.index.digest},
    )


@torch.no_grad()
def _example(datamodule: SSLDataModule, network: DeploymentNetwork) -> Any:
    """Return one training image as the exported network takes it, ``(1, 3, H, W)`` in [0, 1]."""
    image, _ = datamodule.clean_image(0)
    return (image[None] * network.std + network.mean).clamp(0, 1).mul(255).round().div(255).numpy()


def _summarized(untrained: dict[str, float], val_acc: float | None, tested: dict[str, float]) -> dict[str, float]:
    renamed = {"val_acc_untrained" if name == "val_acc" else name: value for name, value in untrained.items()}
    return renamed | tested | ({} if val_acc is None else {"val_acc": val_acc})


def _merged(results: Sequence[Any]) -> dict[str, float]:
    """Return Lightning's metrics of all loaders as one mapping."""
    return {name: float(value) for result in results for name, value in result.items()}


def _plain(config: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config)
    return plain  # type: ignore[no-any-return]

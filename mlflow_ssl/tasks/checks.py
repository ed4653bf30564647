"""What can be known to go wrong before a training begins, and what the data decide about its config."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning_fabric.plugins.precision.precision import _PRECISION_INPUT_STR_ALIAS_CONVERSION as PRECISION_ALIASES
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.strategies import ModelParallelStrategy

from mlflow_ssl.backbones import stride_past_the_edge
from mlflow_ssl.config import build
from mlflow_ssl.datamodules import ClassificationDataModule, LabelledDataModule, SSLDataModule
from mlflow_ssl.datasets.embedded import DIGITS
from mlflow_ssl.errors import InputError
from mlflow_ssl.export import check_types
from mlflow_ssl.losses import balanced_weights
from mlflow_ssl.methods import Method
from mlflow_ssl.sharding import NOT_COMPILED, PRECISIONS
from mlflow_ssl.tracking.packaging import check_servable
from mlflow_ssl.transforms import apply, to_tensor

log = logging.getLogger(__name__)

LABEL_FREE = "embedding/rankme"
"""The metric that the best checkpoint is chosen by where no image has a class."""


def fit_to_data(config: DictConfig, datamodule: SSLDataModule) -> None:
    """Check a resolved config against its data, and drop the choice of a best checkpoint where nothing can choose.

    Raises:
        InputError: if batch size, neighbours, normalization or export types cannot work.
    """
    _check_deployment(config, datamodule)
    num_bank = len(datamodule.bank)
    knn = config.callbacks.get("knn") or {}
    neighbours, max_bank = knn.get("num_neighbours", 1), knn.get("max_bank")
    if max_bank is not None and max_bank < neighbours:
        raise InputError(
            f"callbacks.knn.max_bank must be at least callbacks.knn.num_neighbours {neighbours}, got {max_bank}"
        )
    if num_bank and not 1 <= neighbours <= num_bank:
        raise InputError(
            f"callbacks.knn.num_neighbours must be between 1 and the bank size {num_bank}, got {neighbours}; "
            "lower it or add data"
        )
    _choose_monitor(config, datamodule)


def fit_to_labels(config: DictConfig, datamodule: LabelledDataModule) -> None:
    """Check a resolved config of a classifier against its data, and fill in, in place, what the data decide.

    Raises:
        InputError: if batch size, normalization, weights of classes or export types cannot work.
    """
    _check_deployment(config, datamodule)
    classes, labels = datamodule.classes, datamodule.images_of("train").labels
    if config.model.num_classes not in ("auto", len(classes)):
        raise InputError(
            f"model.num_classes must be auto, or the {len(classes)} classes that the data have, "
            f"got {config.model.num_classes}"
        )
    config.model.num_classes = len(classes)
    weights = class_weights(config.loss.class_weights, np.bincount(labels, minlength=len(classes)).tolist())
    config.loss.class_weights = config.model.loss.class_weights = weights
    if config.callbacks.get("model_checkpoint") and not len(datamodule.images_of("val")):
        log.warning("no val_acc in this run, since there are no validation images: the last checkpoint is the best")
        config.callbacks.model_checkpoint = None


def check_sharing(config: DictConfig) -> None:
    """Check that processes which share weights are asked for nothing that they cannot do.

    Args:
        config: resolved, without any ``auto`` in its trainer.

    Raises:
        InputError: if ``trainer.precision`` or ``model.compile`` asks for that.
    """
    trainer = config.trainer
    strategy = build(trainer.strategy) if OmegaConf.is_config(trainer.get("strategy")) else None
    if not isinstance(strategy, ModelParallelStrategy):
        return
    precision = PRECISION_ALIASES.get(str(trainer.precision), trainer.precision)
    if precision not in PRECISIONS:
        raise InputError(
            f"trainer.precision must be one of {', '.join(PRECISIONS)} with trainer=lightning_fsdp, got {precision}"
        )
    if config.model.get("compile"):
        raise InputError(NOT_COMPILED)


def check_precision(config: DictConfig, method: Method) -> None:
    """Check that the network's gradients are right in the precision it is to be trained in.

    On a CPU torch 2.15 reads memory that nobody wrote for the gradient, in bfloat16, of a convolution whose stride is
    wider than its input: as a resnet's last stage has for images of 16 px.

    Raises:
        InputError: if they are not.
    """
    trainer = config.trainer
    precision = PRECISION_ALIASES.get(str(trainer.precision), trainer.precision)
    if trainer.accelerator != "cpu" or not str(precision).startswith("bf16"):
        return
    height, width = config.transforms.input_height, config.transforms.input_width
    name = stride_past_the_edge(method.embedder, (height, width))
    if name is not None:
        raise InputError(
            f"trainer.precision must be 32-true on a CPU for images of {height}x{width} px, got {precision}: {name} "
            "has a stride wider than what is left of them there, and its gradient would be wrong in bfloat16"
        )


def class_weights(asked: Any, counts: Sequence[int]) -> list[float] | None:
    """Return the weight of each class.

    Args:
        asked: ``balanced``, a number for each class, or None for 1.
        counts: training images of each class.

    Raises:
        InputError: if it is none of these.

    Example:
        >>> class_weights("balanced", [30, 10])
        [0.666667, 2.0]
    """
    if asked is None:
        return None
    if asked == "balanced":
        return [round(weight, 6) for weight in balanced_weights(counts)]
    numbers = [] if isinstance(asked, str) else [float(weight) for weight in asked]
    if len(numbers) != len(counts) or not min(numbers) > 0:
        raise InputError(
            f"loss.class_weights must be null, balanced, or a number above 0 for each of the {len(counts)} classes, "
            f"got {asked}"
        )
    return numbers


def _check_deployment(config: DictConfig, datamodule: ClassificationDataModule) -> None:
    """Check what can be known of the end of a training, and that there is a batch to begin with."""
    check_types(config.export.types)
    check_servable(datamodule.val_transform)
    num_train = len(datamodule.images_of("train"))
    if datamodule.batch_size > num_train:
        raise InputError(
            f"datamodule.batch_size must be at most the training split's {num_train} images, "
            f"got {datamodule.batch_size}"
        )
    _check_normalization(config, datamodule)


def _choose_monitor(config: DictConfig, datamodule: SSLDataModule) -> None:
    """Choose the best checkpoint without labels where there are none, or none where nothing can choose."""
    best = config.callbacks.get("model_checkpoint")
    if best is None or best.get("monitor") != "val_acc" or (len(datamodule.bank) and len(datamodule.queries)):
        return
    if len(datamodule.queries) and config.callbacks.get("health"):
        log.warning(
            "no val_acc in this run, since the images have no two classes: the best checkpoint is the one with the "
            "highest %s, the effective rank of the validation images' embeddings",
            LABEL_FREE,
        )
        best.monitor, best.mode = LABEL_FREE, "max"
        return
    log.warning(
        "no val_acc in this run: the data have %d class(es) and %d validation images; the last checkpoint is tested "
        "and exported",
        len(datamodule.classes),
        len(datamodule.index.split("val")),
    )
    config.callbacks.model_checkpoint = None


def _check_normalization(config: DictConfig, datamodule: ClassificationDataModule) -> None:
    """Check that ``val_transform`` normalizes as the exported network will: an even grey stays even."""
    grey = np.full((config.transforms.input_height, config.transforms.input_width, 3), 100, dtype=np.uint8)
    got = to_tensor(apply(datamodule.val_transform, grey, draw=(0,))) if datamodule.val_transform else to_tensor(grey)
    mean, std = (torch.tensor(list(config.transforms[name])).view(3, 1, 1) for name in ("mean", "std"))
    expected = ((100 / 255 - mean) / std).expand(3, config.transforms.input_height, config.transforms.input_width)
    if got.shape != expected.shape:
        raise InputError(
            f"datamodule.val_transform must give images of transforms.input_height x input_width, shape "
            f"{tuple(expected.shape)}, got {tuple(got.shape)}"
        )
    if not torch.allclose(got, expected, atol=1e-4):
        raise InputError(
            "datamodule.val_transform must normalize by transforms.mean and transforms.std, which the exported network "
            "does; use ${transforms.normalize}"
        )


def warn_of_demonstration(config: DictConfig, datamodule: ClassificationDataModule) -> None:
    """Say which settings were made for the embedded data, where somebody else's are trained on."""
    if config.core.demonstration and datamodule.data_path != DIGITS:
        log.warning(
            "this experiment demonstrates on the embedded digits, and these settings were made for them: %s; for a "
            "real data set take experiment=base/ssl/byol, or experiment=paper/byol_small_batch for small batches",
            ", ".join(config.core.demonstration),
        )

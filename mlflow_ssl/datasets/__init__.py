"""From a folder to pictures: index, splits, decoding, views."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_ssl.datasets.image import ImageDataset
    from mlflow_ssl.datasets.sampler import EpochSampler
    from mlflow_ssl.datasets.two_augmentation import TwoAugmentationDataset

__all__ = ["EpochSampler", "ImageDataset", "TwoAugmentationDataset"]

_MODULES = {"EpochSampler": "sampler", "ImageDataset": "image", "TwoAugmentationDataset": "two_augmentation"}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: the index, which MLflow's data sets read, does not."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

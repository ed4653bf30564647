"""From a folder to pictures: index, splits, decoding, views."""

from mlflow_ssl.datasets.image import ImageDataset
from mlflow_ssl.datasets.sampler import EpochSampler
from mlflow_ssl.datasets.two_augmentation import TwoAugmentationDataset

__all__ = ["EpochSampler", "ImageDataset", "TwoAugmentationDataset"]

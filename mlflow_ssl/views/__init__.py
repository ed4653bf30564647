"""How views are made of an image: fast operations, as albumentations transforms and in batches on a device."""

from mlflow_ssl.views.device import DeviceViews
from mlflow_ssl.views.transforms import FlipAndJitter, GaussianBlur, NormalizedTensor, RandomResizedCrop

__all__ = ["DeviceViews", "FlipAndJitter", "GaussianBlur", "NormalizedTensor", "RandomResizedCrop"]

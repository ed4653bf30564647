"""How views are made of an image: fast operations, as albumentations transforms and in batches on a device."""

from mlflow_ssl.views.device import DeviceViews
from mlflow_ssl.views.normalize import Normalize
from mlflow_ssl.views.transforms import FlipAndJitter, GaussianBlur, RandomResizedCrop

__all__ = ["DeviceViews", "FlipAndJitter", "GaussianBlur", "Normalize", "RandomResizedCrop"]

"""Lightning datamodules with the tutorial's API."""

from mlflow_ssl.datamodules.classification import ClassificationDataModule
from mlflow_ssl.datamodules.labelled import LabelledDataModule
from mlflow_ssl.datamodules.ssl import SSLDataModule

__all__ = ["ClassificationDataModule", "LabelledDataModule", "SSLDataModule"]

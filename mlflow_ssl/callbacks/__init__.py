"""When things happen during a training: thin over ``evaluation`` and ``tracking``."""

from mlflow_ssl.callbacks.knn import KNNEvaluation
from mlflow_ssl.callbacks.pixel_baseline import PixelBaseline
from mlflow_ssl.callbacks.progress import Progress
from mlflow_ssl.callbacks.step_metrics import StepMetrics

__all__ = ["KNNEvaluation", "PixelBaseline", "Progress", "StepMetrics"]

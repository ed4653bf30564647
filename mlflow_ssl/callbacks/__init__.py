"""When things happen during a training: thin over ``evaluation`` and ``tracking``."""

from mlflow_ssl.callbacks.bad_images import BadImages
from mlflow_ssl.callbacks.checkpoint_upload import CheckpointUpload
from mlflow_ssl.callbacks.health import Health
from mlflow_ssl.callbacks.knn import KNNEvaluation
from mlflow_ssl.callbacks.last_checkpoint import LastCheckpoint
from mlflow_ssl.callbacks.linear_probe import LinearProbe
from mlflow_ssl.callbacks.monitors import Monitors
from mlflow_ssl.callbacks.pictures import Pictures
from mlflow_ssl.callbacks.pixel_baseline import PixelBaseline
from mlflow_ssl.callbacks.progress import Progress
from mlflow_ssl.callbacks.step_metrics import StepMetrics

__all__ = [
    "BadImages",
    "CheckpointUpload",
    "Health",
    "KNNEvaluation",
    "LastCheckpoint",
    "LinearProbe",
    "Monitors",
    "Pictures",
    "PixelBaseline",
    "Progress",
    "StepMetrics",
]

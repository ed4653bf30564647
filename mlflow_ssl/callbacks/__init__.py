"""When things happen during a training: thin over ``evaluation`` and ``tracking``."""

from mlflow_ssl.callbacks.backbone_baseline import BackboneBaseline
from mlflow_ssl.callbacks.bad_images import BadImages
from mlflow_ssl.callbacks.best_checkpoint import BestCheckpoint
from mlflow_ssl.callbacks.checkpoint_upload import CheckpointUpload
from mlflow_ssl.callbacks.classification import ClassificationEvaluation
from mlflow_ssl.callbacks.health import Health
from mlflow_ssl.callbacks.knn import KNNEvaluation
from mlflow_ssl.callbacks.last_checkpoint import LastCheckpoint
from mlflow_ssl.callbacks.linear_probe import LinearProbe
from mlflow_ssl.callbacks.monitors import Monitors
from mlflow_ssl.callbacks.pictures import Pictures
from mlflow_ssl.callbacks.pixel_baseline import PixelBaseline
from mlflow_ssl.callbacks.profile import Profile
from mlflow_ssl.callbacks.progress import Progress
from mlflow_ssl.callbacks.pulse import Pulse
from mlflow_ssl.callbacks.step_metrics import StepMetrics

__all__ = [
    "BackboneBaseline",
    "BadImages",
    "BestCheckpoint",
    "CheckpointUpload",
    "ClassificationEvaluation",
    "Health",
    "KNNEvaluation",
    "LastCheckpoint",
    "LinearProbe",
    "Monitors",
    "Pictures",
    "PixelBaseline",
    "Profile",
    "Progress",
    "Pulse",
    "StepMetrics",
]

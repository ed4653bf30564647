"""How good embeddings are: pure functions, used by callbacks and tasks alike."""

from mlflow_ssl.evaluation.knn import knn_predict
from mlflow_ssl.evaluation.linear import linear_accuracy

__all__ = ["knn_predict", "linear_accuracy"]

"""What a run looks like: arrays in, pictures and pages out. Nothing here knows of trainers or tracking."""

from mlflow_ssl.pictures.confusion import ClassResult, confusion_matrix, per_class_csv, per_class_table
from mlflow_ssl.pictures.grids import neighbours, thumbnail, view_pairs
from mlflow_ssl.pictures.projection import project, projection_html, projection_png

__all__ = [
    "ClassResult",
    "confusion_matrix",
    "neighbours",
    "per_class_csv",
    "per_class_table",
    "project",
    "projection_html",
    "projection_png",
    "thumbnail",
    "view_pairs",
]

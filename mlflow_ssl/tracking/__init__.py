"""The only door to MLflow."""

# before any module here: `import mlflow` loads dataset.py by its entry points, and must find it unbegun or whole
import mlflow  # noqa: F401

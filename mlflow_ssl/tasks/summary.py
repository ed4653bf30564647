"""What the terminal shows when a training has ended."""

from dataclasses import dataclass
from pathlib import Path

from mlflow_ssl.callbacks.progress import clock
from mlflow_ssl.datamodules import SSLDataModule


@dataclass(frozen=True)
class Outcome:
    """What came of a training."""

    metrics: dict[str, float]
    """``val_acc`` of the best checkpoint, ``test_acc*``, and ``val_acc_untrained``; those that there are."""
    run_id: str
    name: str
    version: str | None
    link: str
    ui_command: str | None
    output: Path
    seconds: float


def closing_words(outcome: Outcome) -> str:
    """Return the summary: accuracies, registered version, where to look and how to load."""
    metrics = outcome.metrics
    lines = [f"finished in {clock(outcome.seconds)}"]
    if "val_acc" in metrics:
        lines.append(f"val_acc    {metrics['val_acc_untrained']:.3f} (untrained) -> {metrics['val_acc']:.3f}")
    if "baseline_acc_pixels" in metrics:
        lines.append(f"           {metrics['baseline_acc_pixels']:.3f} with raw pixels")
    if "test_acc" in metrics:
        lines.append(f"test_acc   {metrics['test_acc']:.3f}, linear classifier {metrics['test_acc_linear']:.3f}")
    lines.append(f"output     {outcome.output}")
    lines.append(f"registered {outcome.name} version {outcome.version or '(not yet: MLflow does not answer)'}")
    if outcome.ui_command:
        lines.append(f"look       {outcome.ui_command}")
    lines.append(f"run        {outcome.link}")
    if outcome.version:
        lines += [
            "load",
            "  import mlflow",
            f'  network = mlflow.pytorch.load_model("models:/{outcome.name}/{outcome.version}")',
        ]
    return "\n".join(lines)


def data_words(datamodule: SSLDataModule) -> str:
    """Return what is trained on, in words."""
    images, classes = len(datamodule.index.split("train")), len(datamodule.classes)
    kinds = f" of {classes} classes" if classes else " without classes"
    return f"`{datamodule.root.name}`: {images:,} training images{kinds}"

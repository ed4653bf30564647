"""What the terminal shows when a training has ended."""

from dataclasses import dataclass
from pathlib import Path

from mlflow_ssl.callbacks.progress import clock
from mlflow_ssl.datamodules import ClassificationDataModule

BASELINES = {
    "baseline_acc_pixels": "with raw pixels",
    "baseline_acc_knn": "with the neighbours of the backbone as it was",
    "baseline_acc_linear": "with a linear classifier on the backbone as it was",
}
"""What ``val_acc`` is shown against, those that there are."""
BESIDE = {"test_acc_linear": "linear classifier", "test_f1": "mean F1"}
"""What is shown beside ``test_acc``, likewise."""


@dataclass(frozen=True)
class Outcome:
    """What came of a training."""

    metrics: dict[str, float]
    """``val_acc`` of the best checkpoint, ``test_*``, ``baseline_acc_*``, ``val_acc_untrained``; as far as there."""
    run_id: str
    name: str
    version: str | None
    link: str
    ui_command: str | None
    output: Path
    seconds: float
    registering: bool = True
    """Whether the network was to be registered."""


def closing_words(outcome: Outcome) -> str:
    """Return the summary: accuracies, registered version, where to look and how to load."""
    metrics = outcome.metrics
    lines = [f"finished in {clock(outcome.seconds)}"]
    if "val_acc" in metrics:
        lines.append(f"val_acc    {metrics['val_acc_untrained']:.3f} (untrained) -> {metrics['val_acc']:.3f}")
    lines += [f"           {metrics[name]:.3f} {words}" for name, words in BASELINES.items() if name in metrics]
    if "test_acc" in metrics:
        beside = [f", {words} {metrics[name]:.3f}" for name, words in BESIDE.items() if name in metrics]
        lines.append(f"test_acc   {metrics['test_acc']:.3f}{''.join(beside)}")
    lines.append(f"output     {outcome.output}")
    if outcome.registering:
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


def data_words(datamodule: ClassificationDataModule) -> str:
    """Return what is trained on, in words."""
    images, classes = len(datamodule.images_of("train")), len(datamodule.classes)
    kinds = f" of {classes} classes" if classes else " without classes"
    return f"`{datamodule.root.name}`: {images:,} training images{kinds}"

"""What stands on a run's page: Markdown."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIGURES = {
    "baseline_acc_pixels": "raw pixels",
    "baseline_acc_knn": "neighbours, backbone as it was",
    "baseline_acc_linear": "linear classifier, backbone as it was",
    "test_acc": "test_acc",
    "test_acc_linear": "test_acc, linear classifier",
    "test_f1": "test_f1, mean of the classes",
}
"""Metrics that the page of a finished run shows below ``val_acc``, and what they are called there."""
UNREGISTERED = "# not registered, as registry.register is false: the artifact deployment_model is its network"


def finished_note(
    config: Mapping[str, Any],
    *,
    run_id: str,
    metrics: Mapping[str, float],
    data: str,
    steps: int,
    name: str,
    version: str | None,
    look: str,
) -> str:
    """Return the description of a finished run.

    Args:
        config: resolved config.
        run_id: of the run.
        metrics: ``val_acc`` of the best checkpoint, ``val_acc_untrained``, and `FIGURES`; those that there are.
        data: what it was trained on, in words.
        steps: optimizer steps.
        name: registered name.
        version: registered version; None where it is still to come.
        look: where there is something to see.
    """
    method = config["model"]["_target_"].rpartition(".")[2]
    lines = [
        f"**{method}**, `{config['backbone']['model_name']}`, {config['trainer']['max_epochs']} epochs "
        f"({steps:,} steps of {config['datamodule']['batch_size']} images per device) on {data}.",
        "",
        *_accuracies(metrics),
        look,
        "",
        *_block(
            "Load",
            "python",
            loading(name, version) if config.get("registry", {}).get("register", True) else UNREGISTERED,
        ),
        *_block("Go on for more epochs", "bash", f"mlflow run . -P resume={run_id} -P trainer.max_epochs=MORE"),
        *_block("Reproduce", "bash", f"mlflow run . -e reproduce -P run_id={run_id}"),
    ]
    return "\n".join(lines)


def running_note(*, run_id: str, data: str) -> str:
    """Return the description of a run that is under way, or whose machine is gone."""
    return "\n".join([f"Training on {data}.", "", *_resuming(run_id, "Resume, should it stop")])


def failure_note(run_id: str, *, status: str, reason: str, output: Path, resumable: bool) -> str:
    """Return the description of a run that failed or was stopped: why, and how to go on."""
    why = reason.replace("`", "'")
    lines = [f"**{'Stopped' if status == 'KILLED' else 'Failed'}**: `{why[:1000]}`", ""]
    if resumable:
        lines += _resuming(run_id, "Resume from the last checkpoint")
    else:
        lines += ["It had not come to a checkpoint: start it again.", ""]
    lines.append(f"Log: artifact `main.log`; output folder `{output}`.")
    return "\n".join(lines)


def _accuracies(metrics: Mapping[str, float]) -> list[str]:
    rows = []
    if "val_acc" in metrics:
        rows.append(("val_acc", f"{metrics.get('val_acc_untrained', float('nan')):.3f} → **{metrics['val_acc']:.3f}**"))
    for name, words in FIGURES.items():
        if name in metrics:
            shown = f"{metrics[name]:.3f}"
            rows.append((words, f"**{shown}**" if name == "test_acc" else shown))
    if not rows:
        return ["The images have no classes: there is no accuracy.", ""]
    return ["| | untrained → trained |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]


def loading(name: str, version: str | None) -> str:
    """Return how a registered network is loaded, in Python."""
    if version is None:
        return "# not registered yet: python -m mlflow_ssl sync OUTPUT_FOLDER"
    return f'import mlflow\n\nnetwork = mlflow.pytorch.load_model("models:/{name}/{version}")'


def _resuming(run_id: str, title: str) -> list[str]:
    return _block(title, "bash", f"mlflow run . -P resume={run_id}")


def _block(title: str, language: str, code: str) -> list[str]:
    return [f"{title}:", f"```{language}", code, "```", ""]

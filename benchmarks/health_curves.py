"""Draw what a healthy and three ruined trainings look like, for docs/is-it-working.md.

    python benchmarks/health_curves.py [--results FILE] [--picture docs/health.png]

Trains the recipes of `benchmarks/collapse.py` with one seed for the first eight of their 30 epochs, whatever the
verdict says, and draws the readings of each validation. The file of results keeps them: drawing again is cheap.
"""

import argparse
from pathlib import Path
from typing import Any

from collapse import train_all

from mlflow_ssl.pictures.style import COLOURS, INK

STOP = (
    "+callbacks.stop={_target_: pytorch_lightning.callbacks.EarlyStopping, monitor: val_acc, min_delta: 1000, "
    "mode: max, patience: 7}"  # nothing is such an improvement: it ends with the eighth validation
)
PANELS = {
    "monitor": "val_acc",
    "loss": "train/loss",
    "agreement": "embedding/agreement",
    "projection_deviation": "projection/deviation",
    "rankme": "embedding/rankme",
    "deviation": "embedding/deviation",
    "mean_cosine": "embedding/mean_cosine",
}
"""What is drawn of a reading, and the metric that it is logged as."""
LABELS = {
    "healthy": "healthy",
    "no_predictor": "no predictor, tau = 0",
    "no_stop_gradient": "no stop-gradient",
    "rate_too_high": "learning rate 1.0, not 0.001",
}
DASHES = ("-", "--", "-.", ":")


def draw(results: dict[str, dict[str, Any]], picture: Path) -> None:
    """Write a picture with a panel a metric and a line a recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, (name, metric) in zip(axes.flat, PANELS.items(), strict=False):
        for (recipe, label), colour, dashes in zip(LABELS.items(), COLOURS, DASHES, strict=False):
            points = [(each["step"], each[name]) for each in results[recipe]["readings"] if each[name] is not None]
            axis.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=2, label=label)
        axis.set_title(metric, fontsize=11, loc="left", color=INK)
        axis.set_xlabel("optimizer steps", fontsize=9, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    legend = axes.flat[-1]
    legend.axis("off")
    legend.legend(*axes.flat[0].get_legend_handles_labels(), loc="center", frameon=False, handlelength=3)
    figure.savefig(picture, dpi=90)


def main() -> None:
    """Train what is missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("health_curves.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/health.png"))
    options = parser.parse_args()
    results = train_all({recipe: (recipe, 0, STOP) for recipe in LABELS}, options.results)
    draw(results, options.picture)


if __name__ == "__main__":
    main()

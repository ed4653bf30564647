"""Train healthy and ruined networks with many seeds, and print how soon the verdict says which is which.

    python benchmarks/collapse.py [--seeds 20] [--recipes healthy no_predictor ...] [--results FILE] [--minutes 8]

Each training is the demonstration, ``experiment=byol`` on the embedded digits, as the command line's words compose and
build it, with a validation after every epoch, and without MLflow and export. What a recipe changes of it is in
`RECIPES`; those that ought to be flagged end at the first flag (``callbacks.health.on_collapse=stop``), the others
after all 30 epochs. Two trainings go on at once, with a thread each. The readings of each are kept in a file: what is
there is not trained again, so that the work may be done in pieces, and another verdict be tried on the same readings.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from mlflow_ssl.evaluation.verdict import Reading, Verdict, judge

UNTRACKED = ("model_checkpoint", "last_checkpoint", "checkpoint_upload", "pictures", "pixel_baseline", "progress")
WORDS = (
    "experiment=byol",
    "trainer.check_val_every_n_epoch=1",
    *(f"callbacks.{name}=null" for name in (*UNTRACKED, "bad_images", "step_metrics")),
)
STOPPING = "callbacks.health.on_collapse=stop"
RECIPES: dict[str, tuple[str, ...]] = {
    "healthy": (),
    "healthy_10_epochs": ("trainer.max_epochs=10",),
    "no_predictor": ("model.predictor={_target_: torch.nn.Identity}", "model.base_tau=0"),
    "no_stop_gradient": ("model._target_=siamese.Siamese",),
    "rate_too_high": ("optimizer.lr=1.0",),
}
"""Recipes by name, and their words; the healthy ones are to be left alone."""
FLAGS = ("collapsing", "diverging")


def train(recipe: str, seed: int, *words: str) -> dict[str, Any]:
    """Train in this process, and return the readings of the health callback and what they are judged with."""
    from pytorch_lightning import seed_everything

    from mlflow_ssl.callbacks.divergence import DivergedError
    from mlflow_ssl.config import build, compose_config, resolve
    from mlflow_ssl.machine import settle

    began = time.process_time()
    config = resolve(compose_config([*WORDS, *RECIPES[recipe], *words, f"core.seed={seed}"]))
    settle(config)
    datamodule = build(config.datamodule)
    seed_everything(seed, workers=True, verbose=False)
    method = build(config.model)
    callbacks = {name: build(node) for name, node in config.callbacks.items() if node is not None}
    trainer = build(
        config.trainer,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=list(callbacks.values()),
    )
    error = None
    trainer.validate(method, datamodule, verbose=False)
    try:
        trainer.fit(method, datamodule)
    except DivergedError as caught:
        error = str(caught)
    health = callbacks["health"].state_dict()
    return {
        "start_loss": statistics.mean(health["first"]),
        "readings": health["history"],
        "error": error,
        "cpu_seconds": round(time.process_time() - began),
    }


def verdicts(training: dict[str, Any]) -> list[Verdict]:
    """Return what is said at each validation of a training."""
    history = [Reading(**reading) for reading in training["readings"]]
    said = [judge(history[: n + 1], start_loss=training["start_loss"]) for n in range(len(history))]
    return [*said, Verdict("diverging", training["error"])] if training["error"] else said


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return a row a recipe: how many are flagged, and when first."""
    lines = [
        "| recipe | seeds | validations | flagged | first flagged at validation, median (worst) | at step | val_acc, "
        "median (least) |",
        "|" + " --- |" * 7,
    ]
    for recipe in RECIPES:
        trainings = [training for key, training in results.items() if key.rpartition(" ")[0] == recipe]
        if trainings:
            lines.append(_row(recipe, trainings))
    return "\n".join(lines)


def _row(recipe: str, trainings: Sequence[dict[str, Any]]) -> str:
    firsts, steps, validations = [], [], 0
    for training in trainings:
        said = verdicts(training)
        validations += len(said) - 1  # the untrained network is never flagged
        first = next((number for number, verdict in enumerate(said) if verdict.state in FLAGS), None)
        if first is not None:
            firsts.append(first)
            steps.append(training["readings"][min(first, len(training["readings"]) - 1)]["step"])
    accuracies = [training["readings"][-1]["monitor"] for training in trainings]
    when = [f"{statistics.median(each):g} ({max(each)})" if each else "never" for each in (firsts, steps)]
    cells = (recipe, len(trainings), validations, len(firsts), *when)
    return f"| {' | '.join(map(str, cells))} | {statistics.median(accuracies):.3f} ({min(accuracies):.3f}) |"


def train_all(jobs: Mapping[str, Sequence[Any]], file: Path, minutes: float = float("inf")) -> dict[str, Any]:
    """Return the trainings in a file, after training two at once what is not there; begin none after so many minutes.

    Args:
        jobs: the arguments of `train`, by the training's name in the file.
        file: of JSON, written after each training.
        minutes: how long to begin trainings.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    left, ends = [name for name in jobs if name not in results], time.monotonic() + 60 * minutes
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[dict[str, Any]], str] = {}
        while left or running:
            while left and len(running) < 2 and time.monotonic() < ends:
                name = left.pop(0)
                running[pool.submit(train, *jobs[name])] = name
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                results[name] = future.result()
                file.write_text(json.dumps(results))
                state = verdicts(results[name])[-1].state
                print(f"{name}: {state}, {results[name]['cpu_seconds']} s of processor time", flush=True)
    return results


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--results", type=Path, default=Path("collapse.json"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no training after these")
    options = parser.parse_args()
    stopping = {recipe: () if recipe.startswith("healthy") else (STOPPING,) for recipe in RECIPES}
    jobs = {
        f"{recipe} {seed}": (recipe, seed, *stopping[recipe])
        for seed in range(options.seeds)
        for recipe in options.recipes
    }
    results = train_all(jobs, options.results, options.minutes)
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(table(results))


if __name__ == "__main__":
    main()

"""A training: from a config, or an earlier run, to a registered network."""

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, Trainer, seed_everything
from pytorch_lightning.utilities import rank_zero_only

from mlflow_ssl.batchnorm import use_batchnorm_sync
from mlflow_ssl.callbacks import Monitors, Pulse
from mlflow_ssl.checkpoint_io import AtomicCheckpointIO
from mlflow_ssl.config import build, write_composed, write_resolved
from mlflow_ssl.datamodules import ClassificationDataModule
from mlflow_ssl.datasets.bad_images import BadImageList
from mlflow_ssl.machine import settle
from mlflow_ssl.methods import Method
from mlflow_ssl.sharding import load_whole, made_whole, without_weights
from mlflow_ssl.signals import stop_signals
from mlflow_ssl.startup import Ahead, collect_again
from mlflow_ssl.tasks.checks import check_precision, check_sharing
from mlflow_ssl.tasks.deploy import deploy
from mlflow_ssl.tasks.launcher import watch_processes, watched
from mlflow_ssl.tasks.output import BAD_IMAGES, open_output, write_data
from mlflow_ssl.tasks.resume import find_start
from mlflow_ssl.tasks.summary import Outcome, closing_words, data_words
from mlflow_ssl.tasks.task import Task
from mlflow_ssl.tracking.dataset import split_datasets
from mlflow_ssl.tracking.lifecycle import NOTE_TAG, prepare_store, tracked_run
from mlflow_ssl.tracking.logger import MLflowLogger
from mlflow_ssl.tracking.note import finished_note, running_note
from mlflow_ssl.tracking.opening import run_link, ui_command
from mlflow_ssl.tracking.run import Run
from mlflow_ssl.tracking.source import installed_packages

log = logging.getLogger(__name__)

CONFIG_FILES = (
    "config_resolved.yaml",
    "config_tree.txt",
    "config_unresolved.yaml",
    "overrides.yaml",
    "packages.txt",
)


def train(unresolved: DictConfig, overrides: Sequence[str] = (), *, tags: Mapping[str, str] | None = None) -> Outcome:
    """Train, test, export and register what a config describes, or go on with the run that it names.

    Args:
        unresolved: composed config, interpolations included; its ``task`` says which kind of training it is, and where
            it names a run to go on in, that run's does.
        overrides: the words that it was composed from.
        tags: for the run.

    Raises:
        InputError: for a mistake in config, data or tracking store, before any training.
        NotSynced: at the end, if not everything has reached MLflow.
    """
    began = time.monotonic()
    start = find_start(unresolved, overrides)
    config, output = start.config, start.output
    with (
        open_output(output, log_level=config.core.log_level, resumed=start.run_id is not None),
        watched(output, seconds=config.core.get("hang_seconds", 45.0)),
    ):
        task: Task = build(config.task)
        settle(config)
        check_sharing(config)
        datamodule: ClassificationDataModule = build(config.datamodule)
        images = Ahead(datamodule.prepare_data)
        images.glance(seconds=1.0)  # small data, and most mistakes in data, come to an end before any store is made
        method = None if task.network_follows_data else _build_method(config)
        prepare_store(config.tracking.uri)
        images.result()
        task.fit_to_data(config, datamodule)
        digest = datamodule.index.digest
        start.check_data(digest, changed_allowed=unresolved.resume_changed_data)
        method = method or _build_method(config)
        check_precision(config, method)
        blank = without_weights(method)  # for those that are shared among processes
        if start.run_id is None:  # before there is a run, so that any run can be resumed
            write_composed(unresolved, overrides, output)
            write_resolved(config, output)
        with tracked_run(_plain(config), output=output, run_id=start.run_id, data_digest=digest) as run:
            if start.run_id:
                log.info("going on with run %s from %s", start.run_id, start.checkpoint or "its beginning")
            datamodule.bad_image_list = BadImageList(output / "data" / BAD_IMAGES)
            _describe(run, config, datamodule, output, tags or {}, resumed=start.run_id is not None)
            task.begin(run, config, datamodule)
            callbacks = {name: build(node) for name, node in config.callbacks.items() if node is not None}
            trainer = _build_trainer(config, run, callbacks, output)

            collect_again()
            if start.checkpoint is None:
                trainer.validate(method, datamodule, verbose=False)  # what can be done without any training
            with stop_signals.awaited():
                trainer.fit(method, datamodule, ckpt_path=start.checkpoint, weights_only=True)
            val_acc = _take_best(method, callbacks)
            tested = _merged(trainer.test(method, datamodule, verbose=False))

            task.report(run, config, datamodule, callbacks)
            metrics = _summarized(run, val_acc, tested)
            whole = made_whole(method, blank)
            version = _deployed(task, config, whole, datamodule, callbacks, run, metrics, steps=trainer.global_step)
            outcome = Outcome(
                metrics=metrics,
                run_id=run.run_id,
                name=config.registry.name,
                version=version,
                link=run_link(run.record.tracking_uri, run.record.experiment_id, run.run_id),
                ui_command=ui_command(run.record.tracking_uri),
                output=output,
                seconds=time.monotonic() - began,
                registering=config.registry.get("register", True),
            )
            _close(run, config, datamodule, outcome, steps=trainer.global_step, look=task.look)
    return outcome


def _build_method(config: DictConfig) -> Method:
    """Return the method with weights that follow from the seed; so do the random numbers after them."""
    seed_everything(config.core.seed, workers=True, verbose=False)
    method: Method = build(config.model)
    return method


@rank_zero_only
def _describe(
    run: Run,
    config: DictConfig,
    datamodule: ClassificationDataModule,
    output: Path,
    tags: Mapping[str, str],
    *,
    resumed: bool,
) -> None:
    """Put config, packages and data on record: in the output folder first, then in MLflow."""
    if resumed:
        write_resolved(config, output)
    (output / "packages.txt").write_text(installed_packages())
    write_data(datamodule, output / "data")
    run.log_params(_plain(config))
    for name in CONFIG_FILES:
        if (output / name).exists():
            run.log_file(output / name, "config")
    run.log_file(output / "data", "data")
    index = datamodule.index
    run.set_tags(
        {
            "data.digest": index.digest,
            "data.path": str(datamodule.root),
            NOTE_TAG: running_note(run_id=run.run_id, data=data_words(datamodule)),
        }
        | dict(tags)
    )
    run.log_metrics({"data/images": len(index), "data/bad_images": len(datamodule.bad_images)})
    for split, dataset in split_datasets(index, root=datamodule.root, name=datamodule.root.name).items():
        run.log_dataset(dataset, context=split)


@rank_zero_only
def _close(
    run: Run,
    config: DictConfig,
    datamodule: ClassificationDataModule,
    outcome: Outcome,
    *,
    steps: int,
    look: str,
) -> None:
    """Say what came of it, in the log and on the run's page."""
    note = finished_note(
        _plain(config),
        run_id=run.run_id,
        metrics=outcome.metrics,
        data=data_words(datamodule),
        steps=steps,
        name=outcome.name,
        version=outcome.version,
        look=look,
    )
    run.set_tags({NOTE_TAG: note})
    log.info("%s", closing_words(outcome))


def _build_trainer(config: DictConfig, run: Run, callbacks: dict[str, Callback], output: Path) -> Trainer:
    trainer: Trainer = build(
        config.trainer,
        logger=MLflowLogger(run),
        callbacks=[Pulse(), Monitors(callbacks), *callbacks.values()],
        default_root_dir=str(output),
    )
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # unless the config asks for another
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    use_batchnorm_sync(trainer)
    # what our callbacks log of an evaluation, they have made of the images of all processes
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\(.*sync_dist=True")
    watch_processes(trainer)
    run.step = lambda: trainer.global_step
    return trainer


def _take_best(method: Method, callbacks: dict[str, Any]) -> float | None:
    """Give ``method`` the best checkpoint's weights, and return its ``val_acc``; without one the last is the best."""
    best = callbacks.get("model_checkpoint")
    if best is None or not best.best_model_path:
        return None
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    load_whole(method, checkpoint["state_dict"])
    log.info("best checkpoint: step %d, %s %.4f", checkpoint["global_step"], best.monitor, best.best_model_score)
    # that of the callback which measures it, whatever the checkpoint was chosen by
    return next((state["val_acc"] for state in checkpoint["callbacks"].values() if "val_acc" in state), None)


@rank_zero_only
def _deployed(
    task: Task,
    config: DictConfig,
    method: Method,
    datamodule: ClassificationDataModule,
    callbacks: Mapping[str, Callback],
    run: Run,
    metrics: Mapping[str, float],
    *,
    steps: int,
) -> str | None:
    """Export and register what the training hands over; see `mlflow_ssl.tasks.deploy.deploy`."""
    deployable = task.deployable(config, method, datamodule, callbacks)
    return deploy(config, deployable, datamodule, run, metrics, steps=steps)


def _summarized(run: Run, val_acc: float | None, tested: dict[str, float]) -> dict[str, float]:
    """Return what the run comes to, with what its first validation found before any training."""
    first = {"val_acc_untrained": run.first["val_acc"]} if "val_acc" in run.first else {}
    baselines = {name: value for name, value in run.first.items() if name.startswith("baseline_acc_")}
    return first | baselines | tested | ({} if val_acc is None else {"val_acc": val_acc})


def _merged(results: Sequence[Any]) -> dict[str, float]:
    """Return Lightning's metrics of all loaders as one mapping."""
    return {name: float(value) for result in results for name, value in result.items()}


def _plain(config: DictConfig) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(config)
    return plain  # type: ignore[no-any-return]

"""Many trainings, one table: each a run below the sweep's, and the best network registered."""

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mlflow_ssl.callbacks.progress import clock
from mlflow_ssl.config import build, compose_config
from mlflow_ssl.errors import InputError
from mlflow_ssl.pictures.coordinates import Axis, parallel_coordinates_html
from mlflow_ssl.signals import stop_signals
from mlflow_ssl.sweeps.board import as_csv, as_note, counted
from mlflow_ssl.sweeps.launchers import Launcher, LocalLauncher, RayLauncher, SubmititLauncher
from mlflow_ssl.sweeps.space import shown
from mlflow_ssl.sweeps.study import State, Study, Trial, open_study
from mlflow_ssl.tasks.output import open_output
from mlflow_ssl.tasks.sweep_plan import RECORD, Plan, new_plan, resumed_plan, stored_sweep
from mlflow_ssl.tasks.sweep_trainings import LOOK_SECONDS, Trainings, without_ours
from mlflow_ssl.tracking.children import SWEEP_TAG, Children, all_sent
from mlflow_ssl.tracking.lifecycle import NOTE_TAG, sync, tracked_run
from mlflow_ssl.tracking.note import loading
from mlflow_ssl.tracking.opening import run_link, ui_command
from mlflow_ssl.tracking.run import Run
from mlflow_ssl.tracking.stored import begun_run

log = logging.getLogger(__name__)

ENDS: tuple[State, ...] = ("finished", "pruned", "failed", "killed")
FIGURES = ("val_acc", "val_acc_linear", "test_acc", "test_acc_linear", "embedding/rankme")
"""Metrics of the best training that the sweep's run has, too."""


def sweep(overrides: Sequence[str]) -> None:
    """Run the sweep that words ask for, or go on with the one that ``resume`` names, or that the launcher's run is.

    Raises:
        InputError: for a mistake in any word or value, before anything is begun.
    """
    if not any(word.startswith("resume=") for word in overrides):
        store = next((word.partition("=")[2] for word in overrides if word.startswith("tracking.uri=")), None)
        begun = begun_run(store)
        if begun is None:
            Sweep(new_plan(overrides)).run()
            return
        overrides = [*overrides, f"resume={begun}"]
    # what is said of the sweep is not the training's to know
    known = ("resume=", "experiment=", "core.name=", "tracking.")
    config = compose_config([word for word in overrides if word.startswith(known)])
    if not go_on(config, overrides):
        raise InputError(f"resume must name a sweep where something is said of one, got {config.resume}, a training")


def go_on(config: DictConfig, overrides: Sequence[str]) -> bool:
    """Go on with the sweep that ``resume`` names, and return whether it names one."""
    stored = stored_sweep(config)
    if stored is None:
        return False
    Sweep(resumed_plan(stored, overrides)).run()
    return True


class Sweep:
    """Run trainings until all are done, each in a process of its own.

    Args:
        plan: what is to be done.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._settings = plan.settings
        self._keys = [swept.key for swept in plan.space]
        self._registered = ""

    def run(self) -> None:
        """Run all trainings that are missing, and register the best network.

        Raises:
            InputError: if storage or launcher cannot be used, or no training finished.
            Interrupted: for a signal, when all trainings have saved and ended.
        """
        plan, began, without = self._plan, time.monotonic(), without_ours()
        with open_output(plan.output, log_level=plan.config.core.log_level, resumed=plan.run_id is not None):
            study = self._open_study()
            launcher, jobs = self._open_launcher()
            plan.write()  # before there is a run, so that any can be gone on with
            with (
                contextlib.closing(launcher),
                tracked_run(
                    self._parent_config(),
                    output=plan.output,
                    run_id=plan.run_id,
                    name=f"sweep-{self._settings['name']}",
                ) as run,
            ):
                stop_signals.install()  # Ray puts its own before them
                assert run.client is not None
                children = Children(run.client, run.record)
                run.describe = lambda status, reason: self._note(run, study, f"**{status}**: {reason}\n")
                self._describe(run)
                trainings = Trainings(
                    plan,
                    study,
                    children,
                    launcher,
                    jobs=jobs,
                    without=without,
                    changed=lambda: self._show(run, study),
                )
                try:
                    with stop_signals.awaited():
                        while trainings.go_on() and not stop_signals.received():
                            time.sleep(LOOK_SECONDS)
                finally:
                    trainings.stop()
                    children.drain(patience=5)
                self._close(run, study, children, seconds=time.monotonic() - began)

    def _open_study(self) -> Study:
        settings, plan = self._settings, self._plan
        sampler, pruner = settings["sampler"], settings["pruner"]
        study = open_study(
            plan.study,
            plan.space,
            storage=settings["storage"],
            direction=settings["direction"],
            trials=settings["trials"],
            sampler=None if sampler is None else build(OmegaConf.create(sampler)),
            pruner=None if pruner is None else build(OmegaConf.create(pruner)),
            resumed=plan.run_id is not None,
        )
        begun = len(study.trials())
        if begun and sampler and sampler.get("seed") is not None:
            # the same seed would draw again what it has drawn
            study.study.sampler = build(OmegaConf.create(sampler | {"seed": sampler["seed"] + begun}))
        if settings["retry_failed"] and plan.run_id is not None:
            study.retry_failed()
        return study

    def _open_launcher(self) -> tuple[Launcher, int]:
        name, jobs = self._settings["launcher"], self._settings["jobs"]
        if name == "local":
            local = LocalLauncher(None if jobs == "auto" else jobs)
            return local, local.jobs
        if jobs == "auto":
            raise InputError(f"sweep.jobs must be a number with sweep.launcher={name}; add sweep.jobs=N")
        if name == "ray":
            return RayLauncher(self._settings["ray"]), jobs
        return SubmititLauncher(self._settings["submitit"], self._plan.output / "submitit"), jobs

    def _parent_config(self) -> dict[str, Any]:
        config: Any = OmegaConf.to_container(self._plan.config)
        return config | {"tracking": config["tracking"] | {"system_metrics": False}}  # type: ignore[no-any-return]

    # what is shown

    def _describe(self, run: Run) -> None:
        """Say what is to be done."""
        run.log_file(self._plan.output / RECORD, "config")
        space = dict(word.split("=", 1) for word in self._plan.space_words)
        run.log_params({"sweep": dict(self._settings) | {"space": space}})
        run.set_tags({SWEEP_TAG: self._settings["name"]})

    def _show(self, run: Run, study: Study) -> None:
        """Bring tables, picture and metrics up to date."""
        trials = study.trials()
        run.log_text(as_csv(trials, self._keys, self._settings["monitor"]), "sweep/children.csv")
        run.set_tags({NOTE_TAG: self._note(run, study)})
        measured = [trial for trial in trials if trial.result is not None and trial.state in ("finished", "pruned")]
        if not measured:
            return
        run.log_text(self._picture(measured), "sweep/parallel_coordinates.html")
        counts = counted(trials)
        metrics: dict[str, float] = {f"sweep/{state}": counts.get(state, 0) for state in ENDS}
        best = study.best()
        if best is not None and best.result is not None:
            metrics[f"sweep/best_{self._settings['monitor'].rpartition('/')[2]}"] = best.result
        run.log_metrics(metrics, _num_ended(trials))

    def _note(self, run: Run, study: Study, ending: str = "") -> str:
        return as_note(
            study.trials(),
            self._keys,
            monitor=self._settings["monitor"],
            highest=self._settings["direction"] == "maximize",
            experiment_id=run.record.experiment_id,
            run_id=run.run_id,
            ending=ending,
            registered=self._registered,
        )

    def _picture(self, trials: Sequence[Trial]) -> str:
        axes = [Axis(swept.key, [trial.values[swept.key] for trial in trials], swept.log) for swept in self._plan.space]
        results = Axis(self._settings["monitor"], [trial.result for trial in trials if trial.result is not None])
        return parallel_coordinates_html(
            axes,
            results,
            names=[f"{trial.number} ({trial.state})" for trial in trials],
            whole=[trial.state == "finished" for trial in trials],
            title=f"{len(trials)} trainings; those that were pruned are paler",
        )

    # the end

    def _close(self, run: Run, study: Study, children: Children, *, seconds: float) -> None:
        """Register the best network, and say what came of it all.

        Raises:
            InputError: if no training finished.
        """
        trials, best = study.trials(), study.best()
        if best is None or best.run_id is None:
            first = next((trial.reason for trial in trials if trial.reason), "none was begun")
            raise InputError(f"none of the {len(trials)} trainings finished; of the first: {first}")
        self._send_the_rest(trials)
        metrics = children.metrics(best.run_id)
        run.log_metrics({name: metrics[name] for name in FIGURES if name in metrics}, _num_ended(trials))
        registered = self._register(children, best)
        run.set_tags({"sweep.best_trial": str(best.number), "sweep.best_run": best.run_id})
        if registered:
            name, version = registered
            self._registered = f"Load the best network:\n```python\n{loading(name, version)}\n```\n"
            run.set_tags({"sweep.best_version": f"models:/{name}/{version}" if version else "not yet"})
        self._show(run, study)
        children.drain(patience=self._plan.config.tracking.wait_at_end_seconds)
        log.info("%s", self._closing_words(run, trials, best, registered, seconds=seconds))

    def _register(self, children: Children, best: Trial) -> tuple[str, str | None] | None:
        if not self._plan.config.registry.get("register", True):
            return None
        output = self._plan.output / "children" / f"{best.number:03d}"
        return children.register(output, patience=self._plan.config.tracking.wait_at_end_seconds)

    def _send_the_rest(self, trials: Sequence[Trial]) -> None:
        """Send what trainings could not, while MLflow was away."""
        for trial in trials:
            output = self._plan.output / "children" / f"{trial.number:03d}"
            if trial.state == "finished" and not all_sent(output):
                with contextlib.suppress(Exception):
                    sync(output)

    def _closing_words(
        self,
        run: Run,
        trials: Sequence[Trial],
        best: Trial,
        registered: tuple[str, str | None] | None,
        *,
        seconds: float,
    ) -> str:
        counts = ", ".join(f"{count} {state}" for state, count in counted(trials).items())
        values = " ".join(f"{key}={shown(value)}" for key, value in best.values.items())
        lines = [
            f"finished in {clock(seconds)}: {counts}",
            f"best       training {best.number}: {self._settings['monitor']} {best.result:.4f}, {values}",
            f"output     {self._plan.output}",
        ]
        if registered:
            lines.append(f"registered {registered[0]} version {registered[1] or '(not yet: MLflow does not answer)'}")
        command = ui_command(run.record.tracking_uri)
        lines += [f"look       {command}"] if command else []
        lines.append(f"run        {run_link(run.record.tracking_uri, run.record.experiment_id, run.run_id)}")
        return "\n".join(lines)


def _num_ended(trials: Sequence[Trial]) -> int:
    """Return how many trainings came to an end: the step of the sweep's own metrics."""
    return sum(trial.state in ("finished", "pruned", "failed") for trial in trials)

"""The trainings of a sweep that run now: begun, watched, pruned, and settled when they end."""

import logging
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlflow_ssl.config import quote_text
from mlflow_ssl.errors import InputError, Interrupted
from mlflow_ssl.sweeps.launchers import LOST, AdoptedJob, Job, Launcher
from mlflow_ssl.sweeps.process import STOP_SECONDS, Training
from mlflow_ssl.sweeps.space import as_words, shown
from mlflow_ssl.sweeps.study import State, Study, Trial
from mlflow_ssl.tasks.output import SHARED_VARIABLE
from mlflow_ssl.tasks.sweep_plan import Plan
from mlflow_ssl.tracking.children import STATE_TAG, Children, lock_file, status_of, was_opened
from mlflow_ssl.tracking.lifecycle import IMPATIENCE
from mlflow_ssl.tracking.opening import REASON_TAG
from mlflow_ssl.tracking.stored import TRIAL_TAG
from mlflow_ssl.tracking.tail import MetricTail

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
KILL_SECONDS = 10.0
"""How long those that are killed may take to be gone."""
AGAIN_SECONDS = 5.0
"""Between two tries to open a run while MLflow does not answer."""
STATES: dict[str, State] = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "killed"}


def without_ours() -> tuple[str, ...]:
    """Return variables that a training must not have from us; to be asked before the sweep's own run is open."""
    ours = (key for key in IMPATIENCE if key not in os.environ)
    return (SHARED_VARIABLE, "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", *ours)


@dataclass
class _Running:
    trial: Trial
    run_id: str
    output: Path
    job: Job
    tail: MetricTail
    validations: int = 0
    pruned: str = ""


class Trainings:
    """Trainings that run at once.

    Args:
        plan: what the sweep is to do.
        study: its trials.
        children: their runs in MLflow.
        launcher: starts them.
        jobs: how many at once.
        without: see `without_ours`.
        changed: called when one begins or ends.
    """

    def __init__(
        self,
        plan: Plan,
        study: Study,
        children: Children,
        launcher: Launcher,
        *,
        jobs: int,
        without: tuple[str, ...],
        changed: Callable[[], None],
    ) -> None:
        self._plan = plan
        self._study = study
        self._children = children
        self._launcher = launcher
        self._jobs = jobs
        self._without = without
        self._changed = changed
        self._due = deque(study.unfinished())
        self._running: list[_Running] = []
        self._not_before = 0.0

    def go_on(self) -> bool:
        """Begin what there is room for, look at what runs, and return whether there was anything."""
        self._fill()
        if not self._running and not self._due:
            return False
        for running in list(self._running):
            code = self._code(running)
            self._look(running, ended=code is not None)
            if code is not None:
                self._running.remove(running)
                self._settle(running, code)
        self._children.flush()
        return True

    def _code(self, running: _Running) -> int | None:
        """Return a training's exit code; None while it runs, also where only what looked after it is gone."""
        code = running.job.poll()
        if code == LOST:
            adopted = AdoptedJob(
                lock_file(running.output), self._training(running.trial, running.run_id, running.output)
            )
            if adopted.running:
                running.job, code = adopted, None
        return code

    def stop(self) -> None:
        """Have all that run save and end; a second signal kills them."""
        if self._running:
            log.warning("%d trainings are told to save and to end", len(self._running))
        for running in self._running:
            running.job.stop()
        end = time.monotonic() + STOP_SECONDS
        try:
            while self._running and time.monotonic() < end:
                self._settle_ended()
                time.sleep(0.2)
        except Interrupted:
            log.warning("the trainings are killed")
        for running in self._running:
            running.job.kill()
        end = time.monotonic() + KILL_SECONDS
        while self._running and time.monotonic() < end:
            self._settle_ended()
            time.sleep(0.2)

    def _settle_ended(self) -> None:
        for running in list(self._running):
            code = self._code(running)
            if code is not None:
                self._running.remove(running)
                self._look(running, ended=True)
                self._settle(running, code)

    # beginning

    def _fill(self) -> None:
        while len(self._running) < self._jobs and time.monotonic() >= self._not_before:
            if not self._due:
                trial = self._study.next()
                if trial is None:
                    return
                self._due.append(trial)
            if self._begin(self._due[0]):
                self._due.popleft()
                self._changed()
            else:
                self._not_before = time.monotonic() + AGAIN_SECONDS

    def _begin(self, trial: Trial) -> bool:
        """Begin a training, or go on with it; return False while MLflow does not answer."""
        words = " ".join(f"{key}={shown(value)}" for key, value in trial.values.items())
        tags = {TRIAL_TAG: str(trial.number), "sweep.overrides": words}
        run_id = trial.run_id or self._children.open(f"{trial.number:03d} {words}", tags)
        if run_id is None:
            return False
        self._study.started(trial.number, run_id)
        self._children.say(run_id, {STATE_TAG: "running"})
        output = self._plan.output / "children" / f"{trial.number:03d}"
        job = self._job(trial, run_id, output)
        self._running.append(_Running(trial, run_id, output, job, MetricTail(output, self._plan.settings["monitor"])))
        log.info("training %d: %s", trial.number, words)
        return True

    def _job(self, trial: Trial, run_id: str, output: Path) -> Job:
        training = self._training(trial, run_id, output)
        if not was_opened(output):
            shutil.rmtree(output, ignore_errors=True)  # of a process that did not come far
            return self._launcher.start(training)
        adopted = AdoptedJob(lock_file(output), training)
        if adopted.running or status_of(output) in ("FINISHED", "FAILED"):
            return adopted  # it went on, or came to its end, while no sweep looked
        return self._launcher.start(training)

    def _training(self, trial: Trial, run_id: str, output: Path) -> Training:
        words = [
            *self._plan.words,
            *as_words(trial.values),
            f"core.output_dir={quote_text(str(output))}",
            "sweep=none",
            "++registry.register=false",
        ]
        log_file = output.with_suffix(".log")
        log_file.parent.mkdir(exist_ok=True)
        here = Path.cwd()
        if was_opened(output):
            return Training((*words, f"resume={run_id}"), here, log_file, without=self._without)
        return Training(tuple(words), here, log_file, self._children.environment(run_id), self._without)

    # watching

    def _look(self, running: _Running, *, ended: bool) -> None:
        """Report what a training has measured, and stop it where that is not worth going on with."""
        values = [value for step, value in running.tail.new() if step > 0]  # at 0 nothing is trained
        if not values:
            return
        prune = self._study.report(running.trial.number, values, first=running.validations)
        running.validations += len(values)
        if prune and not ended and not running.pruned:
            monitor = self._plan.settings["monitor"]
            running.pruned = f"pruned: {monitor} {values[-1]:.4f} after {running.validations} validations"
            running.job.stop()

    # ending

    def _settle(self, running: _Running, code: int) -> None:
        number, status = running.trial.number, status_of(running.output)
        state: State = STATES[status] if status else ("killed" if code < 0 or code > 128 else "failed")
        if state == "killed" and running.pruned:
            state = "pruned"
        reason = "" if state == "finished" else running.pruned or self._reason(running, code, died=status is None)
        if status is None:
            ending = "FAILED" if state == "failed" else "KILLED"
            self._children.settle(running.run_id, running.output, status=ending, reason=reason)
        if state == "finished" and not running.validations:
            state, reason = "failed", self._without_monitor(running)
        self._tell(number, state, reason)
        said = {STATE_TAG: state} | ({REASON_TAG: reason} if state == "pruned" else {})
        self._children.say(running.run_id, said)
        log.info("training %d is %s%s", number, state, f": {reason}" if reason else "")
        self._changed()
        if state == "failed" and not running.validations and status == "FINISHED":
            raise InputError(reason)  # as it would be of every other

    def _tell(self, number: int, state: State, reason: str) -> None:
        if state == "finished":
            self._study.finished(number)
        else:
            {"pruned": self._study.pruned, "failed": self._study.failed}.get(state, self._study.killed)(number, reason)

    def _reason(self, running: _Running, code: int, *, died: bool) -> str:
        if died and code == LOST:
            return "its process was killed by SIGKILL, or its machine is gone"
        if died and code < 0:
            return f"its process was killed by {signal.Signals(-code).name}"
        return self._children.reason(running.run_id) or _last_line(running.output.with_suffix(".log"))

    def _without_monitor(self, running: _Running) -> str:
        names = ", ".join(sorted(name for name in running.tail.names if not name.startswith(("system/", "train/"))))
        return (
            f"sweep.monitor must be a metric that the trainings log, got {self._plan.settings['monitor']!r}; "
            f"training {running.trial.number} logged {names}"
        )


def _last_line(file: Path) -> str:
    try:
        lines = file.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].removeprefix("error: ") if lines else "its process said nothing"

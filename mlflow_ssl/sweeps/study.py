"""The trials of a sweep, in a database of Optuna's: what is tried next, what came of it, what is still missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import optuna
from optuna.exceptions import DuplicatedStudyError, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from mlflow_ssl.config import Swept
from mlflow_ssl.errors import InputError
from mlflow_ssl.secret import redact
from mlflow_ssl.sweeps.space import distributions, grid

State = Literal["waiting", "running", "finished", "pruned", "failed", "killed"]

LOCKED_SECONDS = 60
"""How long SQLite waits for another process that writes."""
_STATES: Mapping[TrialState, State] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Trial:
    """One training of a sweep.

    Attributes:
        number: counts from 0.
        values: what it sets, by key.
        state: how it stands; ``killed`` is to be gone on with when the sweep is resumed.
        result: its best value of the monitor; while it runs, the best so far.
        run_id: its run in MLflow.
        reason: why it did not finish.
        began: when it was first started.
        ended: when it came to its end.
        retried: whether a later trial tries the same again.
    """

    number: int
    values: Mapping[str, Any]
    state: State
    result: float | None = None
    run_id: str | None = None
    reason: str = ""
    began: datetime | None = None
    ended: datetime | None = None
    retried: bool = False


@dataclass
class Study:
    """The trials of one sweep; a single process writes them.

    Args:
        study: Optuna's.
        space: what is searched.
        total: how many trials there are to be; those that are tried again count once.
    """

    study: optuna.Study
    space: Sequence[Swept]
    total: int
    _open: dict[int, optuna.Trial] = field(default_factory=dict)

    def trials(self) -> list[Trial]:
        """Return all trials, in order."""
        frozen = self.study.get_trials(deepcopy=False)
        retried = {trial.user_attrs["retry_of"] for trial in frozen if "retry_of" in trial.user_attrs}
        return [self._trial(trial, retried=trial.number in retried) for trial in frozen]

    def _trial(self, frozen: FrozenTrial, *, retried: bool) -> Trial:
        attrs, state = frozen.user_attrs, _STATES[frozen.state]
        fixed = frozen.system_attrs.get("fixed_params", {})  # of one that waits
        return Trial(
            number=frozen.number,
            values={swept.key: (frozen.params or fixed)[swept.key] for swept in self.space},
            state="killed" if state == "running" and attrs.get("killed") else state,
            result=self._best(list(frozen.intermediate_values.values())),
            run_id=attrs.get("run_id"),
            reason=attrs.get("reason", ""),
            began=frozen.datetime_start,
            ended=frozen.datetime_complete,
            retried=retried,
        )

    def _best(self, values: Sequence[float]) -> float | None:
        better = max if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else min
        return better(values) if values else None

    def best(self) -> Trial | None:
        """Return the finished trial with the best result; of equals the first."""
        finished = [trial for trial in self.trials() if trial.state == "finished" and trial.result is not None]
        result = self._best([trial.result for trial in finished if trial.result is not None])
        return next((trial for trial in finished if trial.result == result), None)

    def unfinished(self) -> list[Trial]:
        """Return the trials that were begun, and came to no end of their own."""
        return [trial for trial in self.trials() if trial.state in ("running", "killed")]

    def next(self) -> Trial | None:
        """Return what to try next; None where all has been begun."""
        frozen = self.study.get_trials(deepcopy=False)
        waiting = any(trial.state == TrialState.WAITING for trial in frozen)
        if not waiting and sum("retry_of" not in trial.user_attrs for trial in frozen) >= self.total:
            return None
        asked = self.study.ask(distributions(self.space))
        self._open[asked.number] = asked
        return self.trials()[asked.number]

    def retry_failed(self) -> None:
        """Have every trial that failed tried once more, as a new one."""
        for trial in self.trials():
            if trial.state == "failed" and not trial.retried:
                self.study.enqueue_trial(dict(trial.values), user_attrs={"retry_of": trial.number})

    def started(self, number: int, run_id: str) -> None:
        """Remember which run in MLflow a trial has."""
        trial = self._asked(number)
        trial.set_user_attr("run_id", run_id)
        trial.set_user_attr("killed", value=False)
        trial.set_user_attr("reason", "")

    def report(self, number: int, values: Sequence[float], *, first: int) -> bool:
        """Say what a training's monitor was at validations ``first``, ``first + 1``, ...; return whether to prune it.

        Validations count from 0, as Optuna's pruners do. Trials are compared at the same number of validations, since
        their steps may be of different sizes.
        """
        trial = self._asked(number)
        known = self.study.get_trials(deepcopy=False)[number].intermediate_values
        for step, value in enumerate(values, first):
            if step not in known:
                trial.report(value, step)
        return bool(values and trial.should_prune())

    def finished(self, number: int) -> None:
        """End a trial with the best that it reported."""
        values = self.study.get_trials(deepcopy=False)[number].intermediate_values
        self.study.tell(number, self._best(list(values.values())))

    def pruned(self, number: int, reason: str) -> None:
        """End a trial that was not worth going on with."""
        self._asked(number).set_user_attr("reason", reason)
        self.study.tell(number, state=TrialState.PRUNED)

    def failed(self, number: int, reason: str) -> None:
        """End a trial that went wrong."""
        self._asked(number).set_user_attr("reason", reason)
        self.study.tell(number, state=TrialState.FAIL)

    def killed(self, number: int, reason: str) -> None:
        """Leave a trial as it is, to be gone on with when the sweep is resumed."""
        trial = self._asked(number)
        trial.set_user_attr("reason", reason)
        trial.set_user_attr("killed", value=True)

    def _asked(self, number: int) -> optuna.Trial:
        if number not in self._open:  # of the process that this one goes on for
            self._open[number] = optuna.Trial(self.study, self.study.get_trials(deepcopy=False)[number]._trial_id)
        return self._open[number]


def open_study(
    name: str,
    space: Sequence[Swept],
    *,
    storage: str,
    direction: str,
    trials: int | None,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    resumed: bool = False,
) -> Study:
    """Return the trials of a new sweep, or of one that goes on.

    Args:
        name: of the study in the storage.
        space: what is searched.
        storage: URL of a database.
        direction: ``maximize`` or ``minimize``.
        trials: how many; None for every combination.
        sampler: chooses the values; None takes every combination in turn.
        pruner: ends what is not worth going on with; None ends nothing.
        resumed: whether there is such a study already.

    Raises:
        InputError: if the storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            study_name=name,
            storage=_storage(storage),
            direction="maximize" if direction == "maximize" else "minimize",
            sampler=sampler or optuna.samplers.RandomSampler(seed=0),
            pruner=pruner or optuna.pruners.NopPruner(),
            load_if_exists=resumed,
        )
    except DuplicatedStudyError as error:
        raise InputError(f"sweep.storage holds a sweep {name} already: {redact(storage)}; resume it") from error
    except (ImportError, SQLAlchemyError, StorageInternalError) as error:
        reason = redact(str(error).strip().splitlines()[0])
        raise InputError(f"sweep.storage must be a database that answers, got {redact(storage)}: {reason}") from error
    points = [] if sampler else grid(space)[:trials]
    known = len(study.get_trials(deepcopy=False))
    for point in points[known:]:
        study.enqueue_trial(point)
    return Study(study, space, total=len(points) if sampler is None else (trials or 0))


def _storage(url: str) -> BaseStorage:
    if not url.startswith("sqlite"):
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCKED_SECONDS}})

"""Which trainings are still to be, after whatever has happened."""

import warnings

import optuna
import pytest
from servers import running_postgresql

from mlflow_ssl.config import Swept
from mlflow_ssl.errors import InputError
from mlflow_ssl.sweeps.study import open_study

pytestmark = pytest.mark.filterwarnings("default")
SPACE = [Swept("lr", ("0.1", "0.2")), Swept("backbone", ("a", "b"))]
LINE = [Swept("x", low=0.0, high=1.0)]


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens the same study again, as another process would."""

    def again(space=SPACE, **settings):
        database = tmp_path / "study.db"
        defaults = {"storage": f"sqlite:///{database}", "direction": "maximize", "trials": None}
        return open_study("mine", space, **defaults | settings, resumed=database.exists())

    return again


def begin(study, number_of=1):
    trials = [study.next() for _ in range(number_of)]
    for trial in trials:
        study.started(trial.number, f"run{trial.number}")
    return trials


def states(study):
    return [trial.state for trial in study.trials()]


def test_a_grid_is_tried_once_each(opened):
    study = opened()
    assert states(study) == ["waiting"] * 4
    tried = [tuple(trial.values.values()) for trial in begin(study, 4)]
    assert tried == [("0.1", "a"), ("0.1", "b"), ("0.2", "a"), ("0.2", "b")]
    assert study.next() is None


def test_another_process_goes_on_with_what_is_missing(opened):
    study = opened()
    begin(study, 3)
    study.report(0, [0.5, 0.7, 0.6], first=0)
    study.finished(0)
    study.failed(1, "no memory")
    study.killed(2, "killed by SIGKILL")
    again = opened()
    assert [(trial.number, trial.state, trial.run_id) for trial in again.unfinished()] == [(2, "killed", "run2")]
    (missing,) = begin(again)
    assert (missing.number, dict(missing.values)) == (3, {"lr": "0.2", "backbone": "b"})
    assert again.next() is None
    again.started(2, "run2")
    assert states(again) == ["finished", "failed", "running", "running"]
    again.report(2, [0.1], first=0)
    again.finished(2)
    first = again.trials()[0]
    assert (first.result, first.run_id) == (0.7, "run0")
    assert [trial.reason for trial in again.trials()] == ["", "no memory", "", ""]


def test_what_failed_is_tried_again_only_if_asked_and_once(opened):
    study = opened()
    begin(study, 4)
    study.failed(1, "no memory")
    assert opened().next() is None
    study = opened()
    study.retry_failed()
    study.retry_failed()
    (again,) = begin(study)
    assert (again.number, again.values) == (4, study.trials()[1].values)
    assert study.next() is None
    assert [trial.retried for trial in study.trials()] == [False, True, False, False, False]


@pytest.mark.parametrize(("direction", "best"), [("maximize", 1), ("minimize", 0)])
def test_the_best_is_of_those_that_finished(opened, direction, best):
    study = opened(direction=direction)
    begin(study, 4)
    for number, values in enumerate([[0.3, 0.2], [0.5, 0.6], [0.9, 0.1], [0.9, 0.1]]):
        study.report(number, values, first=0)
    study.finished(0)
    study.finished(1)
    study.pruned(2, "pruned")
    study.killed(3, "killed")
    assert study.best().number == best
    assert study.trials()[best].result == {"maximize": 0.6, "minimize": 0.2}[direction]


def test_a_validation_that_is_reported_again_counts_once(opened):
    study = opened()
    begin(study)
    study.report(0, [0.5, 0.4], first=0)
    again = opened()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Optuna's, of a step that it knows
        again.report(0, [0.1, 0.1, 0.9], first=0)
    values = again.study.get_trials()[0].intermediate_values
    assert values == {0: 0.5, 1: 0.4, 2: 0.9}


def test_what_is_worse_than_the_median_of_the_others_is_pruned(opened):
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=1)
    study = opened(pruner=pruner)
    begin(study, 4)
    for number, level in enumerate([0.5, 0.6]):
        assert not study.report(number, [level, level], first=0)
        study.finished(number)
    assert not study.report(2, [0.1], first=0)  # every training is given its first validation
    assert study.report(2, [0.1], first=1)
    assert not study.report(3, [0.1, 0.9], first=0)


def test_as_many_as_asked_for_are_drawn_and_more_when_more_are_asked_for(opened):
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = opened(LINE, trials=3, sampler=sampler)
    drawn = begin(study, 3)
    assert len({trial.values["x"] for trial in drawn}) == 3
    assert study.next() is None
    more = opened(LINE, trials=4, sampler=sampler)
    assert begin(more)[0].number == 3
    assert more.next() is None
    more.failed(3, "no memory")
    more.retry_failed()
    assert begin(more)[0].number == 4
    assert more.next() is None
    # what was tried again is one of the five
    assert begin(opened(LINE, trials=5, sampler=sampler))[0].number == 5


def test_a_sweep_of_the_same_name_is_not_written_into(opened, tmp_path):
    opened()
    with pytest.raises(InputError, match=r"sweep.storage holds a sweep mine already: sqlite:///.*resume it"):
        open_study(
            "mine",
            SPACE,
            storage=f"sqlite:///{tmp_path / 'study.db'}",
            direction="maximize",
            trials=None,
            resumed=False,
        )


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "nonsense", "postgresql://me:hunter2@127.0.0.1:1/x"])
def test_a_storage_that_does_not_answer_is_one_line_without_its_password(url):
    with pytest.raises(InputError, match=r"sweep.storage must be a database that answers") as caught:
        open_study("mine", SPACE, storage=url, direction="maximize", trials=None)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_trials_in_postgresql_are_gone_on_with_too():
    with running_postgresql() as url:
        settings = {"storage": url, "direction": "maximize", "trials": None}
        study = open_study("mine", SPACE, **settings)
        begin(study, 2)
        study.report(0, [0.5], first=0)
        study.finished(0)
        again = open_study("mine", SPACE, **settings, resumed=True)
        assert [trial.number for trial in again.unfinished()] == [1]
        assert [trial.result for trial in again.trials()] == [0.5, None, None, None]
        for each in (study, again):
            each.study._storage._backend.remove_session()
            each.study._storage._backend.engine.dispose()

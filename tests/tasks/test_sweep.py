"""A sweep whose trainings take a second: what it begins, what it makes of their ends, and what it shows."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pretended import calls, pretend

from mlflow_ssl.cli import main, to_overrides
from mlflow_ssl.tasks.sweep_plan import new_plan

pytestmark = pytest.mark.filterwarnings("default")
WORDS = ("experiment=byol", "data_path=/nowhere", "trainer=lightning_cpu")
ROOT = Path(__file__).parents[2]
SEEDS = "core.seed=1,2,3,4"


@pytest.fixture
def sweep(store, monkeypatch):
    """Return a function that sweeps with pretended trainings, and gives the exit code, the parent and its children."""
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(Path.cwd() / "cache"))

    def run(*words, **behaviour):
        pretend(Path.cwd(), **behaviour)
        code = main([*WORDS, *words])
        return (code, *found(store))

    return run


def found(store):
    """Return the sweep's run and its children by number."""
    runs = store.search_runs([experiment.experiment_id for experiment in store.search_experiments()])
    (parent,) = [run for run in runs if "mlflow_ssl.sweep" in run.data.tags]
    children = {int(run.data.tags["sweep.trial"]): run for run in runs if "sweep.trial" in run.data.tags}
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in children.values())
    return parent, children


def table(store, parent, folder):
    file = store.download_artifacts(parent.info.run_id, "sweep/children.csv", str(folder))
    with Path(file).open() as lines:
        return list(csv.DictReader(lines))


def states(children):
    return [children[number].data.tags["sweep.state"] for number in sorted(children)]


def test_a_failed_and_a_killed_training_are_reported_and_resuming_runs_what_is_missing(sweep, store, tmp_path, capsys):
    does = {"core.seed=2": "fail", "core.seed=3": "kill"}
    code, parent, children = sweep("-m", SEEDS, "sweep.jobs=2", does=does, values={"core.seed=4": [0.2, 0.9, 0.8]})
    assert (code, parent.info.status) == (0, "FINISHED")
    assert states(children) == ["finished", "failed", "killed", "finished"]
    assert [children[number].info.status for number in range(4)] == ["FINISHED", "FAILED", "KILLED", "FINISHED"]
    assert [children[number].info.run_name for number in range(2)] == ["000 core.seed=1", "001 core.seed=2"]
    rows = table(store, parent, tmp_path)
    assert [row["core.seed"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["val_acc"] for row in rows] == ["0.5", "", "0.1", "0.9"]  # the best after the beginning
    assert rows[1]["reason"] == "core.seed must be another"
    assert "killed by SIGKILL" in rows[2]["reason"]
    note = parent.data.tags["mlflow.note.content"]
    assert "2 finished, 1 killed, 1 failed" in note
    assert note.index("| **0.9000** |") < note.index("| **0.5000** |") < note.index("core.seed must be another")
    assert f"(#/experiments/{parent.info.experiment_id}/runs/{children[3].info.run_id})" in note
    assert parent.data.tags["sweep.best_run"] == children[3].info.run_id
    assert parent.data.metrics["val_acc"] == 0.8  # as its own run has it
    counts = {name: value for name, value in parent.data.metrics.items() if name.startswith("sweep/")}
    assert counts == {
        "sweep/finished": 2,
        "sweep/pruned": 0,
        "sweep/failed": 1,
        "sweep/killed": 1,
        "sweep/best_val_acc": 0.9,
    }
    assert parent.data.params["sweep.space.core.seed"] == "choice(1,2,3,4)"
    files = {info.path for info in store.list_artifacts(parent.info.run_id, "sweep")}
    assert files == {"sweep/children.csv", "sweep/parallel_coordinates.html"}

    begun = len(calls(Path.cwd()))
    again = sweep(f"resume={parent.info.run_id}", does=does)
    assert (again[0], again[1].info.run_id) == (0, parent.info.run_id)
    assert states(again[2]) == ["finished", "failed", "finished", "finished"]
    assert [(call["core.seed"], call["resume"]) for call in calls(Path.cwd())[begun:]] == [
        ("3", children[2].info.run_id)
    ]
    retried = sweep(f"resume={parent.info.run_id}", "sweep.retry_failed=true")
    assert retried[0] == 0
    assert states(retried[2]) == ["finished", "failed", "finished", "finished", "finished"]
    assert calls(Path.cwd())[-1]["core.seed"] == "2"
    assert "4 finished; best" in retried[1].data.tags["mlflow.note.content"]


def test_trainings_are_told_nothing_that_is_the_sweeps(sweep):
    _, _, children = sweep("-m", "core.seed=1,2", "core.tag=mine", "sweep.jobs=2")
    first = next(call for call in calls(Path.cwd()) if call["core.seed"] == "1")
    assert (first["core.tag"], first["registry.register"], first["sweep"]) == ("mine", "false", "none")
    assert Path(first["core.output_dir"].strip("'")).name == "000"
    environment = json.loads(children[0].data.tags["environment"])
    assert environment == {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "MLFLOW_SSL_OUTPUT_DIR": None,
        "MLFLOW_HTTP_REQUEST_TIMEOUT": None,
    }


def test_what_is_worse_than_the_others_is_pruned(sweep, store):
    words = ["-m", "core.seed=1,2,3,4", "sweep.jobs=1", "sweep.pruner={_target_: optuna.pruners.MedianPruner}"]
    words += ["+sweep.pruner.n_startup_trials=1", "+sweep.pruner.n_warmup_steps=1"]
    curves = {"core.seed=2": [0.1] * 100, "core.seed=3": [0.2, 0.9, 0.9], "core.seed=4": [0.6, *[0.1] * 100]}
    code, parent, children = sweep(*words, pause=0.3, values=curves)
    assert (code, parent.info.status) == (0, "FINISHED")
    # the first validation is never judged; the third training begins badly and gets better
    assert states(children) == ["finished", "pruned", "finished", "pruned"]
    for number in (1, 3):
        assert children[number].info.status == "KILLED"
        assert children[number].data.tags["mlflow_ssl.reason"].startswith("pruned: val_acc 0.1000 after ")
        assert len(store.get_metric_history(children[number].info.run_id, "val_acc")) < 300
    assert "2 finished, 2 pruned" in parent.data.tags["mlflow.note.content"]


def stop_when_waiting(number=signal.SIGTERM):
    """Send this process a signal once a training waits for one."""
    waiting = Path("waiting").resolve()

    def watch():
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if waiting.exists():
                os.kill(os.getpid(), number)
                return
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()


def test_a_signal_ends_the_trainings_in_order_and_the_sweep_goes_on_later(sweep):
    stop_when_waiting()
    code, parent, children = sweep("-m", SEEDS, "sweep.jobs=2", does={"core.seed=2": "wait"})
    assert code == 143
    assert (parent.info.status, parent.data.tags["mlflow_ssl.reason"]) == ("KILLED", "stopped by SIGTERM")
    assert f"mlflow run . -P resume={parent.info.run_id}" in parent.data.tags["mlflow.note.content"]
    assert children[1].info.status == "KILLED"
    assert children[1].data.tags["mlflow_ssl.reason"] == "stopped by SIGTERM"
    assert children[1].data.tags["sweep.state"] == "killed"
    finished = {number for number, run in children.items() if run.data.tags["sweep.state"] == "finished"}
    begun = len(calls(Path.cwd()))
    code, parent, children = sweep("resume=last", SEEDS, "-m")
    assert (code, parent.info.status) == (0, "FINISHED")
    assert states(children) == ["finished"] * 4
    seeds = {int(call["core.seed"]) - 1 for call in calls(Path.cwd())[begun:]}
    assert seeds == {0, 1, 2, 3} - finished


@pytest.mark.slow
def test_a_sweep_that_was_killed_finds_its_trainings_still_running(store):
    pretend(Path.cwd(), does={"core.seed=2": "wait"}, pause=0.1)
    # ours, and not the one in the current folder, which is for its trainings
    ours = f"import sys; sys.path[0] = {str(ROOT)!r}; from mlflow_ssl.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", ours, *WORDS, "-m", "core.seed=1,2", "sweep.jobs=2"]
    with subprocess.Popen(command) as process:
        end = time.monotonic() + 120
        while not Path("waiting").exists() and time.monotonic() < end:
            time.sleep(0.1)
        process.kill()
    parent, children = found(store)
    assert children[1].info.status == "RUNNING"
    (pid,) = [int(each) for each in _pids_of(children[1].info.run_id)]
    threading.Timer(8, lambda: os.kill(pid, signal.SIGTERM)).start()
    assert main([f"resume={parent.info.run_id}"]) == 0
    parent, children = found(store)
    # it ended as it was told by somebody else, and was not begun a second time meanwhile
    assert states(children) == ["finished", "killed"]
    assert len(calls(Path.cwd())) == 2
    assert main([f"resume={parent.info.run_id}"]) == 0
    assert states(found(store)[1]) == ["finished", "finished"]


def _pids_of(run_id):
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"MLFLOW_RUN_ID={run_id}".encode() in entry.read_bytes():
                yield entry.parent.name
        except OSError:
            continue


def test_a_metric_that_no_training_logs_ends_the_sweep_at_the_first(sweep, capsys):
    code, parent, children = sweep("-m", SEEDS, "sweep.jobs=1", metric="embedding/rankme")
    assert code == 2
    assert (
        "sweep.monitor must be a metric that the trainings log, got 'val_acc'; training 0 logged embedding/rankme"
        in (capsys.readouterr().err)
    )
    assert (parent.info.status, len(children)) == ("FAILED", 1)


def test_a_sweep_of_which_nothing_finishes_is_failed(sweep, capsys):
    code, parent, _ = sweep("-m", "core.seed=1,2", does={"core.seed=1": "fail", "core.seed=2": "crash"})
    assert code == 2
    assert "none of the 2 trainings finished; of the first: core.seed must be another" in capsys.readouterr().err
    assert parent.info.status == "FAILED"
    assert "ValueError: no such thing" in parent.data.tags["mlflow.note.content"]


def test_the_launchers_run_becomes_the_parent(sweep, store, monkeypatch):
    launched = store.create_run("0", run_name="as I named it").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
    code, parent, children = sweep("--sweep", "grid", "--core.seed", "1,2")
    assert code == 0
    assert (parent.info.run_id, parent.info.run_name, parent.info.status) == (launched, "as I named it", "FINISHED")
    assert {run.info.experiment_id for run in children.values()} == {"0"}


def test_a_sweep_that_a_launcher_starts_again_goes_on(sweep, store, monkeypatch):
    launched = store.create_run("0").info.run_id
    words = ("--sweep", "grid", "--core.seed", "1,2")
    for _ in range(2):
        monkeypatch.setenv("MLFLOW_RUN_ID", launched)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "0")
        code, parent, children = sweep(*words)
        assert (code, parent.info.run_id, states(children)) == (0, launched, ["finished"] * 2)
    assert len(calls(Path.cwd())) == 2  # nothing was trained again


MISTAKES = {
    "a typo in a key": (["-m", "core.sed=1,2"], "no config key is named 'core.sed'; close matches: core.seed"),
    "a value among good ones": (["-m", "backbone=resnet18,resnet19"], "backbone has no option 'resnet19'"),
    "a value of the wrong kind": (["-m", "core.seed=1,x"], "core.seed is wrong"),
    "an end of an interval": (
        ["sweep=tpe", "core.seed=int(interval(-5,5))"],
        "core.seed is wrong: .* got -5",
    ),
    "nothing to try": (["-m"], "a sweep must have something to try"),
    "an unknown sweep": (["sweep=optimiser"], "sweep has no option 'optimiser'; close matches: optimizer"),
    "a typo in a setting": (
        ["-m", SEEDS, "sweep.job=3"],
        "no config key is named 'sweep.job'; close matches: sweep.jobs",
    ),
    "an interval in a grid": (["-m", "core.seed=int(interval(1,5))"], "core.seed must be given values to choose from"),
    "a key twice": (["-m", "optimizer.lr=1,2", "scheduler.init_lr=3,4"], "must be swept once, got 2 words"),
    "an unknown launcher": (["-m", SEEDS, "sweep.launcher=slurm"], "sweep.launcher is wrong"),
    "a sampler that does not exist": (
        ["sweep=tpe", SEEDS, "sweep.sampler._target_=optuna.samplers.Nothing"],
        "sweep.sampler._target_ must be an importable name",
    ),
    "a sampler's argument": (
        ["sweep=tpe", SEEDS, "+sweep.sampler.n_startup=1"],
        "sweep.sampler.n_startup is not an argument of optuna.samplers.TPESampler; close matches: n_startup_trials",
    ),
    "no sweep at all": (["-m", SEEDS, "sweep=none"], "sweep must not be none where something is swept"),
    "no number of trainings": (["sweep=tpe", SEEDS, "sweep.trials=null"], "sweep.trials must be given"),
    "no number of jobs": (["-m", SEEDS, "sweep.launcher=ray"], "sweep.jobs must be a number with sweep.launcher=ray"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_opened(store, capsys, mistake):
    import re

    words, message = MISTAKES[mistake]
    assert main([*WORDS, *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert store.search_runs([experiment.experiment_id for experiment in store.search_experiments()]) == []


REFUSED = {
    "core.seed=1,2,3": "the sweep's core.seed must stay; start a new sweep for it",
    "trainer.max_epochs=9": "the sweep's trainer.max_epochs must stay",
    "sweep.monitor=val_acc_linear": "the sweep's sweep.monitor must stay",
    "sweep.jobs=many": "sweep.jobs",
}


def test_what_would_change_the_comparison_is_refused_by_name(sweep, capsys):
    _, parent, _ = sweep("-m", "core.seed=1,2")
    for word, message in REFUSED.items():
        capsys.readouterr()
        assert main([*WORDS, f"resume={parent.info.run_id}", "-m", word]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_words_take_the_place_of_what_the_sweep_lists():
    words = ["sweep=optimizer", "optimizer.lr=0.1,0.2", "model.base_tau=0.9", "backbone.small_stem=true,false"]
    plan = new_plan([*WORDS, *words])
    assert plan.space_words == [
        "optimizer.weight_decay=tag(log, interval(1e-07, 0.1))",
        "optimizer.lr=choice(0.1,0.2)",
        "backbone.small_stem=choice(True,False)",
    ]
    assert "model.base_tau=0.9" in plan.words


def test_an_experiment_may_be_a_sweep(tmp_path, monkeypatch):
    file = tmp_path / "configs" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    defaults = "defaults:\n  - byol\n  - override /sweep: grid\n  - _self_\n"
    file.write_text(f"# @package _global_\n{defaults}sweep:\n  space: ['core.seed=5,6']\n")
    monkeypatch.chdir(tmp_path)
    plan = new_plan(["experiment=mine"])
    assert (plan.settings["name"], plan.space_words) == ("grid", ["core.seed=choice(5,6)"])
    assert "sweep" not in plan.config


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        (["-m", "a=1,2"], ["-m", "a=1,2"]),
        (["--multirun", "a=1,2"], ["--multirun", "a=1,2"]),
        (["--sweep", "grid", "--optimizer.lr", "0.1,0.2"], ["sweep=grid", "optimizer.lr=0.1,0.2"]),
        (["--overrides", "-m a=1,2", "--b", "3,4"], ["-m", "a=1,2", "b=3,4"]),
        (["--core.tag", "a,b"], ["core.tag='a,b'"]),
    ],
)
def test_several_values_arrive_where_a_sweep_is_asked_for(words, overrides):
    assert to_overrides(words) == overrides


def test_a_run_that_is_no_sweep_takes_nothing_of_one(store, monkeypatch, tmp_path, capsys):
    run = store.create_run("0", tags={"mlflow_ssl.output_dir": str(tmp_path)})
    assert main([f"resume={run.info.run_id}", "sweep.trials=9"]) == 2
    assert f"resume must name a sweep where something is said of one, got {run.info.run_id}" in capsys.readouterr().err


def test_a_sweep_whose_folder_is_gone_says_so(sweep, capsys):
    import shutil

    _, parent, _ = sweep("-m", "core.seed=1,2")
    shutil.rmtree("outputs")
    assert main([f"resume={parent.info.run_id}"]) == 2
    assert f"the output folder of sweep {parent.info.run_id} must be there to go on with it" in capsys.readouterr().err


@pytest.mark.slow
def test_ten_trainings_at_once_on_one_sqlite_store_lose_nothing(sweep, store, tmp_path):
    seeds = range(1, 11)
    values = {f"core.seed={seed}": [seed / 100 + step / 10 for step in range(8)] for seed in seeds}
    code, parent, children = sweep("-m", f"core.seed={','.join(map(str, seeds))}", "sweep.jobs=10", values=values)
    assert (code, parent.info.status) == (0, "FINISHED")
    assert states(children) == ["finished"] * 10
    for row in table(store, parent, tmp_path):
        expected = values[f"core.seed={row['core.seed']}"]
        history = store.get_metric_history(row["run_id"], "val_acc")
        assert [point.value for point in sorted(history, key=lambda point: point.step)][1:] == expected
        assert float(row["val_acc"]) == expected[-1]
    assert parent.data.tags["sweep.best_run"] == children[9].info.run_id

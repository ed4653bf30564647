"""Opening, filling and ending runs, and their links."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from mlflow_ssl.errors import InputError, Interrupted, NotSynced
from mlflow_ssl.tracking.lifecycle import sync, tracked_run
from mlflow_ssl.tracking.opening import REASON_TAG, run_link, ui_command, without_password
from mlflow_ssl.tracking.run import RunRecord, lock_output

pytestmark = pytest.mark.filterwarnings("default")  # SQLAlchemy's notices to MLflow

CONFIG = {
    "core": {"name": "mine", "tag": "run"},
    "backbone": {"model_name": "resnet18"},
    "tracking": {"uri": None, "system_metrics": False, "wait_at_end_seconds": 60},
}


@pytest.fixture
def new_output(tmp_path):
    """Return a function that makes an output folder with a log."""

    def make(name="out"):
        output = tmp_path / name
        output.mkdir()
        (output / "main.log").write_text("said")
        return output

    return make


@pytest.fixture
def output(new_output):
    return new_output()


def history(store, run_id, key):
    return [(point.step, point.value) for point in store.get_metric_history(run_id, key)]


def artifacts(store, run_id, folder=None):
    return sorted(info.path for info in store.list_artifacts(run_id, folder))


# opened


def test_a_run_of_ours_has_a_name_of_its_own_in_the_experiment_of_the_config(store, new_output):
    names = set()
    for name in ("one", "two"):
        with tracked_run(CONFIG, output=new_output(name)) as run:
            found = store.get_run(run.run_id)
            names.add(found.info.run_name)
            assert store.get_experiment(found.info.experiment_id).name == "mine"
    assert len(names) == 2
    assert all(name.startswith("run-resnet18-") for name in names)


def test_a_job_stays_in_the_experiment_that_its_environment_names(store, output, monkeypatch):
    given = store.create_experiment("given")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", given)
    with tracked_run(CONFIG, output=output) as run:
        assert store.get_run(run.run_id).info.experiment_id == given


def test_the_run_of_the_launcher_is_taken_over_once(store, new_output, monkeypatch):
    launched = store.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    with tracked_run(CONFIG, output=new_output("one")) as run:
        assert run.run_id == launched
    with tracked_run(CONFIG, output=new_output("two")) as run:
        assert run.run_id != launched


def test_run_and_output_folder_know_each_other_from_the_first_moment(store, output):
    with tracked_run(CONFIG, output=output) as run:
        assert store.get_run(run.run_id).data.tags["mlflow_ssl.output_dir"] == str(output)
        record = RunRecord.read(output)
        assert (record.run_id, record.tracking_uri, record.status) == (run.run_id, store.tracking_uri, None)


def test_an_output_folder_is_written_to_by_one_process_at_a_time(store, output):
    message = f"another process is writing to {output}"
    with lock_output(output), pytest.raises(InputError, match=message), tracked_run(CONFIG, output=output):
        pass
    with tracked_run(CONFIG, output=output):
        pass


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"{tmp_path} is not the output folder of a run: .*run.json cannot be read"):
        RunRecord.read(tmp_path)


# gone on in


def test_a_run_that_is_gone_on_in_says_no_step_again(store, output):
    with pytest.raises(Interrupted), tracked_run(CONFIG, output=output) as run:  # noqa: PT012
        for step in range(1, 6):
            run.log_metrics({"train/loss": 1.0 / step}, step)
        raise Interrupted(15)
    with tracked_run(CONFIG, output=output, run_id=run.run_id) as again:
        assert again.first == {"train/loss": 1.0}
        for step in range(4, 9):  # from its last checkpoint
            again.log_metrics({"train/loss": 1.0 / step}, step)
    assert again.run_id == run.run_id
    assert history(store, run.run_id, "train/loss") == [(step, 1.0 / step) for step in range(1, 9)]
    assert store.get_run(run.run_id).info.status == "FINISHED"


def test_so_does_one_whose_output_folder_is_gone(store, new_output):
    with tracked_run(CONFIG, output=new_output("old")) as run:
        for step in (1, 2):
            run.log_metrics({"train/loss": 1.0 / step}, step)
    with tracked_run(CONFIG, output=new_output("new"), run_id=run.run_id) as again:
        assert again.first == {"train/loss": 1.0}
        for step in (2, 3):
            again.log_metrics({"train/loss": 9.0}, step)
    assert history(store, run.run_id, "train/loss") == [(1, 1.0), (2, 0.5), (3, 9.0)]
    assert store.get_run(run.run_id).data.tags["mlflow_ssl.output_dir"].endswith("/new")


def test_the_launchers_run_is_put_below_the_one_that_is_gone_on_in(store, output, monkeypatch):
    with tracked_run(CONFIG, output=output) as run:
        pass
    launched = store.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    with tracked_run(CONFIG, output=output, run_id=run.run_id) as again:
        assert again.run_id == run.run_id
    found = store.get_run(launched)
    assert (found.info.status, found.data.tags["mlflow.parentRunId"]) == ("FINISHED", run.run_id)


# filled


def test_everything_is_there_at_the_end(store, output):
    (output / "data").mkdir()
    (output / "data" / "splits.csv").write_text("a,b")
    with tracked_run(CONFIG, output=output) as run:
        run.log_params({"core": {"seed": 42}, "datamodule": {"classes": [1, 2]}})
        run.set_tags({"data.digest": "d1"})
        run.log_metrics({"val_acc": 0.5, "epoch": 1}, 10)
        run.log_file(output / "data", "data")
        run.log_text("<p>ö</p>", "pictures/projection.html")
    found = store.get_run(run.run_id)
    assert found.data.params == {"core.seed": "42", "datamodule.classes": "[1, 2]"}
    assert found.data.metrics == {"val_acc": 0.5, "epoch": 1.0}
    assert found.data.tags["data.digest"] == "d1"
    assert artifacts(store, run.run_id) == ["data", "main.log", "pictures"]
    assert artifacts(store, run.run_id, "pictures") == ["pictures/projection.html"]
    assert (output / "pictures" / "projection.html").read_text(encoding="utf-8") == "<p>ö</p>"


def test_a_picture_has_the_names_that_the_ui_finds_it_by(store, output, tmp_path):
    with tracked_run(CONFIG, output=output) as run:
        run.log_picture(Image.new("RGB", (3000, 1500)), key="views/pairs", step=10)
    small, whole = artifacts(store, run.run_id, "images")
    assert re.fullmatch(r"images/views~pairs\+step\+10\+timestamp\+\d{13}\+[0-9a-f]{32}\.png", whole)
    assert small == whole.replace(".png", "+compressed.webp")
    for file, size in ((whole, (3000, 1500)), (small, (1024, 512))):
        with Image.open(store.download_artifacts(run.run_id, file, str(tmp_path))) as picture:
            assert picture.size == size
    assert store.get_run(run.run_id).data.tags["mlflow.loggedImages"] == "true"


def test_a_picture_is_said_once_a_step_by_a_resumed_training_too(store, output):
    run_id, picture = None, Image.new("RGB", (8, 8))
    for steps in ((0, 10), (10, 20)):
        with tracked_run(CONFIG, output=output, run_id=run_id) as run:
            for step in steps:
                run.log_picture(picture, key="views/pairs", step=step)
        run_id = run.run_id
    whole = [file for file in artifacts(store, run_id, "images") if file.endswith(".png")]
    assert [file.split("+")[2] for file in whole] == ["0", "10", "20"]


def test_the_parameters_of_the_launcher_stay(store, output, monkeypatch):
    launched = store.create_run("0").info.run_id
    store.log_param(launched, "core.seed", "'42'")
    monkeypatch.setenv("MLFLOW_RUN_ID", launched)
    with tracked_run(CONFIG, output=output) as run:
        run.log_params({"core": {"seed": 42, "tag": "run"}})
    assert store.get_run(launched).data.params == {"core.seed": "'42'", "core.tag": "run"}


def test_a_config_of_any_size_becomes_parameters(store, output):
    with tracked_run(CONFIG, output=output) as run:
        run.log_params({f"key{number}": number for number in range(450)})
    assert store.get_run(run.run_id).data.params == {f"key{number}": str(number) for number in range(450)}


def test_no_credential_reaches_the_store_or_the_output_folder(store, output, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "correct horse")
    with pytest.raises(RuntimeError), tracked_run(CONFIG, output=output) as run:  # noqa: PT012
        run.log_params({"tracking": {"uri": "http://me:hunter2@host", "password": "hunter2"}})
        run.set_tags({"note": "it is correct horse"})
        raise RuntimeError("postgresql://me:hunter2@host is down")
    data = store.get_run(run.run_id).data
    assert data.params == {"tracking.uri": "http://***@host", "tracking.password": "***"}
    assert data.tags["note"] == "it is ***"
    assert data.tags[REASON_TAG] == "RuntimeError: postgresql://***@host is down"
    written = b"".join(file.read_bytes() for file in output.rglob("*") if file.is_file())
    assert b"hunter2" not in written
    assert b"correct horse" not in written


def test_a_metric_is_said_once_a_step_and_never_backwards(store, output):
    with tracked_run(CONFIG, output=output) as run:
        for value, step in ((0.5, 1), (0.6, 1), (0.7, 3), (0.8, 2), (0.9, 4)):
            run.log_metrics({"a": value}, step)
        run.log_metrics({"b": 1.0}, 1)
    assert history(store, run.run_id, "a") == [(1, 0.5), (3, 0.7), (4, 0.9)]
    assert history(store, run.run_id, "b") == [(1, 1.0)]
    assert run.first == {"a": 0.5, "b": 1.0}


def test_threads_may_say_metrics_at_once(store, output):
    with tracked_run(CONFIG, output=output) as run:
        threads = [
            threading.Thread(target=lambda key=key: [run.log_metrics({key: step}, step) for step in range(200)])
            for key in "abcd"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for key in "abcd":
        assert history(store, run.run_id, key) == [(step, float(step)) for step in range(200)]


def test_what_cannot_be_sent_is_on_disk_before_the_call_returns(store, output):
    with tracked_run(CONFIG, output=output) as run:
        run.log_metrics({"a": 0.5}, 1)
        last = json.loads((output / "tracking" / "records.jsonl").read_text().splitlines()[-1])
        assert last["metrics"] == [["a", 0.5, last["metrics"][0][2], 1]]


def test_system_metrics_are_logged_at_optimizer_steps_when_asked_for(store, output, monkeypatch):
    monkeypatch.setattr("mlflow_ssl.tracking.system.SystemMetrics.__init__.__defaults__", (0.1,))
    config = CONFIG | {"tracking": CONFIG["tracking"] | {"system_metrics": True}}
    with tracked_run(config, output=output) as run:
        run.step = lambda: 7
        while "system/cpu_utilization_percentage" not in run.first:
            time.sleep(0.05)
    assert {step for step, _ in history(store, run.run_id, "system/cpu_utilization_percentage")} == {7}


# ended


def test_a_run_that_ends_well_is_finished_with_its_log(store, output):
    with tracked_run(CONFIG, output=output) as run:
        pass
    assert store.get_run(run.run_id).info.status == "FINISHED"
    assert artifacts(store, run.run_id) == ["main.log"]
    assert RunRecord.read(output).status == "FINISHED"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("disk\non fire"), "FAILED", "RuntimeError: disk\non fire"),
        (InputError("core.seed must be"), "FAILED", "core.seed must be"),
        (Interrupted(15), "KILLED", "stopped by SIGTERM"),
        (KeyboardInterrupt(), "KILLED", "stopped by Ctrl-C"),
        (SystemExit(3), "FAILED", "SystemExit: 3"),
    ],
)
def test_a_run_that_ends_early_says_why(store, output, error, status, reason):
    with pytest.raises(type(error)), tracked_run(CONFIG, output=output) as run:
        raise error
    found = store.get_run(run.run_id)
    assert found.info.status == RunRecord.read(output).status == status
    assert found.data.tags[REASON_TAG] == reason
    assert "It had not come to a checkpoint" in found.data.tags["mlflow.note.content"]


def checkpoints(output):
    folder = output / "checkpoints"
    folder.mkdir()
    for name in ("last", "best"):
        (folder / f"{name}.ckpt").write_text(f"{name} of now")
    return folder


def test_a_run_that_ends_early_leaves_its_checkpoints_and_how_to_go_on(store, output):
    with pytest.raises(RuntimeError), tracked_run(CONFIG, output=output) as run:  # noqa: PT012
        checkpoints(output)
        raise RuntimeError("no more")
    assert artifacts(store, run.run_id, "checkpoints") == ["checkpoints/best.ckpt", "checkpoints/last.ckpt"]
    assert f"resume={run.run_id}" in store.get_run(run.run_id).data.tags["mlflow.note.content"]


def test_the_environment_of_the_user_is_as_it_was(store, output, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with tracked_run(CONFIG, output=output):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def fail(*_, **__):
    raise ConnectionError("MLflow is gone")


def test_what_never_arrives_ends_in_a_clear_word_and_is_sent_later_once(store, output):
    config = CONFIG | {"tracking": CONFIG["tracking"] | {"wait_at_end_seconds": 0.2}}
    words = rf"(?s)MLflow is gone.*python -m mlflow_ssl sync {output}"
    patch = pytest.MonkeyPatch()
    with pytest.raises(NotSynced, match=words), tracked_run(config, output=output) as run:  # noqa: PT012
        patch.setattr(run.client.__class__, "log_batch", fail)
        run.log_metrics({"a": 0.5}, 1)
        run.log_text("t", "t.txt")
    patch.undo()
    assert history(store, run.run_id, "a") == []
    for _ in range(3):
        sync(output)
    assert history(store, run.run_id, "a") == [(1, 0.5)]
    assert store.get_run(run.run_id).info.status == "FINISHED"
    assert artifacts(store, run.run_id) == ["main.log", "t.txt"]


def test_sync_ends_a_run_whose_process_was_killed(store, output):
    with tracked_run(CONFIG, output=output) as run:
        pass
    RunRecord(run.run_id, "1", store.tracking_uri).write(output)  # as before its end
    store.update_run(run.run_id, status="RUNNING")
    sync(output)
    found = store.get_run(run.run_id)
    assert (found.info.status, found.data.tags[REASON_TAG]) == ("KILLED", "the process ended without a word")


# checkpoints


def wait_for_uploads(run):
    assert run._files.drain(patience=10)


def test_checkpoints_are_uploaded_as_they_are_now_and_the_unchanged_not_again(store, output, tmp_path):
    folder, sent = checkpoints(output), []
    with tracked_run(CONFIG, output=output) as run:
        journal = run._files.journal
        run.log_checkpoints()
        assert [Path(entry["path"]).name for entry in journal] == ["best.ckpt", "last.ckpt"]  # last comes last
        (folder / "last.ckpt").rename(folder / "old")  # a checkpoint is replaced, never written into
        (folder / "last.ckpt").write_text("later")
        wait_for_uploads(run)
        assert download(store, run, "last.ckpt", tmp_path) == "last of now"
        run.log_checkpoints()
        sent = [Path(entry["path"]).name for entry in journal][2:]
        wait_for_uploads(run)
    assert sent == ["last.ckpt"]
    assert download(store, run, "last.ckpt", tmp_path) == "later"
    assert artifacts(store, run.run_id, "checkpoints") == ["checkpoints/best.ckpt", "checkpoints/last.ckpt"]
    assert list((output / "tracking" / "outbox").iterdir()) == []


def download(store, run, name, folder):
    return Path(store.download_artifacts(run.run_id, f"checkpoints/{name}", str(folder))).read_text()


def test_an_upload_that_waits_is_superseded_by_a_later_one(store, output, tmp_path):
    folder = checkpoints(output)
    with tracked_run(CONFIG, output=output) as run:
        patch = pytest.MonkeyPatch()
        patch.setattr(run.client.__class__, "log_artifact", fail)
        for number in range(5):
            (folder / "last.ckpt").unlink()
            (folder / "last.ckpt").write_text(f"{number}")
            os.utime(folder / "last.ckpt", ns=(number, number))
            run.log_checkpoints()
        waiting = sorted(file.name for file in (output / "tracking" / "outbox").rglob("*.ckpt"))
        patch.undo()
    assert waiting == ["best.ckpt", "last.ckpt"]
    assert download(store, run, "last.ckpt", tmp_path) == "4"
    assert list((output / "tracking" / "outbox").iterdir()) == []


# links


def test_the_link_of_a_server_is_the_servers_and_of_a_file_that_of_a_ui():
    link = "/#/experiments/1/runs/r?workflowType=machine_learning"
    assert run_link("sqlite:///mlflow.db", "1", "r") == f"http://127.0.0.1:5000{link}"
    assert run_link("https://host:1/", "1", "r") == f"https://host:1{link}"
    assert ui_command("sqlite:///mlflow.db") == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    assert ui_command("https://host:1/") is None


def test_neither_link_nor_command_shows_a_password():
    assert run_link("https://me:secret@host:1", "1", "r").startswith("https://host:1/#/")
    assert ui_command("postgresql://me:secret@host/db") == "mlflow ui --backend-store-uri postgresql://host/db"
    assert without_password("https://me:secret@host:1/x") == "https://host:1/x"


@pytest.mark.slow
def test_processes_that_open_a_fresh_store_at_once_all_get_a_run(tmp_path):
    code = (
        "import pathlib, sys\nfrom mlflow_ssl.tracking.lifecycle import tracked_run\n"
        "output = pathlib.Path(sys.argv[1])\noutput.mkdir()\n(output / 'main.log').touch()\n"
        f"with tracked_run({CONFIG!r}, output=output.resolve()): pass"
    )
    environment = {"PATH": "", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/fresh.db", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
    started = [subprocess.Popen([*command, f"{number}"], cwd=tmp_path, env=environment) for number in range(3)]
    assert [process.wait(timeout=180) for process in started] == [0, 0, 0]

"""A server that fails in every way costs nothing: all that is said arrives, once and in order."""

import json
import resource
import signal
import subprocess
import sys
import threading

import mlflow
import pytest
import saying
from saying import assert_holds, assert_holds_metrics, config, say, say_metrics
from servers import Fault, FaultyProxy, running_server, wait_until

from mlflow_ssl.cli import main
from mlflow_ssl.errors import MachineError, NotSynced
from mlflow_ssl.tracking.lifecycle import tracked_run
from mlflow_ssl.tracking.run import RunRecord

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory, migrated_store):
    with running_server(tmp_path_factory.mktemp("server"), migrated_store) as server:
        yield server


@pytest.fixture
def server(shared_server):
    """A running server, which the test may kill."""
    if shared_server.down:
        shared_server.start()
    yield shared_server
    mlflow.set_tracking_uri(None)


@pytest.fixture
def proxy(server):
    with FaultyProxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


def status(server, run):
    return server.client.get_run(run.run_id).info.status


@pytest.mark.slow
def test_all_arrives_once_through_faults_of_every_kind(proxy, server, output, tmp_path):
    with tracked_run(config(proxy.uri), output=output) as run:
        proxy.faults = {Fault.LOSE: 3, Fault.ERROR: 2, Fault.BUSY: 2, Fault.REFUSE: 2, Fault.DELAY: 2}
        say(run)
    assert all(proxy.seen[fault] for fault in Fault), proxy.seen
    assert status(server, run) == "FINISHED"
    assert_holds(server.client, run.run_id, folder=tmp_path)
    assert not any((output / "tracking" / "outbox").iterdir())


@pytest.mark.slow
def test_what_was_taken_and_never_answered_is_not_there_twice(proxy, server, output):
    with tracked_run(config(proxy.uri), output=output) as run:
        proxy.faults = {Fault.LOSE: 20}
        say_metrics(run, range(1, 301))
        wait_until(lambda: proxy.seen[Fault.LOSE] >= 3, "some answers are lost")
        assert server.client.get_metric_history(run.run_id, "train/loss")
        proxy.faults = {}
        say_metrics(run, range(301, saying.STEPS + 1))
    assert_holds_metrics(server.client, run.run_id)


@pytest.mark.slow
def test_a_killed_server_stops_nobody_and_all_arrives_when_it_is_back(server, output, tmp_path):
    with tracked_run(config(server.uri), output=output) as run:
        say_metrics(run, [1])
        run.drain(patience=30)
        server.kill()
        # all is said while there is nobody to hear it
        say(run)
        assert server.down
        assert len(waiting_entries(output)) >= saying.STEPS
        server.start()
    assert status(server, run) == "FINISHED"
    assert_holds(server.client, run.run_id, folder=tmp_path)


def waiting_entries(output):
    """Return the entries of the records that wait to be sent."""
    folder = output / "tracking"
    sent = int((folder / "records.sent").read_text())
    return [json.loads(line) for line in (folder / "records.jsonl").read_bytes()[sent:].splitlines()]


@pytest.mark.slow
def test_what_never_arrives_is_sent_by_sync_any_number_of_times(server, output, tmp_path, capsys):
    def run_without_server():
        with tracked_run(config(server.uri, wait_at_end_seconds=1), output=output) as run:
            server.kill()
            say(run)

    with pytest.raises(NotSynced, match=f"python -m mlflow_ssl sync {output}"):
        run_without_server()
    assert main(["sync", str(output)]) == 3
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "does not answer" in line]) == 1
    assert not [line for line in said if "Traceback" in line]

    server.start()
    record = RunRecord.read(output)
    ends = set()
    for time in range(3):
        assert main(["sync", str(output)]) == 0
        stored = server.client.get_run(record.run_id)
        assert stored.info.status == "FINISHED"
        ends.add(stored.info.end_time)
        assert_holds(server.client, record.run_id, folder=make(tmp_path / str(time)))
        # as if the machine had died before it noted what had arrived
        (output / "tracking" / "records.sent").unlink()
        (output / "tracking" / "files.sent").unlink()
    assert ends == {record.end_time}


def make(folder):
    folder.mkdir()
    return folder


def test_sync_of_a_folder_that_is_no_runs_is_a_mistake(tmp_path, capsys):
    assert main(["sync", str(tmp_path)]) == 2
    assert f"{tmp_path} is not the output folder of a run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_sync_while_the_run_is_alive_is_a_mistake(store, output, capsys):
    with tracked_run(config(None), output=output) as run:
        assert main(["sync", str(output)]) == 2
        say_metrics(run, range(1, 11))
    assert "another process is writing to" in capsys.readouterr().err
    assert_holds_metrics(store, run.run_id, steps=10)


@pytest.mark.slow
def test_sync_ends_a_run_whose_process_was_killed(store, output):
    command = [sys.executable, saying.__file__, store.tracking_uri, str(output), "0"]
    with subprocess.Popen(command) as process:
        wait_until((output / "said").exists, "half of it is said")
        process.send_signal(signal.SIGKILL)
    run_id = RunRecord.read(output).run_id
    assert store.get_run(run_id).info.status == "RUNNING"
    assert main(["sync", str(output)]) == 0
    run = store.get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["mlflow_ssl.reason"] == "the process ended without a word"
    assert_holds_metrics(store, run_id, steps=saying.STEPS // 2)


def test_what_is_refused_is_set_aside_and_the_rest_arrives(store, output, caplog):
    with tracked_run(config(None), output=output) as run:
        store.log_param(run.run_id, "taken", "1")
        run.log_params({"before": 0, "taken": 2, "after": 3})
        for step in range(1, 41):
            extra = {"not*allowed": 1.0} if step % 20 == 0 else {}
            run.log_metrics(extra | saying.values(step), step)
        run.set_tags({"last": "word"})
    stored = store.get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"before": "0", "taken": "1", "after": "3"}
    assert stored.data.tags["last"] == "word"
    assert_holds_metrics(store, run.run_id, steps=40)
    refusals = [record.message for record in caplog.records if "refuses" in record.message]
    assert len(refusals) == len(run.refused) == 3
    assert "taken" in refusals[0]
    assert "not*allowed" in refusals[1]


@pytest.mark.slow
def test_a_file_too_large_for_the_server_stops_no_other(proxy, server, output, tmp_path):
    proxy.refused_paths = ("huge.bin",)
    with tracked_run(config(proxy.uri, wait_at_end_seconds=2), output=output) as run:
        (output / "huge.bin").write_bytes(b"0" * 1000)
        run.log_file(output / "huge.bin")
        say(run, steps=100)
    assert len(run.refused) == 1
    assert_holds(server.client, run.run_id, steps=100, folder=tmp_path)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_failed_and_what_was_said_arrives(server, output):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run_until_the_disk_is_full():
        with tracked_run(config(server.uri), output=output) as run:
            ids.append(run.run_id)
            say_metrics(run, range(1, saying.STEPS + 1))
            size = (output / "tracking" / "records.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, hard))
            say_metrics(run, [saying.STEPS + 1])

    ids = []
    try:
        with pytest.raises(MachineError, match=r"the disk takes no more: .*File too large"):
            run_until_the_disk_is_full()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run = server.client.get_run(ids[0])
    assert run.info.status == "FAILED"
    assert "the disk takes no more" in run.data.tags["mlflow_ssl.reason"]
    assert_holds_metrics(server.client, ids[0])


@pytest.mark.slow
def test_a_server_that_is_gone_at_the_very_end_is_waited_for(proxy, server, output):
    with tracked_run(config(proxy.uri), output=output) as run:
        say(run, steps=100)
        run.log_file(output / "main.log")
        assert run.drain(patience=30)
        proxy.faults = {Fault.REFUSE: 20}
        threading.Timer(3, setattr, (proxy, "faults", {})).start()
    assert proxy.seen[Fault.REFUSE]
    assert status(server, run) == "FINISHED"

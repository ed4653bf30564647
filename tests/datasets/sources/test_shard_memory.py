import errno
import fcntl
import logging
import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pytest
from damage import damaged
from shards import png, write_shards, write_tar

from mlflow_ssl.datasets.sources import shard_memory, shards
from mlflow_ssl.datasets.sources.shards import ShardSource

FORK = get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """Remember shards that have just been written, too: no test waits two seconds for each."""
    monkeypatch.setattr(shard_memory, "RACY_NS", 0)


@pytest.fixture
def opened(monkeypatch):
    """Return the names of the shards that are opened from here on."""
    names, members = [], shards._members

    def noting(shard, bad):
        names.append(shard.name)
        return members(shard, bad)

    monkeypatch.setattr(shards, "_members", noting)
    return names


@pytest.fixture
def folder(tmp_path):
    return write_shards(tmp_path / "shards", [3, 2, 4])


def scan(folder, **options):
    time.sleep(0.02)  # the kernel stamps files by a clock of 1 to 10 ms
    return ShardSource(str(folder), **options).scan()


def files(cache):
    return sorted(cache.rglob("*.arrow"))


def test_headers_are_read_once_and_what_is_remembered_is_the_same(folder, opened):
    read = scan(folder)
    assert sorted(opened) == ["shard-000.tar", "shard-001.tar", "shard-002.tar"]
    recalled = scan(folder)
    assert len(opened) == 3
    assert recalled.table.equals(read.table, check_metadata=True)
    assert recalled.bad == read.bad == []
    assert [recalled.table[name].num_chunks for name in recalled.table.column_names] == [1] * 7


def test_a_warm_scan_opens_no_shard(folder):
    """Whatever the code above counts, the system says so."""
    scan(folder)
    heard = FORK.SimpleQueue()

    def work():
        sys.addaudithook(lambda event, args: heard.put(str(args[0])) if event == "open" else None)
        scan(folder)

    run_all(work)
    names = drain(heard)
    assert sum(name.endswith(".arrow") for name in names) == 3
    assert not [name for name in names if name.endswith(".tar")]


def test_bad_members_are_remembered_with_their_reasons(tmp_path, opened):
    shard = write_tar(tmp_path / "x.tar", [("a.png", png(0)), ("a.jpg", png(1)), ("b.png", png(2))])
    read, recalled = scan(shard), scan(shard)
    assert len(opened) == 1
    assert recalled.bad == read.bad != []
    assert recalled.table.equals(read.table)


def test_labels_may_be_left_out_of_what_is_remembered(folder, opened):
    assert set(scan(folder).table["class_name"].to_pylist()) == {"cat", "dog"}
    plain = scan(folder, labels="none").table
    assert set(plain["class_name"].to_pylist()) == {""}
    assert len(opened) == 3
    assert plain.drop(["class_name"]).equals(scan(folder).table.drop(["class_name"]))


def test_only_a_shard_that_has_changed_is_read_again(folder, opened):
    scan(folder)
    write_tar(folder / "shard-001.tar", [("new.png", png(9)), ("new.cls", b"bird")])
    found = scan(folder).table
    assert opened[3:] == ["shard-001.tar"]
    assert "shard-001.tar/new.png" in found["path"].to_pylist()
    assert len(found) == 3 + 1 + 4


def test_a_change_that_keeps_size_and_mtime_is_seen(folder, opened):
    scan(folder)
    shard = folder / "shard-002.tar"
    stat = shard.stat()
    shard.write_bytes(shard.read_bytes().replace(b"00005.png", b"other.png"))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    scan(folder)
    assert opened[3:] == ["shard-002.tar"]


def test_a_shard_written_just_before_it_is_read_is_read_again(folder, opened, monkeypatch):
    monkeypatch.setattr(shard_memory, "RACY_NS", 60_000_000_000)
    assert scan(folder).table.equals(scan(folder).table)
    assert len(opened) == 6


def test_a_shard_that_breaks_off_is_not_held_against_it(folder, opened):
    shard = folder / "shard-000.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    assert scan(folder).bad == scan(folder).bad != []
    assert opened.count("shard-000.tar") == 2
    assert len(opened) == 4


def test_damage_never_changes_the_answer_and_is_mended(folder, cache, opened, caplog):
    caplog.set_level(logging.INFO)
    expected = scan(folder).table
    for seed in range(60):
        for file in files(cache):
            file.write_bytes(damaged(file.read_bytes(), seed))
        opened.clear()
        assert scan(folder).table.equals(expected)
        assert len(opened) == 3
    scan(folder)
    assert len(opened) == 3
    assert not caplog.records


def test_another_version_is_not_taken(folder, opened, monkeypatch):
    scan(folder)
    monkeypatch.setattr(shard_memory, "_FORMAT", "0")
    scan(folder)
    assert len(opened) == 6


def test_a_file_that_names_other_shards_is_not_taken(folder, cache, opened):
    """However it came there: what it names is read from."""
    expected = scan(folder).table
    for file in files(cache):
        table = pa.ipc.open_stream(file.read_bytes()).read_all()
        other = table.set_column(0, table.schema[0], pa.array(["../x.tar/a"] * len(table), table.schema[0].type))
        file.write_bytes(shard_memory._pack(shards.Found(other, [])))
    assert scan(folder).table.equals(expected)
    assert len(opened) == 6


@pytest.mark.parametrize("obstacle", ["a file in the way", "no home", "no space", "read-only"])
def test_a_cache_that_cannot_be_written_costs_only_speed(folder, cache, monkeypatch, caplog, opened, obstacle):
    caplog.set_level(logging.INFO)

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC if obstacle == "no space" else errno.EROFS, "refused")

    if obstacle == "a file in the way":
        cache.write_text("in the way")
    elif obstacle == "no home":
        for name in ("MLFLOW_SSL_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    elif obstacle == "no space":
        monkeypatch.setattr(Path, "write_bytes", refuse)
    else:
        (cache / "shards").mkdir(parents=True)
        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(os, "mkdir", refuse)
    assert scan(folder).table.equals(scan(folder).table)
    assert len(opened) == 6
    assert len(caplog.records) == 2  # once a scan
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert not files(cache)


# several processes


def run_all(*works):
    processes = [FORK.Process(target=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def drain(queue):
    found = []
    while not queue.empty():
        found.append(queue.get())
    return found


def test_processes_that_start_together_share_the_shards(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "shards", [2] * 24)
    together, heard, members = FORK.Barrier(3), FORK.SimpleQueue(), shards._members

    def slow(shard, bad):
        time.sleep(0.05)
        heard.put((os.getpid(), shard.name))
        return members(shard, bad)

    monkeypatch.setattr(shards, "_members", slow)
    results = FORK.SimpleQueue()

    def work():
        together.wait()
        results.put(scan(folder).table.to_pydict())

    run_all(work, work, work)
    read, found = drain(heard), drain(results)
    assert sorted(name for _, name in read) == [f"shard-{number:03d}.tar" for number in range(24)]
    assert len({process for process, _ in read}) == 3
    assert found[0] == found[1] == found[2] == scan(folder).table.to_pydict()


def test_processes_that_share_no_cache_read_for_themselves(folder, tmp_path, monkeypatch, opened):
    scan(folder)
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(tmp_path / "another machine's"))
    scan(folder)
    assert len(opened) == 6


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_process_that_reads_no_further_is_not_waited_for(folder, monkeypatch, opened, end):
    """One that is gone has let go; one that has been stopped holds on, for as long as others have patience."""
    monkeypatch.setattr(shard_memory, "PATIENCE_SECONDS", 600.0 if end == "killed" else 0.2)
    reading = FORK.Event()

    def hang(shard, bad):
        reading.set()
        time.sleep(600)

    def work():
        monkeypatch.setattr(shards, "_members", hang)
        scan(folder)

    process = FORK.Process(target=work)
    process.start()
    try:
        assert reading.wait(timeout=30)
        if end == "killed":
            os.kill(process.pid, signal.SIGKILL)
        began = time.monotonic()
        assert len(scan(folder).table) == 9
        assert time.monotonic() - began < 30
        assert sorted(opened) == ["shard-000.tar", "shard-001.tar", "shard-002.tar"]
    finally:
        process.kill()
        process.join()


def test_what_another_process_has_read_meanwhile_is_not_read_again(tmp_path, monkeypatch, opened):
    """It was not there when it was looked for, and is when the shard can be claimed."""
    shard, lock = write_tar(tmp_path / "x.tar", [("a.png", png(0))]), shard_memory._Claims._lock

    def late(claims, place):
        monkeypatch.setattr(shard_memory._Claims, "_lock", lock)
        scan(shard)
        return lock(claims, place)

    monkeypatch.setattr(shard_memory._Claims, "_lock", late)
    scan(shard)
    assert opened == ["x.tar"]


def test_where_nothing_can_be_locked_each_process_reads_all(folder, monkeypatch, opened):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    assert len(scan(folder).table) == 9
    assert len(opened) == 3

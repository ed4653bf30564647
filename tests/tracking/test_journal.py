"""What was said survives: the process, a torn line, a full disk, many threads."""

import json
import subprocess
import sys
import textwrap
import threading
from itertools import islice

import pytest

from mlflow_ssl.tracking.journal import Journal

ENTRIES = [{"kind": "metrics", "metrics": [["train/loss", 0.5, 1, number]]} for number in range(5)]


@pytest.fixture
def journal(tmp_path):
    opened = Journal(tmp_path / "tracking", "records")
    yield opened
    opened.close()


def reopened(journal):
    return Journal(journal.file.parent, journal.file.stem)


def said(journal, limit=100):
    return [entry for entry, _ in journal.unsent(limit)]


def test_a_new_journal_is_empty_and_makes_its_folder(journal):
    assert said(journal) == list(journal) == []
    assert (journal.sent, journal.written) == (0, 0)


def test_entries_are_read_in_the_order_in_which_they_were_appended(journal):
    for entry in ENTRIES:
        journal.append(entry)
    assert said(journal) == list(journal) == ENTRIES
    assert said(journal, limit=2) == ENTRIES[:2]


def test_what_has_arrived_is_not_unsent_but_still_there(journal):
    for entry in ENTRIES:
        journal.append(entry)
    journal.mark(journal.unsent(2)[-1][1])
    assert said(journal) == ENTRIES[2:]
    assert list(journal) == ENTRIES


def test_the_end_of_the_last_entry_is_the_end_of_the_journal(journal):
    for entry in ENTRIES:
        journal.append(entry)
    assert journal.unsent(100)[-1][1] == journal.written


def test_entries_and_mark_survive_reopening(journal):
    for entry in ENTRIES:
        journal.append(entry)
    journal.mark(journal.unsent(3)[-1][1])
    again = reopened(journal)
    assert said(again) == ENTRIES[3:]
    again.append({"kind": "tags", "tags": {}})
    assert said(again) == [*ENTRIES[3:], {"kind": "tags", "tags": {}}]


def test_a_shorter_mark_leaves_nothing_of_a_longer_one(journal):
    for entry in ENTRIES:
        journal.append(entry)
    ends = [end for _, end in journal.unsent(100)]
    journal.mark(ends[-1])
    journal.mark(ends[0])
    assert reopened(journal).sent == ends[0]


@pytest.mark.parametrize("torn", [b'{"kind"', b'{"kind": "tags", "tags": {}}', b"\xc3"])
def test_a_torn_last_line_is_cut(journal, torn):
    journal.append(ENTRIES[0])
    with journal.file.open("ab") as file:
        file.write(torn)
    again = reopened(journal)
    again.append(ENTRIES[1])
    assert said(again) == ENTRIES[:2]
    assert [json.loads(line) for line in again.file.read_text().splitlines()] == ENTRIES[:2]


def test_a_line_that_is_being_written_is_not_read(journal):
    journal.append(ENTRIES[0])
    with journal.file.open("ab") as file:
        file.write(b'{"kind": "tags"')
    assert said(journal) == ENTRIES[:1]


def test_a_line_that_becomes_whole_while_it_is_read_is_read_the_next_time(journal, monkeypatch):
    def read_slowly(lines, limit):
        for line in islice(lines, limit):
            journal.written = len(whole)  # another thread has come to the end of its line
            yield line

    journal.append(ENTRIES[0])
    whole = journal.file.read_bytes() * 2
    journal.file.write_bytes(whole[:-5])
    with monkeypatch.context() as patch:
        patch.setattr("mlflow_ssl.tracking.journal.islice", read_slowly)
        assert said(journal) == ENTRIES[:1]
    journal.file.write_bytes(whole)
    assert said(journal) == [ENTRIES[0], ENTRIES[0]]


def test_a_mark_beyond_the_end_is_at_the_end(journal):
    """A machine may die before the disk holds the lines that had arrived."""
    journal.append(ENTRIES[0])
    journal.mark(10**6)
    again = reopened(journal)
    again.append(ENTRIES[1])
    assert said(again) == [ENTRIES[1]]


@pytest.mark.parametrize("text", ["\n", "\u2028", "\0", "\ud800", "日本", '"\\'])
def test_an_entry_may_hold_any_text(journal, text):
    entry = {"kind": "tags", "tags": {"note": text}}
    journal.append(entry)
    journal.append(ENTRIES[0])
    assert said(journal) == [entry, ENTRIES[0]]


def test_numbers_come_back_bit_for_bit(journal):
    values = [0.1, 1e-300, float("inf"), -0.0, 2**53 + 1]
    journal.append({"kind": "metrics", "metrics": values})
    journal.append({"kind": "metrics", "metrics": [float("nan")]})
    (read,), (nan,) = (entry["metrics"] for entry in journal if len(entry["metrics"]) > 1), list(journal)[1]["metrics"]
    assert list(map(repr, read)) == list(map(repr, values))
    assert nan != nan


FULL = """
    import resource, sys
    from pathlib import Path
    from mlflow_ssl.tracking.journal import Journal

    journal = Journal(Path(sys.argv[1]), "records")
    small, large = {"kind": "tags", "tags": {"a": "b"}}, {"kind": "tags", "tags": {"a": "b" * 5000}}
    journal.append(small)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    before = journal.file.read_bytes()
    try:
        journal.append(large)
    except OSError:
        assert journal.file.read_bytes() == before
        journal.append(small)
        assert [entry for entry, _ in journal.unsent(9)] == [small, small]
        print("as it was")
"""


def test_a_write_that_the_disk_does_not_take_leaves_the_journal_as_it_was(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path / "tracking")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("as it was\n", "")


def test_threads_append_whole_lines_while_another_reads_them(journal):
    long = "x" * 20_000  # a few pages of memory: long enough to be seen half written

    def append(name):
        for number in range(40):
            journal.append({"from": name, "number": number, "long": long})

    threads = [threading.Thread(target=append, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    read = []
    while len(read) < 160:
        for entry, end in journal.unsent(7):
            read.append(entry)
            journal.mark(end)
    for thread in threads:
        thread.join()
    for name in range(4):
        assert [entry["number"] for entry in read if entry["from"] == name] == list(range(40))
    assert journal.sent == journal.written == journal.file.stat().st_size

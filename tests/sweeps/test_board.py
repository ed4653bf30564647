"""What a sweep shows of its trainings."""

import csv
import io
from datetime import datetime, timedelta

from mlflow_ssl.sweeps.board import as_csv, as_note, counted
from mlflow_ssl.sweeps.study import Trial

BEGAN = datetime(2026, 11, 25, 9, 0, 0)
TRIALS = [
    Trial(0, {"lr": 0.000123456, "net": "a"}, "finished", 0.5, "r0", "", BEGAN, BEGAN + timedelta(minutes=3)),
    Trial(1, {"lr": 0.1, "net": "b"}, "failed", None, "r1", "no\nmemory | at all", BEGAN, BEGAN + timedelta(seconds=6)),
    Trial(2, {"lr": 0.2, "net": "a"}, "finished", 0.75, "r2", "", BEGAN, BEGAN + timedelta(minutes=4)),
    Trial(3, {"lr": 0.3, "net": "b"}, "running", 0.9, "r3", "", BEGAN),
    Trial(4, {"lr": 0.4, "net": "b"}, "waiting"),
]


def note(trials=TRIALS, **more):
    settings = {"monitor": "val_acc", "highest": True, "experiment_id": "7", "run_id": "parent"}
    return as_note(trials, ["lr", "net"], **settings | more)


def rows(text):
    return [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]


def test_the_best_is_first_and_each_row_leads_to_its_run():
    assert rows(note()) == [
        "| [2](#/experiments/7/runs/r2) | finished | **0.7500** | `0.2` | `a` | 4.0 |  |",
        "| [0](#/experiments/7/runs/r0) | finished | **0.5000** | `0.0001235` | `a` | 3.0 |  |",
        "| [3](#/experiments/7/runs/r3) | running | 0.9000 | `0.3` | `b` |  |  |",
        "| [1](#/experiments/7/runs/r1) | failed |  | `0.1` | `b` | 0.1 | no memory \\| at all |",
        "| 4 | waiting |  | `0.4` | `b` |  |  |",
    ]
    assert [row[:4] for row in rows(note(highest=False))[:2]] == ["| [0", "| [2"]


def test_the_note_says_how_it_stands_and_how_to_go_on():
    text = note(ending="**KILLED**: stopped by SIGTERM\n", registered="Load the best network:\n")
    assert text.startswith("**Sweep** of `lr`, `net`: 2 finished, 1 running, 1 failed, 1 waiting; best by `val_acc`")
    assert text.index("stopped by SIGTERM") < text.index("| trial |")
    assert text.index("| 4 |") < text.index("Load the best network:") < text.index("mlflow run . -P resume=parent")


def test_a_description_of_thousands_of_trainings_fits_into_a_tag():
    many = [
        Trial(number, {"lr": number, "net": "a" * 20}, "finished", number / 5000, "r" * 32) for number in range(5000)
    ]
    text = note(many)
    assert len(text) <= 8000
    shown = len(rows(text))
    assert f"… and {5000 - shown} more" in text
    assert rows(text)[0].startswith("| [4999]")
    assert "mlflow run . -P resume=parent" in text


def test_the_csv_holds_every_value_as_it_is():
    table = list(csv.DictReader(io.StringIO(as_csv(TRIALS, ["lr", "net"], "val_acc"))))
    assert [row["lr"] for row in table] == ["0.000123456", "0.1", "0.2", "0.3", "0.4"]
    assert table[1] | {} == {
        "trial": "1",
        "state": "failed",
        "val_acc": "",
        "lr": "0.1",
        "net": "b",
        "seconds": "6",
        "run_id": "r1",
        "reason": "no memory | at all",
    }


def test_what_was_tried_again_is_counted_once():
    assert counted([Trial(0, {}, "failed", retried=True), Trial(1, {}, "finished")]) == {"finished": 1}

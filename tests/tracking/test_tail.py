"""A metric of another process, as it comes."""

from mlflow_ssl.tracking.run import FOLDER
from mlflow_ssl.tracking.tail import MetricTail

LINE = '{"kind":"metrics","metrics":[["train/loss",2.0,1,%d],["val_acc",%s,1,%d]]}\n'


def test_each_value_comes_once_and_only_when_its_line_is_whole(tmp_path):
    tail = MetricTail(tmp_path, "val_acc")
    assert tail.new() == []  # not begun
    (tmp_path / FOLDER).mkdir()
    file = tmp_path / FOLDER / "records.jsonl"
    third = LINE % (3, "NaN", 3)
    file.write_text(LINE % (1, 0.5, 1) + '{"kind":"tags","tags":{"val_acc":"no"}}\n' + LINE % (2, 0.25, 2) + third[:20])
    assert tail.new() == [(1, 0.5), (2, 0.25)]
    assert tail.new() == []
    with file.open("a") as journal:
        journal.write(third[20:])
    ((step, value),) = tail.new()
    assert step == 3
    assert value != value
    assert tail.names == {"train/loss", "val_acc"}

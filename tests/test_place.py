"""What a process is at, by where its thread is."""

import threading
from types import SimpleNamespace

import pytest

from mlflow_ssl.place import place_of


def place(monkeypatch, files):
    """Return where a thread is that is in a file, and has come through others: the innermost first."""
    frame = None
    for file in reversed(files):
        frame = SimpleNamespace(f_code=SimpleNamespace(co_filename=file, co_name="call"), f_lineno=7, f_back=frame)
    monkeypatch.setattr("mlflow_ssl.place.sys._current_frames", lambda: {1: frame})
    found = place_of(1)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize(
    ("files", "waiting"),
    [
        (["/x/torch/distributed/distributed_c10d.py", "/x/mlflow_ssl/callbacks/knn.py"], True),
        (["/x/torch/autograd/graph.py", "/x/mlflow_ssl/methods/byol.py"], True),
        (["/x/mlflow_ssl/methods/byol.py", "/x/torch/nn/parallel/distributed.py"], False),
        (["/x/mine.py", "/x/torch/distributed/elastic/multiprocessing/api.py"], False),
        (["/x/torch/autograd/graph.py", "/x/torch/_inductor/compile_fx.py"], False),
    ],
)
def test_a_process_waits_where_it_is_in_a_collective_itself(monkeypatch, files, waiting):
    assert place(monkeypatch, files).waiting is waiting


@pytest.mark.parametrize(
    ("files", "asking"),
    [
        ([threading.__file__, "/x/site-packages/urllib3/connection.py", "/x/mine.py"], True),
        (["/x/mlflow_ssl/datamodules/ssl.py", "/x/mlflow_ssl/tasks/ssl.py"], False),
    ],
)
def test_a_process_asks_while_it_has_come_through_what_speaks_to_servers(monkeypatch, files, asking):
    assert place(monkeypatch, files).asking is asking


def test_a_place_is_named_by_the_innermost_code_that_is_not_pythons_own(monkeypatch):
    assert place(monkeypatch, [threading.__file__, "/x/data.py", "/x/train.py"]).words == "call (data.py:7)"


def test_a_thread_that_has_ended_is_nowhere():
    assert place_of(0).words == ""

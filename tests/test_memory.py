"""What a process does with memory that its tensors have left."""

import subprocess
import sys

import pytest

TAKE_AND_LEAVE = """
import resource, sys, torch
from mlflow_ssl.memory import keep_freed_memory

kept = sys.argv[1] == "kept" and keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = torch.ones(2**24)  # 64 MiB: 16,384 pages of 4 KiB, and glibc keeps what is up to 32
    del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(kept, [faults() for _ in range(40)][-1])  # the first ones find their places
"""


FORK = """
import os, psutil, torch
from mlflow_ssl.memory import keep_freed_memory

assert keep_freed_memory()

def held():
    return psutil.Process().memory_info().rss / 2**20

for _ in range(9):
    large = torch.ones(2**25)  # 128 MiB
    del large
before = held()
if os.fork() == 0:
    os._exit(0)
os.wait()
print(before - held())
"""
GLIBC = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")


@GLIBC
def test_what_is_free_is_given_back_before_a_worker_is_forked():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 100


@GLIBC
@pytest.mark.parametrize(("how", "least", "most"), [("kept", 0, 100), ("given back", 1_000, 100_000)])
def test_pages_of_tensors_that_have_gone_are_there_for_the_next(how, least, most):
    words = [sys.executable, "-c", TAKE_AND_LEAVE, how]
    kept, faults = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert kept == str(how == "kept")
    assert least <= int(faults) <= most


def test_where_there_is_no_such_allocator_nothing_happens(monkeypatch):
    from mlflow_ssl import memory

    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert not memory.keep_freed_memory.__wrapped__()

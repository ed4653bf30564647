"""A checkpoint is there whole, or the former one is; and it runs nothing."""

import os
import pickle
import re
import resource
import zipfile

import pytest
import torch

from mlflow_ssl.checkpoint_io import AtomicCheckpointIO
from mlflow_ssl.errors import MachineError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "checkpoints" / "last.ckpt"


def checkpoint(value):
    return {"state_dict": {"weight": torch.full((1000,), float(value))}, "epoch": value}


def value_in(file):
    read = AtomicCheckpointIO().load_checkpoint(file)
    assert read["state_dict"]["weight"].unique().item() == read["epoch"]
    return read["epoch"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_is_loaded(file):
    for value in (1, 2):
        AtomicCheckpointIO().save_checkpoint(checkpoint(value), file)
        assert value_in(file) == value
    assert names(file.parent) == ["last.ckpt"]


def test_what_another_process_left_half_written_is_no_hindrance(file):
    file.parent.mkdir()
    file.with_name("last.ckpt.part").write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), file)
    assert names(file.parent) == ["last.ckpt"]


@pytest.fixture
def small_files_only():
    """Let no file grow beyond 2 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_former_checkpoint(file, request):
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), file)
    request.getfixturevalue("small_files_only")
    message = rf"the checkpoint {re.escape(str(file))} cannot be written: .*; the former one is as it was"
    with pytest.raises(MachineError, match=message) as caught:
        AtomicCheckpointIO().save_checkpoint(checkpoint(2), file)
    assert "\n" not in str(caught.value)
    assert value_in(file) == 1
    assert names(file.parent) == ["last.ckpt"]


def test_a_full_disk_leaves_no_part_of_a_first_checkpoint(file, small_files_only):
    with pytest.raises(MachineError, match="cannot be written") as caught:
        AtomicCheckpointIO().save_checkpoint(checkpoint(1), file)
    assert "former" not in str(caught.value)
    assert names(file.parent) == []


def test_a_folder_that_cannot_be_made_is_named(file):
    file.parent.write_text("in the way")
    with pytest.raises(MachineError, match=r"the checkpoint .*last.ckpt cannot be written"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(1), file)


def test_the_disk_holds_the_file_before_it_takes_the_formers_place(file, monkeypatch):
    done = []
    fsync, replace = os.fsync, type(file).replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append("fsync") or fsync(number))
    monkeypatch.setattr(type(file), "replace", lambda *paths: done.append("replace") or replace(*paths))
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), file)
    assert done == ["fsync", "replace", "fsync"]  # the last one is the folder's


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def emptied(file):
    os.truncate(file, 0)


def overwritten(file):
    file.write_bytes(bytes(file.stat().st_size))


def text(file):
    file.write_text("<html>not found</html>")


def removed(file):
    file.unlink()


def other_zip(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "a")


@pytest.mark.parametrize("damage", [cut, emptied, overwritten, text, removed, other_zip], ids=lambda f: f.__name__)
def test_a_damaged_file_is_named_in_one_line(file, damage):
    AtomicCheckpointIO().save_checkpoint(checkpoint(1), file)
    damage(file)
    with pytest.raises(MachineError, match=rf"the checkpoint {re.escape(str(file))} cannot be read: .") as caught:
        AtomicCheckpointIO().load_checkpoint(file)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_what_would_run_code_is_refused_and_not_run(file, tmp_path, weights_only):
    file.parent.mkdir()
    torch.save({"epoch": Malicious(tmp_path / "ran")}, file)
    with pytest.raises(MachineError, match="cannot be read"):
        AtomicCheckpointIO().load_checkpoint(file, weights_only=weights_only)
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_a_bare_pickle_is_refused_and_not_run(file, tmp_path):
    file.parent.mkdir()
    file.write_bytes(pickle.dumps(Malicious(tmp_path / "ran"), protocol=2))
    with pytest.raises(MachineError, match="cannot be read"):
        AtomicCheckpointIO().load_checkpoint(file)
    assert not (tmp_path / "ran").exists()

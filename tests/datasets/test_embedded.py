import logging
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mlflow_ssl.datasets.cache import cache_folder
from mlflow_ssl.datasets.decode import decode
from mlflow_ssl.datasets.embedded import digits_folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def digits(cache, monkeypatch):
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(cache))
    return digits_folder()


def test_the_digits_are_the_published_ones_by_class(digits):
    published = load_digits()
    files = sorted(digits.rglob("*.png"), key=lambda file: file.name)
    assert [int(file.parent.name) for file in files] == published.target.tolist()
    for number in (0, 7, 1796):
        expected = np.round(published.images[number] * 255 / 16)
        np.testing.assert_array_equal(decode(files[number].read_bytes()), np.stack([expected] * 3, axis=-1))


def test_the_digits_are_written_once(digits, caplog):
    caplog.set_level(logging.INFO)
    before = {file: file.stat().st_mtime_ns for file in digits.rglob("*")}
    assert digits_folder() == digits
    assert {file: file.stat().st_mtime_ns for file in digits.rglob("*")} == before
    assert not caplog.records


def test_nothing_but_the_digits_is_left_in_the_cache(digits, cache):
    assert list(cache.iterdir()) == [digits]


def few_digits(monkeypatch):
    published = load_digits()
    published.images, published.target = published.images[:12], published.target[:12]
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: published)


def test_another_process_that_was_faster_wins(tmp_path, monkeypatch):
    few_digits(monkeypatch)
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(tmp_path))
    rename = Path.rename

    def overtaken(self, target):
        (target / "0").mkdir(parents=True)
        (target / "0" / "theirs.png").touch()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    folder = digits_folder()
    assert [file.name for file in folder.rglob("*.png")] == ["theirs.png"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_writer_that_fails_leaves_no_half_written_folder(tmp_path, monkeypatch):
    few_digits(monkeypatch)
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(tmp_path))

    def full(self, target):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        with pytest.raises(OSError, match="disk full"):
            digits_folder()
    assert not list(tmp_path.iterdir())
    assert len(list(digits_folder().rglob("*.png"))) == 12


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_SSL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "mlflow_ssl"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mlflow_ssl"
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(tmp_path / "ours"))
    assert cache_folder() == tmp_path / "ours"

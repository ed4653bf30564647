import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_ssl.datasets import pixels
from mlflow_ssl.datasets.pixels import PixelCache, cached_size
from mlflow_ssl.errors import InputError

SIZES = [(30, 20), (16, 40), (8, 6), (25, 25)]  # width, height
DIGESTS = ["d0", "d1", "d2", "d3"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pixels"


def image(number):
    width, height = SIZES[number]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def expected(number, side=10):
    height, width = image(number).shape[:2]
    width, height = (int(size[0]) for size in cached_size(np.array([width]), np.array([height]), side))
    return cv2.resize(image(number), (width, height), interpolation=cv2.INTER_AREA)


def opened(kind="disk", *, numbers=range(4), side=10):
    return PixelCache.open(
        kind,
        digests=pa.array([DIGESTS[number] for number in numbers]),
        widths=np.array([SIZES[number][0] for number in numbers]),
        heights=np.array([SIZES[number][1] for number in numbers]),
        shorter_side=side,
    )


def in_order(cache):
    return cache.rows(pa.array(DIGESTS))


def never():
    pytest.fail("decoded again")


def test_an_image_is_decoded_once_and_kept_resized():
    cache = opened()
    rows = in_order(cache)
    for number in range(4):
        np.testing.assert_array_equal(rows.get(number, lambda number=number: image(number)), expected(number))
    assert (cache.num_images, cache.num_ready) == (4, 4)
    for number in range(4):
        np.testing.assert_array_equal(rows.get(number, never), expected(number))


def test_the_next_run_finds_them_whatever_the_order_of_its_images():
    first = opened()
    in_order(first).get(1, lambda: image(1))
    first.close()
    second = opened(numbers=[3, 1, 0, 2])
    assert second.num_ready == 1
    np.testing.assert_array_equal(in_order(second).get(1, never), expected(1))


def test_a_smaller_image_is_not_enlarged():
    np.testing.assert_array_equal(in_order(opened()).get(2, lambda: image(2)), image(2))


def test_equal_contents_share_a_slot():
    cache = opened(numbers=[0, 1, 0, 1])
    rows = cache.rows(pa.array(["d0", "d1", "d0", "d1"]))
    rows.get(0, lambda: image(0))
    assert cache.num_images == 2
    np.testing.assert_array_equal(rows.get(2, never), expected(0))


def test_another_size_or_other_images_are_another_cache():
    in_order(opened()).get(0, lambda: image(0))
    assert opened(side=12).num_ready == opened(numbers=[0, 1, 2]).num_ready == 0
    assert opened().num_ready == 1


def test_pixels_cannot_be_changed():
    rows = in_order(opened())
    for _ in range(2):
        assert not rows.get(0, lambda: image(0)).flags.writeable


def test_pixels_that_are_not_what_was_written_are_decoded_again(folder):
    first = opened()
    in_order(first).get(0, lambda: image(0))
    first.close()
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[4 * 4] ^= 255  # the first byte of the first slot
    file.write_bytes(content)
    again = []
    second = in_order(opened())
    np.testing.assert_array_equal(second.get(0, lambda: again.append(1) or image(0)), expected(0))
    assert again
    np.testing.assert_array_equal(second.get(0, never), expected(0))


def test_a_checksum_without_its_pixels_is_not_believed(folder):
    opened().close()
    (file,) = folder.iterdir()
    with file.open("r+b") as written:
        written.write(np.full(4, 12345, dtype=np.uint32).tobytes())
    np.testing.assert_array_equal(in_order(opened()).get(3, lambda: image(3)), expected(3))


def test_a_file_of_another_size_is_replaced(folder):
    cache = opened()
    cache.close()
    cache.file.write_bytes(b"something else")
    np.testing.assert_array_equal(in_order(opened()).get(3, lambda: image(3)), expected(3))


def test_a_link_in_place_of_the_file_is_not_followed(tmp_path):
    cache = opened()
    cache.close()
    cache.file.unlink()
    (tmp_path / "precious").write_bytes(b"precious")
    cache.file.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        opened()
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_full_disk_ends_the_writing_and_not_the_training(monkeypatch, caplog):
    rows = in_order(opened())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for number in (0, 1, 0):
        np.testing.assert_array_equal(rows.get(number, lambda number=number: image(number)), expected(number))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "no longer cached" in warnings[0]
    assert "No space left" in warnings[0]


def test_too_little_space_is_refused_before_anything_is_written(monkeypatch, folder):
    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(
        InputError, match=r"^datamodule\.cache=disk needs 0\.1 GB in .*, which has 0\.0 GB free; make room"
    ):
        opened()
    assert list(folder.iterdir()) == []


def fill(cache, numbers):
    rows = in_order(cache)
    for number in numbers:
        rows.get(number, lambda number=number: image(number))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_what_one_of_them_has_decoded(method):
    cache = opened()
    context = multiprocessing.get_context(method)
    workers = [context.Process(target=fill, args=(cache, numbers)) for numbers in ([0, 1, 2], [2, 1, 3])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert cache.num_ready == 4
    for number in range(4):
        np.testing.assert_array_equal(in_order(cache).get(number, never), expected(number))


KILLED = """
import sys, numpy as np, pyarrow as pa
from mlflow_ssl.datasets.pixels import PixelCache
count = 400
digests = pa.array([f"{n:04d}" for n in range(count)])
side = np.full(count, 64)
cache = PixelCache.open(sys.argv[1], digests=digests, widths=side, heights=side, shorter_side=64)
rows = cache.rows(digests)
print(cache.num_ready, flush=True)
for n in range(count):
    got = rows.get(n, lambda: np.full((64, 64, 3), n % 251, dtype=np.uint8))
    assert (got == n % 251).all()
print(cache.num_ready, flush=True)
"""


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_a_run_that_is_killed_leaves_nothing_wrong(kind):
    command = [sys.executable, "-c", KILLED, kind]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "0\n"
    time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "400"


def shared_files():
    return set(pixels._folder("ram").glob("*.pixels"))


def test_a_cache_in_memory_is_gone_with_its_last_user():
    first, second = opened("ram"), opened("ram")
    file = first.file
    in_order(first).get(0, lambda: image(0))
    np.testing.assert_array_equal(in_order(second).get(0, never), expected(0))
    first.close()
    assert file in shared_files()
    second.close()
    assert file not in shared_files()


def test_a_forked_worker_that_ends_does_not_remove_it():
    cache = opened("ram")
    worker = multiprocessing.get_context("fork").Process(target=fill, args=(cache, [0]))
    worker.start()
    worker.join()
    assert cache.num_ready == 1
    assert cache.file in shared_files()
    cache.close()


def test_a_pickled_cache_opens_its_file_again():
    cache = opened()
    in_order(cache).get(0, lambda: image(0))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(in_order(cache))).get(0, never), expected(0))


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), side=st.integers(1, 2000))
def test_a_cached_image_keeps_its_shape_and_never_grows(width, height, side):
    (new_width,), (new_height,) = cached_size(np.array([width]), np.array([height]), side)
    assert 1 <= new_width <= width
    assert 1 <= new_height <= height
    assert min(new_width, new_height) == min(side, width, height)
    scale = min(1, side / min(width, height))
    assert abs(new_width - width * scale) <= 0.5
    assert abs(new_height - height * scale) <= 0.5

import fcntl
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
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


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """Put what belongs in shared memory elsewhere: tests run side by side."""
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(pixels, "_SHARED_MEMORY", memory)
    return memory


def image(number):
    width, height = SIZES[number]
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def expected(number, side=10):
    height, width = image(number).shape[:2]
    width, height = (int(size[0]) for size in cached_size(np.array([width]), np.array([height]), side))
    return cv2.resize(image(number), (width, height), interpolation=cv2.INTER_AREA)


def opened(kind="disk", *, numbers=range(4), side=10, **options):
    return PixelCache.open(
        kind,
        digests=pa.array([DIGESTS[number] for number in numbers]),
        widths=np.array([SIZES[number][0] for number in numbers]),
        heights=np.array([SIZES[number][1] for number in numbers]),
        shorter_side=side,
        **options,
    )


def in_order(cache):
    return cache.rows(pa.array(DIGESTS))


def get(cache, number, decode):
    found = cache.find(number)
    return cache.store(number, decode()) if found is None else found


def never():
    pytest.fail("decoded again")


def test_an_image_is_decoded_once_and_kept_resized():
    cache = opened()
    rows = in_order(cache)
    for number in range(4):
        np.testing.assert_array_equal(get(rows, number, lambda number=number: image(number)), expected(number))
    assert (cache.num_images, cache.num_ready) == (4, 4)
    for number in range(4):
        np.testing.assert_array_equal(get(rows, number, never), expected(number))


def test_the_next_run_finds_them_whatever_the_order_of_its_images():
    first = opened()
    get(in_order(first), 1, lambda: image(1))
    first.close()
    second = opened(numbers=[3, 1, 0, 2])
    assert second.num_ready == 1
    np.testing.assert_array_equal(get(in_order(second), 1, never), expected(1))


def test_a_smaller_image_is_not_enlarged():
    np.testing.assert_array_equal(get(in_order(opened()), 2, lambda: image(2)), image(2))


def test_equal_contents_share_a_slot():
    cache = opened(numbers=[0, 1, 0, 1])
    rows = cache.rows(pa.array(["d0", "d1", "d0", "d1"]))
    get(rows, 0, lambda: image(0))
    assert cache.num_images == 2
    np.testing.assert_array_equal(get(rows, 2, never), expected(0))


def test_another_size_or_other_images_are_another_cache():
    get(in_order(opened()), 0, lambda: image(0))
    assert opened(side=12).num_ready == opened(numbers=[0, 1, 2]).num_ready == 0
    assert opened().num_ready == 1


def test_pixels_cannot_be_changed():
    rows = in_order(opened())
    for _ in range(2):
        assert not get(rows, 0, lambda: image(0)).flags.writeable


def test_pixels_that_are_not_what_was_written_are_decoded_again(folder):
    first = opened()
    get(in_order(first), 0, lambda: image(0))
    first.close()
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[4 * 4] ^= 255  # the first byte of the first slot
    file.write_bytes(content)
    again = []
    second = in_order(opened())
    np.testing.assert_array_equal(get(second, 0, lambda: again.append(1) or image(0)), expected(0))
    assert again
    np.testing.assert_array_equal(get(second, 0, never), expected(0))


def test_a_checksum_without_its_pixels_is_not_believed(folder):
    opened().close()
    (file,) = folder.iterdir()
    with file.open("r+b") as written:
        written.write(np.full(4, 12345, dtype=np.uint32).tobytes())
    np.testing.assert_array_equal(get(in_order(opened()), 3, lambda: image(3)), expected(3))


def test_a_file_of_another_size_is_replaced(folder):
    cache = opened()
    cache.close()
    cache.file.write_bytes(b"something else")
    np.testing.assert_array_equal(get(in_order(opened()), 3, lambda: image(3)), expected(3))


@pytest.mark.parametrize(
    ("link", "content"), [(Path.symlink_to, b""), (Path.symlink_to, b"precious"), (Path.hardlink_to, b"precious")]
)
def test_a_link_in_place_of_the_file_is_replaced_and_not_written_through(tmp_path, link, content):
    cache = opened()
    cache.close()
    cache.file.unlink()
    (tmp_path / "precious").write_bytes(content)
    link(cache.file, tmp_path / "precious")
    np.testing.assert_array_equal(get(in_order(opened()), 3, lambda: image(3)), expected(3))
    assert (tmp_path / "precious").read_bytes() == content
    assert not cache.file.is_symlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_somebody_elses_file_is_replaced(folder):
    cache = opened()
    get(in_order(cache), 0, lambda: image(0))
    os.chown(folder, 12345, 12345)
    os.chown(cache.file, 12345, 12345)
    assert opened().num_ready == 1  # so a file server does that gives all to one user
    os.chown(folder, 0, 0)
    assert opened().num_ready == 0
    assert cache.file.stat().st_uid == 0


def test_a_folder_that_cannot_be_written_is_named(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    with pytest.raises(InputError, match=r"^datamodule\.cache=disk must have a file to write, got .*pixels.*; set ML"):
        opened()


def test_too_many_open_files_cost_nobody_the_file(monkeypatch):
    cache = opened()

    def too_many(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", too_many)
        with pytest.raises(InputError, match="Too many open files"):
            opened()
    assert os.path.samestat(os.fstat(cache._descriptor), cache.file.stat())


def test_another_decoding_is_another_cache_and_never_too_coarse():
    get(in_order(opened()), 0, lambda: image(0))
    assert opened(decode_at_least=12).num_ready == 0
    with pytest.raises(InputError, match=r"^datamodule\.decode_at_least must be null, or .* which is 10, got 9$"):
        opened(decode_at_least=9)


def test_an_image_that_has_become_smaller_is_neither_enlarged_nor_kept():
    cache = opened()
    small = np.zeros((9, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(get(in_order(cache), 0, lambda: small), small)
    assert cache.num_ready == 0


def test_contents_must_be_known():
    with pytest.raises(InputError, match=r"^datamodule\.cache needs .*; set datamodule\.verify=all$"):
        PixelCache.open(
            "disk",
            digests=pa.array(["d0", None]),
            widths=np.array([8, 8]),
            heights=np.array([8, 8]),
            shorter_side=8,
        )


def test_pixels_that_the_caller_still_writes_to_stay_writeable():
    mine = image(2).copy()
    get(in_order(opened()), 2, lambda: mine)
    assert mine.flags.writeable


def test_no_locks_are_needed_on_disk(monkeypatch):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    np.testing.assert_array_equal(get(in_order(opened()), 1, lambda: image(1)), expected(1))


def test_a_closed_cache_writes_into_no_other_file(tmp_path):
    cache = opened()
    descriptor = cache._descriptor
    cache.close()
    with (tmp_path / "precious").open("wb") as other:
        assert other.fileno() == descriptor
        np.testing.assert_array_equal(get(in_order(cache), 0, lambda: image(0)), expected(0))
    assert (tmp_path / "precious").read_bytes() == b""


def test_a_full_disk_ends_the_writing_and_not_the_training(monkeypatch, caplog):
    rows = in_order(opened())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for number in (0, 1, 0):
        np.testing.assert_array_equal(get(rows, number, lambda number=number: image(number)), expected(number))
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


def test_a_cache_that_is_full_needs_no_space(monkeypatch):
    count, side = 8, np.full(8, 64)
    images = {"digests": pa.array([str(n) for n in range(count)]), "widths": side, "heights": side, "shorter_side": 64}
    cache = PixelCache.open("disk", **images)
    for slot in range(count):
        get(cache, slot, lambda: np.zeros((64, 64, 3), dtype=np.uint8))
    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert PixelCache.open("disk", **images).num_ready == count


@pytest.mark.parametrize(
    ("scarce", "said"),
    [
        ("shared", r"GB in \S+memory, which has 0\.0 GB free; .*--shm-size"),
        ("memory", r"GB in memory, .*use cache=disk"),
    ],
)
def test_memory_is_refused_by_what_is_scarce(monkeypatch, scarce, said):
    shared, free = (10, 10**12) if scarce == "shared" else (10**12, 10)
    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda _: SimpleNamespace(free=shared))
    monkeypatch.setattr(pixels.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    with pytest.raises(InputError, match=rf"^datamodule\.cache=ram needs 0\.1 {said}"):
        opened("ram")


FULL = """
import os, sys, numpy as np, pyarrow as pa
from pathlib import Path
from mlflow_ssl.datasets import pixels
pixels._SHARED_MEMORY, pixels._ROOM = Path(sys.argv[1]), 0
count, side = 3000, np.full(3000, 8)
digests = pa.array([f"{n:05d}" for n in range(count)])
cache = pixels.PixelCache.open("ram", digests=digests, widths=side, heights=side, shorter_side=8)
rows = cache.rows(digests)
try:
    Path(sys.argv[1], "else").write_bytes(bytes(10**7))
except OSError:
    pass
for n in range(count):
    found = rows.find(n)
    got = rows.store(n, np.full((8, 8, 3), n % 251, dtype=np.uint8)) if found is None else found
    assert (got == n % 251).all()
print(cache.num_ready < count)
"""


@pytest.fixture
def small_memory(tmp_path):
    """Return a file system in memory that holds 2 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(mounting, check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_memory_that_others_fill_ends_the_writing_and_not_the_process(small_memory):
    done = subprocess.run([sys.executable, "-c", FULL, str(small_memory)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "True\n")  # -7 would be SIGBUS
    assert done.stderr.count("no longer cached") == 1


def test_the_table_takes_its_space_at_once():
    """What is read through the map before it is written must not need memory that is not there."""
    count, side = 50_000, np.full(50_000, 1)
    digests = pa.array([f"{n:05d}" for n in range(count)])
    cache = PixelCache.open("ram", digests=digests, widths=side, heights=side, shorter_side=8)
    assert cache.file.stat().st_blocks * 512 >= 4 * count


def fill_and_close(cache):
    fill(cache, [0])
    cache.close()


def fill(cache, numbers, together=None):
    rows = in_order(cache)
    for number in numbers:
        if together:
            together.wait(60)
        np.testing.assert_array_equal(get(rows, number, lambda number=number: image(number)), expected(number))


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
        np.testing.assert_array_equal(get(in_order(cache), number, never), expected(number))


def test_two_that_fill_one_slot_at_once_leave_it_right():
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)
    # each opens the file for itself, as two runs do
    runs = [context.Process(target=fill, args=(opened(), range(4), together)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
        assert run.exitcode == 0
    fresh = in_order(opened())
    for number in range(4):
        np.testing.assert_array_equal(get(fresh, number, never), expected(number))


RUN = """
import builtins, os, sys, time, numpy as np, pyarrow as pa
from mlflow_ssl.datasets.pixels import PixelCache
kind, name, stop = sys.argv[1:]
count, side = 400, np.full(400, 64)
digests = pa.array([f"{name}{n:04d}" for n in range(count)])
cache = PixelCache.open(kind, digests=digests, widths=side, heights=side, shorter_side=64)
builtins.cache = cache  # nothing lets go of it before the interpreter ends
rows, write = cache.rows(digests), os.pwrite
print(cache.file, cache.num_ready, flush=True)
def torn(descriptor, data, offset):
    write(descriptor, data[: len(data) // 2], offset)
    print("half", flush=True)
    time.sleep(600)
for n in range(count):
    if n == int(stop):
        os.pwrite = torn
    found = rows.find(n)
    got = rows.store(n, np.full((64, 64, 3), n % 251, dtype=np.uint8)) if found is None else found
    assert (got == n % 251).all()
print(cache.num_ready, flush=True)
"""


def kill_in_a_write(kind, name, at=100):
    """Start a run, kill it when half an image is written, and return the cache's file."""
    command = [sys.executable, "-c", RUN, kind, name, str(at)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        file, _ = killed.stdout.readline().split()
        assert killed.stdout.readline() == "half\n"
        killed.send_signal(signal.SIGKILL)
    return Path(file)


def complete(kind, name):
    """Run to the end and return what is printed."""
    command = [sys.executable, "-c", RUN, kind, name, "-1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize("kind", ["disk", "ram"])
def test_what_a_killed_run_has_written_is_used_and_the_rest_is_right(kind):
    name = f"{os.getpid()}-{kind}-"
    file = kill_in_a_write(kind, name)
    assert complete(kind, name) == [str(file), "100", "400"]
    assert file.exists() == (kind == "disk")


def test_what_a_killed_run_leaves_in_memory_is_removed_by_the_next():
    first = kill_in_a_write("ram", f"{os.getpid()}-left-")
    assert first.exists()
    second = kill_in_a_write("ram", f"{os.getpid()}-next-")
    assert (first.exists(), second.exists()) == (False, True)
    complete("ram", f"{os.getpid()}-next-")
    assert not second.exists()


def shared_files():
    return set(pixels._SHARED_MEMORY.rglob("*.pixels"))


def test_a_cache_in_memory_is_gone_with_its_last_user():
    first, second = opened("ram"), opened("ram")
    file = first.file
    get(in_order(first), 0, lambda: image(0))
    np.testing.assert_array_equal(get(in_order(second), 0, never), expected(0))
    first.close()
    assert file in shared_files()
    second.close()
    assert file not in shared_files()


def test_one_that_opens_while_the_last_user_closes_shares_with_the_next(monkeypatch):
    last, flock, closed = opened("ram"), fcntl.flock, []

    def closing(descriptor, how):
        if how == fcntl.LOCK_SH and not closed:  # the file is open, and not leased yet
            closed.append(True)
            last.close()
        return flock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", closing)
        first = opened("ram")
    second = opened("ram")
    get(in_order(first), 0, lambda: image(0))
    np.testing.assert_array_equal(get(in_order(second), 0, never), expected(0))
    first.close()
    assert second.file in shared_files()


@pytest.mark.parametrize("wrong", ["open to all", "a link", "a file"])
def test_memory_in_a_folder_that_others_can_use_is_refused(memory, tmp_path, wrong):
    folder = memory / f"mlflow_ssl-{os.getuid()}"
    if wrong == "open to all":
        folder.mkdir()
        folder.chmod(0o777)
    elif wrong == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.touch(mode=0o600)
    with pytest.raises(InputError, match=r"^datamodule\.cache=ram must have .* for this user alone; remove it, or use"):
        opened("ram")


def test_memory_is_refused_where_there_is_no_shared_memory(memory):
    memory.rmdir()
    with pytest.raises(InputError, match=r"which this system has not; use cache=disk$"):
        opened("ram")


def test_a_forked_worker_that_ends_does_not_remove_it():
    cache = opened("ram")
    worker = multiprocessing.get_context("fork").Process(target=fill_and_close, args=(cache,))
    worker.start()
    worker.join()
    assert cache.num_ready == 1
    assert cache.file in shared_files()
    cache.close()


def test_a_pickled_cache_opens_its_file_again():
    cache = opened()
    get(in_order(cache), 0, lambda: image(0))
    np.testing.assert_array_equal(get(pickle.loads(pickle.dumps(in_order(cache))), 0, never), expected(0))


@given(width=st.integers(1, 20_000), height=st.integers(1, 20_000), side=st.integers(1, 2000))
def test_a_cached_image_keeps_its_shape_and_never_grows(width, height, side):
    (new_width,), (new_height,) = cached_size(np.array([width]), np.array([height]), side)
    assert 1 <= new_width <= width
    assert 1 <= new_height <= height
    assert min(new_width, new_height) == min(side, width, height)
    scale = min(1, side / min(width, height))
    assert abs(new_width - width * scale) <= 0.5
    assert abs(new_height - height * scale) <= 0.5

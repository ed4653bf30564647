import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from damage import damaged
from PIL import Image

from mlflow_ssl.datasets import contents
from mlflow_ssl.datasets.bad_images import BadImage
from mlflow_ssl.datasets.sources import FolderSource
from mlflow_ssl.datasets.walk import look


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(folder))
    return folder


@pytest.fixture
def patient(monkeypatch):
    """Remember files that have just been written, too: no test waits two seconds for each."""
    monkeypatch.setattr(contents, "RACY_NS", 0)


@pytest.fixture
def decoded(monkeypatch):
    """Return the bytes that are decoded from here on."""
    seen, measure = [], contents.measure

    def noting(data):
        seen.append(data)
        return measure(data)

    monkeypatch.setattr(contents, "measure", noting)
    return seen


def read_contents(root, names):
    """Return the contents of some files, as if a scan had found just these, and the bad ones."""
    source = FolderSource(root)
    found, missing = look(str(root), "", names)
    found = found.append_column("offset", [np.zeros(len(found), dtype=np.int64)])
    good, bad = contents.read_contents(source, found)
    return good, [*missing, *bad]


def tick():
    time.sleep(0.02)  # the kernel stamps files by a clock of 1 to 10 ms


def paths(root):
    return sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())


def read(root):
    tick()
    return read_contents(root, paths(root))


def digests(root):
    good, _ = read(root)
    return dict(zip(good["path"].to_pylist(), good["digest"].to_pylist(), strict=True))


def write(file, *, seed=0, size=(24, 24)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


# what a file holds


def test_good_files_come_with_digest_and_sizes_and_bad_ones_with_a_reason(image_folder):
    root = image_folder({"a": 3}, size=8)
    (root / "a" / "bad.png").write_bytes(b"no\nimage")
    shutil.copy(root / "a" / "000.png", root / "a" / "copy.png")
    write(root / "a" / "wide.png", size=(10, 30))
    good, bad = read_contents(root, paths(root))
    assert good.column_names[-3:] == ["digest", "width", "height"]
    rows = {row["path"]: row for row in good.to_pylist()}
    assert list(rows) == ["a/000.png", "a/001.png", "a/002.png", "a/copy.png", "a/wide.png"]
    assert {path: row["size"] for path, row in rows.items()} == {path: (root / path).stat().st_size for path in rows}
    assert rows["a/000.png"]["digest"] == rows["a/copy.png"]["digest"]
    assert len({row["digest"] for row in rows.values()}) == 4
    assert all(len(row["digest"]) == 32 for row in rows.values())
    assert (rows["a/000.png"]["width"], rows["a/000.png"]["height"]) == (8, 8)
    assert (rows["a/wide.png"]["width"], rows["a/wide.png"]["height"]) == (30, 10)
    assert [image.path for image in bad] == ["a/bad.png"]
    assert bad[0].reason
    assert "\n" not in bad[0].reason


def test_a_jpeg_that_breaks_off_is_bad(tmp_path):
    file = write(tmp_path / "half.jpg", size=(64, 64))
    file.write_bytes(file.read_bytes()[:1000])
    good, bad = read_contents(tmp_path, ["half.jpg"])
    assert not len(good)
    assert "truncated" in bad[0].reason


def test_width_and_height_are_those_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (30, 10)).save(tmp_path / "turned.jpg", exif=exif)
    good, _ = read_contents(tmp_path, ["turned.jpg"])
    assert good.select(["width", "height"]).to_pylist() == [{"width": 10, "height": 30}]


def test_no_files_are_no_rows(tmp_path):
    good, bad = read_contents(tmp_path, [])
    assert (len(good), bad) == (0, [])


# the memory


@pytest.mark.usefixtures("patient")
def test_an_unchanged_folder_is_not_read_again(image_folder, decoded, caplog):
    caplog.set_level(logging.INFO)
    root = image_folder({"a": 3, "b": 2})
    (root / "a" / "bad.png").write_bytes(b"no image")
    first = read(root)
    assert len(decoded) == 6
    second = read(root)
    assert len(decoded) == 6
    assert second[0].equals(first[0])
    assert second[1] == first[1] == [BadImage("a/bad.png", first[1][0].reason)]
    assert [record.args for record in caplog.records] == [(6, 6), (6, 0)]


@pytest.mark.usefixtures("patient")
def test_the_memory_is_of_files_below_one_root_however_it_is_spelled(image_folder, decoded, tmp_path, monkeypatch):
    root = image_folder({"a": 2}, name="images")
    read(root)
    (tmp_path / "link").symlink_to(root)
    read(tmp_path / "link")
    monkeypatch.chdir(root)
    read_contents(Path(), paths(root))
    assert len(decoded) == 2
    read(image_folder({"a": 2}, name="twin"))
    assert len(decoded) == 4


@pytest.mark.usefixtures("patient")
def test_only_new_and_changed_files_are_read(image_folder, decoded):
    root = image_folder({"a": 4})
    before = digests(root)
    write(root / "a" / "001.png", seed=7)
    write(root / "a" / "new.png", seed=8)
    (root / "a" / "002.png").unlink()
    decoded.clear()
    after = digests(root)
    assert decoded == [(root / "a" / name).read_bytes() for name in ("001.png", "new.png")]
    assert after["a/001.png"] != before["a/001.png"]
    assert (list(after), after["a/000.png"]) == (
        ["a/000.png", "a/001.png", "a/003.png", "a/new.png"],
        before["a/000.png"],
    )
    decoded.clear()
    assert digests(root) == after
    assert not decoded


@pytest.mark.usefixtures("patient")
def test_a_change_that_keeps_size_and_mtime_is_seen(image_folder):
    root = image_folder({"a": 1})
    file, other = root / "a" / "000.png", root.parent / "other.bmp"
    Image.open(file).save(file.with_suffix(".bmp"))
    file.unlink()
    file = file.with_suffix(".bmp")
    before, stat = digests(root), file.stat()
    write(other, seed=9)
    file.write_bytes(other.read_bytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert digests(root) != before


@pytest.mark.usefixtures("patient")
def test_a_bad_image_that_is_mended_is_good(image_folder):
    root = image_folder({"a": 1})
    (root / "a" / "bad.png").write_bytes(b"no image")
    assert len(read(root)[1]) == 1
    write(root / "a" / "bad.png")
    good, bad = read(root)
    assert (len(good), bad) == (2, [])


@pytest.mark.usefixtures("patient")
def test_the_digests_depend_on_neither_place_nor_order_nor_mtime(image_folder, tmp_path):
    root = image_folder({"a": 3, "b": 3})
    before = digests(root)
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    assert digests(moved) == before
    for number, path in enumerate(before):
        os.utime(moved / path, (number, number))
    assert digests(moved) == before
    backwards, _ = read_contents(moved, list(reversed(before)))
    assert dict(zip(backwards["path"].to_pylist(), backwards["digest"].to_pylist(), strict=True)) == before
    assert backwards["path"].to_pylist() == list(reversed(before))


def test_a_file_written_just_before_it_is_read_is_read_again_until_it_has_settled(tmp_path, decoded):
    root = tmp_path / "images"
    root.mkdir()
    write(root / "0.png")
    os.utime(root / "0.png", (0, 0))  # an old mtime proves nothing: the status changed now
    for expected in (1, 2):
        read(root)
        assert len(decoded) == expected
    time.sleep(2.1)
    for _ in range(2):
        read(root)
        assert len(decoded) == 3


@pytest.mark.usefixtures("patient")
def test_a_file_that_cannot_be_read_is_bad_and_not_remembered(image_folder, cache):
    root = image_folder({"a": 1})
    (root / "a" / "gone.png").symlink_to(root / "nowhere.png")
    (root / "a" / "folder.png").mkdir()
    _, bad = read_contents(root, ["a/000.png", "a/folder.png", "a/gone.png"])
    assert [image.path for image in bad] == ["a/folder.png", "a/gone.png"]
    tick()
    read_contents(root, ["a/000.png", "a/folder.png", "a/gone.png"])
    assert stored(cache)["path"].to_pylist() == ["a/000.png"]


@pytest.mark.usefixtures("patient")
def test_a_lack_of_memory_is_not_held_against_the_file(image_folder, monkeypatch):
    root = image_folder({"a": 1})
    tick()
    with monkeypatch.context() as patch:

        def full(data, **limits):
            raise MemoryError

        patch.setattr(contents, "measure", full)
        reasons = [image.reason for image in read(root)[1]]
        assert reasons == ["takes more memory to decode than this machine has"]
    assert read(root)[1] == []


@pytest.mark.usefixtures("patient")
def test_files_left_out_this_time_are_remembered_and_deleted_ones_forgotten(image_folder, cache, decoded):
    root = image_folder({"a": 2, "b": 3})
    read(root)
    (root / "b" / "002.png").unlink()
    write(root / "b" / "001.png", seed=5)
    write(root / "a" / "new.png", seed=6)
    tick()
    decoded.clear()
    read_contents(root, ["a/000.png", "a/001.png", "a/new.png"])
    assert len(decoded) == 1
    assert sorted(stored(cache)["path"].to_pylist()) == [
        *("a/000.png", "a/001.png", "a/new.png"),
        *("b/000.png", "b/001.png"),  # the latter with the stamp of old: it would be read again
    ]


@pytest.mark.usefixtures("patient")
def test_an_interrupted_run_leaves_what_it_has_read(image_folder, monkeypatch, decoded):
    root = image_folder({"a": 100}, size=4)
    tick()
    read_file = contents._read_file

    def stopping(reader, row, **limits):
        if row == 90:
            raise KeyboardInterrupt
        return read_file(reader, row, **limits)

    with monkeypatch.context() as patch:
        patch.setattr(contents, "_read_file", stopping)
        with pytest.raises(KeyboardInterrupt):
            read(root)
    decoded.clear()
    assert len(digests(root)) == 100
    assert 0 < len(decoded) < 50


# trouble with the cache


def stored(cache):
    [file] = cache.rglob("*.parquet")
    return pq.read_table(file)


@pytest.mark.usefixtures("patient")
def test_a_damaged_cache_never_changes_the_answer(image_folder, cache):
    root = image_folder({"a": 3}, size=4)
    expected = read(root)[0]
    [file] = cache.rglob("*.parquet")
    whole = file.read_bytes()
    for seed in range(60):
        file.write_bytes(damaged(whole, seed))
        assert read_contents(root, paths(root))[0].equals(expected)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("spoil", ["empty", "text", "other columns", "other Pillow"])
def test_a_cache_that_is_not_ours_is_ignored_and_written_anew(image_folder, cache, decoded, spoil):
    root = image_folder({"a": 2})
    expected = digests(root)
    [file] = cache.rglob("*.parquet")
    table = pq.read_table(file)
    if spoil == "other columns":
        pq.write_table(table.drop_columns(["reason"]), file)
    elif spoil == "other Pillow":
        pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"pillow": b"0.1"}), file)
    else:
        file.write_bytes(b"" if spoil == "empty" else b"not a table")
    decoded.clear()
    assert digests(root) == expected
    assert len(decoded) == 2
    assert digests(root) == expected
    assert len(decoded) == 2


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("obstacle", ["a file in the way", "no home"])
def test_a_cache_that_cannot_be_written_costs_only_speed(image_folder, cache, monkeypatch, caplog, decoded, obstacle):
    caplog.set_level(logging.INFO)
    if obstacle == "no home":
        for name in ("MLFLOW_SSL_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    else:
        cache.write_text("in the way")
    root = image_folder({"a": 2})
    assert digests(root) == digests(root)
    assert len(decoded) == 4
    assert "the next run will read every file again" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.usefixtures("patient")
def test_a_full_disk_leaves_the_former_cache_and_no_half_of_a_new_one(image_folder, cache, monkeypatch):
    root = image_folder({"a": 2})
    read(root)
    before = stored(cache)
    write(root / "a" / "new.png")

    def full(table, where, **kwargs):
        where.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(contents, "pq", SimpleNamespace(write_table=full, ParquetFile=pq.ParquetFile))
        assert len(digests(root)) == 3
    assert stored(cache).equals(before)
    assert len(list(cache.rglob("*"))) == 2  # a folder and the file in it


@pytest.mark.usefixtures("patient")
def test_two_that_write_at_once_leave_a_whole_cache(image_folder, cache, caplog, decoded):
    caplog.set_level(logging.INFO)
    root = image_folder({"a": 20}, size=4)
    expected = digests(root)
    names = list(expected)
    both = threading.Barrier(2)

    def run(half):
        for turn in range(10):
            for path in half:
                os.utime(root / path, (turn, turn))
            tick()
            both.wait()
            good, _ = read_contents(root, names)
            assert good["digest"].to_pylist() == list(expected.values())

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, [names[::2], names[1::2]]))
    assert "cannot be" not in caplog.text
    assert set(stored(cache)["path"].to_pylist()) == set(names)
    assert len(list(cache.rglob("*"))) == 2
    assert digests(root) == expected
    decoded.clear()
    assert digests(root) == expected
    assert not decoded

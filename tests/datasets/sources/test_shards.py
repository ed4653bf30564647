import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from shards import png, write_shards, write_tar

from mlflow_ssl.datasets.bad_images import BadImage
from mlflow_ssl.datasets.sources import open_source
from mlflow_ssl.datasets.sources.shards import ShardSource
from mlflow_ssl.errors import InputError


def rows(source):
    return [(row["path"], row["class_name"]) for row in source.scan().table.to_pylist()]


@pytest.mark.parametrize("pattern", ["shard-{000..001}.tar", ""])
def test_a_pattern_and_a_folder_name_shards(tmp_path, pattern):
    write_shards(tmp_path, [2, 1])
    source = open_source(str(tmp_path / pattern))
    assert isinstance(source, ShardSource)
    assert rows(source) == [
        ("shard-000.tar/00000.png", "cat"),
        ("shard-000.tar/00001.png", "dog"),
        ("shard-001.tar/00002.png", "cat"),
    ]


def test_any_image_can_be_read_from_the_middle_of_its_shard(tmp_path):
    source = ShardSource(str(write_shards(tmp_path, [3, 2])))
    table = source.scan().table
    reader = source.reader(table)
    assert [reader[row] for row in (4, 0, 2)] == [png(4), png(0), png(2)]
    assert table["size"].to_pylist()[0] == len(png(0))
    assert pickle.loads(pickle.dumps(reader))[1] == png(1)


def check(reader):
    assert reader[1] == png(1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_opens_the_files_for_itself(tmp_path, method):
    source = ShardSource(str(write_shards(tmp_path, [3])))
    reader = source.reader(source.scan().table)
    check(reader)
    worker = get_context(method).Process(target=check, args=(reader,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def open_files():
    return len(list(Path("/dev/fd").iterdir()))


def test_many_shards_are_read_from_many_threads_with_few_open(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_ssl.datasets.sources.shards.KEPT_OPEN", 2)
    source = ShardSource(str(write_shards(tmp_path, [2] * 8)))
    reader = source.reader(source.scan().table)
    before = open_files()
    with ThreadPoolExecutor(4) as pool:
        wanted = [number % 16 for number in range(0, 16 * 30, 7)]
        assert list(pool.map(reader.__getitem__, wanted)) == [png(number) for number in wanted]
    assert open_files() == before + 2
    del reader
    assert open_files() == before


def test_a_class_may_be_a_number_or_in_json_or_missing(tmp_path):
    members = [
        ("a.png", png(0)),
        ("a.cls", b" 7\n"),
        ("b.json", json.dumps({"label": "dog", "width": 3}).encode()),
        ("b.seg.png", png(1)),  # the sample is b
        ("c.json", b"not json"),
        ("c.png", png(2)),
        ("folder/d.png", png(3)),
        ("e.json", b'{"label": "dog"}'),  # the text counts, wherever it comes
        ("e.cls", b"cat"),
        ("e.png", png(4)),
        ("f.json", b"[" * 100_000),
        ("f.png", png(5)),
    ]
    source = ShardSource(str(write_tar(tmp_path / "x.tar", members)))
    assert rows(source) == [
        ("x.tar/a.png", "7"),
        ("x.tar/b.seg.png", "dog"),
        ("x.tar/c.png", ""),
        ("x.tar/e.png", "cat"),
        ("x.tar/f.png", ""),
        ("x.tar/folder/d.png", ""),
    ]
    assert {name for _, name in rows(ShardSource(str(tmp_path / "x.tar"), labels="none"))} == {""}


def test_hidden_members_are_no_samples(tmp_path):
    members = [("._a.png", b"macOS"), ("a.png", png(0)), ("folder/._b.png", b"macOS"), ("folder/b.png", png(1))]
    source = ShardSource(str(write_tar(tmp_path / "x.tar", members)))
    assert rows(source) == [("x.tar/a.png", ""), ("x.tar/folder/b.png", "")]
    assert source.scan().bad == []


def test_a_name_that_is_not_utf_8_is_bad(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9.png"))
    found = ShardSource(str(tmp_path / "x.tar")).scan()
    assert found.bad == [BadImage("x.tar/caf?.png", "its name is not UTF-8; rename it")]
    assert len(found.table) == 0


def test_a_shard_named_twice_is_read_once(tmp_path):
    write_shards(tmp_path, [1])
    assert rows(ShardSource(str(tmp_path / "shard-{000,000}.tar"))) == [("shard-000.tar/00000.png", "cat")]


def test_links_and_devices_are_no_images(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("passwd.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(InputError, match=r"must hold images, found none in 1 shards"):
        ShardSource(str(tmp_path / "x.tar")).scan()


@pytest.mark.parametrize("inside", ["image", "header"])
def test_a_shard_that_breaks_off_keeps_what_came_before(tmp_path, inside):
    write_shards(tmp_path, [4], classes=())
    shard = tmp_path / "shard-000.tar"
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[2]
    shard.write_bytes(shard.read_bytes()[: 100 + (third.offset_data if inside == "image" else third.offset)])
    found = ShardSource(str(shard)).scan()
    assert [image.path for image in found.bad] == ["shard-000.tar"]
    assert "cannot be read to its end" in found.bad[0].reason
    assert found.table["path"].to_pylist() == ["shard-000.tar/00000.png", "shard-000.tar/00001.png"]


def test_a_header_that_is_broken_is_not_the_end(tmp_path):
    write_shards(tmp_path, [4], classes=())
    shard = tmp_path / "shard-000.tar"
    with tarfile.open(shard) as tar:
        third = tar.getmembers()[2].offset
    data = shard.read_bytes()
    shard.write_bytes(data[:third] + b"x" * tarfile.BLOCKSIZE + data[third + tarfile.BLOCKSIZE :])
    found = ShardSource(str(shard)).scan()
    assert found.bad == [BadImage("shard-000.tar", "cannot be read to its end: broken header")]
    assert len(found.table) == 2


def test_a_shard_without_an_end_mark_is_whole(tmp_path):
    write_shards(tmp_path, [2], classes=())
    shard = tmp_path / "shard-000.tar"
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-1]
    end = -(-(last.offset_data + last.size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    shard.write_bytes(shard.read_bytes()[:end])
    found = ShardSource(str(shard)).scan()
    assert (len(found.table), found.bad) == (2, [])


def test_a_shard_that_is_cut_later_cannot_be_read(tmp_path):
    source = ShardSource(str(write_shards(tmp_path, [4], classes=())))
    table = source.scan().table
    shard = tmp_path / "shard-000.tar"
    shard.write_bytes(shard.read_bytes()[: table["offset"].to_pylist()[2] + 10])
    reader = source.reader(table)
    assert reader[1] == png(1)
    with pytest.raises(OSError, match="ends before"):
        reader[2]


def test_a_second_image_of_a_sample_is_bad(tmp_path):
    found = ShardSource(str(write_tar(tmp_path / "x.tar", [("a.png", png(0)), ("a.jpg", png(1))]))).scan()
    assert [(image.path, image.reason) for image in found.bad] == [("x.tar/a.jpg", "is the second image of its sample")]


@pytest.mark.parametrize("path", ["pipe:touch {here}/ran.tar", "http://127.0.0.1:9/x.tar", "gone-{00..03}.tar"])
def test_only_files_that_are_here_are_opened(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^datamodule\.data_path must name files, \d are none, the first is /"):
        open_source(path.replace("{here}", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.tar.gz", r"must name \.tar files, .* got /.*/x\.tar\.gz; unpack others, such as x\.tar\.gz with gunzip$"),
        ("{a,b}/x.tar", r"must name shards of one folder, got /"),
        ("empty.tar", r"must hold \.tar files, found none in /"),
        ("x{0.tar", r"must be a pattern such as shards-\{000\.\.127\}\.tar: "),
    ],
)
def test_what_names_no_shards_is_refused(tmp_path, name, message):
    (tmp_path / "empty.tar").mkdir()
    with pytest.raises(InputError, match=rf"^datamodule\.data_path {message}"):
        ShardSource(f"{tmp_path}/{name}")


def test_other_options_are_for_folders(tmp_path):
    write_shards(tmp_path, [1])
    with pytest.raises(InputError, match=r"include_filter, exclude_filter and class_from are for folders and lists"):
        open_source(str(tmp_path), include=["x"])

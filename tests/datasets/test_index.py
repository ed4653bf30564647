import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from mlflow_ssl.datasets.contents import read_contents
from mlflow_ssl.datasets.index import INDEX, ImageIndex, index_folder, leaks, make_index
from mlflow_ssl.datasets.sources import FolderSource
from mlflow_ssl.errors import InputError


def table(**columns):
    number = len(next(iter(columns.values())))
    default = {
        "path": [f"a/{n}.png" for n in range(number)],
        "class_name": ["a"] * number,
        "label": [0] * number,
        "split": ["train"] * number,
        "size": [1] * number,
        "mtime_ns": [0] * number,
        "digest": ["00"] * number,
        "width": [8] * number,
        "height": [8] * number,
        "offset": [0] * number,
        "part": [0] * number,
    }
    return ImageIndex(pa.table(default | columns).cast(INDEX))


def test_make_index_takes_the_images_that_are_in_a_split(image_folder):
    root = image_folder({"a": 2, "b": 1}, size=8)
    source = FolderSource(root)
    contents, _ = read_contents(source, source.scan().table)
    index = make_index(contents, labels={"a": 5}, splits=np.array([-1, 0, 1], dtype=np.int8))
    [first, second] = index.table.select(["path", "class_name", "label", "split", "digest"]).to_pylist()
    digests = contents["digest"].to_pylist()
    assert tuple(first.values()) == ("a/001.png", "a", 5, "train", digests[1])
    assert tuple(second.values()) == ("b/000.png", "b", -1, "val", digests[2])


def test_index_folder_takes_every_good_image_in_the_splits_that_folders_name(image_folder):
    root = image_folder({"train/a": 2, "train/b": 1, "test/b": 1})
    (root / "train" / "b" / "bad.png").write_bytes(b"no image")
    index, bad = index_folder(root)
    rows = index.table.select(["path", "class_name", "label", "split"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("test/b/000.png", "b", 1, "test"),
        ("train/a/000.png", "a", 0, "train"),
        ("train/a/001.png", "a", 0, "train"),
        ("train/b/000.png", "b", 1, "train"),
    ]
    assert [image.path for image in bad] == ["train/b/bad.png"]


def test_index_folder_refuses_a_folder_without_one_readable_image(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"^path holds 1 images and none can be decoded: "):
        index_folder(tmp_path)


def test_index_splits_and_takes_rows():
    index = table(label=[0, 1, 2, 3], split=["val", "train", "val", "test"])
    assert len(index) == 4
    assert index.split("val").labels.tolist() == [0, 2]
    assert index.split("val").paths == ["a/0.png", "a/2.png"]
    assert index.take(np.array([3, 1])).labels.tolist() == [3, 1]


def test_some_rows_are_no_copy_until_a_table_is_made_of_them():
    index = table(label=[0, 1, 2, 3, -1], split=["val", "train", "val", "train", "train"])
    train = index.split("train").labelled().take(np.array([1]))
    assert train.whole is index.whole
    assert (train.rows.tolist(), train.rows.dtype) == ([3], np.uint32)
    assert train.by_row(["a", "b", "c", "d", "e"])[0] == "d"
    assert index.by_row(index.whole) is index.whole
    assert train.table.equals(index.whole.slice(3, 1))
    assert train.column("path").to_pylist() == ["a/3.png"]


def test_rows_say_of_themselves_what_a_table_of_them_does(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_ssl.datasets.index._SHARE", 2)  # more than one piece
    index = table(digest=["01", None, "03", "04", "05"], split=["val", *["train"] * 4], class_name=list("abcab"))
    rows = index.split("train")
    alone = ImageIndex(rows.table)
    assert rows.digest == alone.digest != index.digest
    assert (rows.verified, index.split("val").verified) == (False, True)
    assert pickle.loads(pickle.dumps(rows)).table.equals(alone.table)
    for part, name in ((rows, "rows"), (alone, "alone")):
        part.write_csv(tmp_path / f"{name}.csv")
        part.write_parquet(tmp_path / f"{name}.parquet")
    assert (tmp_path / "rows.csv").read_bytes() == (tmp_path / "alone.csv").read_bytes()
    assert pq.read_table(tmp_path / "rows.parquet").equals(pq.read_table(tmp_path / "alone.parquet"))


def test_a_split_is_taken_once_and_its_labelled_images_without_a_copy_where_all_are():
    index = table(split=["train", "val", "train"], label=[0, -1, 1])
    assert index.split("train") is index.split("train") is index.split("train").labelled()
    assert len(index.split("val").labelled()) == 0
    assert len(index.split("test").labelled()) == 0
    assert pickle.loads(pickle.dumps(index)).split("train").paths == ["a/0.png", "a/2.png"]


def test_index_of_an_empty_split_has_paths_and_labels():
    empty = table(label=[0]).split("test")
    assert (len(empty), empty.paths, empty.labels.tolist(), empty.labels.dtype) == (0, [], [], np.int64)
    assert empty.table["path"].combine_chunks().to_pylist() == []


def test_digest_changes_with_paths_and_contents_and_nothing_else():
    index = table(digest=["01", "02"])
    assert len(index.digest) == 32
    same = {"split": ["val", "test"], "size": [7, 8], "mtime_ns": [5, 6]}
    assert index.digest == table(digest=["01", "02"], **same).digest
    assert index.digest != table(digest=["02", "01"]).digest
    assert index.digest != table(digest=["01", "02"], path=["a/0.png", "b/1.png"]).digest


def test_digest_is_the_one_of_the_day_it_was_written():
    # every run's tag and every champion's data hang on it
    assert table(digest=["01", "02"]).digest == "e276ee6ef122e31e0cf0591bf1d093d6"


def test_sizes_and_times_stand_for_contents_that_are_not_known():
    unread = table(digest=[None, None], size=[1, 2])
    assert not unread.verified
    assert unread.digest == table(digest=[None, None], size=[1, 2], path=["a/0.png", "a/1.png"]).digest
    assert unread.digest != table(digest=[None, None], size=[1, 3]).digest
    assert unread.digest != table(digest=[None, None], size=[1, 2], mtime_ns=[0, 1]).digest


def test_write_csv_can_be_read_without_this_package(tmp_path):
    table(label=[0, 1], class_name=["a", 'b "quoted", comma']).write_csv(tmp_path / "splits.csv")
    assert Path(tmp_path / "splits.csv").read_text() == (
        '"path","class_name","label","split"\n"a/0.png","a",0,"train"\n"a/1.png","b ""quoted"", comma",1,"train"\n'
    )


def test_write_csv_piece_by_piece_writes_what_it_would_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_ssl.datasets.index._SHARE", 3)
    index = table(path=[f"a, {n}.png" for n in range(10)], class_name=list("abcabcabca"), label=list(range(10)))
    index.write_csv(tmp_path / "pieces.csv")
    shown = index.table.select(["path", "class_name", "label", "split"])
    for place in (1, 3):
        shown = shown.set_column(place, shown.column_names[place], shown[place].cast(pa.string()))
    csv.write_csv(shown, tmp_path / "once.csv")
    assert (tmp_path / "pieces.csv").read_bytes() == (tmp_path / "once.csv").read_bytes()


def test_write_parquet_keeps_every_column(tmp_path):
    index = table(label=[0, 1], split=["train", "test"])
    index.write_parquet(tmp_path / "index.parquet")
    assert pq.read_table(tmp_path / "index.parquet").to_pylist() == index.table.to_pylist()


def test_a_pickled_index_is_the_same_and_small():
    index = table(path=[f"class/{n:07d}.png" for n in range(10_000)])
    dumped = pickle.dumps(index)
    assert len(dumped) < index.table.nbytes / 10  # nothing in it but consecutive names
    assert pickle.loads(dumped).table.equals(index.table)


def test_leaks_are_images_whose_content_is_trained_on_too():
    splits = ["train", "train", "val", "test", "val"]
    assert leaks(table(digest=["01", "02", "02", "01", "03"], split=splits)) == 2
    assert leaks(table(digest=["01", "01", "02", "03", "03"], split=splits)) == 0

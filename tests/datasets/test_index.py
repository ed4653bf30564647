import logging
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mlflow_ssl.datasets.contents import read_contents
from mlflow_ssl.datasets.index import ImageIndex, index_folder, make_index, scan
from mlflow_ssl.errors import InputError


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def table(**columns):
    number = len(next(iter(columns.values())))
    default = {
        "path": [f"a/{n}.png" for n in range(number)],
        "class_name": ["a"] * number,
        "label": [0] * number,
        "split": ["train"] * number,
        "size": [1] * number,
        "digest": ["00"] * number,
    }
    return ImageIndex(pa.table(default | columns))


def test_scan_gives_class_names_by_path_sorted(tmp_path):
    touch(tmp_path, "b/1.png", "a/2.jpg", "a/1.png")
    assert list(scan(tmp_path).items()) == [
        ("a/1.png", ("a", "")),
        ("a/2.jpg", ("a", "")),
        ("b/1.png", ("b", "")),
    ]


def test_scan_looks_below_class_folders(tmp_path):
    touch(tmp_path, "a/one/two/1.png", "a/2.png")
    assert scan(tmp_path) == {"a/2.png": ("a", ""), "a/one/two/1.png": ("a", "")}


def test_scan_takes_image_endings_in_either_case_and_nothing_else(tmp_path):
    touch(tmp_path, "a/1.PNG", "a/2.JpEg", "a/notes.txt", "a/3.png.part", "a/Thumbs.db")
    assert list(scan(tmp_path)) == ["a/1.PNG", "a/2.JpEg"]


def test_scan_leaves_out_hidden_files_and_folders(tmp_path):
    touch(tmp_path, "a/1.png", "a/._1.png", ".cache/2.png", "a/.thumbs/3.png")
    assert list(scan(tmp_path)) == ["a/1.png"]


def test_scan_does_not_depend_on_the_order_of_the_file_system(tmp_path, monkeypatch):
    touch(tmp_path, "b/1.png", "a/2.png", "a/sub/3.png", "c/4.png", "c/0.png")
    walk = os.walk

    def backwards(*args, **kwargs):
        for folder, subfolders, files in walk(*args, **kwargs):
            subfolders.sort(reverse=True)
            yield folder, subfolders, sorted(files, reverse=True)

    expected = list(scan(tmp_path).items())
    monkeypatch.setattr(os, "walk", backwards)
    assert list(scan(tmp_path).items()) == expected


def test_scan_follows_links_and_stops_at_a_loop(tmp_path):
    touch(tmp_path / "elsewhere", "1.png")
    root = touch(tmp_path / "root", "b/2.png")
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "loop").symlink_to(root)
    assert scan(root) == {"a/1.png": ("a", ""), "b/2.png": ("b", "")}


def test_scan_keeps_only_what_the_include_filter_names(tmp_path):
    touch(tmp_path, "a/x1.png", "a/y1.png", "b/x2.png", "c/z.png")
    assert list(scan(tmp_path, include=["x", "c/"])) == ["a/x1.png", "b/x2.png", "c/z.png"]


def test_scan_leaves_out_what_the_exclude_filter_names_whole_classes_too(tmp_path):
    touch(tmp_path, "a/x1.png", "a/y1.png", "b/x2.png")
    assert list(scan(tmp_path, exclude=["b/", "y1"])) == ["a/x1.png"]


def test_scan_applies_both_filters(tmp_path):
    touch(tmp_path, "a/x1.png", "a/y1.png", "b/x2.png")
    assert list(scan(tmp_path, include=["x"], exclude=["b/"])) == ["a/x1.png"]


def test_scan_refuses_a_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"^datamodule\.data_path must be an existing folder, got .*missing$"):
        scan(tmp_path / "missing")


def test_scan_refuses_a_folder_without_images(tmp_path):
    touch(tmp_path, "a/notes.txt")
    with pytest.raises(InputError, match=r"data_path must hold images \(\.bmp .*\.webp\), found none in "):
        scan(tmp_path)


def test_scan_refuses_filters_that_leave_nothing(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png")
    with pytest.raises(InputError, match=r"include_filter=\['x'\] and exclude_filter=None leave none of 2 images"):
        scan(tmp_path, include=["x"])


def test_scan_gives_a_flat_folder_no_class(tmp_path, caplog):
    touch(tmp_path, "1.png", "2.png")
    assert scan(tmp_path) == {"1.png": ("", ""), "2.png": ("", "")}
    assert not caplog.records


def test_scan_leaves_out_images_beside_class_folders_with_a_warning(tmp_path, caplog):
    touch(tmp_path, "a/1.png", "loose.png")
    assert list(scan(tmp_path)) == ["a/1.png"]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "1 images lie beside folders, in none of them, and are left out: loose.png ..."
    ]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_scan_takes_split_folders_for_splits(tmp_path, val):
    touch(tmp_path, "train/a/1.png", "train/b/sub/2.png", f"{val}/a/3.png", "test/b/4.png")
    assert scan(tmp_path) == {
        "test/b/4.png": ("b", "test"),
        "train/a/1.png": ("a", "train"),
        "train/b/sub/2.png": ("b", "train"),
        f"{val}/a/3.png": ("a", "val"),
    }


def test_scan_takes_split_folders_in_either_case(tmp_path):
    touch(tmp_path, "Train/a/1.png", "Test/a/2.png")
    assert scan(tmp_path) == {"Test/a/2.png": ("a", "test"), "Train/a/1.png": ("a", "train")}


def test_scan_takes_split_folders_of_unlabelled_images(tmp_path):
    touch(tmp_path, "train/1.png", "test/2.png")
    assert scan(tmp_path) == {"test/2.png": ("", "test"), "train/1.png": ("", "train")}


def test_scan_takes_unlabelled_training_images_beside_a_labelled_validation_folder(tmp_path, caplog):
    touch(tmp_path, "train/1.png", "val/a/2.png", "val/b/3.png")
    assert scan(tmp_path) == {"train/1.png": ("", "train"), "val/a/2.png": ("a", "val"), "val/b/3.png": ("b", "val")}
    assert not caplog.records


@pytest.mark.parametrize("loose", ["loose.png", "train/loose.png", "test/loose.png"])
def test_scan_leaves_out_images_without_a_class_beside_labelled_split_folders(tmp_path, caplog, loose):
    touch(tmp_path, "train/a/1.png", "train/b/2.png", "test/a/3.png", loose)
    assert list(scan(tmp_path)) == ["test/a/3.png", "train/a/1.png", "train/b/2.png"]
    assert [loose in record.getMessage() for record in caplog.records] == [True]


def test_scan_leaves_out_an_unlabelled_test_folder_of_labelled_training_images(tmp_path, caplog):
    touch(tmp_path, "train/a/1.png", "train/b/2.png", "test/3.png", "test/4.png")
    assert list(scan(tmp_path)) == ["train/a/1.png", "train/b/2.png"]
    assert ["2 images" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("below", ["", "monday/"])
def test_scan_takes_valid_for_a_class_where_there_is_no_train(tmp_path, below):
    touch(tmp_path, f"valid/{below}1.png", f"invalid/{below}2.png")
    assert scan(tmp_path) == {f"invalid/{below}2.png": ("invalid", ""), f"valid/{below}1.png": ("valid", "")}


@pytest.mark.parametrize(
    "paths",
    [
        ["a/1.png", "b/2.png", "test/a/3.png"],
        ["train/a/1.png", "test/a/2.png", "extra/3.png"],
        ["val/a/1.png", "test/a/2.png"],
    ],
)
def test_scan_refuses_a_test_folder_that_would_be_taken_for_a_class(tmp_path, paths):
    touch(tmp_path, *paths)
    with pytest.raises(
        InputError, match=r"split folders with train among them, got .*test.*exclude_filter=\[(test|val)/\]"
    ):
        scan(tmp_path)


def test_scan_takes_train_for_a_class_beside_other_classes(tmp_path):
    touch(tmp_path, "train/bus/1.png", "bus/2.png")
    assert scan(tmp_path) == {"bus/2.png": ("bus", ""), "train/bus/1.png": ("train", "")}


def test_scan_refuses_a_name_that_is_not_unicode(tmp_path):
    touch(tmp_path, "a/1.png")
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / "a" / name).touch()
    except OSError:
        pytest.skip("this file system refuses such names")
    with pytest.raises(InputError, match=r"UTF-8.*caf"):
        scan(tmp_path)


def test_make_index_takes_the_images_that_are_in_a_split(image_folder):
    root = image_folder({"a": 2, "b": 1}, size=8)
    contents, _ = read_contents(root, list(scan(root)))
    index = make_index(
        contents,
        class_names={"a/000.png": "a", "a/001.png": "a", "b/000.png": ""},
        labels={"a": 5},
        splits={"b/000.png": "val", "a/001.png": "train"},
    )
    [first, second] = index.table.to_pylist()
    of_file = {row["path"]: row for row in contents.to_pylist()}
    assert first == of_file["a/001.png"] | {"class_name": "a", "label": 5, "split": "train"}
    assert second == of_file["b/000.png"] | {"class_name": "", "label": 0, "split": "val"}


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


def test_index_of_an_empty_split_has_paths_and_labels():
    empty = table(label=[0]).split("test")
    assert (len(empty), empty.paths, empty.labels.tolist(), empty.labels.dtype) == (0, [], [], np.int64)
    assert empty.table["path"].combine_chunks().to_pylist() == []


def test_digest_changes_with_paths_and_contents_and_nothing_else():
    index = table(digest=["01", "02"])
    assert len(index.digest) == 32
    assert index.digest == table(digest=["01", "02"], split=["val", "test"], size=[7, 8]).digest
    assert index.digest != table(digest=["02", "01"]).digest
    assert index.digest != table(digest=["01", "02"], path=["a/0.png", "b/1.png"]).digest


def test_write_csv_can_be_read_without_this_package(tmp_path):
    table(label=[0, 1], class_name=["a", 'b "quoted", comma']).write_csv(tmp_path / "splits.csv")
    assert Path(tmp_path / "splits.csv").read_text() == (
        '"path","class_name","label","split","size","digest"\n'
        '"a/0.png","a",0,"train",1,"00"\n'
        '"a/1.png","b ""quoted"", comma",1,"train",1,"00"\n'
    )

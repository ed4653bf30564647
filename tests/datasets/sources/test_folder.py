import logging
import os

import pytest

from mlflow_ssl.datasets import walk
from mlflow_ssl.datasets.sources import FolderSource
from mlflow_ssl.errors import InputError


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def scan(root, **options):
    """Return path to class name and split, in the order of the table."""
    rows = FolderSource(root, **options).scan().table.select(["path", "class_name", "split"]).to_pylist()
    return {row["path"]: (row["class_name"], row["split"]) for row in rows}


def bad(root, **options):
    """Return path to reason."""
    return {image.path: image.reason for image in FolderSource(root, **options).scan().bad}


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
    touch(tmp_path, "b/1.png", "a/2.png", "a/sub/3.png", "c/4.png", "c/0.png", "a-b/5.png")
    expected = list(scan(tmp_path).items())
    scandir = os.scandir

    class Backwards:
        def __init__(self, folder):
            self.entries = scandir(folder)

        def __enter__(self):
            return iter(sorted(self.entries, key=lambda entry: entry.name, reverse=True))

        def __exit__(self, *error):
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Backwards)
    assert list(scan(tmp_path).items()) == expected
    assert [path for path, _ in expected] == sorted(path for path, _ in expected)


@pytest.mark.parametrize("slow", [-1.0, 60.0])
def test_scan_is_the_same_in_one_thread_and_in_many(tmp_path, monkeypatch, slow):
    touch(tmp_path, *(f"{name}/{number:03d}.png" for name in "abcde" for number in range(7)))
    monkeypatch.setattr(walk, "_SHARE", 2)
    monkeypatch.setattr(walk, "_SLOW_FILE_SECONDS", slow)
    assert list(scan(tmp_path)) == [f"{name}/{number:03d}.png" for name in "abcde" for number in range(7)]


def test_scan_knows_sizes_and_times(tmp_path):
    touch(tmp_path, "a/1.png")
    (tmp_path / "a" / "1.png").write_bytes(b"12345")
    (row,) = FolderSource(tmp_path).scan().table.to_pylist()
    stat = (tmp_path / "a" / "1.png").stat()
    assert (row["size"], row["mtime_ns"], row["ctime_ns"], row["offset"]) == (5, stat.st_mtime_ns, stat.st_ctime_ns, 0)


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


def test_a_name_that_is_not_unicode_is_a_bad_image(tmp_path):
    touch(tmp_path, "a/1.png")
    try:
        (tmp_path / "a" / os.fsdecode(b"caf\xe9.png")).touch()
    except OSError:
        pytest.skip("this file system refuses such names")
    assert bad(tmp_path) == {"a/caf\\xe9.png": "its name is not UTF-8; rename it"}
    assert list(scan(tmp_path)) == ["a/1.png"]


def test_links_that_lead_nowhere_and_pipes_are_bad_images(tmp_path):
    touch(tmp_path, "a/1.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")  # to open it would wait for ever
    assert bad(tmp_path) == {
        "a/gone.png": "cannot be looked at: No such file or directory",
        "a/pipe.png": "is no regular file",
    }


def test_a_folder_that_is_called_like_an_image_is_a_folder(tmp_path):
    touch(tmp_path, "a/x.jpg/1.png")
    assert list(scan(tmp_path)) == ["a/x.jpg/1.png"]


def test_a_folder_that_cannot_be_listed_is_a_bad_image(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.png", "locked/2.png")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(scan(tmp_path)) == ["a/1.png"]
    assert bad(tmp_path) == {"locked/": "cannot be listed: Permission denied"}


def test_two_class_folders_that_are_links_to_one_folder_both_count(tmp_path):
    touch(tmp_path / "elsewhere", "1.png")
    (tmp_path / "root").mkdir()
    for name in "ab":
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere")
    assert scan(tmp_path / "root") == {"a/1.png": ("a", ""), "b/1.png": ("b", "")}


@pytest.mark.parametrize(
    "name",
    ["two words (1), é=ß.png", "日本語 のクラス.png", "x" * 251 + ".png", "new\nline.png", "-rf *.png", 'a,b"c.png'],
)
def test_any_name_is_a_name(tmp_path, name):
    touch(tmp_path, f"my class/{name}")
    assert scan(tmp_path) == {f"my class/{name}": ("my class", "")}
    source = FolderSource(tmp_path)
    (tmp_path / "my class" / name).write_bytes(b"bytes")
    assert source.reader(source.scan().table)[0] == b"bytes"


def test_classes_that_differ_in_case_only_are_two_with_a_warning(tmp_path, caplog):
    touch(tmp_path, "Cat/1.png", "cat/1.png", "cat/1.PNG")
    assert scan(tmp_path) == {"Cat/1.png": ("Cat", ""), "cat/1.PNG": ("cat", ""), "cat/1.png": ("cat", "")}
    assert "two classes differ in upper and lower case only: Cat and cat" in caplog.text


# how classes are named


def test_the_folder_that_an_image_is_in_can_be_its_class(tmp_path):
    touch(tmp_path, "monday/cat/1.png", "tuesday/cat/2.png", "tuesday/dog/deep/3.png")
    assert {name for name, _ in scan(tmp_path, class_from="parent").values()} == {"cat", "deep"}


def test_the_folder_above_counts_below_a_split_folder(tmp_path):
    touch(tmp_path, "train/monday/cat/1.png", "test/monday/dog/2.png")
    assert scan(tmp_path, class_from="parent") == {
        "test/monday/dog/2.png": ("dog", "test"),
        "train/monday/cat/1.png": ("cat", "train"),
    }


def test_the_group_of_an_expression_can_be_the_class(tmp_path):
    touch(tmp_path, "2026/cat.001.png", "2026/dog.002.png")
    assert scan(tmp_path, class_from=r"([a-z]+)\.\d+\.png$") == {
        "2026/cat.001.png": ("cat", ""),
        "2026/dog.002.png": ("dog", ""),
    }


def test_images_that_the_expression_is_not_found_in_are_left_out_with_a_warning(tmp_path, caplog):
    touch(tmp_path, "cat.1.png", "other.png")
    assert list(scan(tmp_path, class_from=r"(cat)\.")) == ["cat.1.png"]
    assert "1 images lie beside folders" in caplog.text


def test_an_expression_that_is_found_nowhere_is_refused(tmp_path):
    touch(tmp_path, "cat.1.png")
    with pytest.raises(
        InputError, match=r"class_from must be found in the images' paths, got '\(dog\)'; .*cat\.1\.png$"
    ):
        scan(tmp_path, class_from="(dog)")


def test_without_labels_no_folder_is_a_class(tmp_path):
    touch(tmp_path, "a/1.png", "test/2.png", "3.png")
    assert set(scan(tmp_path, labels="none").values()) == {("", "")}
    assert len(scan(tmp_path, labels="none")) == 3


def test_without_labels_split_folders_are_splits_all_the_same(tmp_path):
    touch(tmp_path, "train/a/1.png", "test/b/2.png")
    assert scan(tmp_path, labels="none") == {"test/b/2.png": ("", "test"), "train/a/1.png": ("", "train")}

import logging
import shutil

import numpy as np
import pytest
from conftest import write_images

from mlflow_ssl.datamodules import ClassificationDataModule
from mlflow_ssl.datasets import assembly
from mlflow_ssl.datasets.decode import decode
from mlflow_ssl.errors import InputError


def module(root, **options):
    return ClassificationDataModule(str(root), **{"val_size": 0.2, "test_size": 0.2} | options)


@pytest.fixture
def labelled(tmp_path):
    return write_images(tmp_path / "labelled", {"a": 10, "b": 10}, size=8)


@pytest.fixture
def more(tmp_path):
    return write_images(tmp_path / "more", {"c": 6}, size=8, seed=3)


def test_more_images_are_trained_on_without_a_class(labelled, more):
    index = module(labelled, unlabelled_path=str(more)).index
    extra = [row for row in index.table.to_pylist() if row["part"] == 1]
    assert {(row["split"], row["label"], row["class_name"]) for row in extra} == {("train", -1, "")}
    assert len(extra) == 6
    assert len(index.split("val")) == len(index.split("test")) == 4
    assert index.digest != module(labelled).index.digest


def test_the_bytes_of_both_folders_are_read(labelled, more):
    datamodule = module(labelled, unlabelled_path=str(more))
    datamodule.setup()
    dataset = datamodule._datasets["train"]
    rows = datamodule.index.split("train").table.to_pylist()
    roots = [labelled, more]
    for number, row in enumerate(rows):
        assert dataset.reader[number] == (roots[row["part"]] / row["path"]).read_bytes()


def test_copies_of_the_data_among_more_images_are_left_out(labelled, more):
    datamodule = module(labelled)
    (held_out, *_) = datamodule.index.split("test").paths
    shutil.copy(labelled / held_out, more / "c" / "copy.png")
    index = module(labelled, unlabelled_path=str(more)).index
    assert sum(part == 1 for part in index.table["part"].to_pylist()) == 6


@pytest.mark.parametrize("place", ["", "a"])
def test_more_images_may_not_lie_among_the_data(labelled, place):
    with pytest.raises(InputError, match=r"^datamodule\.unlabelled_path must be outside of the data, got "):
        _ = module(labelled, unlabelled_path=str(labelled / place)).index


def test_a_missing_folder_of_more_images_is_named(labelled, tmp_path):
    with pytest.raises(InputError, match=r"^datamodule\.unlabelled_path must be an existing folder, got .*nowhere$"):
        _ = module(labelled, unlabelled_path=str(tmp_path / "nowhere")).index


def test_what_is_not_verified_is_not_read(labelled, monkeypatch):
    monkeypatch.setattr(assembly, "read_contents", lambda *_, **__: pytest.fail("read"))
    (labelled / "a" / "000.png").write_bytes(b"broken")
    index = module(labelled, verify="none").index
    assert len(index) == 20
    assert not index.verified


def test_many_images_are_not_verified_unless_asked_for(labelled, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(assembly, "VERIFIED_BY_DEFAULT", 19)
    assert not module(labelled).index.verified
    assert "20 images are not read before the training" in caplog.text
    assert module(labelled, verify="all").index.verified
    assert module(labelled, cache="disk", cache_shorter_side=8).index.verified


def test_splits_are_the_same_verified_or_not(labelled):
    read, unread = (module(labelled, verify=verify).index.table.select(["path", "split"]) for verify in ("all", "none"))
    assert read.to_pylist() == unread.to_pylist()


def test_copies_that_leak_are_warned_of(labelled, caplog):
    datamodule = module(labelled)
    held_out, trained = datamodule.index.split("test").paths[0], datamodule.index.split("train").paths[0]
    shutil.copy(labelled / trained, labelled / held_out)
    _ = module(labelled).index
    assert "1 images of validation and test have the very content of a training image" in caplog.text


def test_images_without_a_class_beside_others_are_trained_on_only(tmp_path, labelled):
    lines = [f"{name}/{n:03d}.png,{name if n < 5 else ''}" for name in "ab" for n in range(10)]
    (labelled / "list.csv").write_text("\n".join(["path,label", *lines]))
    index = module(labelled / "list.csv").index
    assert len(index) == 20
    assert all(row["label"] >= 0 for row in index.table.to_pylist() if row["split"] != "train")
    assert index.split("train").labels.tolist().count(-1) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": "some"}, r"^datamodule\.verify must be auto, all or none, got 'some'$"),
        ({"cache": "tape"}, r"^datamodule\.cache must be none, ram or disk, got 'tape'$"),
        ({"cache": "disk"}, r"^datamodule\.cache_shorter_side must be 1 or more, got None$"),
        ({"cache": "ram", "verify": "none"}, r"^datamodule\.cache needs to know the images' contents and sizes"),
        ({"labels": "some"}, r"^datamodule\.labels must be folders or none, got 'some'$"),
        ({"class_from": "(a)(b)"}, r"class_from must be first, parent, or a regular expression with one group"),
        ({"class_from": "("}, r"^datamodule\.class_from must be a regular expression: "),
        ({"num_workers": "many"}, r"^datamodule\.num_workers must be auto, or 0 or more, got many$"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(labelled, options, message):
    with pytest.raises(InputError, match=message):
        _ = module(labelled, **options).index


def test_pixels_of_a_file_that_was_changed_after_its_indexing_are_not_cached(labelled, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(tmp_path / "cache"))
    datamodule = module(labelled, cache="disk", cache_shorter_side=8, val_size=0.0, test_size=0.0)
    datamodule.setup()
    images = datamodule._datasets["train"]
    first, second = (labelled / path for path in datamodule.index.split("train").paths[:2])
    pixels, content = images.picture(1).copy(), first.read_bytes()
    first.write_bytes(second.read_bytes())
    np.testing.assert_array_equal(images.picture(0), pixels)
    assert datamodule.cached_images == (1, 20)
    first.write_bytes(content)
    np.testing.assert_array_equal(images.picture(0), decode(content))
    assert datamodule.cached_images == (2, 20)

import pickle

import pyarrow as pa
import pytest
from shards import png

from mlflow_ssl.datasets.sources import open_source
from mlflow_ssl.errors import InputError

datasets = pytest.importorskip("datasets")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def make(numbers, **extra):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    rows = {"image": [{"bytes": png(n), "path": None} for n in numbers], "label": [n % 2 for n in numbers]}
    return datasets.Dataset.from_dict(rows | extra, features=datasets.Features(features))


def rows(source):
    found = source.scan().table.select(["path", "class_name", "split", "size"]).to_pylist()
    return [tuple(row.values()) for row in found]


def test_a_saved_data_set_is_rows_with_classes(tmp_path):
    make([4, 5]).save_to_disk(tmp_path / "set")
    source = open_source(str(tmp_path / "set"))
    assert rows(source) == [
        ("all/00000000", "cat", "", len(png(4))),
        ("all/00000001", "dog", "", len(png(5))),
    ]
    reader = source.reader(source.scan().table)
    assert [reader[1], reader[0]] == [png(5), png(4)]
    assert pickle.loads(pickle.dumps(reader))[0] == png(4)


def test_saved_splits_are_splits(tmp_path):
    parts = {"train": make([0, 1, 2]), "validation": make([3]), "test": make([4])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    source = open_source(str(tmp_path / "set"), labels="none")
    assert [(path, name, split) for path, name, split, _ in rows(source)] == [
        ("test/00000000", "", "test"),
        ("train/00000000", "", "train"),
        ("train/00000001", "", "train"),
        ("train/00000002", "", "train"),
        ("validation/00000000", "", "val"),
    ]
    assert source.reader(source.scan().table)[4] == png(3)


def test_a_file_that_a_row_points_to_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(png(1))
    table = pa.table({"image": pa.array([{"bytes": None, "path": str(tmp_path / "secret.png")}], IMAGE)})
    saved = datasets.Dataset(table, info=datasets.DatasetInfo(features=datasets.Features({"image": datasets.Image()})))
    monkeypatch.setattr(datasets.Image, "embed_storage", lambda _, storage, **__: storage)  # as older versions saved
    saved.save_to_disk(tmp_path / "set")
    source = open_source(str(tmp_path / "set"))
    with pytest.raises(OSError, match="points to a file and does not hold it"):
        source.reader(source.scan().table)[0]


def test_other_splits_and_other_columns_are_refused(tmp_path):
    datasets.DatasetDict({"train": make([0]), "extra": make([1])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=r"must have only the splits train, val, test, got 'extra'"):
        open_source(str(tmp_path / "splits")).scan()
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(InputError, match=r"must have one column of images, has none$"):
        open_source(str(tmp_path / "text")).scan()


def test_a_broken_data_set_is_named_in_one_line(tmp_path):
    make([0]).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "state.json").unlink()
    with pytest.raises(InputError, match=r"^datamodule\.data_path cannot be read as a saved data set: /") as caught:
        open_source(str(tmp_path / "set")).scan()
    assert "\n" not in str(caught.value)

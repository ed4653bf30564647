import json
import subprocess
import sys

import mlflow
import pytest
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.dataset_source_registry import get_registered_sources
from mlflow.entities import Dataset as DatasetEntity
from mlflow.types import Schema

from mlflow_ssl.datamodules import ClassificationDataModule
from mlflow_ssl.errors import InputError
from mlflow_ssl.tracking.dataset import ImageFolderSource, from_image_folder, split_datasets


def run_python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def folder(image_folder):
    """Return a folder of two classes in two splits, with one broken image."""
    root = image_folder({"train/cat": 3, "train/dog": 2, "test/dog": 1}, size=8)
    (root / "train" / "cat" / "bad.png").write_bytes(b"no image")
    return root


# at home in MLflow


def test_anyone_who_imports_mlflow_can_describe_a_folder(folder):
    code = "import sys, mlflow; print(mlflow.data.from_image_folder(sys.argv[1]).to_json())"
    described = json.loads(run_python(code, folder))
    assert described == from_image_folder(str(folder)).to_dict()


@pytest.mark.parametrize("first", ["mlflow", "mlflow.data", "mlflow_ssl.tracking.dataset", "mlflow_ssl.tracking"])
def test_mlflow_knows_the_plugins_whatever_is_imported_first(first):
    code = (
        f"import {first}, mlflow, mlflow_ssl.tracking.dataset as ours\n"
        "print(mlflow.data.from_image_folder is ours.from_image_folder)\n"
        "print(mlflow.data.sources.ImageFolderSource is ours.ImageFolderSource)"
    )
    assert run_python(code).split() == ["True", "True"]


def test_importing_mlflow_imports_nothing_heavy_of_ours():
    heavy = ["torch", "pytorch_lightning", "hydra", "albumentations", "timm", "PIL", "pyarrow.parquet", "sklearn"]
    code = (
        "import sys, mlflow; print('mlflow_ssl.tracking.dataset' in sys.modules, *set(sys.argv[1:]) & set(sys.modules))"
    )
    assert run_python(code, *heavy) == "True"


def test_a_run_tells_what_it_was_given(folder, store):
    dataset = from_image_folder(str(folder), name="pets")
    with mlflow.start_run() as run:
        mlflow.log_input(dataset, context="training")
    [given] = store.get_run(run.info.run_id).inputs.dataset_inputs
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
    assert (given.dataset.name, given.dataset.digest) == ("pets", dataset.digest)
    assert json.loads(given.dataset.profile) == dataset.profile
    assert Schema.from_json(json.dumps(json.loads(given.dataset.schema)["mlflow_colspec"])) == dataset.schema
    source = mlflow.data.get_source(given)
    assert isinstance(source, ImageFolderSource)
    assert source.load() == str(folder)


def test_an_entity_comes_through_json_whole(folder):
    entity = from_image_folder(str(folder))._to_mlflow_entity()
    assert DatasetEntity(**json.loads(json.dumps(entity.to_dictionary()))) == entity


# what is said of a folder


def test_name_and_digest_are_the_folders_own_unless_given(folder):
    plain = from_image_folder(str(folder))
    assert (plain.name, len(plain.digest)) == ("images", 32)
    named = from_image_folder(str(folder), name="pets", digest="v1")
    assert (named.name, named.digest) == ("pets", "v1")


def test_the_digest_is_the_one_of_a_training_on_the_folder(image_folder):
    root = image_folder({"cat": 10, "dog": 10}, size=8)
    assert from_image_folder(str(root)).digest == ClassificationDataModule(str(root)).index.digest


def test_the_profile_counts_images_classes_splits_and_bytes(folder):
    files = [file for file in folder.rglob("*.png") if file.name != "bad.png"]
    assert from_image_folder(str(folder)).profile == {
        "path": str(folder),
        "num_images": 6,
        "num_classes": 2,
        "splits": {"test": 1, "train": 5},
        "total_bytes": sum(file.stat().st_size for file in files),
        "width": {"min": 8, "median": 8, "max": 8},
        "height": {"min": 8, "median": 8, "max": 8},
        "digest_of": "contents",
        "num_bad_images": 1,
        "classes": {"cat": 3, "dog": 3},
    }


def test_the_profile_gives_the_range_of_sizes(image_folder):
    for size in (4, 6, 32):
        root = image_folder({f"c{size}": 1}, size=size)
    assert from_image_folder(str(root)).profile["width"] == {"min": 4, "median": 6, "max": 32}


def test_the_profile_lists_the_largest_of_many_classes(image_folder, monkeypatch):
    monkeypatch.setattr("mlflow_ssl.tracking.dataset.LISTED_CLASSES", 2)
    profile = from_image_folder(str(image_folder({"a": 1, "b": 3, "c": 2}, size=4))).profile
    assert (profile["num_classes"], profile["classes"]) == (3, {"b": 3, "c": 2})


def test_images_without_a_class_have_no_label_and_no_split(image_folder):
    dataset = from_image_folder(str(image_folder({"": 3}, size=4)))
    assert dataset.schema.input_names() == ["image"]
    assert dataset.profile["num_classes"] == 0
    assert not dataset.profile.keys() & {"classes", "splits"}


def test_the_schema_has_image_and_label(folder):
    schema = from_image_folder(str(folder)).schema
    assert [(column.name, column.type.name) for column in schema.inputs] == [("image", "binary"), ("label", "string")]


@pytest.mark.parametrize(
    ("path", "message"), [("missing", "path must be an existing folder"), (".", "must hold images")]
)
def test_a_folder_that_is_none_or_empty_is_refused(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        from_image_folder(path)


# one data set a split


def test_each_split_with_images_is_a_data_set(image_folder):
    root = image_folder({"cat": 10, "dog": 10}, size=8)
    index = ClassificationDataModule(str(root), val_size=0.2, test_size=0).index
    datasets = split_datasets(index, root=root)
    assert list(datasets) == ["train", "val"]
    assert {split: dataset.digest for split, dataset in datasets.items()} == {
        split: index.split(split).digest for split in ("train", "val")
    }
    assert datasets["val"].profile["classes"] == {"cat": 2, "dog": 2}
    assert datasets["val"].profile["splits"] == {"val": 4}
    assert "num_bad_images" not in datasets["val"].profile
    assert {(dataset.name, dataset.source.uri) for dataset in datasets.values()} == {("images", str(root))}
    assert {dataset.name for dataset in split_datasets(index, root=root, name="pets").values()} == {"pets"}


# where it is


def test_a_source_is_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada")
    assert ImageFolderSource("a/../b").uri == str(tmp_path / "b")
    assert ImageFolderSource("~/photos").uri == "/home/ada/photos"
    assert ImageFolderSource("/data/a://b").uri == "/data/a:/b"
    assert ImageFolderSource("file:///data/my%20photos").uri == "/data/my photos"
    assert ImageFolderSource("file://localhost/data").uri == "/data"


def test_a_source_keeps_no_password():
    source = ImageFolderSource("file://ada:secret@nas/photos?token=secret")
    assert source.uri == "file://nas/photos"
    assert ImageFolderSource.from_json(source.to_json()).uri == source.uri
    assert ImageFolderSource("file://ada:secret@localhost/photos").uri == "/photos"
    with pytest.raises(InputError, match=r"^path must be a local folder, got s3://bucket/photos$"):
        ImageFolderSource("s3://key:secret@bucket/photos?token=secret")


@pytest.mark.parametrize("uri", ["/nowhere/photos", "file://nas/photos"])
def test_a_source_that_is_not_here_is_refused(uri):
    with pytest.raises(InputError, match=rf"^path must be an existing folder, got {uri}; it may have moved"):
        ImageFolderSource(uri).load()


@pytest.mark.filterwarnings("ignore:The specified dataset source can be interpreted:UserWarning")  # two of MLflow's own
def test_our_source_claims_nobody_elses_paths(tmp_path):
    assert ImageFolderSource in get_registered_sources()
    source = mlflow.data.dataset_source_registry.resolve_dataset_source(str(tmp_path))
    assert isinstance(source, DatasetSource)
    assert not isinstance(source, ImageFolderSource)

import logging
import os
import shutil
from collections import Counter
from functools import partial
from types import SimpleNamespace

import albumentations as A
import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer

from mlflow_ssl.datamodules import ClassificationDataModule, classification
from mlflow_ssl.errors import InputError

COUNTS = {"a": 10, "b": 20}
SIZED = A.Compose([A.Resize(8, 8), A.Normalize()])


@pytest.fixture
def module(image_folder):
    """Return a function that makes a datamodule of 10 and 20 images."""
    root = image_folder(COUNTS, size=8)
    return partial(ClassificationDataModule, str(root), num_workers=0, batch_size=4, val_size=0.2, test_size=0.2)


def splits(datamodule):
    return dict(zip(datamodule.index.paths, datamodule.index.table["split"].to_pylist(), strict=True))


def counts(datamodule):
    return Counter(splits(datamodule).values())


def write_split(root, name, paths):
    (root / name).write_text("".join(f"{path}\n" for path in paths))
    return set(paths)


def of(datamodule, split):
    return {path for path, name in splits(datamodule).items() if name == split}


# the draw


def test_splits_are_stratified(module):
    table = module().index.table
    drawn = Counter(zip(table["class_name"].to_pylist(), table["split"].to_pylist(), strict=True))
    assert drawn == {
        ("a", "train"): 6,
        ("a", "val"): 2,
        ("a", "test"): 2,
        ("b", "train"): 12,
        ("b", "val"): 4,
        ("b", "test"): 4,
    }


def test_splits_do_not_depend_on_where_the_folder_is_or_how_it_is_listed(module, tmp_path, monkeypatch):
    expected = splits(module())
    moved = shutil.copytree(tmp_path / "images", tmp_path / "elsewhere" / "moved")
    walk = os.walk

    def backwards(*args, **kwargs):
        for folder, subfolders, files in walk(*args, **kwargs):
            subfolders.sort(reverse=True)
            yield folder, subfolders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    other = ClassificationDataModule(str(moved), val_size=0.2, test_size=0.2)
    assert list(splits(other).items()) == list(expected.items())
    assert other.index.digest == module().index.digest


def test_another_seed_draws_other_splits_of_the_same_sizes(module):
    first, second = module(seed=0), module(seed=1)
    assert splits(first) != splits(second)
    assert counts(first) == counts(second)


@pytest.mark.parametrize(
    ("val_size", "test_size", "expected"),
    [
        (0, 0.2, {"train": 24, "test": 6}),
        (0.2, 0, {"train": 24, "val": 6}),
        (0, 0, {"train": 30}),
    ],
)
def test_a_size_of_nothing_leaves_the_split_empty(module, val_size, test_size, expected, caplog):
    datamodule = module(val_size=val_size, test_size=test_size)
    assert counts(datamodule) == expected
    assert not caplog.records
    datamodule.setup()
    assert bool(datamodule.val_dataloader()) == ("val" in expected)
    assert bool(datamodule.test_dataloader()) == ("test" in expected)


def test_a_class_too_small_for_every_split_goes_to_training_with_one_warning(module, image_folder, caplog):
    root = image_folder({"a": 10, "rare": 2}, size=8, name="rare")
    table = ClassificationDataModule(str(root), val_size=0.2, test_size=0.2).index.table
    rare = [split for name, split in zip(table["class_name"].to_pylist(), table["split"].to_pylist(), strict=True)]
    assert rare[-2:] == ["train", "train"]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "classes with too few images for every split go to training whole: rare"
    ]


def test_memory_that_arrow_only_keeps_is_given_back_before_free_memory_is_counted(module, monkeypatch):
    done = []
    pool = SimpleNamespace(release_unused=lambda: done.append("given back"))
    datamodule = module(val_size=0.2)
    datamodule.setup()
    monkeypatch.setattr(classification.pa, "default_memory_pool", lambda: pool)
    monkeypatch.setattr(classification, "free_memory", lambda: done.append("counted") or 2**30)
    datamodule.train_dataloader()
    assert done == ["given back", "counted"]


def test_many_classes_and_no_transform_are_no_reason_to_warn(module, caplog):
    datamodule = module()
    datamodule.setup()
    next(iter(datamodule.train_dataloader()))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# classes and filters


def test_labels_number_the_sorted_class_names(module):
    datamodule = module()
    assert datamodule.class_to_idx is None
    table = datamodule.index.table
    pairs = set(zip(table["class_name"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert pairs == {("a", 0), ("b", 1)}
    assert datamodule.class_to_idx == {"a": 0, "b": 1}
    assert datamodule.classes == ["a", "b"]


def test_class_to_idx_numbers_the_classes_and_may_name_more(module):
    datamodule = module(class_to_idx={"b": 0, "c": 1, "a": 2})
    table = datamodule.index.table
    pairs = set(zip(table["class_name"].to_pylist(), table["label"].to_pylist(), strict=True))
    assert pairs == {("a", 2), ("b", 0)}
    assert datamodule.classes == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"a": 0}, r"class_to_idx must name every class folder; it lacks b \(leave them out with datamodule\.exclude"),
        ({"a": 1, "b": 2}, r"class_to_idx must number the classes 0, 1, 2, \.\.\., got \{'a': 1, 'b': 2\}"),
        ({"a": 0, "b": 0}, r"class_to_idx must number the classes 0, 1, 2"),
    ],
)
def test_a_class_to_idx_that_does_not_fit_is_refused(module, mapping, message):
    with pytest.raises(InputError, match=message):
        _ = module(class_to_idx=mapping).index


def test_a_whole_class_can_be_left_out(module):
    datamodule = module(exclude_filter=["b/"])
    assert len(datamodule.index) == 10
    assert datamodule.classes == ["a"]


def test_a_filter_may_be_one_word(module):
    assert len(module(include_filter="00").index) == 20
    assert len(module(exclude_filter="00").index) == 10


def test_a_class_of_class_to_idx_may_be_left_out_by_a_filter(module):
    assert module(exclude_filter=["b/"], class_to_idx={"a": 0}).index.labels.tolist() == [0] * 10


def test_a_flat_folder_has_no_classes(tmp_path):
    for number in range(5):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    datamodule = ClassificationDataModule(str(tmp_path), val_size=0.2, test_size=0.2)
    assert datamodule.classes == []
    assert set(datamodule.index.labels.tolist()) == {-1}
    assert counts(datamodule) == {"train": 3, "val": 1, "test": 1}


# split files


def test_a_train_file_leaves_the_rest_to_val_and_test(module, tmp_path):
    named = write_split(tmp_path, "mine.txt", [f"{name}/00{n}.png" for name in "ab" for n in range(4)])
    datamodule = module(train_split_file=str(tmp_path / "mine.txt"))
    assert of(datamodule, "train") == named
    assert counts(datamodule) == {"train": 8, "val": 11, "test": 11}


def test_a_train_file_and_sizes_of_nothing_leave_the_rest_out(module, tmp_path):
    named = write_split(tmp_path, "mine.txt", [f"{name}/00{n}.png" for name in "ab" for n in range(5)])
    datamodule = module(train_split_file=str(tmp_path / "mine.txt"), val_size=0, test_size=0)
    assert set(datamodule.index.paths) == named


@pytest.mark.parametrize(("split", "drawn"), [("val", "test"), ("test", "val")])
def test_a_val_or_test_file_leaves_the_rest_to_be_drawn_from(module, tmp_path, split, drawn):
    named = write_split(tmp_path, "mine.txt", [f"{name}/00{n}.png" for name in "ab" for n in range(5)])
    datamodule = module(**{f"{split}_split_file": str(tmp_path / "mine.txt")})
    assert of(datamodule, split) == named
    assert counts(datamodule) == {split: 10, drawn: 4, "train": 16}  # 1 of 5, 3 of 15


def test_train_and_test_files_leave_the_rest_to_validation(module, tmp_path):
    train = write_split(tmp_path, "one.txt", [f"a/00{n}.png" for n in range(5)])
    test = write_split(tmp_path, "two.txt", [f"b/00{n}.png" for n in range(5)])
    files = {"train_split_file": str(tmp_path / "one.txt"), "test_split_file": str(tmp_path / "two.txt")}
    datamodule = module(**files)
    assert (of(datamodule, "train"), of(datamodule, "test")) == (train, test)
    assert counts(datamodule) == {"train": 5, "test": 5, "val": 20}
    assert counts(module(**files, val_size=0)) == {"train": 5, "test": 5}


def test_three_files_name_all_that_is_used(module, tmp_path):
    expected = {}
    for number, split in enumerate(("train", "val", "test")):
        paths = [f"{name}/00{number}.png" for name in "ab"]
        write_split(tmp_path / "images", f"{split}.txt", paths)
        expected |= dict.fromkeys(paths, split)
    datamodule = module()
    assert splits(datamodule) == expected
    datamodule = module(**{f"{split}_split_file": f"{split}.txt" for split in ("train", "val", "test")})
    assert splits(datamodule) == expected  # relative to the data folder, as the tutorial's


def test_a_file_in_the_folder_is_its_splits_unless_another_is_given(module, tmp_path):
    lying = write_split(tmp_path / "images", "test.txt", ["a/000.png"])
    assert of(module(), "test") == lying
    given = write_split(tmp_path, "mine.txt", ["a/001.png", "b/001.png"])
    assert of(module(test_split_file=str(tmp_path / "mine.txt")), "test") == given
    # the images kept for the test stay out of training whatever else is given
    assert of(module(val_split_file=str(tmp_path / "mine.txt")), "test") == lying


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/000.png\na/none.png\n", r"^train\.txt names a missing file: a/none\.png; looked in /"),
        ("../secret.png\n", r"^train\.txt names a file outside the data folder: \.\./secret\.png; give paths"),
        ("", r"^train split file names no image: "),
    ],
)
def test_a_bad_split_file_is_refused_in_one_line(module, tmp_path, text, message):
    (tmp_path / "images" / "train.txt").write_text(text)
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    with pytest.raises(InputError, match=message) as caught:
        _ = module().index
    assert "\n" not in str(caught.value)


def test_an_image_in_two_split_files_is_refused(module, tmp_path):
    write_split(tmp_path / "images", "train.txt", ["a/000.png", "a/001.png"])
    write_split(tmp_path / "images", "test.txt", ["a/001.png"])
    with pytest.raises(InputError, match=r"^split files must not share an image: a/001\.png is in train and in test$"):
        _ = module().index


def test_a_split_file_may_name_what_a_filter_left_out(module, tmp_path):
    write_split(tmp_path / "images", "train.txt", ["a/000.png", "a/001.png", "b/001.png"])
    assert of(module(exclude_filter=["b/"]), "train") == {"a/000.png", "a/001.png"}


def test_a_missing_split_file_is_refused(module):
    with pytest.raises(InputError, match=r"^datamodule\.test_split_file must be an existing file, got nowhere\.txt$"):
        _ = module(test_split_file="nowhere.txt").index


def test_an_empty_training_split_is_refused(module, tmp_path):
    everything = [f"{name}/{number:03d}.png" for name, count in COUNTS.items() for number in range(count)]
    write_split(tmp_path / "images", "test.txt", everything)
    with pytest.raises(InputError, match=r"^the training split is empty; check datamodule\.train_split_file"):
        _ = module().index


# split folders


@pytest.fixture
def folders(image_folder, tmp_path):
    """Return a function that makes a datamodule of split folders, 10 images of two classes in each."""

    def make(*names, **options):
        for number, name in enumerate(names):
            image_folder({"a": 10, "b": 10}, size=8, seed=number, name=f"data/{name}")
        return ClassificationDataModule(
            str(tmp_path / "data"), **({"val_size": 0.2, "test_size": 0.2, "batch_size": 4, "num_workers": 0} | options)
        )

    return make


def in_folder(datamodule, folder):
    return {path for path in datamodule.index.paths if path.startswith(f"{folder}/")}


def test_a_test_folder_is_the_test_split_and_validation_is_drawn_from_training(folders):
    datamodule = folders("train", "test")
    assert of(datamodule, "test") == in_folder(datamodule, "test")
    assert of(datamodule, "train") | of(datamodule, "val") == in_folder(datamodule, "train")
    assert counts(datamodule) == {"train": 16, "val": 4, "test": 20}
    assert datamodule.classes == ["a", "b"]


def test_train_val_and_test_folders_are_the_splits(folders):
    datamodule = folders("train", "val", "test")
    for split in ("train", "val", "test"):
        assert of(datamodule, split) == in_folder(datamodule, split)
    assert counts(datamodule) == {"train": 20, "val": 20, "test": 20}


@pytest.mark.parametrize("size", [0, 0.5])
def test_sizes_take_nothing_from_given_folders(folders, size):
    assert counts(folders("train", "val", "test", val_size=size, test_size=0.4)) == {"train": 20, "val": 20, "test": 20}


def test_a_train_folder_alone_is_drawn_from(folders):
    assert counts(folders("train")) == {"train": 12, "val": 4, "test": 4}


def test_a_val_folder_is_no_source_of_test_images(folders):
    datamodule = folders("train", "val")
    assert of(datamodule, "val") == in_folder(datamodule, "val")
    assert counts(datamodule) == {"train": 16, "test": 4, "val": 20}


def test_a_val_file_takes_training_images_beside_a_test_folder(folders, tmp_path):
    datamodule = folders("train", "test")
    named = write_split(tmp_path / "data", "val.txt", ["train/a/000.png", "train/b/000.png"])
    assert of(datamodule, "val") == named
    assert of(datamodule, "train") == in_folder(datamodule, "train") - named
    assert of(datamodule, "test") == in_folder(datamodule, "test")


def test_a_train_file_leaves_the_test_folder_to_the_test_split(folders, tmp_path):
    datamodule = folders("train", "test")
    named = write_split(tmp_path / "data", "train.txt", ["train/a/000.png", "train/b/000.png"])
    assert of(datamodule, "train") == named
    assert of(datamodule, "test") == in_folder(datamodule, "test")
    assert counts(datamodule) == {"train": 2, "val": 18, "test": 20}


def test_a_test_file_leaves_the_rest_of_the_test_folder_unused(folders, tmp_path):
    datamodule = folders("train", "test")
    named = write_split(tmp_path / "data", "test.txt", ["test/a/000.png", "test/b/000.png"])
    assert of(datamodule, "test") == named == in_folder(datamodule, "test")
    assert counts(datamodule) == {"train": 16, "val": 4, "test": 2}


def test_no_combination_of_sizes_trains_on_the_test_folder(folders):
    for seed in range(3):
        datamodule = folders("train", "test", val_size=0.3, test_size=0.3, seed=seed)
        assert not any(path.startswith("test/") for path in of(datamodule, "train") | of(datamodule, "val"))


def test_a_test_folder_beside_class_folders_is_refused(image_folder):
    image_folder({"a": 3, "b": 3}, name="data")
    root = image_folder({"a": 3, "b": 3}, name="data/test").parent
    with pytest.raises(InputError, match=r"got a, b, test; .*exclude_filter=\[test/\]"):
        _ = ClassificationDataModule(str(root)).index
    assert len(ClassificationDataModule(str(root), exclude_filter=["test/"]).index) == 6


# bad input


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^datamodule\.data_path must be an existing folder, got .*/nowhere$"):
        _ = ClassificationDataModule(str(tmp_path / "nowhere")).index


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^datamodule\.data_path must hold images .*, found none in "):
        _ = ClassificationDataModule(str(tmp_path)).index


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_folder_without_one_readable_image_is_refused(tmp_path, on_bad_image):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"data_path holds 1 images and none can be read: the first is /"):
        _ = ClassificationDataModule(str(tmp_path), on_bad_image=on_bad_image).index


def test_an_image_that_cannot_be_decoded_is_named(module, tmp_path):
    (tmp_path / "images" / "a" / "bad.jpg").write_bytes(b"no\nimage")
    with pytest.raises(InputError, match=r"^1 of 31 images cannot be read, the first is .*/a/bad\.jpg \(") as caught:
        _ = module().index
    assert "datamodule.on_bad_image=skip" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_that_cannot_be_decoded_can_be_skipped(module, tmp_path, caplog):
    before = splits(module())
    (tmp_path / "images" / "a" / "bad.jpg").write_bytes(b"no image")
    datamodule = module(on_bad_image="skip")
    assert splits(datamodule) == before
    assert [image.path for image in datamodule.bad_images] == ["a/bad.jpg"]
    assert ["a/bad.jpg" in record.getMessage() for record in caplog.records] == [True]


def test_a_split_file_may_name_an_image_that_is_skipped(module, tmp_path):
    (tmp_path / "images" / "a" / "bad.jpg").write_bytes(b"no image")
    write_split(tmp_path / "images", "train.txt", ["a/000.png", "a/bad.jpg", "b/000.png"])
    assert of(module(on_bad_image="skip"), "train") == {"a/000.png", "b/000.png"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"on_bad_image": "ignore"}, r"^datamodule\.on_bad_image must be error, skip or replace, got 'ignore'$"),
        ({"batch_size": 1}, r"^datamodule\.batch_size must be at least 2, got 1$"),
        ({"num_workers": -1}, r"^datamodule\.num_workers must be auto, or 0 or more, got -1$"),
        ({"val_size": 1.5}, r"^datamodule\.val_size must be in \[0, 1\), got 1\.5$"),
        ({"val_size": 0.6, "test_size": 0.6}, r"^datamodule\.val_size \+ test_size must leave images to train on"),
    ],
)
def test_options_out_of_range_are_refused(module, option, message):
    with pytest.raises(InputError, match=message):
        _ = module(**option).index


def test_sizes_and_split_files_are_checked_before_any_image_is_read(module, tmp_path, monkeypatch):
    monkeypatch.setattr("mlflow_ssl.datasets.assembly.read_contents", lambda *_: pytest.fail("too early"))
    write_split(tmp_path / "images", "test.txt", ["a/gone.png"])
    for options, message in (({"val_size": 1.5}, "val_size"), ({}, r"missing file: a/gone\.png")):
        with pytest.raises(InputError, match=message):
            _ = module(**options).index


def test_a_batch_larger_than_the_training_split_is_refused(module):
    datamodule = module(batch_size=19)
    datamodule.setup()
    with pytest.raises(InputError, match=r"batch_size must be at most the training split's 18 images, got 19$"):
        datamodule.train_dataloader()


# loaders


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(17, [17]), (18, [18]), (4, [4, 4, 4, 4, 2]), (9, [9, 9]), (16, [16, 2])],
)
def test_a_last_batch_of_one_training_image_is_dropped_and_no_other(module, batch_size, sizes):
    datamodule = module(batch_size=batch_size)  # 18 images
    datamodule.setup()
    loader = datamodule.train_dataloader()
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


def test_validation_and_test_images_are_all_loaded_in_order(module):
    datamodule = module(val_transform=SIZED, test_transform=SIZED, batch_size=5)  # 6 images each, so 5 + 1
    datamodule.setup()
    for split, loader in (("val", datamodule.val_dataloader()), ("test", datamodule.test_dataloader())):
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [5, 1]
        assert torch.cat([labels for _, labels in batches]).tolist() == datamodule.index.split(split).labels.tolist()


def test_each_split_goes_through_its_transform(module):
    transforms = {f"{split}_transform": A.Resize(size, size) for split, size in (("train", 4), ("val", 5), ("test", 6))}
    datamodule = module(**transforms)
    datamodule.setup()
    loaders = datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader()
    assert [next(iter(loader))[0].shape[-1] for loader in loaders] == [4, 5, 6]


def test_training_images_come_in_another_order_each_epoch(module):
    datamodule = module(train_transform=SIZED)
    datamodule.setup()
    loader = datamodule.train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append(torch.cat([images for images, _ in loader]))
    assert orders[0].equal(orders[2])
    assert not orders[0].equal(orders[1])
    assert sorted(orders[0].flatten(1).sum(1).tolist()) == pytest.approx(sorted(orders[1].flatten(1).sum(1).tolist()))


def test_no_more_workers_are_started_than_there_are_processors(module, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    datamodule = module(num_workers=64)
    datamodule.setup()
    train, val, test = datamodule.train_dataloader(), datamodule.val_dataloader(), datamodule.test_dataloader()
    assert [loader.num_workers for loader in (train, val, test)] == [2, 2, 2]
    # only training's stay between epochs: three loaders of persistent workers would be thrice as many processes
    assert [loader.persistent_workers for loader in (train, val, test)] == [True, False, False]


def test_each_process_trains_on_its_share(module, monkeypatch):
    shares = []
    for rank in range(2):
        monkeypatch.setattr("mlflow_ssl.datamodules.classification.rank_and_world_size", lambda rank=rank: (rank, 2))
        datamodule = module()
        datamodule.setup()
        shares.append({index for _, index in datamodule.train_dataloader().sampler})
    assert [len(share) for share in shares] == [9, 9]
    assert shares[0] | shares[1] == set(range(18))


def test_a_loaded_position_is_where_that_epoch_begins_and_the_next_is_whole(module):
    whole, resumed = module(), module()
    resumed.load_state_dict({"epoch": 1, "images": 8})
    orders = []
    for datamodule in (whole, resumed):
        datamodule.setup()
        sampler = datamodule.train_dataloader().sampler
        for epoch in (1, 2):
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
    assert orders[2] == orders[0][8:]
    assert orders[3] == orders[1]


@pytest.mark.filterwarnings("default")  # Lightning has advice on loaders
@pytest.mark.parametrize(("num_batches", "images"), [(3, 4 * 3), (None, 0)])
def test_a_position_is_the_epoch_and_its_images_that_were_trained_on(module, num_batches, images):
    """Asked as the next batch begins, or as the next epoch does."""
    asked = []

    class Ask(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, num_batches):
                asked.append(trainer.datamodule.state_dict())

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1 and num_batches is None:
                asked.append(trainer.datamodule.state_dict())

    fit(module(), epochs=2, callbacks=[Ask()])
    assert asked == [{"epoch": 1, "images": images}]


def test_loading_draws_no_shared_random_number(module):
    datamodule = module(train_transform=SIZED, val_transform=SIZED)
    datamodule.setup()
    before = torch.get_rng_state()
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        for _ in loader:
            pass
    assert torch.get_rng_state().equal(before)


class Listener(LightningModule):
    """Learns nothing, and remembers what it is shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch[0].clone())
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(datamodule, *, epochs, resume=None, save=None, callbacks=()):
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    quiet |= {"limit_val_batches": 0, "use_distributed_sampler": False, "callbacks": list(callbacks)}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", **quiet)
    listener = Listener()
    trainer.fit(listener, datamodule, ckpt_path=resume, weights_only=False)
    if save:
        trainer.save_checkpoint(save)
    return listener.seen


@pytest.mark.filterwarnings("default")  # Lightning has advice on loaders and resuming
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_training_sees_what_an_unbroken_one_sees(module, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    module = partial(module, num_workers=num_workers, batch_size=6, train_transform=A.RandomCrop(4, 4))
    unbroken = fit(module(), epochs=3)
    fit(module(), epochs=2, save=tmp_path / "last.ckpt")
    resumed = fit(module(), epochs=3, resume=tmp_path / "last.ckpt")
    assert len(resumed) == 3
    assert all(seen.equal(expected) for seen, expected in zip(resumed, unbroken[6:], strict=True))


# what is kept


def test_a_dump_loads_back_with_the_same_splits_after_a_move(module, tmp_path):
    datamodule = module(val_transform=SIZED)
    datamodule.setup()
    joblib.dump(datamodule, tmp_path / "datamodule.joblib")
    (tmp_path / "images").rename(tmp_path / "moved")
    for file in ("a/000.png", "b/000.png"):  # what is drawn anew would differ
        (tmp_path / "moved" / file).with_name("extra.png").write_bytes((tmp_path / "moved" / file).read_bytes())
    loaded = joblib.load(tmp_path / "datamodule.joblib")
    loaded.data_path = str(tmp_path / "moved")
    loaded.setup()
    assert splits(loaded) == splits(datamodule)
    assert len(next(iter(loaded.train_dataloader()))[1]) == 4
    assert next(iter(loaded.val_dataloader()))[0].shape == (4, 3, 8, 8)
    assert loaded.classes == ["a", "b"]


def test_a_dump_holds_the_data_folder_once_and_else_relative_paths(module, tmp_path):
    datamodule = module()
    datamodule.setup()
    joblib.dump(datamodule, tmp_path / "datamodule.joblib")
    data = (tmp_path / "datamodule.joblib").read_bytes()
    assert b"a/000.png" in data
    assert data.count(tmp_path.name.encode()) == 1  # a path is pickled in parts


def test_a_dump_holds_no_trainer(module, tmp_path):
    datamodule = module()
    datamodule.trainer = {"model": np.zeros(10**6)}
    joblib.dump(datamodule, tmp_path / "datamodule.joblib")
    assert (tmp_path / "datamodule.joblib").stat().st_size < 10**5
    assert joblib.load(tmp_path / "datamodule.joblib").trainer is None
    assert datamodule.trainer is not None


def test_the_index_is_built_once(module, monkeypatch):
    datamodule = module()
    datamodule.prepare_data()
    monkeypatch.setattr(datamodule, "build_index", lambda: pytest.fail("built twice"))
    datamodule.setup()
    datamodule.prepare_data()


def test_embedded_digits_are_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(tmp_path))
    datamodule = ClassificationDataModule("embedded:digits", val_size=0.1, test_size=0.1)
    assert len(datamodule.index) == 1797
    assert datamodule.classes == list("0123456789")
    assert datamodule.root == tmp_path / "digits"

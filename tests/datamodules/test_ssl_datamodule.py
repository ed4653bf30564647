import os
import pickle
from functools import partial

import albumentations as A
import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from shards import write_shards

from mlflow_ssl.datamodules import ClassificationDataModule, SSLDataModule, classification
from mlflow_ssl.datasets import TwoAugmentationDataset, image
from mlflow_ssl.errors import InputError

CROP = A.Compose([A.RandomResizedCrop(size=(8, 8)), A.HorizontalFlip(p=0.5), A.ColorJitter(p=0.8), A.Normalize()])
CLEAN = A.Compose([A.Resize(8, 8), A.Normalize()])


def ssl(root, **options):
    defaults = {"num_workers": 0, "batch_size": 4, "val_size": 0.2, "test_size": 0.2}
    transforms = {"val_transform": CLEAN, "test_transform": CLEAN}
    views = options.pop("augmentation_dataset", TwoAugmentationDataset([CROP, CROP]))
    return SSLDataModule(str(root), augmentation_dataset=views, **(defaults | transforms | options))


@pytest.fixture
def module(image_folder):
    """Return a function that makes a datamodule of 10 and 20 images."""
    return partial(ssl, image_folder({"a": 10, "b": 20}, size=12))


@pytest.fixture
def good_parts(image_folder):
    """Return a function that makes a datamodule of one class to train on; 10 images of each of two validate."""
    image_folder({"good": 20}, size=8, name="data/train")
    image_folder({"good": 10, "bad": 10}, size=8, name="data/val")
    root = image_folder({"good": 4, "bad": 4}, size=8, name="data/test").parent
    return partial(ssl, root)


def paths(index):
    return set(index.paths)


def images_of(loader):
    return torch.cat([images for images, _ in loader])


def labels_of(loader):
    return torch.cat([labels for _, labels in loader]).tolist()


def two_epochs(datamodule):
    """Return both views of all images, by epoch, in the order of the loader."""
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        batches = [(torch.stack(views), labels) for views, labels in loader]
        epochs.append((torch.cat([views for views, _ in batches], dim=1), torch.cat([labels for _, labels in batches])))
    return epochs


def test_it_is_a_classification_datamodule_with_the_same_splits(module, tmp_path):
    datamodule = module(seed=3)
    plain = ClassificationDataModule(str(tmp_path / "images"), seed=3, val_size=0.2, test_size=0.2)
    assert isinstance(datamodule, ClassificationDataModule)
    assert datamodule.index.table.equals(plain.index.table)


def test_it_takes_every_argument_of_the_tutorials_config(image_folder):
    datamodule = SSLDataModule(
        data_path=str(image_folder({"a": 5, "b": 5}, size=8)),
        exclude_filter=None,
        include_filter=None,
        seed=42,
        num_workers=8,
        batch_size=2,
        augmentation_dataset=TwoAugmentationDataset(CROP),
        train_transform=None,
        test_transform=CLEAN,
        val_transform=CLEAN,
        train_split_file=None,
        val_split_file=None,
        test_split_file=None,
        val_size=0.3,
        test_size=0.1,
        split_validation=True,
        class_to_idx=None,
    )
    assert len(datamodule.index) == 10


# views


def test_training_batches_are_two_views_and_labels(module):
    datamodule = module()
    datamodule.setup("fit")
    (view_1, view_2), labels = next(iter(datamodule.train_dataloader()))
    assert view_1.shape == view_2.shape == (4, 3, 8, 8)
    assert view_1.dtype == view_2.dtype == torch.float32
    assert labels.shape == (4,)


def test_views_are_the_same_with_any_number_of_workers_in_each_epoch(module, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    alone, beside = two_epochs(module(num_workers=0)), two_epochs(module(num_workers=2))
    for (views, labels), (others, other_labels) in zip(alone, beside, strict=True):
        assert views.shape == (2, 18, 3, 8, 8)
        assert views.equal(others)
        assert labels.equal(other_labels)


def test_views_do_not_depend_on_the_batch_size(module):
    for (views, labels), (others, other_labels) in zip(
        two_epochs(module(batch_size=4)), two_epochs(module(batch_size=6)), strict=True
    ):
        assert views.equal(others)
        assert labels.equal(other_labels)


def test_views_differ_from_each_other_and_between_epochs(module):
    (first, _), (second, _) = two_epochs(module())
    assert not any(view_1.equal(view_2) for view_1, view_2 in zip(*first, strict=True))
    seen = {view.numpy().tobytes() for views in (first, second) for view in views.flatten(0, 1)}
    assert len(seen) == 2 * 2 * 18


def test_another_seed_draws_other_views_of_the_same_images(module, tmp_path):
    names = [f"{name}/00{number}.png" for name in "ab" for number in range(8)]
    (tmp_path / "images" / "train.txt").write_text("\n".join(names))
    first, second = (two_epochs(module(seed=seed))[0][0] for seed in (0, 1))
    assert not {view.numpy().tobytes() for view in first[0]} & {view.numpy().tobytes() for view in second[0]}


def test_data_sets_of_splits_hold_no_paths_of_their_own(module):
    datamodule = module()
    datamodule.setup("fit")
    datasets = [*datamodule._datasets.values(), datamodule.augmentation_dataset.dataset]
    assert [len(dataset) for dataset in datasets] == [18, 6, 6, 18, 18]
    held = [paths for dataset in datasets for paths in (dataset._paths._whole, dataset.reader._whole._paths)]
    characters = {paths.buffers()[-1].address for paths in (datamodule.index.whole["path"].chunk(0), *held)}
    assert len(characters) == 1


def test_shards_are_listed_once_and_anew_where_the_data_move(tmp_path, monkeypatch):
    listed, opening = [], classification.open_source
    monkeypatch.setattr(classification, "open_source", lambda path, **_: listed.append(path) or opening(path))
    folder = write_shards(tmp_path / "here", [8, 8, 8, 8])
    datamodule = ssl(folder)
    for stage in ("validate", "fit"):
        datamodule.setup(stage)
    datamodule.train_dataloader()
    assert datamodule.root == folder
    assert listed == [str(folder)]
    loaded = pickle.loads(pickle.dumps(datamodule))
    loaded.data_path = str(folder.rename(tmp_path / "there"))
    loaded.setup("fit")
    assert loaded.root == tmp_path / "there"
    assert listed == [str(folder), loaded.data_path]
    write_shards(tmp_path / "there", [8, 8, 8, 8, 8])
    assert len(loaded.build_index()) == 40


def test_an_image_is_decoded_once_for_both_views(module, monkeypatch):
    decoded = []
    decode = image.decode
    monkeypatch.setattr(image, "decode", lambda data, **options: decoded.append(data) or decode(data, **options))
    datamodule = module()
    datamodule.setup("fit")
    for _ in datamodule.train_dataloader():
        pass
    assert len(decoded) == len(set(decoded)) == 18


def test_a_train_transform_that_changes_nothing_changes_no_view(module):
    plain, same = two_epochs(module()), two_epochs(module(train_transform=A.Compose([A.NoOp()])))
    assert plain[0][0].equal(same[0][0])


def test_the_train_transform_comes_before_the_views(module):
    views = TwoAugmentationDataset([A.NoOp(), A.NoOp()])
    datamodule = module(train_transform=A.Resize(5, 7), augmentation_dataset=views)
    datamodule.setup("fit")
    (view_1, view_2), _ = next(iter(datamodule.train_dataloader()))
    assert view_1.shape == (4, 3, 5, 7)
    assert view_1.equal(view_2)


@pytest.mark.parametrize(("batch_size", "sizes"), [(17, [17]), (4, [4, 4, 4, 4, 2])])
def test_a_last_batch_of_one_pair_is_dropped_and_no_other(module, batch_size, sizes):
    datamodule = module(batch_size=batch_size)  # 18 images
    datamodule.setup("fit")
    assert [len(labels) for _, labels in datamodule.train_dataloader()] == sizes


def test_a_batch_larger_than_the_training_split_is_refused(module):
    datamodule = module(batch_size=19)
    datamodule.setup("fit")
    with pytest.raises(InputError, match=r"batch_size must be at most the training split's 18 images, got 19$"):
        datamodule.train_dataloader()


def test_views_must_be_given(module):
    with pytest.raises(InputError, match=r"^datamodule\.augmentation_dataset must be a TwoAugmentationDataset, got nu"):
        module(augmentation_dataset=None).prepare_data()


# bank and queries


def test_training_images_are_the_bank_and_validation_images_the_queries(module):
    datamodule = module()
    datamodule.setup()
    assert paths(datamodule.bank) == paths(datamodule.index.split("train"))
    assert paths(datamodule.queries) == paths(datamodule.index.split("val"))
    bank, queries = datamodule.val_dataloader()
    assert labels_of(bank) == datamodule.bank.labels.tolist()
    assert labels_of(queries) == datamodule.queries.labels.tolist()
    bank, tested = datamodule.test_dataloader()
    assert labels_of(bank) == datamodule.bank.labels.tolist()
    assert labels_of(tested) == datamodule.index.split("test").labels.tolist()


def test_a_bounded_bank_is_of_each_class_its_share_and_the_same_each_time(module):
    whole, bounded, again, other = module(), module(), module(), module(seed=1)
    for datamodule in (bounded, again, other):
        assert datamodule.bound_bank(6).startswith("6 of 18 labelled images, drawn by class with seed ")
    assert np.bincount(whole.bank.labels).tolist() == [6, 12]
    assert np.bincount(bounded.bank.labels).tolist() == [2, 4]
    assert bounded.bank.paths == again.bank.paths
    assert paths(bounded.bank) < paths(whole.bank)
    assert bounded.bank.paths == sorted(bounded.bank.paths)
    assert paths(other.bank) != paths(bounded.bank)
    assert paths(bounded.queries) == paths(whole.queries)


@pytest.mark.parametrize("early", [True, False])
def test_only_images_of_a_bounded_bank_are_read(module, early, monkeypatch):
    datamodule = module()
    if early:
        datamodule.bound_bank(6)
    datamodule.setup()
    if not early:
        datamodule.bound_bank(6)
    read = []
    whole = image.ImageDataset.picture
    monkeypatch.setattr(
        image.ImageDataset, "picture", lambda self, row: read.append(self._paths[row].as_py()) or whole(self, row)
    )
    for bank, _ in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        read.clear()
        images, labels = images_of(bank), labels_of(bank)
        assert read[: len(labels)] == datamodule.bank.paths
        assert labels == datamodule.bank.labels.tolist()
        shown = datamodule.evaluated_images("bank")
        assert images.equal(torch.stack([shown[row][0] for row in range(6)]))


def test_a_bank_that_is_small_enough_is_left_whole(module):
    datamodule = module()
    assert datamodule.bound_bank(18) is None
    assert datamodule.bound_bank(17)
    assert len(datamodule.bank) == 17
    assert datamodule.bound_bank(None) is None
    assert len(datamodule.bank) == 18


def test_bank_and_queries_are_clean_images(module, tmp_path):
    datamodule = module()
    datamodule.setup()
    for loader, index in zip(datamodule.val_dataloader(), (datamodule.bank, datamodule.queries), strict=True):
        pixels = [np.asarray(Image.open(tmp_path / "images" / path)) for path in index.paths]
        expected = [torch.from_numpy(CLEAN(image=image)["image"]).permute(2, 0, 1) for image in pixels]
        torch.testing.assert_close(images_of(loader), torch.stack(expected))


def test_test_images_go_through_their_own_transform(module):
    datamodule = module(test_transform=A.Resize(5, 5))
    datamodule.setup()
    bank, tested = datamodule.test_dataloader()
    assert (images_of(bank).shape[-1], images_of(tested).shape[-1]) == (8, 5)


def test_without_a_transform_the_bank_is_pictures_of_fractions(module):
    datamodule = module(val_transform=None)
    datamodule.setup()
    images = images_of(datamodule.val_dataloader()[0])
    assert images.shape == (18, 3, 12, 12)
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize(("val_size", "test_size", "expected"), [(0, 0.2, (0, 2)), (0.2, 0, (2, 0)), (0, 0, (0, 0))])
def test_an_empty_split_has_no_loaders(module, val_size, test_size, expected):
    datamodule = module(val_size=val_size, test_size=test_size)
    datamodule.setup()
    assert (len(datamodule.val_dataloader()), len(datamodule.test_dataloader())) == expected


def test_one_class_gives_no_bank_and_no_queries(image_folder):
    datamodule = ssl(image_folder({"good": 20}, size=8))
    datamodule.setup()
    assert len(datamodule.bank) == 0
    assert datamodule.queries.paths == datamodule.index.split("val").paths
    for loaders in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        (loader,) = loaders
        assert sum(len(images) for images, _ in loader) == 4
    assert len(list(datamodule.train_dataloader())) == 3


def test_images_without_classes_give_one_loader_of_the_images_to_look_at(tmp_path):
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    datamodule = ssl(tmp_path)
    datamodule.setup()
    assert len(datamodule.bank) == 0
    assert datamodule.queries.paths == datamodule.index.split("val").paths
    for loaders in (datamodule.val_dataloader(), datamodule.test_dataloader()):
        (loader,) = loaders
        assert sum(len(images) for images, _ in loader) == 4


def test_one_training_class_splits_the_validation_images_into_bank_and_queries(good_parts):
    datamodule = good_parts()
    datamodule.setup()
    bank, queries = datamodule.bank, datamodule.queries
    assert paths(bank) | paths(queries) == paths(datamodule.index.split("val"))
    assert not paths(bank) & paths(queries)
    assert np.bincount(bank.labels).tolist() == [7, 7]
    assert np.bincount(queries.labels).tolist() == [3, 3]
    loaders = [*datamodule.val_dataloader(), datamodule.test_dataloader()[1]]
    expected = [bank, queries, datamodule.index.split("test")]
    assert [labels_of(loader) for loader in loaders] == [index.labels.tolist() for index in expected]
    assert labels_of(datamodule.test_dataloader()[0]) == bank.labels.tolist()


def test_the_division_of_the_validation_images_depends_on_the_seed_alone(good_parts):
    assert good_parts().queries.paths == good_parts().queries.paths
    assert good_parts(seed=1).queries.paths != good_parts(seed=2).queries.paths


def test_the_validation_images_are_left_whole_where_the_user_says_so(good_parts):
    datamodule = good_parts(split_validation=False)
    datamodule.setup()
    assert len(datamodule.bank) == 0
    assert datamodule.queries.paths == datamodule.index.split("val").paths
    assert len(datamodule.val_dataloader()) == 1


def test_one_validation_class_is_nothing_to_recognize(good_parts):
    datamodule = good_parts(exclude_filter=["val/bad/"])
    datamodule.setup()
    assert len(datamodule.bank) == 0
    assert len(datamodule.val_dataloader()) == 1


def test_split_validation_changes_nothing_where_training_has_classes(module):
    assert paths(module(split_validation=True).bank) == paths(module(split_validation=False).bank)


def test_unlabelled_training_images_are_measured_by_a_labelled_validation_folder(image_folder):
    root = image_folder({"train": 20}, size=8, name="data")
    image_folder({"a": 10, "b": 10}, size=8, name="data/val")
    datamodule = ssl(root, test_size=0)
    datamodule.setup()
    assert (len(datamodule.bank), len(datamodule.queries)) == (14, 6)
    assert len(list(datamodule.train_dataloader())) == 5


def test_a_test_folder_reaches_neither_views_nor_bank_nor_queries(good_parts):
    datamodule = good_parts()
    datamodule.setup()
    trained = {datamodule.index.split("train").paths[key[1]] for key in datamodule.train_dataloader().sampler}
    used = trained | paths(datamodule.bank) | paths(datamodule.queries)
    assert used == paths(datamodule.index) - {path for path in datamodule.index.paths if path.startswith("test/")}


# what is kept


def test_a_dump_loads_back_and_draws_the_same_views_after_a_move(module, tmp_path):
    datamodule = module()
    expected = two_epochs(datamodule)
    joblib.dump(datamodule, tmp_path / "datamodule.joblib")
    (tmp_path / "images").rename(tmp_path / "moved")
    loaded = joblib.load(tmp_path / "datamodule.joblib")
    loaded.data_path = str(tmp_path / "moved")
    assert loaded.index.table.equals(datamodule.index.table)
    for (views, labels), (others, other_labels) in zip(expected, two_epochs(loaded), strict=True):
        assert views.equal(others)
        assert labels.equal(other_labels)
    assert images_of(loaded.val_dataloader()[0]).shape == (18, 3, 8, 8)


def test_a_dump_holds_neither_trainer_nor_other_absolute_paths_than_the_data_folder(module, tmp_path):
    datamodule = module()
    datamodule.setup()
    datamodule.trainer = {"model": np.zeros(10**6)}
    joblib.dump(datamodule, tmp_path / "datamodule.joblib")
    data = (tmp_path / "datamodule.joblib").read_bytes()
    assert len(data) < 10**5
    assert b"a/000.png" in data
    assert data.count(tmp_path.name.encode()) == 1  # a path is pickled in parts


def test_dumping_leaves_the_datamodule_at_work(module, tmp_path):
    datamodule = module()
    datamodule.setup()
    joblib.dump(datamodule, tmp_path / "datamodule.joblib")
    assert len(next(iter(datamodule.train_dataloader()))[1]) == 4
    assert len(datamodule.val_dataloader()) == 2


# what is drawn of them


def test_evaluated_images_are_those_of_the_loaders_in_their_order(module):
    datamodule = module()
    datamodule.setup("validate")
    for split, loader in zip(("bank", "val"), datamodule.val_dataloader(), strict=True):
        images, labels = zip(*datamodule.evaluated_images(split), strict=True)
        assert torch.stack(images).equal(images_of(loader))
        assert list(labels) == labels_of(loader)


def test_drawn_views_are_those_of_training(module):
    datamodule = module()
    datamodule.setup("fit")
    views = datamodule.drawn_views()
    for key in ((0, 0), (3, 7)):
        (view_1, view_2), label = views[key]
        (expected_1, expected_2), expected_label = datamodule.augmentation_dataset[key]
        assert view_1.equal(expected_1)
        assert view_2.equal(expected_2)
        assert label == expected_label


def test_what_is_drawn_shares_no_transform_with_the_loaders(module):
    datamodule = module(train_transform=A.Compose([A.HorizontalFlip(p=0.5)]))
    datamodule.setup("fit")
    views = datamodule.drawn_views()
    assert datamodule.evaluated_images("val").transform is not datamodule.val_transform
    assert views.dataset.transform is not datamodule.train_transform
    for drawn, trained in zip(views.transform, datamodule.augmentation_dataset.transform, strict=True):
        assert drawn is not trained
        assert drawn.transforms[0] is not trained.transforms[0]

import os

import albumentations as A
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from mlflow_ssl.datasets import EpochSampler, ImageDataset, TwoAugmentationDataset, image
from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.datasets.sources.folder import FileReader

CROP = A.Compose([A.RandomResizedCrop(size=(8, 8)), A.HorizontalFlip(p=0.5), A.ColorJitter(p=0.8)])


@pytest.fixture
def images(image_folder):
    root = image_folder({"a": 4, "b": 5}, size=12)
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    labels = pa.array([int(path.startswith("b")) for path in paths], pa.int32())
    table = pa.table({"path": pa.array(paths, pa.large_string()), "label": labels})
    return ImageDataset(FileReader(root, table["path"].combine_chunks()), ImageIndex(table), pixels=True)


def test_an_item_is_two_views_and_the_class(images):
    dataset = TwoAugmentationDataset(CROP, images)
    (view_1, view_2), label = dataset[(0, 8)]
    assert view_1.shape == view_2.shape == (3, 8, 8)
    assert view_1.dtype == view_2.dtype == torch.float32
    assert label == 1
    assert len(dataset) == 9


def test_each_transform_draws_its_own_view(images):
    dataset = TwoAugmentationDataset([A.NoOp(), A.InvertImg(p=1.0)], images)
    (view_1, view_2), _ = dataset[0]
    torch.testing.assert_close(view_1, torch.from_numpy(images[0][0].copy()).permute(2, 0, 1) / 255)
    torch.testing.assert_close(view_2, 1 - view_1)


@pytest.mark.parametrize("transform", [CROP, [CROP, CROP], (CROP, CROP)])
def test_views_of_one_image_differ(images, transform):
    dataset = TwoAugmentationDataset(transform, images)
    for number in range(len(dataset)):
        (view_1, view_2), _ = dataset[number]
        assert not view_1.equal(view_2)


def test_flips_of_the_two_views_are_independent():
    ramp = np.broadcast_to(np.arange(4, dtype=np.uint8)[None, :, None], (1, 4, 3))

    class Ramp:
        def __getitem__(self, key):
            return ramp, 0

    dataset = TwoAugmentationDataset(A.HorizontalFlip(p=0.5), Ramp())
    views = (dataset[(0, number)][0] for number in range(400))
    flipped = np.array([[bool(view[0, 0, 0] > 0) for view in pair] for pair in views])
    assert flipped.mean(axis=0) == pytest.approx(0.5, abs=0.1)
    assert abs(np.corrcoef(flipped.T)[0, 1]) < 4 / np.sqrt(400)


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"number": 3}], ids=str)
def test_views_depend_on_seed_epoch_and_image(other):
    same = np.zeros((12, 12, 3), np.uint8)
    same[:] = np.arange(12)[:, None, None] * 20

    class Same:
        def __getitem__(self, key):
            return same, 0

    def views(seed=0, epoch=0, number=2):
        return TwoAugmentationDataset(CROP, Same(), seed=seed)[(epoch, number)][0]

    assert all(a.equal(b) for a, b in zip(views(), views(), strict=True))
    assert not any(a.equal(b) for a, b in zip(views(), views(**other), strict=True))


def test_views_do_not_depend_on_what_was_drawn_before(images):
    dataset = TwoAugmentationDataset(CROP, images)
    forwards = [dataset[(0, number)][0] for number in range(9)]
    backwards = [dataset[(0, number)][0] for number in reversed(range(9))][::-1]
    for pair, other in zip(forwards, backwards, strict=True):
        assert all(a.equal(b) for a, b in zip(pair, other, strict=True))


def test_a_bare_number_means_epoch_0(images):
    dataset = TwoAugmentationDataset(CROP, images)
    assert dataset[4][0][0].equal(dataset[(0, 4)][0][0])
    assert not dataset[4][0][0].equal(dataset[(1, 4)][0][0])


def test_an_image_is_decoded_once_for_both_views(images, monkeypatch):
    decoded = []
    decode = image.decode
    monkeypatch.setattr(image, "decode", lambda data, **options: decoded.append(data) or decode(data, **options))
    dataset = TwoAugmentationDataset(CROP, images)
    for number in range(3):
        dataset[(0, number)]
    assert decoded == [images.reader[row] for row in range(3)]


def test_the_first_view_cannot_change_what_the_second_is_drawn_from(images):
    class Spoil(A.ImageOnlyTransform):
        def apply(self, img, **params):
            img[:] = 0
            return img

    dataset = TwoAugmentationDataset([Spoil(p=1.0), A.NoOp()], images)
    with pytest.raises(ValueError, match="read-only"):
        dataset[0]


@pytest.mark.parametrize("steps", [[], [A.ToTensorV2()]], ids=["array", "tensor"])
def test_views_are_drawn_from_what_a_transform_before_left(images, steps):
    expected = [1 - view for view in TwoAugmentationDataset(A.NoOp(), images)[0][0]]
    images.transform = A.Compose([A.InvertImg(p=1.0), *steps])
    (view_1, view_2), _ = TwoAugmentationDataset(A.NoOp(), images)[0]
    torch.testing.assert_close((view_1, view_2), tuple(expected))


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_list_must_hold_two_transforms(number):
    with pytest.raises(ValueError, match=rf"^transform must be one transform or a list of two, got {number}$"):
        TwoAugmentationDataset([CROP] * number)


def test_views_before_there_are_images_are_refused():
    with pytest.raises(RuntimeError, match="dataset must be set before views are drawn"):
        TwoAugmentationDataset(CROP)[0]
    with pytest.raises(RuntimeError, match="dataset must be set before views are drawn"):
        len(TwoAugmentationDataset(CROP))


def epochs(dataset, workers):
    """Return the views of two epochs by epoch and image, through a loader as training has it."""
    sampler = EpochSampler(len(dataset), seed=0)
    loader = DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    batches = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches.append([torch.stack(views) for views, _ in loader])
    return [torch.cat(parts, dim=1) for parts in batches]


def test_views_are_the_same_with_and_without_workers_in_each_epoch(images, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)  # torch warns where there is one
    dataset = TwoAugmentationDataset(CROP, images)
    alone, beside = epochs(dataset, 0), epochs(dataset, 2)
    for epoch in range(2):
        assert alone[epoch].shape == (2, 9, 3, 8, 8)
        assert alone[epoch].equal(beside[epoch])
    assert not alone[0].sort(dim=1).values.equal(alone[1].sort(dim=1).values)

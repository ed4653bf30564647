import albumentations as A
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from mlflow_ssl.datasets import ImageDataset
from mlflow_ssl.datasets.index import ImageIndex


@pytest.fixture
def index(image_folder):
    root = image_folder({"a": 2, "b": 3}, size=6)
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    labels = [int(path.startswith("b")) for path in paths]
    return root, ImageIndex(pa.table({"path": paths, "label": pa.array(labels, pa.int64())}))


def test_an_item_is_the_picture_of_its_row_and_its_class(index):
    root, rows = index
    dataset = ImageDataset(root, rows, pixels=True)
    assert len(dataset) == 5
    for number, path in enumerate(rows.paths):
        image, label = dataset[number]
        np.testing.assert_array_equal(image, np.asarray(Image.open(root / path)))
        assert label == int(path.startswith("b"))
        assert type(label) is int


def test_a_transform_makes_a_tensor_a_batch_can_be_made_of(index):
    dataset = ImageDataset(*index, transform=A.Compose([A.Resize(4, 5), A.Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)]))
    images, labels = default_collate([dataset[0], dataset[4]])
    assert (images.dtype, images.shape) == (torch.float32, (2, 3, 4, 5))
    assert labels.tolist() == [0, 1]
    assert -1 <= images.min() < 0 < images.max() <= 1


@pytest.mark.parametrize("transform", [None, A.NoOp()])
def test_bytes_become_fractions_with_and_without_a_transform(index, transform):
    image, _ = ImageDataset(*index, transform=transform)[2]
    pixels, _ = ImageDataset(*index, pixels=True)[2]
    torch.testing.assert_close(image, torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)


def test_pixels_of_a_transform_stay_bytes(index):
    inverted, _ = ImageDataset(*index, transform=A.InvertImg(p=1.0), pixels=True)[2]
    pixels, _ = ImageDataset(*index, pixels=True)[2]
    np.testing.assert_array_equal(inverted, 255 - pixels)
    assert inverted.dtype == np.uint8


def test_a_random_transform_depends_on_seed_epoch_and_image_alone(index):
    noise = A.GaussNoise(p=1.0)
    dataset = ImageDataset(*index, transform=noise, seed=1)
    first = dataset[(0, 3)][0]
    assert not dataset[(1, 3)][0].equal(first)
    assert not ImageDataset(*index, transform=noise, seed=2)[(0, 3)][0].equal(first)
    assert dataset[(0, 3)][0].equal(first)


def test_a_bare_number_means_epoch_0(index):
    dataset = ImageDataset(*index, transform=A.GaussNoise(p=1.0))
    assert dataset[3][0].equal(dataset[(0, 3)][0])
    assert not dataset[3][0].equal(dataset[(1, 3)][0])


def test_an_empty_split_has_no_images(index):
    root, rows = index
    assert len(ImageDataset(root, rows.take(np.empty(0, dtype=np.int64)))) == 0


def test_an_image_that_vanished_is_named(index):
    root, rows = index
    (root / rows.paths[1]).unlink()
    with pytest.raises(RuntimeError, match=r"is not any more: .*a/001\.png"):
        ImageDataset(root, rows)[1]

import copy

import albumentations as A
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

from mlflow_ssl.datasets import ImageDataset
from mlflow_ssl.datasets.bad_images import BAD_LABEL, BadImageList
from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.datasets.sources.folder import FileReader


@pytest.fixture
def index(image_folder):
    root = image_folder({"a": 2, "b": 3}, size=6)
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    labels = [int(path.startswith("b")) for path in paths]
    table = pa.table({"path": pa.array(paths, pa.large_string()), "label": pa.array(labels, pa.int32())})
    return FileReader(root, table["path"].combine_chunks()), ImageIndex(table)


def test_a_copy_has_a_transform_of_its_own_and_the_same_images(index):
    reader, rows = index
    dataset = ImageDataset(reader, rows, transform=A.Compose([A.GaussNoise(p=1.0)]), pixels=True)
    copied = copy.deepcopy(dataset)
    assert copied.reader is dataset.reader
    assert copied._paths is dataset._paths
    assert copied.transform is not dataset.transform
    assert copied.transform.transforms[0] is not dataset.transform.transforms[0]
    np.testing.assert_array_equal(copied[(1, 2)][0], dataset[(1, 2)][0])


def test_an_item_is_the_picture_of_its_row_and_its_class(index):
    reader, rows = index
    dataset = ImageDataset(reader, rows, pixels=True)
    assert len(dataset) == 5
    for number, path in enumerate(rows.paths):
        image, label = dataset[number]
        np.testing.assert_array_equal(image, np.asarray(Image.open(reader.root / path)))
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
    reader, rows = index
    assert len(ImageDataset(reader, rows.take(np.empty(0, dtype=np.int64)))) == 0


def test_an_image_that_vanished_is_named(index):
    reader, rows = index
    (reader.root / rows.paths[1]).unlink()
    with pytest.raises(RuntimeError, match=r"any more: a/001\.png: cannot be read: No such file .*on_bad_image=skip"):
        ImageDataset(reader, rows)[1]


@pytest.fixture
def broken(index, tmp_path):
    """Return the reader and rows of five images, the second gone and the fourth cut off, and a list for such images."""
    reader, rows = index
    (reader.root / rows.paths[1]).unlink()
    whole = (reader.root / rows.paths[3]).read_bytes()
    (reader.root / rows.paths[3]).write_bytes(whole[: len(whole) // 2])
    return reader, rows, BadImageList(tmp_path / "bad_images.csv")


def test_a_skipped_image_gives_nothing_and_is_listed_once(broken):
    reader, rows, listed = broken
    dataset = ImageDataset(reader, rows, pixels=True, on_bad_image="skip", bad_images=listed)
    assert [dataset[row] is None for row in range(5)] == [False, True, False, True, False]
    assert dataset[1] is None
    assert [image.path for image in listed.read()] == ["a/001.png", "b/001.png"]
    assert "No such file" in listed.read()[0].reason


def test_a_replaced_image_is_another_good_one_drawn_by_its_key_alone(broken):
    reader, rows, listed = broken
    dataset = ImageDataset(reader, rows, pixels=True, on_bad_image="replace", bad_images=listed)
    good = [dataset[row][0] for row in (0, 2, 4)]
    drawn = [dataset[(epoch, 1)] for epoch in range(20)]
    assert all(any(np.array_equal(image, other) for other in good) for image, _ in drawn)
    assert len({image.tobytes() for image, _ in drawn}) == 3  # over the epochs all of them come
    assert all(np.array_equal(dataset[(epoch, 1)][0], image) for epoch, (image, _) in enumerate(drawn))


def test_where_no_image_can_be_read_nothing_replaces_one(broken):
    reader, rows, listed = broken
    for path in rows.paths:
        (reader.root / path).unlink(missing_ok=True)
    dataset = ImageDataset(reader, rows, pixels=True, on_bad_image="replace", bad_images=listed)
    with pytest.raises(RuntimeError, match=r"none of 20 images .* can be read; is the disk there\?"):
        dataset[0]


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_an_image_to_be_evaluated_that_is_bad_keeps_its_place_and_says_so(broken, policy):
    reader, rows, listed = broken
    transform = A.Compose([A.Resize(4, 5), A.Normalize(mean=(0.5,) * 3, std=(0.5,) * 3)])
    dataset = ImageDataset(reader, rows, transform=transform, on_bad_image=policy, bad_images=listed)
    images, labels = default_collate([dataset[row] for row in range(5)])
    assert labels.tolist() == [0, BAD_LABEL, 1, BAD_LABEL, 1]
    assert images.shape == (5, 3, 4, 5)
    assert len(listed.read()) == 2


def test_streamed_bytes_give_what_the_row_gives(index):
    reader, rows = index
    dataset = ImageDataset(reader, rows, transform=A.GaussNoise(p=1.0), pixels=True)
    image, label = dataset.streamed(reader[3], (2, 3))
    expected, _ = dataset[(2, 3)]
    np.testing.assert_array_equal(image, expected)
    assert label == 1
    assert ImageDataset(reader, rows, pixels=True, on_bad_image="skip").streamed(b"no image", (0, 1)) is None

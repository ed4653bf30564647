import random

import albumentations as A
import cv2
import numpy as np
import pytest
import torch

from mlflow_ssl.transforms import apply, to_tensor

IMAGE = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
CROP_AND_COLOUR = A.Compose([A.RandomResizedCrop(size=(8, 8)), A.ColorJitter(p=1.0), A.GaussianBlur(p=0.5)])


def test_the_draw_determines_the_result_whatever_came_before():
    first = apply(CROP_AND_COLOUR, IMAGE, draw=(0, 1, 2, 1))
    apply(CROP_AND_COLOUR, IMAGE, draw=(9, 9, 9, 9))
    np.random.seed(5)  # noqa: NPY002 the state that must not matter
    random.seed(5)
    torch.manual_seed(5)
    np.testing.assert_array_equal(apply(CROP_AND_COLOUR, IMAGE, draw=(0, 1, 2, 1)), first)


@pytest.mark.parametrize("place", range(4))
def test_each_number_of_the_draw_matters(place):
    draw = [3, 1, 2, 1]
    other = [value + (number == place) for number, value in enumerate(draw)]
    results = [apply(CROP_AND_COLOUR, IMAGE, draw=tuple(numbers)) for numbers in (draw, other)]
    assert not np.array_equal(*results)


def test_draws_leave_the_shared_random_states_alone():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    apply(CROP_AND_COLOUR, IMAGE, draw=(0,))
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.get_rng_state().equal(before[2])


def test_apply_leaves_the_image_alone():
    image = IMAGE.copy()
    apply(CROP_AND_COLOUR, image, draw=(0,))
    np.testing.assert_array_equal(image, IMAGE)


class Mark(A.ImageOnlyTransform):
    """Write 1 into a channel, and a number drawn into the next row."""

    def __init__(self, channel, p):
        super().__init__(p=p)
        self.channel = channel

    def apply(self, img, **params):
        img = img.copy()
        img[0, 0, self.channel] = 1
        img[1, 0, self.channel] = self.random_generator.random()
        img[2, 0, self.channel] = self.py_random.random()
        return img


def drawn(transform, number=400):
    blank = np.zeros((3, 1, 2), dtype=np.float32)
    return np.stack([apply(transform, blank, draw=(0, 0, index, 1))[:, 0] for index in range(number)])


@pytest.mark.parametrize("nested", [False, True])
def test_two_transforms_of_a_composition_come_independently(nested):
    second = A.Compose([Mark(1, 0.5)]) if nested else Mark(1, 0.5)
    came = drawn(A.Compose([Mark(0, 0.5), second]))[:, 0]
    assert came.mean(axis=0) == pytest.approx(0.5, abs=0.1)
    # four standard errors of a correlation of 400 pairs
    assert abs(np.corrcoef(came.T)[0, 1]) < 4 / np.sqrt(400)


def test_two_transforms_of_a_composition_draw_independent_numbers():
    numbers = drawn(A.Compose([Mark(0, 1.0), Mark(1, 1.0)]))[:, 1:].reshape(400, 4)
    correlations = np.corrcoef(numbers.T)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(400)
    assert numbers.mean(axis=0) == pytest.approx(0.5, abs=0.08)


def test_a_transform_without_a_composition_is_drawn_too():
    came = drawn(Mark(0, 0.5))[:, 0, 0]
    assert came.mean() == pytest.approx(0.5, abs=0.1)


def test_opencv_starts_no_threads_of_its_own():
    assert cv2.getNumThreads() == 1


def test_to_tensor_scales_bytes_to_one_and_puts_channels_first():
    tensor = to_tensor(IMAGE)
    assert (tensor.dtype, tensor.shape) == (torch.float32, (3, 12, 10))
    assert tensor[2, 4, 7].item() == pytest.approx(int(IMAGE[4, 7, 2]) / 255)
    assert to_tensor(np.full((1, 1, 3), 255, np.uint8)).tolist() == [[[1.0]]] * 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_to_tensor_leaves_the_values_of_floats(dtype):
    tensor = to_tensor(np.array([[[-2.0, 0.5, 300.0]]], dtype=dtype))
    assert tensor.dtype == torch.float32
    assert tensor.flatten().tolist() == [-2.0, 0.5, 300.0]


def test_to_tensor_gives_grey_one_channel():
    assert to_tensor(np.zeros((4, 5), np.uint8)).shape == (1, 4, 5)


def test_to_tensor_takes_what_totensorv2_made():
    chw = torch.from_numpy(IMAGE).permute(2, 0, 1)
    torch.testing.assert_close(to_tensor(chw), to_tensor(IMAGE))
    assert to_tensor(torch.tensor([2.5], dtype=torch.float64)).dtype == torch.float32
    assert to_tensor(torch.tensor([2.5], dtype=torch.float64)).item() == 2.5

"""Against torchvision, whose functions are the field's reference."""

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from mlflow_ssl.views import operations

SIZES = [(40, 56), (7, 1), (1, 9)]


def picture(height=40, width=56, seed=0):
    """Return colours of all kinds, with edges and texture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(height // 8, 1), max(width // 8, 1), 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST).reshape(height, width, 3)
    return np.clip(smooth.astype(int) + rng.integers(-30, 31, smooth.shape), 0, 255).astype(np.uint8)


def planes(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def levels(ours, theirs):
    """Return by how many grey levels two images differ."""
    return (planes(ours).int() - theirs.int()).abs()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_a_blend_is_torchvisions_to_a_level_of_rounding(name, factor, size):
    image = picture(*size)
    ours = getattr(operations, f"adjust_{name}")(image, factor)
    theirs = getattr(functional, f"adjust_{name}")(planes(image), factor)
    assert levels(ours, theirs).max() <= 1  # it cuts fractions off, OpenCV rounds them


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.01, 0.0, 0.03, 0.1, 0.5])
def test_hue_is_torchvisions_to_a_level_of_rounding(turn, size):
    image = picture(*size)
    theirs = functional.adjust_hue(planes(image).float() / 255, turn) * 255
    assert (planes(operations.adjust_hue(image, turn)) - theirs).abs().max() <= 0.51


def test_grey_is_torchvisions_to_a_level_of_rounding():
    image = picture()
    assert levels(operations.to_grey(image), functional.rgb_to_grayscale(planes(image), 3)).max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions_to_a_level_of_rounding_and_the_end_of_the_kernel(sigma):
    image = picture()
    theirs = functional.gaussian_blur(planes(image), [23, 23], [sigma, sigma])
    assert levels(operations.gaussian_blur(image, sigma), theirs).max() <= 1


def test_a_blur_takes_as_many_values_as_it_may():
    image = np.zeros((41, 41, 3), dtype=np.uint8)
    image[20, 20] = 255
    wide = np.flatnonzero(operations.gaussian_blur(image, 2.0, most_taps=5)[20, :, 0])
    assert wide.tolist() == [18, 19, 20, 21, 22]


def test_solarize_is_torchvisions():
    image = picture()
    assert levels(operations.solarize(image), functional.solarize(planes(image), 128)).max() == 0


def test_resize_to_a_larger_size_is_torchvisions_to_a_few_levels():
    image = picture()
    theirs = functional.resize(planes(image), [80, 112], interpolation=functional.InterpolationMode.BICUBIC)
    apart = levels(operations.resize(image, 80, 112), theirs).float()
    assert apart.mean() < 2  # the cubic's parameter is -0.75 in OpenCV, as in torch without antialiasing, -0.5 with it


@pytest.mark.parametrize("factor", [2, 3, 4.7])
def test_where_an_image_shrinks_much_it_is_nearer_to_torchvisions_antialiased_one(factor):
    image, side = picture(240, 240), int(240 / factor)
    theirs = functional.resize(planes(image), [side, side], functional.InterpolationMode.BICUBIC).float()
    plain = cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC)
    ours, aliased = (levels(each, theirs).float().mean() for each in (operations.resize(image, side, side), plain))
    assert ours < 0.75 * aliased


@pytest.mark.parametrize("factor", [2, 3, 4.7])
def test_stripes_too_fine_for_the_small_size_fade_by_the_size_of_the_blocks(factor):
    stripes = np.zeros((240, 240, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = operations.resize(stripes, int(240 / factor), int(240 / factor))[4:-4, 4:-4]
    assert np.abs(small - 127.5).max() <= 127.5 / int(factor) + 1


@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue"])
def test_the_image_that_is_given_stays_as_it_is(name):
    image = picture()
    image.flags.writeable = False
    before = image.copy()
    getattr(operations, name)(image, 0.3)
    operations.gaussian_blur(image, 1.0)
    operations.resize(image, 10, 10)
    np.testing.assert_array_equal(image, before)

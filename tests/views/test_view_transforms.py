import pickle

import albumentations as A
import numpy as np
import pytest
import torch
from test_operations import picture
from torchvision.transforms import v2

from mlflow_ssl.config import build, compose_config
from mlflow_ssl.transforms import apply, to_tensor
from mlflow_ssl.views import FlipAndJitter, GaussianBlur, RandomResizedCrop, operations

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DRAWS = 1500


def recipe(group="byol", size=32):
    words = ["experiment=base/ssl/byol", "data_path=x", f"transforms={group}"]
    return compose_config([*words, f"transforms.input_height={size}", f"transforms.input_width={size}"]).transforms


def torchvisions_view(blur, solarize, size=32):
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(0.5),
            jitter,
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarize),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def statistics(views):
    """Return mean, spread, spread of the pixels' differences, and histogram of values, over many views in [0, 1]."""
    edges = (views[..., 1:] - views[..., :-1]).abs().mean((1, 2, 3))
    histogram = torch.histc(views, 16, 0, 1) / views.numel()
    per_view = views.mean((2, 3))
    moments = torch.cat([per_view.mean(0), per_view.std(0), views.std((2, 3)).mean(0), edges.mean()[None]])
    return moments, histogram


@pytest.mark.slow
@pytest.mark.parametrize(("number", "blur", "solarize"), [(1, 1.0, 0.0), (2, 0.1, 0.2)])
def test_views_are_distributed_as_torchvisions(number, blur, solarize):
    images = [picture(48, 64, seed=seed) for seed in range(5)]
    transform = build(recipe()[f"augmentation{number}"])
    ours = [to_tensor(apply(transform, images[n % 5], draw=(0, n, number))) for n in range(DRAWS)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = torchvisions_view(blur, solarize)
        tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
        theirs = [reference(tensors[n % 5]) for n in range(DRAWS)]
    (moments, histogram), (expected, expected_histogram) = (
        statistics(torch.stack(views).clamp(0, 1)) for views in (ours, theirs)
    )
    # 1,500 draws tell means apart to 0.01; the crops' interpolation differs where they shrink to less than a half
    torch.testing.assert_close(moments, expected, atol=0.02, rtol=0.05)
    torch.testing.assert_close(histogram, expected_histogram, atol=0.012, rtol=0)


def params(transform, count=2000):
    """Return what a transform draws, many times."""
    drawn = []
    for number in range(count):
        apply(transform, np.zeros((4, 4, 3), dtype=np.uint8), draw=(1, number))
        drawn.append(transform.params)
    return drawn


def test_each_thing_is_done_as_often_as_it_should():
    drawn = params(FlipAndJitter())
    shares = [np.mean([bool(each[name]) for each in drawn]) for name in ("flip", "steps", "grey")]
    assert shares == pytest.approx([0.5, 0.8, 0.2], abs=4 * 0.5 / 2000**0.5)


def test_jitters_come_in_every_order_with_numbers_within_their_bounds():
    steps = [each["steps"] for each in params(FlipAndJitter(jitter=1.0))]
    orders = [tuple(operation.__name__ for operation, _ in each) for each in steps]
    assert len(set(orders)) == 24
    numbers = {name: [n for each in steps for operation, n in each if operation.__name__ == name] for name in orders[0]}
    bounds = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in bounds.items():
        drawn = np.array(numbers[f"adjust_{name}"])
        assert low <= drawn.min() < low + (high - low) / 50
        assert high - (high - low) / 50 < drawn.max() <= high
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=(high - low) / 30)


def test_a_crop_has_the_areas_and_ratios_of_torchvisions():
    crop = RandomResizedCrop(size=(8, 8))
    areas = []
    for number in range(2000):
        apply(crop, np.zeros((100, 150, 3), dtype=np.uint8), draw=(2, number))
        left, top, right, bottom = crop.params["crop_coords"]
        areas.append((right - left) * (bottom - top) / 15000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [v2.RandomResizedCrop(8).make_params([torch.zeros(3, 100, 150)]) for _ in range(2000)]
    expected = [each["height"] * each["width"] / 15000 for each in theirs]
    quantiles = [0.05, 0.25, 0.5, 0.75, 0.95]
    np.testing.assert_allclose(np.quantile(areas, quantiles), np.quantile(expected, quantiles), atol=0.04)


@pytest.mark.parametrize("size", [(48, 64), (64, 1), (1, 1), (300, 20)])
@pytest.mark.parametrize("number", [1, 2])
def test_any_image_becomes_a_view_and_stays_as_it_is(size, number):
    image = picture(*size)
    image.flags.writeable = False
    transform = build(recipe()[f"augmentation{number}"])
    view = apply(transform, image, draw=(0, 1))
    assert view.shape == (32, 32, 3)
    assert np.array_equal(view, apply(transform, image, draw=(0, 1)))
    assert not np.array_equal(view, apply(transform, image, draw=(0, 2)))
    np.testing.assert_array_equal(image, picture(*size))


def test_they_stand_beside_albumentations_own():
    transform = A.Compose(
        [
            A.RandomResizedCrop(size=(16, 16)),
            FlipAndJitter(),
            A.OneOf([GaussianBlur(p=1.0), A.MedianBlur(p=1.0)]),
            A.Normalize(),
        ]
    )
    assert to_tensor(apply(transform, picture(), draw=(0,))).shape == (3, 16, 16)


def test_a_pickled_transform_draws_the_same():
    transform = build(recipe().augmentation1)
    again = pickle.loads(pickle.dumps(transform))
    assert np.array_equal(apply(again, picture(), draw=(3,)), apply(transform, picture(), draw=(3,)))


def test_a_transform_can_be_written_down_and_made_again():
    transform = A.Compose([FlipAndJitter(flip=0.25, hue=0.05), GaussianBlur(sigma=(0.5, 1.0), p=0.3)])
    again = A.from_dict(A.to_dict(transform))
    assert (again.transforms[0].flip, again.transforms[0].hue, tuple(again.transforms[1].sigma)) == (
        0.25,
        0.05,
        (0.5, 1.0),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FlipAndJitter(flip=1.5), r"^flip must be a probability, got 1\.5$"),
        (lambda: GaussianBlur(sigma=(2, 1)), r"^sigma must be two numbers above 0, the lower first, got \[2, 1\]$"),
        (lambda: GaussianBlur(most_taps=4), r"^most_taps must be odd and positive, got 4$"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_blur_is_as_wide_as_drawn():
    blur = GaussianBlur(sigma=(0.1, 2.0), p=1.0)
    blurred = apply(blur, picture(), draw=(5,))
    np.testing.assert_array_equal(blurred, operations.gaussian_blur(picture(), blur.params["width"]))
    assert {0.1 <= each["width"] <= 2.0 for each in params(blur, 50)} == {True}

import pytest
import torch
from test_operations import picture
from test_view_transforms import MEAN, STD, recipe, statistics, unit
from torchvision.transforms.v2 import functional

from mlflow_ssl.config import build
from mlflow_ssl.transforms import apply
from mlflow_ssl.views import DeviceViews, device


def images(count=6, height=32, width=40):
    return torch.stack([torch.from_numpy(picture(height, width, seed)).permute(2, 0, 1) for seed in range(count)])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def views(**options):
    quiet = {"flip": 0.0, "jitter": 0.0, "grey": 0.0, "blur": 0.0, "solarize": 0.0}
    return DeviceViews(mean=(0.0,) * 3, std=(1.0,) * 3, **quiet | options)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("brightness", [0.0, 0.6, 1.0, 1.4, 1.2, 0.9]),
        ("contrast", [0.0, 0.6, 1.0, 1.4, 1.2, 0.9]),
        ("saturation", [0.0, 0.8, 1.0, 1.2, 1.1, 0.9]),
        ("hue", [-0.5, -0.1, 0.0, 0.1, 0.05, 0.5]),
    ],
)
def test_each_image_is_adjusted_by_its_own_number_as_torchvision_does(name, numbers):
    batch = images().float() / 255
    ours = getattr(device, f"adjust_{name}")(batch, torch.tensor(numbers))
    for image, number, result in zip(batch, numbers, ours, strict=True):
        torch.testing.assert_close(result, getattr(functional, f"adjust_{name}")(image, number), atol=1e-5, rtol=1e-4)


def test_grey_images_have_no_hue_to_turn():
    grey = torch.linspace(0, 1, 12).view(1, 1, 3, 4).expand(1, 3, 3, 4)
    torch.testing.assert_close(device.adjust_hue(grey, torch.tensor([0.3])), grey)


def test_each_image_is_blurred_by_its_own_width_as_torchvision_does():
    batch, sigmas = images().float() / 255, [0.1, 0.5, 1.0, 1.5, 2.0, 0.8]
    ours = device.gaussian_blur(batch, torch.tensor(sigmas), taps=23)
    for image, sigma, result in zip(batch, sigmas, ours, strict=True):
        torch.testing.assert_close(result, functional.gaussian_blur(image, [23, 23], [sigma] * 2), atol=1e-5, rtol=1e-4)


def test_solarize_and_grey_are_torchvisions():
    batch = images().float() / 255
    torch.testing.assert_close(device.solarize(batch, 0.5), functional.solarize(batch, 0.5))
    torch.testing.assert_close(device.grey(batch), functional.rgb_to_grayscale(batch, 1))


@pytest.mark.parametrize("name", ["flip", "jitter", "grey", "blur", "solarize"])
def test_each_thing_is_done_to_its_share_of_the_images_and_to_no_other(name):
    batch = images(1, 16, 16).expand(800, -1, -1, -1)
    plain = batch[0].float() / 255
    done = views(**{name: 0.3})(batch, generator())
    changed = torch.tensor([not torch.allclose(image, plain, atol=1e-6) for image in done])
    assert changed.float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / 800) ** 0.5)


def test_images_of_one_batch_are_jittered_by_different_numbers():
    done = views(jitter=1.0)(images(1).expand(50, -1, -1, -1), generator())
    means = done.mean((2, 3))
    assert len({tuple(mean.tolist()) for mean in means}) == 50


def test_a_view_depends_on_the_generator_alone():
    full = DeviceViews(mean=MEAN, std=STD, solarize=0.2)
    first = full(images(), generator(3))
    assert first.equal(full(images(), generator(3)))
    assert not first.equal(full(images(), generator(4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert first.equal(full(images(), generator(3)))
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, full(images().float() / 255, generator(3)))


def test_views_are_normalized():
    plain = DeviceViews(mean=MEAN, std=STD, flip=0, jitter=0, grey=0, blur=0)(images(), generator())
    torch.testing.assert_close(unit(plain[0]), images()[0] / 255)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_views_are_distributed_as_those_of_the_workers(number):
    pictures = [picture(48, 64, seed=seed) for seed in range(5)]
    on_host = build(recipe()[f"augmentation{number}"])
    ours = torch.stack([unit(apply(on_host, pictures[n % 5], draw=(0, n, number))) for n in range(1500)])
    group = recipe("byol_device")
    crop, finish = build(group[f"augmentation{number}"]), build(group.device_transforms)[number - 1]
    cropped = [apply(crop, pictures[n % 5], draw=(1, n, number)) for n in range(1500)]
    batch = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in cropped])
    on_device = unit(finish(batch, generator()))
    (moments, histogram), (expected, expected_histogram) = (statistics(each.clamp(0, 1)) for each in (on_device, ours))
    torch.testing.assert_close(moments, expected, atol=0.02, rtol=0.05)
    torch.testing.assert_close(histogram, expected_histogram, atol=0.012, rtol=0)


def test_a_share_is_refused_that_is_none():
    with pytest.raises(ValueError, match=r"^blur must be a probability, got 2$"):
        views(blur=2)

import itertools
import warnings
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from pytorch_lightning import Callback
from test_operations import picture
from test_view_transforms import MEAN, STD, recipe, statistics
from tiny import quiet_trainer, tiny_method
from torchvision.transforms.v2 import functional

from mlflow_ssl.callbacks import LastCheckpoint
from mlflow_ssl.config import build
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset
from mlflow_ssl.transforms import apply, to_tensor
from mlflow_ssl.views import DeviceViews, RandomResizedCrop, device

BLENDS = ["brightness", "contrast", "saturation"]


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
    batch, numbers_of_all = images().float() / 255, torch.tensor(numbers)
    if name == "hue":
        ours = device.adjust_hue(batch, numbers_of_all)
    else:
        ours = device.adjust(batch, torch.full((6,), BLENDS.index(name)), numbers_of_all)
    for image, number, result in zip(batch, numbers, ours, strict=True):
        torch.testing.assert_close(result, getattr(functional, f"adjust_{name}")(image, number), atol=1e-5, rtol=1e-4)


def by_torchvision(image, drawn, row):
    """Return a view of one image, not normalized, by torchvision's operations in the order that was drawn."""
    image = image.float() / 255
    if drawn.flip[row]:
        image = functional.horizontal_flip(image)
    if drawn.jitter[row]:
        for operation in drawn.order[row].tolist():
            name, number = [*BLENDS, "hue"][operation], drawn.numbers[row, operation].item()
            image = getattr(functional, f"adjust_{name}")(image, number)
    if drawn.grey[row]:
        image = functional.rgb_to_grayscale(image, 3)
    if drawn.blur[row]:
        image = functional.gaussian_blur(image, [13, 13], [drawn.sigma[row].item()] * 2)
    return functional.solarize(image, 0.5) if drawn.solarize[row] else image


def test_a_whole_view_is_torchvisions_operations_in_the_order_of_its_image():
    batch = images(120, 20, 24)
    full = DeviceViews(mean=(0.0,) * 3, std=(1.0,) * 3, blur=0.5, solarize=0.3)
    drawn = full.draw(120, generator())
    done = full.finish(batch, drawn)
    expected = torch.stack([by_torchvision(image, drawn, row) for row, image in enumerate(batch)])
    # a value at the very threshold may be inverted or not
    agrees = torch.isclose(done, expected, atol=1e-4) | torch.isclose(1 - done, expected, atol=1e-4)
    assert agrees.all()
    assert torch.isclose(done, expected, atol=1e-4).float().mean() > 0.9999


def test_an_image_is_finished_as_if_it_were_alone():
    full = DeviceViews(mean=MEAN, std=STD, blur=0.5, solarize=0.3)
    drawn = full.draw(40, generator())
    batch = images(40)
    together = full.finish(batch, drawn)
    for row in range(40):
        alone = full.finish(batch[row : row + 1], drawn[torch.tensor([row])])
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


def test_the_first_images_are_drawn_alike_in_a_larger_batch():
    full = DeviceViews(mean=MEAN, std=STD, blur=0.5, solarize=0.3)
    few, many = full.draw(3, generator()), full.draw(50, generator())[torch.arange(3)]
    assert all(getattr(few, name).equal(drawn) for name, drawn in vars(many).items())


def test_processes_draw_together_what_one_draws_for_the_whole_batch():
    full = DeviceViews(mean=MEAN, std=STD, blur=0.5, solarize=0.3)
    whole = full.draw(12, generator())
    for rank in range(3):
        share = full.draw(4, generator(), share=(rank, 3))
        assert all(getattr(share, name)[:].equal(drawn[rank::3]) for name, drawn in vars(whole).items())


def test_every_order_of_jittering_comes_as_often():
    orders = Counter(map(tuple, views().draw(24_000, generator()).order.tolist()))
    assert orders.keys() == set(itertools.permutations(range(4)))
    assert all(count == pytest.approx(1000, abs=5 * 1000**0.5) for count in orders.values())


def test_numbers_are_drawn_evenly_between_their_bounds():
    drawn = views().draw(20_000, generator())
    bounds = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    for numbers, (low, high) in zip([*drawn.numbers.T, drawn.sigma], [*bounds, (0.1, 2.0)], strict=True):
        shares = torch.histc((numbers - low) / (high - low), bins=10, min=0, max=1) / 20_000
        torch.testing.assert_close(shares, torch.full((10,), 0.1), atol=0.01, rtol=0)


def test_nothing_is_read_back_from_the_device(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no such device
    absent = images().to("meta")  # has shapes and no values: what asks for one fails
    assert DeviceViews(mean=MEAN, std=STD, blur=0.5, solarize=0.3)(absent, generator()).shape == absent.shape


def test_images_smaller_than_the_kernel_are_blurred():
    small = views(blur=1.0, sigma=(2.0, 2.0))(images(2, 4, 5), generator())
    expected = device.gaussian_blur(images(2, 4, 5).float() / 255, torch.full((2,), 2.0), taps=7)
    torch.testing.assert_close(small, expected)


def test_any_memory_format_is_taken_and_left_as_it_was():
    full, batch = DeviceViews(mean=MEAN, std=STD), images().float() / 255
    before = batch.clone()
    expected = full(batch, generator())
    assert batch.equal(before)
    assert full(batch.to(memory_format=torch.channels_last), generator()).equal(expected)


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
    torch.testing.assert_close(device.to_grey(batch), functional.rgb_to_grayscale(batch, 1))


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


def unit(view):
    """Return a normalized view in [0, 1]."""
    return view * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_views_are_normalized():
    plain = DeviceViews(mean=MEAN, std=STD, flip=0, jitter=0, grey=0, blur=0)(images(), generator())
    torch.testing.assert_close(unit(plain[0]), images()[0] / 255)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_views_are_distributed_as_those_of_the_workers(number):
    pictures = [picture(48, 64, seed=seed) for seed in range(5)]
    on_host = build(recipe()[f"augmentation{number}"])
    ours = torch.stack([to_tensor(apply(on_host, pictures[n % 5], draw=(0, n, number))) for n in range(1500)])
    group = recipe("byol_device")
    crop, finish = build(group[f"augmentation{number}"]), build(group.device_transforms)[number - 1]
    cropped = [apply(crop, pictures[n % 5], draw=(1, n, number)) for n in range(1500)]
    batch = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in cropped])
    on_device = unit(finish(batch, generator()))
    (moments, histogram), (expected, expected_histogram) = (statistics(each.clamp(0, 1)) for each in (on_device, ours))
    torch.testing.assert_close(moments, expected, atol=0.02, rtol=0.05)
    torch.testing.assert_close(histogram, expected_histogram, atol=0.012, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blur": 2}, r"^blur must be a probability, got 2$"),
        ({"sigma": (2.0, 0.1)}, r"^sigma must be two numbers above 0, the lower first, got \[2.0, 0.1\]$"),
        ({"most_taps": 4}, r"^most_taps must be odd and positive, got 4$"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        views(**options)


class StoppedError(Exception):
    pass


class Seen(Callback):
    """Keep the views of each training batch, by epoch and number; write a checkpoint before one of them."""

    def __init__(self, checkpoint=None, stop=None):
        self.views = {}
        self.checkpoint, self.stop = checkpoint, stop

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.stop:
            self.checkpoint.save(trainer)
            raise StoppedError
        self.views[trainer.current_epoch, batch_idx] = torch.stack(batch[0]).clone()


FINISH = [DeviceViews(mean=MEAN, std=STD, blur=blur) for blur in (1.0, 0.1)]


def train_and_look(
    folder, *, finish=FINISH, num_workers=0, precision="32-true", checkpoint=None, stop=None, ckpt_path=None
):
    crop = RandomResizedCrop(size=(8, 8))
    datamodule = SSLDataModule(
        str(folder),
        TwoAugmentationDataset([crop, crop]),
        device_transforms=finish,
        num_workers=num_workers,
        batch_size=4,
        val_size=0.0,
        test_size=0.0,
    )
    seen = Seen(checkpoint, stop)
    callbacks = [seen] if checkpoint is None else [checkpoint, seen]
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, precision=precision, callbacks=callbacks)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        trainer.fit(tiny_method(), datamodule, ckpt_path=ckpt_path)
    return seen.views


def first_number(images, generator, share):
    return torch.rand((), generator=generator).expand(images.shape)


def test_every_epoch_batch_and_view_has_numbers_of_its_own(image_folder):
    seen = train_and_look(image_folder({"a": 10, "b": 10}), finish=[first_number] * 2)
    numbers = torch.stack(list(seen.values()))[:, :, 0, 0, 0, 0]  # (batches, views)
    assert numbers.shape == (2 * 5, 2)
    assert len(numbers.unique()) == 20


def test_a_resumed_training_sees_the_views_of_an_uninterrupted_one(image_folder, tmp_path):
    folder = image_folder({"a": 10, "b": 10})
    whole = train_and_look(folder)
    assert len(whole) == 2 * 5
    with pytest.raises(StoppedError):
        train_and_look(folder, checkpoint=LastCheckpoint(str(tmp_path)), stop=(1, 2))
    resumed = train_and_look(folder, checkpoint=LastCheckpoint(str(tmp_path)), ckpt_path=tmp_path / "last.ckpt")
    assert sorted(resumed) == [(1, 2), (1, 3), (1, 4)]
    assert all(views.equal(whole[moment]) for moment, views in resumed.items())


def test_views_do_not_depend_on_the_number_of_workers(image_folder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    folder = image_folder({"a": 10, "b": 10})
    alone, by_two = train_and_look(folder), train_and_look(folder, num_workers=2)
    assert alone.keys() == by_two.keys()
    assert all(views.equal(by_two[moment]) for moment, views in alone.items())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_views_come_in_the_precision_of_the_weights(image_folder, precision, dtype):
    whole = train_and_look(image_folder({"a": 4, "b": 4}), precision=precision)
    assert {views.dtype for views in whole.values()} == {dtype}

"""What ``transforms=byol_device`` leaves to the loader's workers, and what it costs on the device.

``python benchmarks/device_views.py [ROUNDS]`` prints, in one run and in turns,

- images per CPU-second of a worker: decode a 256 px JPEG and make both views, as ``transforms=byol`` does wholly and
  ``transforms=byol_device`` up to the crops; and the bytes that it hands on;
- images per second of the device's part, both views of a batch: this package's `DeviceViews`; kornia, which draws for
  each image but one order of jittering for the batch, where it is installed; torchvision, which draws once a call and
  so is called for each image.

On a processor one thread runs and CPU time is counted; where there is a GPU, wall time on it is shown too. A launch is
an operation that reads or writes whole planes of an image; on a GPU, any kernel or copy that its profiler sees. All
candidates blur with as many taps. Medians of the rounds, from least to most.
"""

import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from views import write_images

SIZES = {224: 64, 64: 256}
"""Pixels, and images of a batch."""
SECONDS = 2.0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = ({"blur": 1.0, "solarize": 0.0}, {"blur": 0.1, "solarize": 0.2})
TAPS = 13
"""Three standard deviations of 2 px to each side, as `DeviceViews` has them."""

Finish = Callable[[Tensor], Tensor]


def worker(name: str, size: int) -> Callable[[bytes], int]:
    """Return what a loader's worker does to a file under ``transforms=name``; it returns the bytes handed on."""
    from mlflow_ssl.config import build, compose_config
    from mlflow_ssl.datasets import TwoAugmentationDataset
    from mlflow_ssl.datasets.decode import decode

    sizes = [f"transforms.input_{side}={size}" for side in ("height", "width")]
    config = compose_config(["experiment=base/ssl/byol", "data_path=x", *sizes, f"transforms={name}"]).transforms
    views = TwoAugmentationDataset([build(config.augmentation1), build(config.augmentation2)])
    views.as_bytes = True
    count = 0

    def work(file: bytes) -> int:
        nonlocal count
        count += 1
        sample = views.views((decode(file), 0), (0, count))
        assert sample is not None
        return sum(view.numel() * view.element_size() for view in sample[0])

    return work


def ours(device: torch.device) -> list[Finish]:
    """Return the views of this package."""
    from mlflow_ssl.views import DeviceViews

    generator = torch.Generator().manual_seed(0)
    views = [DeviceViews(mean=MEAN, std=STD, sigma=(0.1, 2.0), most_taps=TAPS, **chances) for chances in VIEWS]
    return [partial(view, generator=generator) for view in views]


def kornias(device: torch.device) -> list[Finish]:
    """Return the views in kornia's words."""
    from kornia import augmentation

    def view(blur: float, solarize: float) -> Finish:
        steps = torch.nn.Sequential(
            augmentation.RandomHorizontalFlip(p=0.5),
            augmentation.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
            augmentation.RandomGrayscale(p=0.2),
            augmentation.RandomGaussianBlur((TAPS, TAPS), (0.1, 2.0), p=blur),
            augmentation.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=solarize),
            augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        ).to(device)
        return lambda images: steps(images.float() / 255)

    return [view(**chances) for chances in VIEWS]


def torchvisions(device: torch.device) -> list[Finish]:
    """Return the views in torchvision's words, image by image."""
    from torchvision.transforms import v2

    def view(blur: float, solarize: float) -> Finish:
        steps = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(TAPS, (0.1, 2.0))], blur),
                v2.RandomSolarize(0.5, solarize),
                v2.Normalize(list(MEAN), list(STD)),
            ]
        )
        return lambda images: torch.stack([steps(image) for image in images.float() / 255])

    return [view(**chances) for chances in VIEWS]


def candidates(device: torch.device) -> dict[str, list[Finish]]:
    """Return what can be imported here, by name."""
    import torchvision

    found = {"mlflow_ssl DeviceViews": ours(device)}
    try:
        import kornia

        found[f"kornia {kornia.__version__}"] = kornias(device)
    except ImportError:
        print("kornia is not installed")
    return found | {f"torchvision {torchvision.__version__}, image by image": torchvisions(device)}


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count operations that read or write at least so many values."""

    def __init__(self, values: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = values
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and go on."""
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        moves_nothing = func.is_view or func.overloadpacket.__name__.startswith(("empty", "_unsafe_view", "detach"))
        self.count += not moves_nothing and any(each.numel() >= self.values for each in tensors)
        return result


def launches(finish: list[Finish], images: Tensor) -> int:
    """Return how many launches both views of a batch take."""
    if images.device.type == "cuda":
        from torch.autograd import DeviceType  # type: ignore[attr-defined]
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            both(finish, images)
            torch.cuda.synchronize()
        return sum(event.device_type == DeviceType.CUDA for event in profiled.events())
    with Launches(images[0, 0].numel()) as counted:
        both(finish, images)
    return int(counted.count)


def both(finish: list[Finish], images: Tensor) -> None:
    """Make both views of a batch."""
    for view in finish:
        view(images)


def rate(step: Callable[[], None], images: int, device: torch.device) -> float:
    """Return images per second: of CPU time on a processor, of wall time on a GPU."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    began, count = clock(), 0
    while clock() - began < SECONDS:
        step()
        if on_gpu:
            torch.cuda.synchronize()
        count += images
    return count / (clock() - began)


def measure(steps: dict[str, Callable[[], None]], images: int, rounds: int, device: torch.device) -> dict[str, str]:
    """Return the rates of the candidates, measured in turns, as a cell of a table each."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()  # warms up
    for _ in range(rounds):
        for name, step in steps.items():
            rates[name].append(rate(step, images, device))
    return {
        name: f"{statistics.median(values):.0f} | {min(values):.0f} to {max(values):.0f}"
        for name, values in rates.items()
    }


def compare_workers(size: int, rounds: int, files: list[bytes]) -> None:
    """Print the table of the workers' part."""
    work = {f"transforms={name}": worker(name, size) for name in ("byol", "byol_device")}
    sizes = {name: one(files[0]) for name, one in work.items()}

    def step(one: Callable[[bytes], int]) -> None:
        for file in files:
            one(file)

    cells = measure({name: partial(step, one) for name, one in work.items()}, len(files), rounds, torch.device("cpu"))
    print(f"\n| worker, {size} px | images per CPU-second | least to most | kB handed on |\n| --- | --- | --- | --- |")
    for name, cell in cells.items():
        print(f"| {name} | {cell} | {sizes[name] / 1000:.0f} |", flush=True)


def compare_devices(size: int, batch: int, rounds: int, device: torch.device) -> None:
    """Print the table of the device's part."""
    images = torch.randint(
        0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = images.to(device)
    found = candidates(device)
    cells = measure({name: partial(both, finish, images) for name, finish in found.items()}, batch, rounds, device)
    second = "second" if device.type == "cuda" else "CPU-second"
    print(
        f"\n| both views on {device.type}, {size} px, {batch} images | images per {second} | least to most | launches |"
    )
    print("| --- | --- | --- | --- |")
    for name, cell in cells.items():
        print(f"| {name} | {cell} | {launches(found[name], images)} |", flush=True)


def main() -> None:
    """Print all tables."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, {rounds} rounds")
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    with tempfile.TemporaryDirectory() as folder:
        files = [path.read_bytes() for path in write_images(Path(folder))]
        for size, batch in SIZES.items():
            compare_workers(size, rounds, files)
            for device in devices:
                compare_devices(size, batch, rounds, device)


if __name__ == "__main__":
    main()

"""Images a second whose views are finished in batches on a device, beside what the loader's workers are left with.

``python benchmarks/device_views.py [BATCH]`` prints, for both views at 224 px: how many images a second of processor
time a worker decodes and crops (``transforms=byol_device``) and how many it draws whole (``transforms=byol``); and how
many the device finishes, by this package's batched operations and by torchvision's, called for one image after the
other, since they draw one set of numbers a batch. On a GPU it counts the kernels of a batch too.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2
from views import SECONDS, our_recipe, rate, write_images

from mlflow_ssl.config import build, compose_config
from mlflow_ssl.transforms import to_tensor

SIZE = 224


def per_second(function: Callable[[], Any], images: int, device: str) -> float:
    """Return images a second."""
    function()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        count += images
    return count / (time.perf_counter() - began)


def torchvisions(blur: float, solarize: float) -> Any:
    """Return torchvision's recipe for one image."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def count_kernels(function: Callable[[], Any]) -> int:
    """Return the kernels that a call launches on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profiled.key_averages() if event.device_type.name == "CUDA")


def main() -> None:
    """Print the table."""
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    torch.set_num_threads(1)
    transforms = compose_config(["experiment=base/ssl/byol", "data_path=x", "transforms=byol_device"]).transforms
    crops, finish = (
        [build(transforms.augmentation1), build(transforms.augmentation2)],
        build(transforms.device_transforms),
    )
    with tempfile.TemporaryDirectory() as folder:
        files = [path.read_bytes() for path in write_images(Path(folder))]
    print("| both views at 224 px | images a second |")
    print("| --- | --- |")
    print(f"| a worker, transforms=byol | {rate(our_recipe(SIZE), files, to_tensor):.0f} |")
    print(f"| a worker, transforms=byol_device | {rate(crops, files, lambda view: view):.0f} |")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        images = torch.randint(0, 256, (batch, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
        generator = torch.Generator().manual_seed(0)
        single = [torchvisions(1.0, 0.0), torchvisions(0.1, 0.2)]

        def ours(images: Any = images, generator: Any = generator) -> list[Any]:
            return [view(images, generator) for view in finish]

        def theirs(images: Any = images, single: Any = single) -> list[Any]:
            return [torch.stack([view(image) for image in images]) for view in single]

        print(f"| {device}, batches of {batch}, DeviceViews | {per_second(ours, batch, device):.0f} |")
        print(f"| {device}, torchvision image by image | {per_second(theirs, batch, device):.0f} |")
        if device == "cuda":
            print(f"| kernels of a batch, DeviceViews | {count_kernels(ours)} |")


if __name__ == "__main__":
    main()

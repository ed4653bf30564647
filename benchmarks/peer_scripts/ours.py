"""The parts of this package that `lightly_byol` has beside it; a whole training is ``python -m mlflow_ssl``.

python ours.py step SIZE BATCH STEPS PRECISION
python ours.py views FOLDER SIZE SECONDS
python ours.py knn QUERIES ENTRIES DIMENSIONS NEIGHBOURS CLASSES
"""

import sys
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

from mlflow_ssl.config import build, compose_config, resolve


def config(size: str, *words: str) -> DictConfig:
    """Return the config of the training that is measured."""
    sizes = [f"transforms.input_{side}={size}" for side in ("height", "width")]
    return resolve(compose_config(["experiment=base/ssl/byol", "data_path=none", *sizes, *words]))


def step(size: str, batch: str, steps: str, precision: str) -> None:
    """Train on one batch, that is there, again and again."""
    import pytorch_lightning as pl
    from stopwatch import Stopwatch

    from mlflow_ssl.machine import settle

    words = [
        "trainer=auto",
        "trainer.accelerator=cpu",
        f"trainer.precision={precision}",
        f"datamodule.batch_size={batch}",
    ]
    settled = config(size, "backbone.small_stem=false", *words)
    settle(settled)
    views = torch.randn(2, int(batch), 3, int(size), int(size)).unbind()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=settled.trainer.precision,
        callbacks=[Stopwatch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ready = [(views, torch.zeros(int(batch), dtype=torch.long))] * int(steps)
    trainer.fit(build(settled.model), torch.utils.data.DataLoader(ready, batch_size=None))


def views(folder: str, size: str, seconds: str) -> None:
    """Print images per second of a processor: decoded, and two views drawn."""
    import cv2

    from mlflow_ssl.datasets.decode import decode
    from mlflow_ssl.transforms import apply

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    files = [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))]
    transforms = config(size).transforms
    both = [build(transforms.augmentation1), build(transforms.augmentation2)]
    normalize, _ = build(transforms.device_transforms)

    def draw(number: int) -> None:
        image = decode(files[number % len(files)])
        for view, transform in enumerate(both, start=1):
            drawn = torch.from_numpy(apply(transform, image, draw=(0, 0, number, view)))
            normalize(drawn.permute(2, 0, 1)[None])  # as the training device does with a batch

    draw(0)
    began, count = time.process_time(), 0
    while time.process_time() - began < float(seconds):
        draw(count)
        count += 1
    print(count / (time.process_time() - began))


def knn(queries: str, entries: str, dimensions: str, neighbours: str, classes: str) -> None:
    """Print seconds for the nearest neighbours' votes on all queries."""
    from mlflow_ssl.evaluation.knn import knn_predict

    generator = torch.Generator().manual_seed(0)
    asked, bank = (
        torch.nn.functional.normalize(torch.randn(int(count), int(dimensions), generator=generator), dim=1)
        for count in (queries, entries)
    )
    labels = torch.randint(int(classes), (int(entries),), generator=generator)
    began = time.perf_counter()
    knn_predict(asked, bank, labels, num_neighbours=int(neighbours), temperature=0.1)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    {"step": step, "views": views, "knn": knn}[sys.argv[1]](*sys.argv[2:])

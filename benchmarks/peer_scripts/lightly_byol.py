"""BYOL as lightly's PyTorch Lightning example has it, made of lightly's parts; runs in lightly's environment.

    python lightly_byol.py train FOLDER SIZE BATCH EPOCHS WORKERS PRECISION
    python lightly_byol.py step SIZE BATCH STEPS PRECISION
    python lightly_byol.py views FOLDER SIZE SECONDS
    python lightly_byol.py knn QUERIES ENTRIES DIMENSIONS NEIGHBOURS CLASSES

Network, heads, optimizer and views are the paper's, as on the other side. ``step`` and ``train`` write times as
`stopwatch.Stopwatch` does; ``views`` and ``knn`` print a number.
"""

import copy
import io
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, get_weight_decay_parameters, update_momentum
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from lightly.utils.benchmarking import knn_predict
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from PIL import Image
from stopwatch import Stopwatch
from torch import Tensor, nn


class BYOL(pl.LightningModule):
    """Online and target network of lightly's heads on a ResNet-18."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
        self.projection_head = BYOLProjectionHead(512, 4096, 256)
        self.prediction_head = BYOLPredictionHead(256, 4096, 256)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def predict(self, images: Tensor) -> Tensor:
        """Return what the online network predicts."""
        return self.prediction_head(self.projection_head(self.backbone(images).flatten(start_dim=1)))

    def project(self, images: Tensor) -> Tensor:
        """Return the target's projection."""
        return self.projection_head_momentum(self.backbone_momentum(images).flatten(start_dim=1)).detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Move the target, and return the loss of both directions."""
        momentum = cosine_schedule(self.global_step, int(self.trainer.estimated_stepping_batches), 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        view_1, view_2 = batch[0]
        prediction_1, projection_1 = self.predict(view_1), self.project(view_1)
        prediction_2, projection_2 = self.predict(view_2), self.project(view_2)
        loss = self.criterion(prediction_1, projection_2) + self.criterion(prediction_2, projection_1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return LARS, which neither decays nor adapts biases and norms, and a warm-up with a cosine."""
        decayed, kept = get_weight_decay_parameters([self.backbone, self.projection_head, self.prediction_head])
        groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        optimizer = LARS(groups, lr=0.1, momentum=0.9, weight_decay=1.5e-6)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = CosineWarmupScheduler(optimizer, warmup_epochs=steps // 10, max_epochs=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def transform(size: int) -> BYOLTransform:
    """Return lightly's two views."""
    return BYOLTransform(BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size))


def train(folder: str, size: str, batch: str, epochs: str, workers: str, precision: str) -> None:
    """Train on a folder of class folders."""
    loader = torch.utils.data.DataLoader(
        LightlyDataset(folder, transform=transform(int(size))),
        batch_size=int(batch),
        shuffle=True,
        drop_last=True,
        num_workers=int(workers),
        persistent_workers=True,
    )
    trainer = pl.Trainer(max_epochs=int(epochs), accelerator="cpu", precision=precision, callbacks=[Stopwatch()])
    trainer.fit(BYOL(), loader)


def step(size: str, batch: str, steps: str, precision: str) -> None:
    """Train on one batch, that is there, again and again."""
    views = torch.randn(2, int(batch), 3, int(size), int(size)).unbind()
    ready = [(views, torch.zeros(int(batch), dtype=torch.long), None)] * int(steps)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=precision,
        callbacks=[Stopwatch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(BYOL(), torch.utils.data.DataLoader(ready, batch_size=None))


def views(folder: str, size: str, seconds: str) -> None:
    """Print images per second of a processor: decoded, and two views drawn."""
    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(Path(folder).rglob("*.jpg"))]
    draw = transform(int(size))
    draw(Image.open(io.BytesIO(files[0])).convert("RGB"))
    began, count = time.process_time(), 0
    while time.process_time() - began < float(seconds):
        with Image.open(io.BytesIO(files[count % len(files)])) as image:
            draw(image.convert("RGB"))
        count += 1
    print(count / (time.process_time() - began))


def knn(queries: str, entries: str, dimensions: str, neighbours: str, classes: str) -> None:
    """Print seconds for the nearest neighbours' votes on all queries, in batches of 256."""
    generator = torch.Generator().manual_seed(0)
    asked, bank = (
        nn.functional.normalize(torch.randn(int(count), int(dimensions), generator=generator), dim=1)
        for count in (queries, entries)
    )
    labels = torch.randint(int(classes), (int(entries),), generator=generator)
    began = time.perf_counter()
    for chunk in asked.split(256):
        knn_predict(chunk, bank.T, labels, num_classes=int(classes), knn_k=int(neighbours), knn_t=0.1)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    {"train": train, "step": step, "views": views, "knn": knn}[sys.argv[1]](*sys.argv[2:])

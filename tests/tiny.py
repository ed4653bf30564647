"""A method of a few hundred weights, and a trainer that writes nothing."""

import warnings
from functools import partial

import albumentations as A
import torch
from pytorch_lightning import Trainer
from torch import nn

from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset
from mlflow_ssl.heads import MLP, Encoder
from mlflow_ssl.methods import BYOL


class Backbone(nn.Module):
    """Convolution, BatchNorm, ReLU and mean: images ``(B, 3, H, W)`` to embeddings ``(B, 6)``."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, images):
        return self.norm(self.conv(images)).relu().mean((2, 3))


def tiny_method(seed=0, **kwargs):
    """Return a BYOL whose weights follow from ``seed``."""
    kwargs.setdefault("optimizer", partial(torch.optim.SGD, lr=0.1))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(Backbone(), partial(MLP, hidden_features=8, out_features=4))
        return BYOL(encoder, MLP(4, hidden_features=8, out_features=4), **kwargs)


def quiet_trainer(**settings):
    """Return a CPU trainer without logger, checkpoints or prints."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**quiet | settings)


def fit(method, batches, validation=None, *, ckpt_path=None, **settings):
    """Train ``method`` and return the trainer."""
    trainer = quiet_trainer(**settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        trainer.fit(method, batches, validation, ckpt_path=ckpt_path)
    return trainer


class Batches:
    """A loader of ready batches; Lightning takes a plain list for several loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def pairs(num_batches, batch_size=4, size=6, seed=0):
    """Return a loader of ``((view_1, view_2), labels)``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(batch_size, dtype=torch.long)
    views = (torch.randn(2, batch_size, 3, size, size, generator=generator) for _ in range(num_batches))
    return Batches([(pair.unbind(), labels) for pair in views])


def labelled(num_batches, num_classes=3, batch_size=4, size=6, seed=0):
    """Return a loader of ``(images, labels)``; a class is a brightness."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        labels = torch.randint(num_classes, (batch_size,), generator=generator)
        images = torch.randn(batch_size, 3, size, size, generator=generator)
        batches.append((images + 0.5 * labels[:, None, None, None], labels))
    return Batches(batches)


CROP = A.Compose([A.RandomResizedCrop(size=(8, 8)), A.Normalize()])
CLEAN = A.Compose([A.Resize(8, 8), A.Normalize()])


def tiny_datamodule(folder, transform=CROP, **options):
    """Return a datamodule of the images of a folder, 8 px large and in batches of 4."""
    options = {"batch_size": 4, "num_workers": 0, "val_transform": CLEAN, "test_transform": CLEAN} | options
    return SSLDataModule(str(folder), TwoAugmentationDataset([transform, transform]), **options)

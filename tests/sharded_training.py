"""Trainings whose weights two processes share, as a script: ``sharded_training.py OUT``.

OUT holds ``alone.ckpt``, which the last of them goes on from.

The heads are without BatchNorm, which would normalize by the images of each process.
"""

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import timm
import torch
from pytorch_lightning import Callback
from tiny import Batches, labelled, pairs, quiet_trainer
from torch import nn
from torch.distributed.tensor import DTensor

from mlflow_ssl.callbacks.divergence import DivergedError, check_weights
from mlflow_ssl.heads import Encoder
from mlflow_ssl.methods import BYOL
from mlflow_ssl.optimizers import LARS
from mlflow_ssl.sharding import ShardedStrategy, made_whole, whole_state, without_weights

OPTIMIZERS = {
    # attention does not depend on the bias of its keys: by default AdamW makes steps of the rounding in that gradient
    "adamw": partial(torch.optim.AdamW, lr=0.01, eps=1e-3),
    "lars": partial(LARS, lr=0.5, weight_decay=0.01, trust_coefficient=0.1),
    "sgd": partial(torch.optim.SGD, lr=20.0, momentum=0.9),
}
SETTINGS = {"adamw": {}, "lars": {}, "sgd": {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2}}
STEPS = 4
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


class Head(nn.Sequential):
    """Linear, GELU, Linear; its three outputs are an odd number for two processes."""

    def __init__(self, in_features):
        super().__init__(nn.Linear(in_features, 10), nn.GELU(), nn.Linear(10, 3, bias=False))


class Planned(BYOL):
    """A BYOL that is to take two epochs, whenever it stops."""

    total_steps = 2 * STEPS


def vit_method(optimizer="adamw"):
    """Return a BYOL of a transformer with two blocks."""
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **shape)
    return Planned(Encoder(vit, Head), Head(3), optimizer=OPTIMIZERS[optimizer], base_tau=0.5, channels_last=True)


class Losses(Callback):
    """Keep the loss of each batch, and how many numbers of gradients this process held at a step."""

    def __init__(self):
        self.values = []
        self.gradients = (0, 0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Keep one."""
        self.values.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """Count."""
        self.gradients = numbers_held(p.grad for p in pl_module.parameters() if p.grad is not None)


def batches(rank=0, processes=1):
    """Return a process's share of the images."""
    whole = pairs(4, batch_size=8, size=16).batches
    return Batches([((a[rank::processes], b[rank::processes]), c[rank::processes]) for (a, b), c in whole])


def fit(method, file, *, optimizer="adamw", ckpt_path=None, rank=0, processes=1, **settings):
    """Train a method, write its checkpoint, and return the trainer and what was kept."""
    losses = Losses()
    settings = {"max_epochs": 1, "use_distributed_sampler": False} | SETTINGS[optimizer] | settings
    trainer = quiet_trainer(devices=processes, callbacks=[losses], **settings)
    trainer.validate(
        method, labelled(1, size=16), verbose=False
    )  # calls the backbone alone, before it is in the encoder
    trainer.fit(method, batches(rank, processes), labelled(1, size=16), ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(file)
    return trainer, losses


def numbers_held(tensors):
    """Return how many numbers this process holds of tensors, and how many they are."""
    tensors = list(tensors)
    return sum(local(each).numel() for each in tensors), sum(each.numel() for each in tensors)


def local(tensor):
    """Return what this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def complaint(trainer, method):
    """Return what every process says when the first one's part of a weight is not finite."""
    if trainer.global_rank == 0:
        with torch.no_grad():
            local(method.predictor[0].weight)[0, 0] = float("nan")
    try:
        check_weights(trainer, {"state_dict": whole_state(method)})
    except DivergedError as error:
        return str(error)
    return None


def main(out):
    """Train with each optimizer, and go on from a checkpoint of one process; write what each process has found."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, found = int(os.environ.get("LOCAL_RANK", "0")), {}
    for name in OPTIMIZERS:
        method = vit_method(name)
        blank = without_weights(method)
        trainer, losses = fit(
            method, out / f"{name}.ckpt", optimizer=name, rank=rank, processes=2, strategy=ShardedStrategy()
        )
        states = trainer.optimizers[0].state.values()
        found[name] = {
            "losses": losses.values,
            "weights": numbers_held(method.parameters()),
            "gradients": losses.gradients,
            "states": numbers_held(value for state in states for value in state.values() if value.ndim),
        }
        whole = made_whole(method, blank)
        if rank == 0:
            torch.save(whole.online.backbone.eval()(IMAGES), out / f"{name}.embeddings.pt")
    found["complaint"] = complaint(trainer, method)
    fit(
        vit_method("lars"),
        out / "resumed.ckpt",
        optimizer="lars",
        ckpt_path=out / "alone.ckpt",
        rank=rank,
        processes=2,
        strategy=ShardedStrategy(),
        max_epochs=2,
    )
    torch.save(found, out / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

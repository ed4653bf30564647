"""The same global batches in 1, 2 and 4 processes, as a script: ``several_processes.py IMAGES OUT``."""

import os
import socket
import sys
import warnings
from functools import partial
from pathlib import Path

import albumentations as A
import torch
from pytorch_lightning import Callback
from timm.layers import BatchNormAct2d
from tiny import quiet_trainer
from torch import distributed, multiprocessing, nn

from mlflow_ssl.batchnorm import has_plain_batchnorm, share_batchnorm, use_batchnorm_sync
from mlflow_ssl.callbacks import BackboneBaseline, ClassificationEvaluation, Health, KNNEvaluation, LinearProbe
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datamodules.labelled import LabelledDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset
from mlflow_ssl.export import DeploymentNetwork, traced
from mlflow_ssl.heads import MLP, Encoder
from mlflow_ssl.methods import BYOL, Classifier
from mlflow_ssl.optimizers import LARS
from mlflow_ssl.processes import join, joined
from mlflow_ssl.views import DeviceViews

BATCH = 8
"""Images of a step, of all processes together."""
LOGGED_EVERY = 2
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CROP = A.RandomResizedCrop(size=(8, 8))
CLEAN = A.Compose([A.Resize(8, 8), A.Normalize(MEAN, STD)])


class Backbone(nn.Module):
    """A network with a BatchNorm of torch and one of timm, which has the activation in it."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, bias=False)
        self.stem_norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, bias=False)
        self.norm_act = BatchNormAct2d(6)

    def forward(self, images):
        return self.norm_act(self.conv(self.stem_norm(self.stem(images)).relu())).mean((2, 3))


def method():
    """Return a BYOL whose weights are always the same."""
    torch.manual_seed(0)
    encoder = Encoder(Backbone(), partial(MLP, hidden_features=8, out_features=4))
    optimizer = partial(LARS, lr=0.2, trust_coefficient=0.1, weight_decay=1e-4)
    return BYOL(encoder, MLP(4, hidden_features=8, out_features=4), optimizer=optimizer, base_tau=0.9)


def datamodule(images, batch_size):
    """Return a datamodule whose views are begun by the loader and finished in batches."""
    return SSLDataModule(
        str(images),
        augmentation_dataset=TwoAugmentationDataset([CROP, CROP]),
        device_transforms=[DeviceViews(mean=MEAN, std=STD, blur=blur) for blur in (1.0, 0.1)],
        val_transform=CLEAN,
        test_transform=CLEAN,
        num_workers=0,
        batch_size=batch_size,
    )


def layers():
    """Return layers by name, and for each two batches of 8 with the weights that the loss is the sum by."""
    generator = torch.Generator().manual_seed(0)

    def batches(*shape, dtype=torch.float32, layout=torch.contiguous_format):
        drawn = torch.randn(2, 2, 8, *shape, generator=generator)
        drawn[:, 0] = 3 * drawn[:, 0] + 10  # a mean that a sum of squares would drown in
        return [(one.to(dtype, memory_format=layout), weights.float()) for one, weights in drawn]

    made = {
        "vectors": (nn.BatchNorm1d(5), batches(5)),
        "without weights": (nn.BatchNorm1d(5, affine=False), batches(5)),
        "images": (nn.BatchNorm2d(3), batches(3, 4, 5)),
        "channels last": (nn.BatchNorm2d(3), batches(3, 4, 5, layout=torch.channels_last)),
        "cumulative": (nn.BatchNorm2d(3, momentum=None), batches(3, 4, 5)),
        "without statistics": (nn.BatchNorm2d(3, track_running_stats=False), batches(3, 4, 5)),
        "with activation": (BatchNormAct2d(3, act_layer=nn.GELU), batches(3, 4, 5)),
        "double": (nn.BatchNorm2d(3).double(), batches(3, 4, 5, dtype=torch.float64)),
        "bfloat16": (nn.BatchNorm2d(3), batches(3, 4, 5, dtype=torch.bfloat16)),
    }
    for layer, _ in made.values():
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return made


class Record(Callback):
    """Keep the losses of this process and what is logged of them, and the views of the first step."""

    def __init__(self):
        self.own, self.logged, self.views, self.shared = [], [], None, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.own.append(outputs["loss"].detach().clone())
        self.logged.append(trainer.callback_metrics["train/loss"].clone())
        if self.views is None:
            self.views = [view.clone() for view in batch[0]]  # of a classifier, the images
            self.shared = not has_plain_batchnorm(pl_module)


class KNN(KNNEvaluation):
    """Keep what the last evaluation was made of."""

    last = None

    def on_validation_epoch_end(self, trainer, pl_module):
        super().on_validation_epoch_end(trainer, pl_module)
        self.last = self.evaluated and dict(vars(self.evaluated))


def trainer_of(processes, callbacks):
    """Return a trainer of two epochs that the processes share."""
    trainer = quiet_trainer(
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        max_epochs=2,
        check_val_every_n_epoch=2,
        log_every_n_steps=LOGGED_EVERY,
        use_distributed_sampler=False,
        sync_batchnorm=True,
        callbacks=callbacks,
    )
    use_batchnorm_sync(trainer)
    return trainer


def metrics(trainer):
    """Return what was logged last."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def finetune(images, out, processes):
    """Train a classifier, frozen for one epoch of two, and write what this process has found."""
    record, evaluation = Record(), ClassificationEvaluation()
    trainer = trainer_of(processes, [record, evaluation, BackboneBaseline(num_neighbours=5)])
    torch.manual_seed(0)
    network = Classifier(Backbone(), num_classes=3, freeze_epochs=1, optimizer=partial(torch.optim.SGD, lr=0.5))
    data = LabelledDataModule(
        str(images), train_transform=CLEAN, val_transform=CLEAN, num_workers=0, batch_size=BATCH // processes
    )
    trainer.validate(network, data, verbose=False)
    baseline = metrics(trainer)
    trainer.fit(network, data)
    found = {
        "baseline": baseline,
        "own": joined(torch.stack(record.own)[None], torch.device("cpu")),
        "weights": network.state_dict(),
        "metrics": metrics(trainer),
        "evaluated": dict(vars(evaluation.evaluated)),
    }
    torch.save(found, out / f"classifier_{processes}_{trainer.global_rank}.pt")


def train(images, out, processes):
    """Train two epochs, export the network, and write what this process has found."""
    record, knn, health, probe = Record(), KNN(num_neighbours=5, temperature=0.05), Health(), LinearProbe()
    trainer = trainer_of(processes, [record, knn, health, probe])
    network = method()
    trainer.fit(network, datamodule(images, BATCH // processes))
    device = torch.device("cpu")
    exported = traced(DeploymentNetwork(network.online.backbone, MEAN, STD), torch.rand(2, 3, 8, 8))
    found = {
        "own": joined(torch.stack(record.own)[None], device),
        "logged": torch.stack(record.logged),
        "views": torch.stack([joined(view, device) for view in record.views]),
        "shared": record.shared,
        "classes": [type(module).__name__ for module in network.modules()],
        "weights": network.state_dict(),
        "metrics": metrics(trainer),
        "probe": probe.state_dict()["classifier"],
        "reading": dict(vars(health.history[-1])),
        "evaluated": knn.last,
    }
    exported.save(str(out / f"{processes}_{trainer.global_rank}.ts"))
    torch.save(found, out / f"{processes}_{trainer.global_rank}.pt")


def normalize(out):
    """Send unequal shares of two batches through each layer, and write values, gradients and statistics."""
    rank, found = distributed.get_rank(), {}
    for name, (layer, batches) in layers().items():
        share_batchnorm(layer)
        seen = []
        for images, weights in batches:
            mine = slice(0, 5) if rank == 0 else slice(5, None)
            own = images[mine].clone().requires_grad_()
            values = layer(own)
            (values * weights[mine]).sum().backward()
            seen.append((values.detach().clone(), own.grad))
        found[name] = {
            "values": [values for values, _ in seen],
            "gradients": [gradient for _, gradient in seen],
            "parameters": [parameter.grad for parameter in layer.parameters()],
            "buffers": dict(layer.named_buffers()),
        }
    torch.save(found, out / f"layers_{rank}.pt")


def work(rank, processes, port, images, out):
    """Be one of some processes, as torchrun starts them."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "RANK": rank}
    place = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (meeting | place).items()})
    join(gpu=False, timeout_seconds=60)
    if processes == 2:
        normalize(out)
    train(images, out, processes)
    finetune(images, out, processes)
    distributed.destroy_process_group()


def main(images, out):
    """Train with each number of processes; those that are forked import nothing anew."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for processes in (2, 4):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        multiprocessing.start_processes(work, (processes, port, images, out), nprocs=processes, start_method="fork")
    train(images, out, 1)
    finetune(images, out, 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""A training and evaluations by several processes, as a script: ``two_processes.py IMAGES OUT PROCESSES``."""

import sys
import warnings
from functools import partial
from pathlib import Path

import albumentations as A
import torch
from tiny import quiet_trainer, tiny_method

from mlflow_ssl.callbacks import Health, KNNEvaluation, LinearProbe, PixelBaseline
from mlflow_ssl.datamodules import SSLDataModule
from mlflow_ssl.datasets import TwoAugmentationDataset

CROP = A.Compose([A.RandomResizedCrop(size=(6, 6)), A.ColorJitter(p=0.8), A.Normalize()])
CLEAN = A.Compose([A.Resize(6, 6), A.Normalize()])


def datamodule(images, batch_size):
    """Return a datamodule of the images."""
    return SSLDataModule(
        str(images),
        augmentation_dataset=TwoAugmentationDataset([CROP, CROP]),
        val_transform=CLEAN,
        test_transform=CLEAN,
        num_workers=0,
        batch_size=batch_size,
    )


def callbacks():
    """Return what is logged by."""
    return {
        "knn": KNNEvaluation(num_neighbours=5, temperature=0.05),
        "health": Health(max_images=7),
        "probe": LinearProbe(),
        "pixels": PixelBaseline(num_neighbours=5),
    }


def kept(metrics, knn):
    """Return what can be compared."""
    evaluated = vars(knn.evaluated) if knn.evaluated else None
    return {"metrics": {name: float(value) for name, value in metrics.items()}, "evaluated": evaluated}


def main(images, out, processes):
    """Train an epoch and evaluate, in batches of 4 and of 30, and write what each process has found."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    used = callbacks()
    trainer = quiet_trainer(
        strategy="ddp",
        devices=processes,
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=list(used.values()),
    )
    method = tiny_method(optimizer=partial(torch.optim.SGD, lr=0.3))
    found = {}
    trainer.validate(method, datamodule(images, 4), verbose=False)
    found["untrained"] = kept(trainer.callback_metrics, used["knn"])
    seen = []
    whole = used["knn"].on_validation_epoch_end

    def look(*args):
        whole(*args)
        seen.append(used["knn"].evaluated)

    used["knn"].on_validation_epoch_end = look
    trainer.fit(method, datamodule(images, 4))
    used["knn"].evaluated = seen[-1]
    found["trained"] = kept(trainer.callback_metrics, used["knn"])
    own = {name: value.clone() for name, value in method.state_dict().items()}
    trainer.test(method, datamodule(images, 4), verbose=False)
    found["tested"] = kept(trainer.callback_metrics, used["knn"])
    trainer.validate(method, datamodule(images, 30), verbose=False)  # a batch for one process, none for the other
    found["one batch"] = kept(trainer.callback_metrics, used["knn"])
    found |= {"weights": own, "probe": used["probe"].state_dict()["classifier"]}
    torch.save(found, Path(out) / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""Images that turn out to be unreadable while a network is trained on them."""

import logging
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from mlflow_ssl.datasets.bad_images import BadImageList

log = logging.getLogger(__name__)


class BadImages(Callback):
    """Log ``data/bad_images``, and send the list of them again, after each epoch and evaluation that found more."""

    def __init__(self) -> None:
        self._known: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what is known from before the training."""
        if self._known is None and (listed := _list(trainer)) is not None:
            self._known = len(listed.read())

    on_test_start = on_validation_start = on_fit_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for more."""
        self._look(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for more."""
        self._look(trainer)

    on_test_end = on_validation_end

    def _look(self, trainer: Trainer) -> None:
        listed = _list(trainer)
        # what is found before the first step is said after it: a metric has one value a step
        if listed is None or not trainer.is_global_zero or trainer.global_step == 0:
            return
        images = listed.read()
        if len(images) == (self._known or 0):
            return
        latest = images[-1]
        log.warning(
            "%d images can no longer be read, %d in all: %s (%s) ...",
            len(images) - (self._known or 0),
            len(images),
            latest.path,
            latest.reason,
        )
        self._known = len(images)
        run: Any = getattr(trainer.logger, "run", None)
        if run is not None:
            run.log_metrics({"data/bad_images": len(images)}, step=trainer.global_step)
            run.log_file(listed.file, "data")


def _list(trainer: Trainer) -> BadImageList | None:
    listed: BadImageList | None = getattr(getattr(trainer, "datamodule", None), "bad_image_list", None)
    return listed

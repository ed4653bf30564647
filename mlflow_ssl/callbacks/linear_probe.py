"""A linear classifier that learns beside the network, from what it sees anyway."""

from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mlflow_ssl.batchnorm import share_batchnorm
from mlflow_ssl.callbacks.embeddings import batch_rows, counting, has_bank, is_query_loader
from mlflow_ssl.processes import agree_on_buffers, averaged


class LinearProbe(Callback):
    """Log ``val_acc_linear`` at each validation: the accuracy of a linear classifier of the embeddings.

    It is trained on the embeddings of each batch's views, by an optimizer of its own, and nothing of it reaches the
    network. Embeddings are normalized by the batch first, so that one learning rate does for all networks. It trails
    behind the network it learns from; a classifier fitted to its optimum comes with the test. Several processes train
    the classifier that one would: its BatchNorm and its gradient are of the images of all.

    Args:
        learning_rate: of SGD with a momentum of 0.9.

    Raises:
        ValueError: if the rate is not above 0.

    References:
        Chen et al. 2020, arXiv:2006.10029, sec. 3 (a classifier trained along behind a stop of the gradient).
    """

    def __init__(self, learning_rate: float = 0.1) -> None:
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {learning_rate}")
        self.learning_rate = learning_rate
        self._classifier: nn.Sequential | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._stored: dict[str, Any] | None = None
        self._seen: list[Tensor] = []
        self._right = self._asked = 0
        self._hook: Any = None

    # what a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Return classifier and optimizer."""
        if self._classifier is None or self._optimizer is None:
            return self._stored or {}
        return {"classifier": self._classifier.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until the network is there."""
        self._stored = state_dict or None

    # the training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the classifier, if there are classes, and watch what the backbone gives."""
        num_classes = len(getattr(getattr(trainer, "datamodule", None), "classes", ()))
        backbone: Any = getattr(getattr(pl_module, "online", None), "backbone", None)
        if num_classes < 2 or backbone is None:
            return
        size = int(backbone.num_features)
        # nothing is drawn, so that the network's own random numbers stay the same
        linear: nn.Module = nn.utils.skip_init(nn.Linear, size, num_classes)  # type: ignore[no-untyped-call]
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
        self._classifier = nn.Sequential(nn.BatchNorm1d(size, affine=False), linear)
        share_batchnorm(self._classifier)
        self._classifier.to(pl_module.device)
        self._optimizer = torch.optim.SGD(self._classifier.parameters(), lr=self.learning_rate, momentum=0.9)
        if self._stored:
            self._classifier.load_state_dict(self._stored["classifier"])
            self._optimizer.load_state_dict(self._stored["optimizer"])
        self._hook = backbone.register_forward_hook(self._watch)

    def _watch(self, backbone: nn.Module, inputs: Any, embeddings: Tensor) -> None:
        if backbone.training:
            self._seen.append(embeddings.detach().float())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take one step on the embeddings of this batch's views; images without a class are left out."""
        seen, self._seen = self._seen, []
        if self._classifier is None or self._optimizer is None or not seen:
            return
        labels = batch[1].repeat(len(seen))
        embeddings = torch.cat(seen)
        self._classifier.train()
        with torch.enable_grad(), torch.autocast(embeddings.device.type, enabled=False):
            # a label below 0 is none; a batch of none has no loss, and not NaN
            losses = F.cross_entropy(self._classifier(embeddings), labels.clamp(min=0), reduction="none")
            known = labels >= 0
            parameters = list(self._classifier.parameters())
            gradients = torch.autograd.grad((losses * known).sum(), parameters)
        # in one message: the sums over the images of all processes that have a class, and how many these are
        sizes = [*(parameter.numel() for parameter in parameters), 1]
        *sums, count = torch.split(averaged(torch.cat([*map(torch.flatten, gradients), known.sum()[None]])), sizes)
        for parameter, total in zip(parameters, sums, strict=True):
            # a batch of no such image has no gradient, and not NaN
            parameter.grad = (total / count.clamp(min=1e-9)).view_as(parameter)
        self._optimizer.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Watch no longer."""
        self.on_train_end(trainer, pl_module)

    # the validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, in all processes with one classifier."""
        self._right = self._asked = 0
        if self._classifier is not None:
            agree_on_buffers(self._classifier)

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Classify the embeddings of a batch."""
        if self._classifier is None or not has_bank(trainer) or not is_query_loader(trainer, dataloader_idx):
            return
        known = (batch[1] >= 0) & counting(batch[1], batch_rows(trainer, dataloader_idx, batch_idx))
        with torch.autocast(outputs.device.type, enabled=False):
            predicted = self._classifier.eval()(outputs[known].float()).argmax(1)
        self._right += int((predicted == batch[1][known]).sum())
        self._asked += int(known.sum())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy on the images of all processes."""
        if self._classifier is None or trainer.sanity_checking:
            return
        counts = torch.tensor([self._right, self._asked], device=pl_module.device)
        right, asked = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if asked:
            pl_module.log("val_acc_linear", right / asked)

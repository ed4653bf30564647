"""A linear classifier on a pretrained backbone."""

import logging
from collections.abc import Callable
from typing import Any

from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from mlflow_ssl.heads import LinearClassifier
from mlflow_ssl.losses import cross_entropy
from mlflow_ssl.methods.base import Method
from mlflow_ssl.optimizers import parameter_groups

log = logging.getLogger(__name__)


class Classifier(Method):
    """The head learns first, on a backbone that stays as it is; then both learn, the backbone more slowly.

    A frozen backbone is in evaluation mode: its BatchNorm statistics stay too, and it drops nothing out.

    Args:
        backbone: pretrained network with a ``num_features`` and no classifier.
        num_classes: how many classes.
        freeze_epochs: epochs that the backbone is frozen for; None for all, which is a linear evaluation.
        backbone_lr_scale: the backbone's learning rate as a share of the head's.
        dropout: see `mlflow_ssl.heads.LinearClassifier`.
        loss: of logits and labels, see `mlflow_ssl.losses.cross_entropy`.
        kwargs: see `Method`.

    Raises:
        ValueError: if a number is out of its range.

    References:
        Kumar et al. 2022, arXiv:2202.10054 (why the head comes first).
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int,
        freeze_epochs: int | None = None,
        backbone_lr_scale: float = 0.1,
        dropout: float = 0.0,
        loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        **kwargs: Any,
    ) -> None:
        if freeze_epochs is not None and freeze_epochs < 0:
            raise ValueError(f"freeze_epochs must be 0 or more, or null for all, got {freeze_epochs}")
        if not backbone_lr_scale > 0:
            raise ValueError(
                f"backbone_lr_scale must be above 0, got {backbone_lr_scale}; freeze_epochs=null keeps the backbone"
            )
        super().__init__(**kwargs)
        self.backbone = backbone
        self.head = LinearClassifier(int(backbone.num_features), num_classes, dropout=dropout)  # type: ignore[arg-type]
        self.freeze_epochs = freeze_epochs
        self.backbone_lr_scale = backbone_lr_scale
        self.loss = loss
        self.frozen = False

    @property
    def embedder(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    def networks(self) -> list[nn.Module]:
        """Return backbone and head."""
        return [self.backbone, self.head]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the head's groups, then the backbone's.

        The optimizer has the backbone from the beginning, and leaves alone what has no gradient: so a checkpoint looks
        the same before and after the freeze, and can be resumed on either side.
        """
        backbone = [group | {"lr_scale": self.backbone_lr_scale} for group in parameter_groups(self.backbone)]
        return [*parameter_groups(self.head), *backbone]

    def setup(self, stage: str) -> None:
        """Have processes that average their gradients expect none of a frozen backbone."""
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and self.freeze_epochs != 0:
            strategy._ddp_kwargs["find_unused_parameters"] = True

    def set_frozen(self, *, frozen: bool) -> None:
        """Freeze the backbone, or have it learn."""
        self.frozen = frozen
        self.backbone.requires_grad_(requires_grad=not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Classifier":
        """Change the mode of all but a frozen backbone."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def on_train_start(self) -> None:
        """Freeze the backbone, or not, as the epoch wants it; a training may be resumed within one."""
        self.set_frozen(frozen=self.freeze_epochs is None or self.current_epoch < self.freeze_epochs)

    def on_train_epoch_start(self) -> None:
        """Have the backbone learn once its time has come."""
        was_frozen = self.frozen
        self.on_train_start()
        if was_frozen and not self.frozen:
            log.info("the backbone learns from now on, at %g of the head's rate", self.backbone_lr_scale)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch ``(images, labels)``."""
        images, labels = batch
        logits: Tensor = self.head(self.backbone(self.lay_out(images)))
        loss = self.loss(logits.float(), labels)
        self.log_loss(loss, prog_bar=True)
        return loss

    def classify(self, embeddings: Tensor) -> Tensor:
        """Return the logits ``(B, C)`` of clean embeddings ``(B, D)``, in float32, as the exported network will."""
        return self.head(embeddings.float())  # type: ignore[no-any-return]

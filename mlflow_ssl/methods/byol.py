"""Bootstrap your own latent."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.optim import Optimizer

from mlflow_ssl.losses import byol_loss
from mlflow_ssl.methods.base import SSLMethod
from mlflow_ssl.schedules import cosine_tau
from mlflow_ssl.target import copy_as_target, update_target


class BYOL(SSLMethod):
    """The online network predicts what the target network projects of the other view.

    Args:
        encoder: backbone plus projector; becomes the online network, and a copy of it the target.
        predictor: head on the online network only.
        loss: loss per image of prediction and projection, ``(B, D), (B, D) -> (B,)``.
        base_tau: share of the old target kept per update at the start; rises to 1 on a cosine.
        kwargs: see `SSLMethod`.

    References:
        Grill et al. 2020, arXiv:2006.07733.
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        *,
        loss: Callable[[Tensor, Tensor], Tensor] = byol_loss,
        base_tau: float = 0.996,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder, **kwargs)
        self.predictor = predictor
        self.target = copy_as_target(encoder)
        self.loss = loss
        self.base_tau = base_tau

    def trained_modules(self) -> list[nn.Module]:
        """Return encoder and predictor."""
        return [self.online, self.predictor]

    def step_networks(self) -> list[nn.Module]:
        """Return encoder, predictor and target."""
        return [*self.trained_modules(), self.target]

    def networks(self) -> list[nn.Module]:
        """Return backbone and projector of both networks, and the predictor."""
        return [*super().networks(), self.predictor, *self.target.children()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch ``((view_1, view_2), labels)``: both directions summed, mean over images."""
        views, _ = batch
        view_1, view_2 = map(self.lay_out, views)
        one = self.gather_gradients(self._bootstrap(view_1, view_2).mean())
        loss = one + self._bootstrap(view_2, view_1).mean()
        # not for Lightning's progress bar, which would read it back at each step; ours does so when it draws
        self.log_loss(loss)
        return loss

    def _bootstrap(self, view: Tensor, other: Tensor) -> Tensor:
        prediction = self.predictor(self.online(view))
        # in train mode, as the paper's target is: it normalizes by the batch and keeps its own BatchNorm statistics
        projection = self.target(other)
        return self.loss(prediction.float(), projection.float())

    def configure_optimizers(self) -> Any:
        """Let the target follow each step that the optimizer really makes.

        The hook runs once per optimizer step however many batches accumulate, and not at all for a step that the fp16
        gradient scaler skips.
        """
        configured = super().configure_optimizers()
        optimizer: Optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        optimizer.register_step_post_hook(self._follow)
        return configured

    def _follow(self, *_: Any) -> None:
        tau = cosine_tau(self.schedule_step, total_steps=self.total_steps, base=self.base_tau)
        with record_function("target update"):  # `mlflow_ssl.evaluation.step_parts` finds it by this name in a trace
            update_target(self.target, self.online, tau=tau)
        self.tau = tau

    def on_train_batch_end(self, *_: Any) -> None:
        """Log the tau of the last update."""
        if hasattr(self, "tau"):
            # a tensor of the host: Lightning would make one on the device, and wait until all before it is done
            self.log("train/tau", torch.tensor(self.tau))

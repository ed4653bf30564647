"""What every method shares: the embedding, the optimizer and its schedule."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mlflow_ssl.compiling import compile_mode, compile_networks
from mlflow_ssl.errors import InputError
from mlflow_ssl.optimizers import parameter_groups, scale_rates
from mlflow_ssl.processes import agree_on_buffers, averaged, rank_and_world_size
from mlflow_ssl.sharding import NOT_COMPILED, is_sharded, shard


class Method(LightningModule, ABC):
    """A method trains a backbone, whose output is the embedding of an image.

    Args:
        optimizer: makes the optimizer for parameter groups.
        scheduler: makes the learning-rate schedule, see `mlflow_ssl.schedules.warmup_cosine_scheduler`; None keeps the
            optimizer's own rate.
        batch_size: images per batch and device.
        channels_last: keep images and weights in the memory format that convolutions are fastest in; ``auto`` does.
    """

    def __init__(
        self,
        *,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        batch_size: int = 1,
        channels_last: bool | Literal["auto"] = False,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self.steps_ahead = 0

    @property
    @abstractmethod
    def embedder(self) -> nn.Module:
        """The backbone that images are embedded by."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return what the optimizer moves; a group's ``lr_scale`` multiplies its learning rate."""

    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """Return the modules that are called as a whole; together they have all weights."""

    def configure_model(self) -> None:
        """Share the weights among the processes, where `mlflow_ssl.sharding.ShardedStrategy` trains."""
        if self.device_mesh is not None:
            for network in self.networks():
                shard(network, self.device_mesh["data_parallel"])

    def on_fit_start(self) -> None:
        """Lay the weights out as the images will be, but for parts of weights, which lie as they are gathered."""
        if not is_sharded(self):
            self.to(memory_format=self.memory_format)

    def lay_out(self, images: Tensor) -> Tensor:
        """Return images ``(B, C, H, W)`` in the memory format of the weights."""
        return images.contiguous(memory_format=self.memory_format)

    def log_loss(self, loss: Tensor, **options: Any) -> None:
        """Log the loss of a batch as ``train/loss``: the mean over processes where it is written down.

        Between two such steps, and at all but an epoch's last, a process logs its own: to agree would cost each step.
        """
        if rank_and_world_size()[1] > 1 and (
            self.trainer._logger_connector.should_update_logs or self.trainer.is_last_batch
        ):
            loss = averaged(loss)
        self.log("train/loss", loss, **options)

    def embed(self, images: Tensor) -> Tensor:
        """Return the clean embeddings of images ``(B, C, H, W)``: float32 ``(B, D)`` whatever the precision."""
        embeddings: Tensor = self.embedder(self.lay_out(images))
        return embeddings.float()

    def on_validation_start(self) -> None:
        """Have all processes embed with one network."""
        agree_on_buffers(self)

    on_test_start = on_validation_start

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the embeddings of a batch; callbacks make metrics of them."""
        return self.embed(batch[0])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the embeddings of a batch; callbacks make metrics of them."""
        return self.embed(batch[0])

    def configure_optimizers(self) -> Any:
        """Make the optimizer, and the schedule that moves its learning rate each optimizer step."""
        optimizer = self._make_optimizer(self.parameter_groups())
        # not only at the next backward pass, as Lightning does: the activations before it can have their memory
        optimizer.register_step_post_hook(lambda stepped, *_: stepped.zero_grad())
        if self._make_scheduler is None:
            scale_rates(optimizer)
            return optimizer
        trainer = self.trainer
        scheduler = self._make_scheduler(
            optimizer,
            total_steps=self.total_steps,
            steps_per_epoch=self._steps_per_epoch,
            global_batch=self.batch_size * trainer.accumulate_grad_batches * trainer.world_size,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training, if as many processes had made all of it."""
        return int(self.trainer.estimated_stepping_batches)

    @property
    def schedule_step(self) -> int:
        """Where the training is in its schedules: among `total_steps`.

        It is the optimizer step, but for `steps_ahead` where the number of processes has changed on the way.
        """
        return int(self.global_step) + self.steps_ahead

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    def reschedule(self) -> None:
        """Go on in the schedules where as many processes as there are now would be, as the training begins.

        Other processes make another global batch, another peak of the learning rate, and another number of steps an
        epoch: what holds is the share of the epochs that is done.
        """
        loop: Any = self.trainer.fit_loop
        epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress.current
        done = batches.completed // self.trainer.accumulate_grad_batches if epochs.started > epochs.processed else 0
        step = self.trainer.current_epoch * self._steps_per_epoch + done
        self.steps_ahead = step - int(self.global_step)
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                config.scheduler.last_epoch = step - 1
                config.scheduler.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep `steps_ahead`."""
        checkpoint["steps_ahead"] = self.steps_ahead

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with `steps_ahead`."""
        self.steps_ahead = checkpoint.get("steps_ahead", 0)


class SSLMethod(Method):
    """A self-supervised method trains ``online``; its backbone's output is the embedding that all is measured by.

    Args:
        online: the trained network, with a ``backbone``.
        compile: whether a step's networks are compiled, or how, see `mlflow_ssl.compiling`; what embeds images for
            validations, test and export stays as it is.
        kwargs: see `Method`.
    """

    def __init__(self, online: nn.Module, *, compile: bool | str = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.online = online
        self._compile_mode = compile_mode(compile)

    @property
    def embedder(self) -> nn.Module:
        """The online backbone."""
        return self.online.backbone  # type: ignore[return-value]

    def trained_modules(self) -> list[nn.Module]:
        """Return the modules whose parameters the optimizer moves."""
        return [self.online]

    def step_networks(self) -> list[nn.Module]:
        """Return the modules that a training step calls."""
        return self.trained_modules()

    def on_fit_start(self) -> None:
        """Lay the weights out, and have the networks compiled where that is asked for.

        Raises:
            InputError: if it is, and processes share the weights.
        """
        super().on_fit_start()
        if self._compile_mode and is_sharded(self):
            raise InputError(NOT_COMPILED)
        if self._compile_mode:
            compile_networks(self.step_networks(), self._compile_mode)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin an optimizer step without gradients, those of a step that was skipped among them."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            for optimizer in self.trainer.optimizers:
                optimizer.zero_grad()

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Keep what `gather_gradients` has gathered: Lightning asks for this after ``training_step``."""

    def gather_gradients(self, loss: Tensor) -> Tensor:
        """Add a part of a batch's loss to the gradients at once, so that its activations need not wait for the rest's.

        Where processes share the weights this would have them agree twice a step: there the part waits.

        Args:
            loss: scalar; the batch's loss is the sum of its parts.

        Returns:
            The same, with or without its graph: for ``training_step`` to add to the parts that it returns.
        """
        if self._trainer is None or is_sharded(self):
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            # DDP sums gradients in the backward pass after its forward one, and leaves alone those of one within
            self.trainer.strategy.backward(loss / self.trainer.accumulate_grad_batches, None)
        return loss.detach()

    def networks(self) -> list[nn.Module]:
        """Return backbone and projector: an evaluation calls each alone."""
        return list(self.online.children())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return weights, and vectors, which are not decayed."""
        return parameter_groups(*self.trained_modules())

"""The best checkpoint, where many are as good as each other."""

from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor


class BestCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint of the best value, but of equals the last: it has learned for longer.

    An accuracy of a few validation images soon comes to a value that it never exceeds, with a classifier that is right
    and not yet sure.
    """

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether a value is the best, or as good."""
        best = self.best_model_score
        equal = current is not None and best is not None and bool(current.cpu() == best.cpu())
        return equal or super().check_monitor_top_k(trainer, current)

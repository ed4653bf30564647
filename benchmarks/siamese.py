"""BYOL without what keeps it from collapsing: for `benchmarks/collapse.py` alone."""

import torch.nn.functional as F
from torch import Tensor

from mlflow_ssl.methods import BYOL


class Siamese(BYOL):
    """Both views go through the online network, and the gradient through both: no target, no stop-gradient.

    References:
        Chen and He 2021, arXiv:2011.10566, sec. 4.1: without stop-gradient the trivial solution is found.
    """

    def _bootstrap(self, view: Tensor, other: Tensor) -> Tensor:
        prediction, projection = self.predictor(self.online(view)), self.online(other)
        return 2 - 2 * F.cosine_similarity(prediction.float(), projection.float(), dim=-1)

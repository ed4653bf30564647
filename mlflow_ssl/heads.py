"""What stands on a backbone while it trains: projector and predictor, or a classifier."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear, BatchNorm, ReLU, Linear: BYOL's projector and predictor, ``(B, in) -> (B, out)``.

    Args:
        in_features: width of the input.
        hidden_features: width of the hidden layer.
        out_features: width of the output; it has neither BatchNorm nor bias.

    References:
        Grill et al. 2020, arXiv:2006.07733, sec. 3.3; biases as in its reference code.
    """

    def __init__(self, in_features: int, *, hidden_features: int = 4096, out_features: int = 256) -> None:
        super().__init__(
            nn.Linear(in_features, hidden_features),
            nn.BatchNorm1d(hidden_features),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_features, out_features, bias=False),
        )


class Encoder(nn.Module):
    """Backbone plus projector: images ``(B, C, H, W)`` to projections ``(B, D)``.

    Args:
        backbone: network with a ``num_features`` and no classifier; its output is the embedding.
        projector: makes the projector for a given ``in_features``.
    """

    def __init__(self, backbone: nn.Module, projector: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector(in_features=backbone.num_features)

    def forward(self, images: Tensor) -> Tensor:
        """Return the projections of ``images``."""
        return self.projector(self.backbone(images))  # type: ignore[no-any-return]


class LinearClassifier(nn.Module):
    """BatchNorm, dropout, Linear: embeddings ``(B, D)`` to logits ``(B, C)``.

    The normalization has no weights of its own: it makes one learning rate do for the embeddings of any network, and
    is part of the linear function once the training is over. The weights begin at 0: no class is preferred.

    Args:
        in_features: size of an embedding, D.
        num_classes: C.
        dropout: share of the embedding that is left out in training, in [0, 1).

    References:
        He et al. 2022, arXiv:2111.06377, app. A.1 (the normalization).
    """

    def __init__(self, in_features: int, num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_features, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the logits."""
        return self.linear(self.dropout(self.norm(embeddings)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        r"""Return the linear layer that the whole is in evaluation mode, on the CPU in float32.

        .. math:: W' = W / \sqrt{\sigma^2 + \epsilon}, \qquad b' = b - W' \mu
        """
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        weight = self.linear.weight.double() / (variance.double() + self.norm.eps).sqrt()
        linear = nn.Linear(self.linear.in_features, self.linear.out_features)
        linear.weight.copy_(weight)
        linear.bias.copy_(self.linear.bias.double() - weight @ mean.double())
        return linear

"""What stands on a backbone while it trains: projector and predictor."""

from collections.abc import Callable

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

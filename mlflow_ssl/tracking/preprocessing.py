"""What is done to images before a network that this project did not register sees them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlflow_ssl.errors import InputError


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before a network that is not ours sees it.

    Attributes:
        input_size: height and width, pixels; None where nothing says it.
        mean: per channel, in [0, 1]; None for no normalization.
        std: likewise.
    """

    input_size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Preprocessing":
        """Return what words, or a description like timm's, say.

        Raises:
            InputError: if the size is none of pixels, or mean and std are not three numbers each.
        """
        mean, std = (_three(given, key) for key in ("mean", "std"))
        if (mean is None) != (std is None):
            raise InputError("mean and std must be given together")
        if std is not None and min(std) <= 0:
            raise InputError(f"std must be above 0, got {list(std)}")
        return cls(_size(given.get("input_size")), mean, std)

    def or_else(self, other: "Preprocessing") -> "Preprocessing":
        """Return this, and the other's word where this says nothing."""
        normalized = self if self.mean is not None else other
        return replace(normalized, input_size=self.input_size or other.input_size)

    def __str__(self) -> str:
        """Return it in words."""
        size = "x".join(map(str, self.input_size or ()))
        return f"{size}, mean {list(self.mean)}, std {list(self.std or ())}" if self.mean else f"{size}, in [0, 1]"

    def transform(self) -> Any:
        """Return it as a transform of albumentations: pixels ``(H, W, 3)`` of any size to what the network takes."""
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations

        height, width = self.input_size or (0, 0)
        steps: list[Any] = [albumentations.Resize(height, width, interpolation=2)]  # cubic
        if self.mean is not None:
            steps.append(albumentations.Normalize(self.mean, self.std))
        return albumentations.Compose(steps)

    def as_dict(self) -> dict[str, Any]:
        """Return what `of` reads."""
        return {key: list(value) for key, value in asdict(self).items() if value is not None}


def _three(given: Mapping[str, Any], key: str) -> tuple[float, ...] | None:
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, Sequence) or len(value) != 3 or not all(_is_number(each) for each in value):
        raise InputError(f"{key} must be three numbers, such as [0.485, 0.456, 0.406], got {value}")
    return tuple(float(each) for each in value)


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = [value, value] if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
    sides = sides[-2:] if len(sides) == 3 else sides  # timm names the channels too
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise InputError(f"input_size must be pixels, such as 224 or [224, 320], got {value}")
    return sides[0], sides[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

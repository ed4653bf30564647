"""What a model that may be anyone's answers, as vectors."""

from typing import Any

import numpy as np
import numpy.typing as npt


def as_vectors(given: Any) -> npt.NDArray[np.float32]:
    """Return vectors ``(N, D)``, whatever form they have: an array, a tensor, a frame, or a column of lists.

    Raises:
        ValueError: if they are none; to be read after the model's name.
    """
    if isinstance(given, dict):
        names = ", ".join(map(str, given)) or "nothing"
        raise ValueError(f"must give an array (N, D), got a dictionary of {names}")  # noqa: TRY004 it is read as a value
    if hasattr(given, "detach"):
        given = given.detach().cpu().float().numpy()
    if getattr(given, "ndim", 0) == 2 and getattr(given, "shape", (0, 0))[1] == 1 and hasattr(given, "iloc"):
        given = given.iloc[:, 0]
    try:
        values = given.to_numpy() if hasattr(given, "to_numpy") else np.asarray(given)
        vectors = np.stack(list(values)).astype(np.float32) if values.dtype == object else values.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"must give numbers, a vector for each row: {error}") from error
    if vectors.ndim == 4:
        raise ValueError(
            f"must give vectors (N, D), got feature maps of shape {vectors.shape}; register it with pooling at its end"
        )
    if vectors.ndim != 2:
        raise ValueError(f"must give vectors, an array (N, D), got the shape {vectors.shape}")
    if not np.isfinite(vectors).all():
        raise ValueError("must give finite numbers, got some that are not")
    return vectors

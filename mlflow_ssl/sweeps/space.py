"""What a sweep searches: as Optuna's distributions, and what is found there as words of a command line."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from mlflow_ssl.config import Swept

Values = Mapping[str, Any]
"""A value for each key that is swept: a choice as a word spells it, or a number of an interval."""


def distributions(space: Sequence[Swept]) -> dict[str, BaseDistribution]:
    """Return what Optuna draws from, by key.

    Example:
        >>> from mlflow_ssl.config import Swept
        >>> distributions([Swept("a", ("x", "y")), Swept("b", low=1, high=9), Swept("c", low=0.1, high=1.0, log=True)])
        {'a': CategoricalDistribution(choices=('x', 'y')), 'b': IntDistribution(high=9, log=False, low=1, step=1), \
'c': FloatDistribution(high=1.0, log=True, low=0.1, step=None)}
    """
    return {swept.key: _distribution(swept) for swept in space}


def _distribution(swept: Swept) -> BaseDistribution:
    if swept.choices:
        return CategoricalDistribution(swept.choices)
    if isinstance(swept.low, int) and isinstance(swept.high, int):
        return IntDistribution(swept.low, swept.high, log=swept.log)
    return FloatDistribution(swept.low, swept.high, log=swept.log)


def grid(space: Sequence[Swept]) -> list[dict[str, str]]:
    """Return every combination of choices, in the order of Hydra's own multirun: the last key changes first.

    Example:
        >>> from mlflow_ssl.config import Swept
        >>> [point["a"] + point["b"] for point in grid([Swept("a", ("x", "y")), Swept("b", ("1", "2"))])]
        ['x1', 'x2', 'y1', 'y2']
    """
    keys = [swept.key for swept in space]
    return [dict(zip(keys, point, strict=True)) for point in itertools.product(*(swept.choices for swept in space))]


def as_words(values: Values) -> list[str]:
    """Return the overrides that set these values.

    Example:
        >>> as_words({"backbone": "resnet18", "optimizer.lr": 1e-05})
        ['backbone=resnet18', 'optimizer.lr=1e-05']
    """
    return [f"{key}={value}" for key, value in values.items()]


def shown(value: Any) -> str:
    """Return a value for people: numbers of four digits.

    Example:
        >>> shown(0.000123456), shown("resnet18"), shown(12)
        ('0.0001235', 'resnet18', '12')
    """
    return f"{value:.4g}" if isinstance(value, float) else str(value)

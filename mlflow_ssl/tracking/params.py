"""A resolved config as MLflow parameters."""

import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

log = logging.getLogger(__name__)

LONGEST_VALUE = 6000
LONGEST_KEY = 250


def loggable_params(config: Mapping[str, Any], *, known: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters to log: every leaf of ``config`` that is not logged already.

    MLflow refuses a second value for a key, and with it the whole batch. The launcher has logged what it was given, as
    the shell needs it quoted; where that means something else than the config, a warning says so.

    Args:
        config: resolved config.
        known: parameters that the run has.
    """
    leaves = dict(flatten(config))
    for key in leaves.keys() & known.keys():
        if not _same(known[key], leaves[key]):
            log.warning("parameter %s was given as %s and is %s", key, known[key], leaves[key])
    return {key[:LONGEST_KEY]: _shortened(value) for key, value in leaves.items() if key[:LONGEST_KEY] not in known}


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted key and text of each leaf; a list without mappings is one leaf.

    Example:
        >>> dict(flatten({"a": {"b": 1e-3}, "c": [1, 2], "d": [{"e": None}]}))
        {'a.b': '0.001', 'c': '[1, 2]', 'd.0.e': 'null'}
    """
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}{key}.")
    elif isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        for number, item in enumerate(node):
            yield from flatten(item, f"{prefix}{number}.")
    else:
        yield prefix[:-1], node if isinstance(node, str) else json.dumps(node)


def _shortened(value: str) -> str:
    if len(value) <= LONGEST_VALUE:
        return value
    note = " ... (whole in config/config_resolved.yaml)"
    return value[: LONGEST_VALUE - len(note)] + note


def _same(given: str, value: str) -> bool:
    try:
        unquoted = " ".join(shlex.split(given))
    except ValueError:
        unquoted = given
    return unquoted == value or _parsed(unquoted) == _parsed(value)


def _parsed(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):  # YAML takes 1e-3 for text
        try:
            return float(value)
        except ValueError:
            return value
    return value

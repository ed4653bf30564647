"""Keep credentials out of everything that is kept or sent."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_NAME = re.compile(
    r"(?i)(^|[._\-/])(\w*(password|passwd|passphrase|secret)\w*|pwd|(\w+[_-])?(token|credentials?|auth)"
    r"|\w*(api|access|private|account|auth)[_-]?key(_?id)?|\w*connection_string)$"
)
"""Names of keys and environment variables whose values are nobody's business."""

_SHAPES = re.compile(
    r"""
      (?<=://)[^/\s:@'"]*:[^/\s@'"]+(?=@)                  # user:password@ of a URI
    | (?<=://)[^/\s:@'"]{16,}(?=@)                         # token@ of a URI
    | (?i:(?<=bearer\ )|(?<=basic\ ))[\w\-.~+/=]{12,}      # an Authorization header
    | \b(?:gh[pousr]_|github_pat_|glpat-|hf_|sk-|dapi|xox[abprs]-|npm_|pypi-)[\w\-]{16,}
    | \b(?:AKIA|ASIA)[0-9A-Z]{16}\b
    | \beyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*                 # a JSON web token
    | (?i:(?<=password=)|(?<=secret=)|(?<=token=)|(?<=sig=)|(?<=signature=)|(?<=api_key=)|(?<=accountkey=))
      (?!(?:true|false|null|none|[\d.]+)\b)(?:'[^']*'|"[^"]*"|[^\s&'",;]+)
    """,
    re.VERBOSE,
)
_SHORTEST = 8
"""Length from which the value of a secret environment variable is looked for in texts."""


def is_secret_name(name: str) -> bool:
    """Return whether a key is called as credentials are.

    Example:
        >>> is_secret_name("tracking.api_key"), is_secret_name("model.num_tokens")
        (True, False)
    """
    return _NAME.search(name) is not None


def redact(text: str) -> str:
    """Return ``text`` without what looks like a credential, or is one of this process's environment.

    Example:
        >>> redact("see http://me:hunter2@host/mlflow")
        'see http://***@host/mlflow'
    """
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    return _SHAPES.sub(HIDDEN, text)


def redacted(node: Any, name: str = "") -> Any:
    """Return a config of mappings, lists and values, with every credential in it hidden."""
    if isinstance(node, Mapping):
        return {key: redacted(value, str(key)) for key, value in node.items()}
    if isinstance(node, list):
        return [redacted(value, name) for value in node]
    if isinstance(node, str) and node:
        return HIDDEN if is_secret_name(name) else redact(node)
    return node


def _environment_secrets() -> list[str]:
    # a path, such as PWD's, or that of a file of credentials, is none itself
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and not value.startswith("/") and is_secret_name(name)
    }
    return sorted(values, key=len, reverse=True)  # one may hold another


class RedactingFormatter(logging.Formatter):
    """A log format that hides credentials in the finished line, traceback included."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return redact(super().format(record))

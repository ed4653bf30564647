"""The albumentations 1.x spelling of Quadra's tutorial, in today's words.

albumentations 2 renamed arguments and only warns about the old ones, so a crop would silently have another size. This
is the one place that looks at a ``_target_``: it rewrites a config before anything is built from it.
"""

from typing import Any

_SIZED = {"albumentations.RandomResizedCrop", "albumentations.RandomSizedCrop"}


def modernize(node: Any) -> Any:
    """Return a plain config with every albumentations 1.x argument replaced by its successor.

    ``height`` and ``width`` of the resizing crops become ``size``; ``always_apply: true``, which 2.x dropped, becomes
    ``p: 1.0``.

    Example:
        >>> modernize({"_target_": "albumentations.RandomResizedCrop", "height": 32, "width": 48})
        {'_target_': 'albumentations.RandomResizedCrop', 'size': [32, 48]}
    """
    if isinstance(node, list):
        return [modernize(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: modernize(value) for key, value in node.items()}
    target = str(node.get("_target_", ""))
    if target in _SIZED and {"height", "width"} <= node.keys():
        node["size"] = [node.pop("height"), node.pop("width")]
    if target.startswith("albumentations.") and node.pop("always_apply", False):
        node["p"] = 1.0
    return node

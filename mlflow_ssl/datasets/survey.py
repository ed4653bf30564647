"""What can be said of a data set from its index alone: pure functions of the table."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mlflow_ssl.datasets.index import ImageIndex
from mlflow_ssl.datasets.tables import column, decoded

ODD = 6.0
"""Robust standard deviations from the median from which on an image is called odd."""


def copies(index: ImageIndex) -> pa.Table:
    """Return the images that share their content with another: ``digest``, ``path``, ``class_name``, ``split``.

    Rows are sorted by digest and path.
    """
    table = _plain(index)
    counts = table.group_by("digest").aggregate([("path", "count")])
    repeated = counts.filter(pc.greater(counts["path_count"], 1))["digest"].combine_chunks()
    found = table.filter(pc.is_in(table["digest"], value_set=repeated)).select(
        ["digest", "path", "class_name", "split"]
    )
    return found.sort_by([("digest", "ascending"), ("path", "ascending")])


def differing(copied: pa.Table, name: str) -> pa.Table:
    """Return of some copies those whose group has several values in a column, such as ``split``: then it leaks."""
    values = copied.group_by("digest").aggregate([(name, "count_distinct")])
    several = values.filter(pc.greater(values[f"{name}_count_distinct"], 1))["digest"].combine_chunks()
    return copied.filter(pc.is_in(copied["digest"], value_set=several))


def by_class(index: ImageIndex) -> pa.Table:
    """Return the number of images of each class in each split, the largest class first."""
    table = _plain(index)
    counted = table.group_by("class_name").aggregate([("path", "count")]).rename_columns(["class_name", "images"])
    for split in ("train", "val", "test"):
        rows = table.filter(pc.equal(table["split"], split)).group_by("class_name").aggregate([("path", "count")])
        found = pc.index_in(counted["class_name"], value_set=column(rows, "class_name"))
        counted = counted.append_column(split, pc.fill_null(rows["path_count"].take(found), 0))
    return counted.sort_by([("images", "descending"), ("class_name", "ascending")])


def oddest(index: ImageIndex, count: int = 10) -> list[dict[str, Any]]:
    """Return the images that differ most from the others in width, height, shape or bytes a pixel.

    Each is measured in robust standard deviations of the logarithm, 1.4826 times the median distance from the median;
    those above `ODD` are returned, the oddest first.

    Returns:
        ``path``, ``why`` in words, and ``deviations``.
    """
    table = index.table
    width, height = (table[name].to_numpy().astype(float) for name in ("width", "height"))
    traits = {
        ("narrow", "wide"): width,
        ("low", "high"): height,
        ("high for its width", "wide for its height"): width / height,
        ("few bytes for its size", "many bytes for its size"): table["size"].to_numpy() / (width * height),
    }
    distances = np.stack([_deviations(np.log(np.maximum(values, 1e-9))) for values in traits.values()])  # (4, N)
    worst = np.abs(distances).max(axis=0)
    order = np.argsort(-worst, kind="stable")[:count]
    paths, names = column(table, "path"), list(traits)
    odd = []
    for row in order[worst[order] > ODD].tolist():
        trait = int(np.abs(distances[:, row]).argmax())
        word = names[trait][int(distances[trait, row] > 0)]
        size = f"{int(width[row])} x {int(height[row])} px, {table['size'][row].as_py():,} bytes"
        odd.append({"path": paths[row].as_py(), "why": f"unusually {word}: {size}", "deviations": worst[row]})
    return odd


def _deviations(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if not len(values):
        return values
    middle = np.median(values)
    spread = 1.4826 * np.median(np.abs(values - middle))
    # where most are equal, a twentieth counts as usual
    distances: npt.NDArray[np.float64] = (values - middle) / max(spread, 0.05)
    return distances


def _plain(index: ImageIndex) -> pa.Table:
    """Return the table with names as text, which can be grouped by."""
    table = index.table
    for name in ("class_name", "split"):
        table = table.set_column(table.schema.get_field_index(name), name, decoded(table[name]))
    return table

"""Arrow tables put together piece by piece, so that a million rows are never a million Python objects."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc


def concat(tables: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """Return the rows of all tables in one chunk a column, dictionaries unified.

    Whoever lets go of the tables as they are taken never has more than one column twice.
    """
    left = pa.concat_tables([schema.empty_table(), *tables]).unify_dictionaries()
    columns = []
    for name in schema.names:
        columns.append(column(left, name))
        left = left.drop_columns([name])
        pa.default_memory_pool().release_unused()  # what it was put together from
    return pa.table(columns, schema=schema)


def column(table: pa.Table, name: str) -> pa.Array:
    """Return a column as one array; without a copy if it is one already."""
    if table[name].num_chunks == 1:
        return table[name].chunk(0)
    found = table[name].combine_chunks()
    return found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks)


def encode(values: Any) -> pa.DictionaryArray:
    """Return strings dictionary-encoded, as few names stand for many rows."""
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, pa.string())
    if pa.types.is_dictionary(array.type):
        return array
    encoded = pc.dictionary_encode(pc.cast(array, pa.string()))
    return encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded


def constant(value: str, length: int) -> pa.DictionaryArray:
    """Return one string ``length`` times."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(length, dtype=np.int32)), pa.array([value], pa.string()))


def nulls(length: int, kind: pa.DataType) -> pa.Array:
    """Return as many nulls, which take no memory: nobody writes to the pages that they are in.

    Args:
        length: how many.
        kind: a type of at most 64 bits, or strings.

    Example:
        >>> nulls(2, pa.string()).to_pylist()
        [None, None]
    """
    zeros = pa.py_buffer(np.zeros(length + 1, dtype=np.int64))
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return pa.Array.from_buffers(kind, length, [zeros, zeros, pa.py_buffer(b"")] if strings else [zeros, zeros])


def codes(names: pa.Array | pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return a number for each row, and the names by number, sorted.

    Example:
        >>> codes(encode(["b", "a", "b"]))
        (array([1, 0, 1]), ['a', 'b'])
    """
    names = encode(names)
    present = sorted(pc.unique(names).to_pylist())
    numbers = pc.index_in(names.dictionary, value_set=pa.array(present, pa.string())).fill_null(-1)
    indices = names.indices.to_numpy(zero_copy_only=False)
    return numbers.to_numpy(zero_copy_only=False).astype(np.int64)[indices], present


def decoded(names: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return dictionary-encoded names as plain strings."""
    plain = pc.cast(names, pa.string())
    return plain.combine_chunks() if isinstance(plain, pa.ChunkedArray) else plain


def keep(rows: Any, kept: npt.NDArray[np.bool_]) -> Any:
    """Return the rows of a table or an array where ``kept`` is true; without a copy if it is true everywhere."""
    return rows if kept.all() else rows.filter(pa.array(kept))


class Picked:
    """Some rows of what has rows, such as an Arrow array or a reader of images, without a copy of them.

    Args:
        whole: gives a row by its number.
        rows: numbers of those that are picked, in the order that they have here.

    Example:
        >>> Picked(["a", "b", "c"], np.array([2, 0], dtype=np.uint32))[0]
        'c'
    """

    def __init__(self, whole: Any, rows: npt.NDArray[np.unsignedinteger[Any]]) -> None:
        self._whole = whole
        self._rows = rows

    def __len__(self) -> int:
        """Return how many are picked."""
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        """Return one of them."""
        return self._whole[int(self._rows[row])]


def sort_by_path(table: pa.Table) -> pa.Table:
    """Return the rows sorted by their path, as bytes; without a copy if they are already."""
    paths = column(table, "path")
    if pc.all(pc.less_equal(paths[:-1], paths[1:]), min_count=0).as_py():
        return table.combine_chunks()
    return table.take(pc.sort_indices(paths)).combine_chunks()


def pieces(rows: Sequence[int] | npt.NDArray[np.integer[Any]], size: int) -> Iterable[Any]:
    """Yield consecutive pieces of at most ``size`` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]

"""A faiss index beside a folder of embeddings: flat, so its answers are those of the exact search by cosine.

It holds every embedding again, at unit length: 4 bytes a number on disk and, while it is built or asked, in memory.
"""

import logging
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from mlflow_ssl.datasets.vectors import VectorStore, replace_file, vectors
from mlflow_ssl.errors import InputError

INDEX = "_index.faiss"
"""A name that begins so that readers of Parquet folders pass it over."""
HEADER = struct.Struct("<4siqqqBiQ")
"""Of a flat index: its kind, D, N, two unused numbers, whether trained, its metric, and how many numbers follow."""
FLAT_INNER_PRODUCT = (b"IxFI", 0)


def build_index(store: VectorStore) -> bool:
    """Write the index of a complete store, a part at a time, unless it is there; name it in the manifest.

    Returns:
        Whether it was written now.

    Raises:
        InputError: if a part is missing, or the index cannot be written.
    """
    if (store.folder / INDEX).exists() and stale(store) is None:
        return False
    faiss = _faiss()
    index = faiss.IndexFlatIP(store.manifest.embedding_size)
    for part in store.read(["embedding"]):
        index.add(_unit(vectors(part)))
    try:
        replace_file(store.folder / INDEX, lambda path: faiss.write_index(index, str(path)))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{store.folder / INDEX} cannot be written: {error}") from error
    store.name_index({"bytes": (store.folder / INDEX).stat().st_size, "parts": store.part_sizes()})
    return True


def stale(store: VectorStore) -> str | None:
    """Return why the index is not of the embeddings beside it; None where it is."""
    named = store.manifest.index
    if named is None:
        return "the manifest does not name it"
    if named.get("parts") != store.part_sizes():
        return "the embeddings are others than those it was made of"
    rows, size = sum(count for count, _ in store.part_sizes()), store.manifest.embedding_size
    length = (store.folder / INDEX).stat().st_size
    if length != named.get("bytes") or length != HEADER.size + 4 * rows * size:
        return f"it has {length} bytes, not those of {rows} embeddings of {size} numbers"
    with (store.folder / INDEX).open("rb") as file:
        kind, dimensions, count, _, _, _, metric, numbers = HEADER.unpack(file.read(HEADER.size))
    if ((kind, metric), dimensions, count, numbers) != (FLAT_INNER_PRODUCT, size, rows, rows * size):
        return "it is of another kind, or of another number of embeddings"
    return None


def open_index(store: VectorStore) -> Any:
    """Return the index of a store; None where there is none.

    Reading it runs no code, but the reader trusts what the file says of itself; so this is compared with the manifest
    first.

    Raises:
        InputError: if it is not of these embeddings.
    """
    file = store.folder / INDEX
    if not file.exists():
        return None
    reason = stale(store)
    if reason is not None:
        raise InputError(f"{file} is stale: {reason}; run embed again with index=true, or remove it")
    return _faiss().read_index(str(file))


def _faiss() -> Any:
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it says that it was loaded
    import faiss

    return faiss


def ask(
    index: Any, queries: npt.NDArray[np.float32], count: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return cosines and rows of the nearest of each query ``(Q, D)``, nearest first, ``(Q, K)`` each.

    Of equally near rows the first comes first.
    """
    similarities, rows = index.search(_unit(queries), min(count, index.ntotal))
    order = np.lexsort((rows, -similarities), axis=1)
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    unit: npt.NDArray[np.float32] = np.ascontiguousarray(rows / lengths, dtype=np.float32)
    return unit

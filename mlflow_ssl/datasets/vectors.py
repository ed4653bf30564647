"""Embeddings of images in a folder of Parquet files, written and read a part at a time: memory is that of one part.

Any tool that reads Parquet reads the folder as one table. A part appears whole or not at all, so what is there need not
be made again.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mlflow_ssl.datasets.tables import decoded
from mlflow_ssl.errors import InputError

MANIFEST, BAD_IMAGES = "_manifest.json", "_bad_images.csv"
"""Names that begin so that readers of Parquet folders pass them over."""
PART_ROWS = 8192
"""Images of one file."""


@dataclass(frozen=True)
class Manifest:
    """What the embeddings are of.

    Attributes:
        model_uri: of the network.
        model_digest: of the network.
        data_path: where the images are.
        data_digest: of the images.
        embedding_size: numbers of an embedding, D.
        num_images: in the data set.
        preprocessing: of images for a network that this project did not register; None where it brings its own.
        index: of which ``parts`` the faiss index is, and its ``bytes``, see `mlflow_ssl.datasets.vector_index`.
    """

    model_uri: str
    model_digest: str
    data_path: str
    data_digest: str
    embedding_size: int
    num_images: int
    preprocessing: dict[str, Any] | None = None
    index: dict[str, Any] | None = None

    @classmethod
    def read(cls, file: Path) -> "Manifest":
        """Return what is in a file.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is no JSON.
            TypeError: if it holds something else.
        """
        manifest = cls(**json.loads(file.read_text()))
        if not all(isinstance(each, dict | None) for each in (manifest.preprocessing, manifest.index)):
            raise TypeError("preprocessing and index must be mappings")
        return manifest

    @property
    def num_parts(self) -> int:
        """Files that there will be."""
        return -(-self.num_images // PART_ROWS)

    def rows(self, part: int) -> range:
        """Return the rows of the data set that are in a file."""
        return range(part * PART_ROWS, min((part + 1) * PART_ROWS, self.num_images))


class VectorStore:
    """A folder of embeddings.

    Args:
        folder: where they are.
        manifest: what they are of.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> "VectorStore":
        """Begin a folder, or go on with one of the same network and data.

        Raises:
            InputError: if it holds something else, or cannot be written.
        """
        try:
            if folder.exists() and any(folder.iterdir()):
                known = cls.open(folder).manifest
                if (known.model_digest, known.data_digest) != (manifest.model_digest, manifest.data_digest):
                    raise InputError(
                        f"output holds embeddings of {known.model_uri} and {known.data_path} as they were then: "
                        f"{folder}; give another output=FOLDER"
                    )
                manifest = replace(manifest, index=known.index)
            folder.mkdir(parents=True, exist_ok=True)
            store = cls(folder, manifest)
            store._write_manifest()
        except OSError as error:
            raise InputError(f"output must be a folder that can be written, got {folder}: {error.strerror}") from error
        return store

    @classmethod
    def open(cls, folder: Path) -> "VectorStore":
        """Open a folder.

        Raises:
            InputError: if it is none of embeddings.
        """
        try:
            return cls(folder, Manifest.read(folder / MANIFEST))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{folder} holds no embeddings; `embed` writes such a folder") from error

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that are not there yet."""
        return [part for part in range(self.manifest.num_parts) if not self._file(part).exists()]

    def write(self, part: int, images: pa.Table, embeddings: npt.NDArray[np.float32]) -> None:
        """Write a part.

        Args:
            part: its number.
            images: rows of the data set's index.
            embeddings: shape ``(N, D)``.
        """
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), self.manifest.embedding_size)
        table = pa.table(
            {
                "path": images["path"],
                "class_name": decoded(images["class_name"]),
                "label": images["label"],
                "split": decoded(images["split"]),
                "part": images["part"],
                "embedding": vectors,
            }
        )
        replace_file(self._file(part), lambda path: pq.write_table(table, path, compression="zstd"))

    def read(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the parts, in order.

        Raises:
            InputError: if a part is missing, or broken.
        """
        if self.missing:
            raise InputError(
                f"{self.folder} is not complete, {len(self.missing)} of {self.manifest.num_parts} parts are missing; "
                "run embed again with the same words"
            )
        for part in range(self.manifest.num_parts):
            yield self.part(part, columns)

    def part(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """Return a part.

        Raises:
            InputError: if it is broken, or not there.
        """
        try:
            return pq.read_table(self._file(number), columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self._file(number)} cannot be read; remove it, and run embed again") from error

    def part_sizes(self) -> list[list[int]]:
        """Return rows and bytes of each part, by which another is told from it.

        Raises:
            InputError: if a part is missing, or broken.
        """
        sizes = []
        for number in range(self.manifest.num_parts):
            file = self._file(number)
            try:
                sizes.append([pq.read_metadata(file).num_rows, file.stat().st_size])
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{file} cannot be read; remove it, and run embed again") from error
        return sizes

    def name_index(self, index: dict[str, Any]) -> None:
        """Name the faiss index in the manifest."""
        self.manifest = replace(self.manifest, index=index)
        self._write_manifest()

    def _write_manifest(self) -> None:
        words = json.dumps(asdict(self.manifest), indent=2) + "\n"
        replace_file(self.folder / MANIFEST, lambda path: path.write_text(words))

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.parquet"


def vectors(part: pa.Table) -> npt.NDArray[np.float32]:
    """Return the embeddings ``(N, D)`` of a part, without a copy of them."""
    column = part["embedding"].combine_chunks()
    flat: npt.NDArray[np.float32] = column.flatten().to_numpy()
    return flat.reshape(len(part), -1)


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, and put it there when it is whole."""
    scratch = file.with_name(f".{file.name}.part")
    write(scratch)
    scratch.replace(file)

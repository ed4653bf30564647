"""A data set in two parts: the data folder, and a folder of additional images without labels."""

from collections.abc import Sequence

import pyarrow as pa

from mlflow_ssl.datasets.sources.base import Reader, Source


class PartsReader:
    """Bytes by row of a table whose column ``part`` says which source a row is of."""

    def __init__(self, sources: Sequence[Source], table: pa.Table) -> None:
        self._part = table["part"].to_numpy()
        self._readers = [source.reader(table) for source in sources]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._part)

    def __getitem__(self, row: int) -> bytes:
        """Return the bytes of one image file.

        Raises:
            OSError: if they cannot be read any more.
        """
        reader: Reader = self._readers[self._part[row]]
        return reader[row]


def open_reader(sources: Sequence[Source], table: pa.Table) -> Reader:
    """Return a reader of the rows of a table."""
    return PartsReader(sources, table) if len(sources) > 1 else sources[0].reader(table)

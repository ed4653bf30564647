"""What a run says, in the order it says it: on disk before anything is sent."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


class Journal:
    """An append-only file of entries, one JSON line each, and a mark of how much of it has arrived.

    What was appended survives the death of the process, and what `sync` has seen that of the machine. Any thread may
    append; one reads and marks.

    Args:
        folder: where ``<name>.jsonl`` and ``<name>.sent`` stand; made if missing.
        name: of the journal.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{name}.jsonl"
        self._lock = threading.Lock()
        self._lines = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._mark = os.open(folder / f"{name}.sent", os.O_RDWR | os.O_CREAT, 0o644)
        # a killed process may have left the last line half written
        self.written = self.file.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self._lines, self.written)
        self.sent = min(int(os.pread(self._mark, 32, 0) or b"0"), self.written)

    def append(self, entry: Entry) -> None:
        """Write an entry at the end.

        Raises:
            OSError: if the disk does not take it; the journal is as it was before.
        """
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            try:
                written = os.write(self._lines, line)
                if written < len(line):
                    os.write(self._lines, line[written:])  # says why it does not fit
            except OSError:
                os.ftruncate(self._lines, self.written)
                raise
            self.written += len(line)

    def unsent(self, limit: int) -> list[tuple[Entry, int]]:
        """Return up to ``limit`` entries after the mark, each with where the mark stands after it."""
        found, end, written = [], self.sent, self.written  # before reading: a line may be whole only a moment later
        with self.file.open("rb") as lines:
            lines.seek(self.sent)
            for line in islice(lines, limit):
                end += len(line)
                if end > written:  # is being written
                    break
                found.append((json.loads(line), end))
        return found

    def mark(self, end: int) -> None:
        """Remember that everything before ``end`` has arrived."""
        self.sent = end
        with contextlib.suppress(OSError):  # a full disk: what is sent again does no harm
            os.pwrite(self._mark, b"%-20d" % end, 0)

    def __iter__(self) -> Iterator[Entry]:
        """Yield every entry, sent or not."""
        with self.file.open("rb") as lines:
            yield from map(json.loads, lines)

    def sync(self) -> None:
        """Have the disk hold what was appended."""
        os.fsync(self._lines)

    def close(self) -> None:
        """Close the files."""
        os.close(self._lines)
        os.close(self._mark)

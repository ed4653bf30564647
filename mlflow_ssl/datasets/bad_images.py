"""Images that cannot be read: what is done about them, and the list of them."""

import csv
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

POLICIES = ("error", "skip", "replace")

BAD_LABEL = -2
"""Label of an image that was to be evaluated and could not be read; `UNLABELLED` is -1."""

_HEADER = ["path", "reason"]


@dataclass(frozen=True)
class BadImage:
    """A file that looks like an image and cannot be read as one."""

    path: str
    reason: str


class BadImageList:
    """A CSV file of images that cannot be read, with the reasons; loader workers and ranks add to it at the same time.

    Args:
        file: made on first use.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._said: set[str] = set()

    def start(self, images: Iterable[BadImage]) -> None:
        """Write the list anew, with a header."""
        with self.file.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(_HEADER)
            writer.writerows((image.path, image.reason) for image in images)

    def add(self, image: BadImage) -> None:
        """Add an image, once for each process; one short write at the end of a file is never torn by another's."""
        if image.path in self._said:
            return
        self._said.add(image.path)
        line = _Line()
        csv.writer(line).writerow((image.path, image.reason))
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.text.encode())
        finally:
            os.close(descriptor)

    def read(self) -> list[BadImage]:
        """Return the images, each once."""
        if not self.file.exists():
            return []
        with self.file.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if len(row) == 2 and row != _HEADER]
        return [BadImage(path, reason) for path, reason in dict(reversed(rows)).items()][::-1]


class _Line:
    text = ""

    def write(self, text: str) -> None:
        self.text += text

"""A metric of a training that another process runs, as it comes: from the journal in its output folder."""

import json
from pathlib import Path

from mlflow_ssl.tracking.run import FOLDER


class MetricTail:
    """What a training says of one metric, in order.

    Args:
        output: its output folder.
        metric: name.

    Attributes:
        names: of all metrics that it has said anything of.
    """

    def __init__(self, output: Path, metric: str) -> None:
        self.names: set[str] = set()
        self._file = output / FOLDER / "records.jsonl"
        self._metric = metric
        self._read = 0

    def new(self) -> list[tuple[int, float]]:
        """Return step and value of what came since the last call; a line that is being written comes next time."""
        try:
            with self._file.open("rb") as lines:
                lines.seek(self._read)
                text = lines.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        found = []
        for line in whole.splitlines():
            for name, value, _, step in json.loads(line).get("metrics", ()):
                self.names.add(name)
                if name == self._metric:
                    found.append((step, value))
        return found

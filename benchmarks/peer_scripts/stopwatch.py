"""When the steps of a training ended: a Lightning callback that all candidates are measured with alike."""

import json
import os
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback


class Stopwatch(Callback):
    """Write the clock at the first batch and at each step's end to the file that ``STOPWATCH`` names."""

    def __init__(self) -> None:
        self.first_batch: float | None = None
        self.ends: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Note when the first batch is there."""
        if self.first_batch is None:
            self.first_batch = time.time()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the end of a step."""
        self.ends.append(time.time())

    def on_train_end(self, *_: Any) -> None:
        """Write what was noted, in one piece: whoever waits for the file reads it at once."""
        file = Path(os.environ["STOPWATCH"])
        file.with_suffix(".part").write_text(json.dumps({"first_batch": self.first_batch, "ends": self.ends}))
        file.with_suffix(".part").rename(file)

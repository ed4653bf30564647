"""How many metrics a tracking server takes: ``python benchmarks/tracking_rate.py [--metrics 8000] [--runs 1 4 16]``.

A real MLflow server of one worker on the same machine, over SQLite, and over PostgreSQL where it is installed. As many
runs as are asked for send what they have in their journals at once, by this package's own sender: joined into large
requests, as a backlog is, or a request for each entry of ten metrics, as a training in progress sends them. Printed are
metrics and requests per second of all runs together, and how many trainings that is: a sender begins a request at most
every ``mlflow_ssl.tracking.sender.SHORTEST_PAUSE`` seconds. Clients and server share the machine, so that a server
alone would do better.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from servers import running_postgresql, running_server  # type: ignore[import-not-found]

from mlflow_ssl.tracking.delivery import RecordDelivery
from mlflow_ssl.tracking.journal import Journal
from mlflow_ssl.tracking.sender import SHORTEST_PAUSE, Sender

NAMES = [f"train/metric_{number}" for number in range(10)]
"""What a training logs at a time: loss, rate, tau, speed and the like."""


class Rate(NamedTuple):
    """Of all runs together, a second."""

    metrics: float
    requests: float


class Counted:
    """Send, and count the requests."""

    def __init__(self, send: RecordDelivery, *, joined: bool) -> None:
        self.requests = 0
        self._send = send
        self._most = None if joined else 1

    def __call__(self, entries: Any) -> int:
        """Send the first entries and return how many."""
        self.requests += 1
        return self._send(entries[: self._most])


@contextmanager
def stores() -> Iterator[dict[str, str | None]]:
    """Yield the URI of each store that there is; None is for a SQLite file of the server's own."""
    with ExitStack() as stack:
        found: dict[str, str | None] = {"SQLite": None}
        try:
            found["PostgreSQL"] = stack.enter_context(running_postgresql())
        except BaseException as reason:
            if type(reason).__name__ != "Skipped":  # pytest's
                raise
            print(f"PostgreSQL is left out: {reason}", flush=True)
        yield found


def measure(server: Any, folder: Path, *, runs: int, metrics: int, joined: bool) -> Rate:
    """Have runs send so many metrics together, and return how fast they went.

    Raises:
        RuntimeError: if not all of them arrive.
    """
    client = server.client
    experiment = client.get_experiment_by_name("Default").experiment_id
    sending = []
    entries = metrics // len(NAMES) // runs
    for number in range(runs):
        run = client.create_run(experiment)
        journal = Journal(folder / f"{number}", "records")
        for step in range(entries):
            journal.append({"kind": "metrics", "metrics": [[name, 0.5, 1000 + step, step] for name in NAMES]})
        send = Counted(RecordDelivery(server.client, run.info.run_id), joined=joined)
        sending.append((Sender(journal, send), send, run.info.run_id))
    began = time.perf_counter()
    for sender, _, _ in sending:
        sender.start()
    draining = [threading.Thread(target=sender.drain, kwargs={"patience": 60}) for sender, _, _ in sending]
    for thread in draining:
        thread.start()
    for thread in draining:
        thread.join()
    seconds = time.perf_counter() - began
    for sender, _, run_id in sending:
        sender.stop()
        arrived = len(client.get_metric_history(run_id, NAMES[-1]))
        if arrived != entries:
            raise RuntimeError(f"{arrived} of {entries} entries have arrived: {sender.trouble or sender.refused}")
    requests = sum(send.requests for _, send, _ in sending)
    return Rate(runs * entries * len(NAMES) / seconds, requests / seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--metrics", type=int, default=8000)
    parser.add_argument("--runs", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    print(f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}; {asked.rounds} rounds\n")
    print("| store | runs at once | | metrics a second | requests a second | trainings that is |")
    print("| --- | --- | --- | --- | --- | --- |")
    with stores() as found, tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        servers = {}
        for name, uri in found.items():
            folder = Path(scratch, name)
            folder.mkdir()
            store = uri or f"sqlite:///{folder}/mlflow.db"
            servers[name] = stack.enter_context(running_server(folder, store))
        for runs in asked.runs:
            for joined in (True, False):
                rates: dict[str, list[Rate]] = {name: [] for name in servers}
                for number in range(asked.rounds):
                    for name, server in servers.items():
                        folder = Path(scratch, f"{name}-{runs}-{joined}-{number}")
                        # an entry a request is slow: fewer of them tell as much
                        metrics = asked.metrics if joined else asked.metrics // 10
                        rates[name].append(measure(server, folder, runs=runs, metrics=metrics, joined=joined))
                for name, each in rates.items():
                    print_row(name, runs, each, joined=joined)


def print_row(name: str, runs: int, rates: list[Rate], *, joined: bool) -> None:
    """Print what the rounds have found: medians with least and most."""
    cells = []
    for values, digits in (([rate.metrics for rate in rates], 0), ([rate.requests for rate in rates], 1)):
        median, least, most = statistics.median(values), min(values), max(values)
        cells.append(f"{median:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})")
    trainings = f"{statistics.median(rate.requests for rate in rates) * SHORTEST_PAUSE:.0f}"
    how = "joined" if joined else "one by one"
    print(f"| {name} | {runs} | {how} | {' | '.join(cells)} | {'' if joined else trainings} |", flush=True)


if __name__ == "__main__":
    main()

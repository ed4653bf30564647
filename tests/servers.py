"""Real MLflow servers that can be killed and come back, a proxy that makes them fail, and a PostgreSQL."""

import collections
import contextlib
import enum
import http.client
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

START_SECONDS = 120


def free_port():
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """An `mlflow server` that can be killed, and started again with the same store at the same address.

    Args:
        folder: for its artifacts, its log and, by default, its store.
        store: URI of its store, or a migrated SQLite file to begin with a copy of.
    """

    def __init__(self, folder, store):
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._store = store
        if isinstance(store, Path):
            shutil.copy(store, folder / "mlflow.db")
            self._store = f"sqlite:///{folder / 'mlflow.db'}"
        self._process = None

    @property
    def client(self):
        """A client that speaks to the server itself, whatever MLflow's own settings are."""
        return MlflowClient(self.uri)

    def start(self):
        """Start it and wait until it answers."""
        words = ["-w", "1", "--port", str(self.port), "--backend-store-uri", self._store]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "mlflow",
                    "server",
                    *words,
                    "--artifacts-destination",
                    str(self.folder / "files"),
                ],
                cwd=self.folder,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self.answers, "the server answers")

    def answers(self):
        """Return whether it is up."""
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended: {(self.folder / 'server.log').read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    @property
    def down(self):
        """Whether nobody listens at its address."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) != 0

    def kill(self):
        """Kill it and its workers without a warning."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
            wait_until(lambda: self.down, "its workers are gone too")


@contextlib.contextmanager
def running_server(folder, store):
    """Yield a running `Server`, which may be down at the end."""
    server = Server(folder, store)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def wait_until(reached, what, seconds=START_SECONDS):
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s until {what}")
        time.sleep(0.05)


class Fault(enum.Enum):
    """What becomes of a request."""

    REFUSE = "the connection is closed before the request is read"
    DELAY = "it is forwarded after a while"
    ERROR = "answered 500"
    BUSY = "answered 429"
    LOSE = "forwarded, and the answer lost"


class FaultyProxy:
    """An HTTP proxy before a server, some of whose requests go wrong.

    Args:
        target: port of the server.
        seed: of the draws.

    Attributes:
        faults: how many of any 20 requests have each fault; empty passes all.
        delay: seconds of `Fault.DELAY`.
        refused_paths: words in a path that is answered 413, as one for a file too large.
        seen: how often each fault happened.
    """

    def __init__(self, target, seed=0):
        self.target = target
        self.delay = 0.3
        self.refused_paths = ()
        self.seen = collections.Counter()
        self._random = random.Random(seed)
        self._deck = []
        self._lock = threading.Lock()
        self.faults = {}
        self._server = _QuietServer(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        """Start."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        """Stop."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def faults(self):
        """See above."""
        return self._faults

    @faults.setter
    def faults(self, faults):
        with self._lock:
            self._faults, self._deck = faults, []

    def draw(self):
        """Return the fault of the next request; None passes it."""
        with self._lock:
            if not self._deck:
                dealt = [fault for fault, number in self._faults.items() for _ in range(number)]
                self._deck = self._random.sample([*dealt, *[None] * (20 - len(dealt))], 20)
            fault = self._deck.pop()
            self.seen[fault] += 1
        return fault


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass


class _Handler(BaseHTTPRequestHandler):
    def _answer(self):
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if any(word in self.path for word in proxy.refused_paths):
            self._reply(413, [], b"too large")
            return
        fault = proxy.draw()
        if fault is Fault.REFUSE:
            self._hang_up()
        elif fault is Fault.ERROR:
            self._reply(500, [], b"something broke")
        elif fault is Fault.BUSY:
            self._reply(429, [("Retry-After", "0")], b"slow down")
        else:
            if fault is Fault.DELAY:
                time.sleep(proxy.delay)
            answer = self._forward(body)
            if answer is None or fault is Fault.LOSE:
                self._hang_up()
            else:
                self._reply(*answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer  # noqa: N815 the standard library's names

    def log_message(self, *_):
        pass

    def _forward(self, body):
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.proxy.target, timeout=60)
        with contextlib.closing(upstream):
            try:
                upstream.request(self.command, self.path, body, dict(self.headers) | {"Connection": "close"})
                answer = upstream.getresponse()
                return answer.status, answer.getheaders(), answer.read()
            except (OSError, http.client.HTTPException):
                return None

    def _reply(self, status, headers, body):
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self):
        # a reset rather than an empty answer
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


@contextlib.contextmanager
def running_postgresql():
    """Yield the URI of an empty database of a PostgreSQL of its own; skip the test where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install psycopg2-binary")
    port, programs = free_port(), found[-1].parent
    # neither pytest's own folder nor every TMPDIR is one that another user may enter
    with tempfile.TemporaryDirectory(prefix="postgresql-", dir="/tmp" if os.geteuid() == 0 else None) as name:
        as_user = []
        if os.geteuid() == 0:  # it refuses to run as root
            shutil.chown(name, "postgres")
            as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
        data = f"{name}/data"
        made = [*as_user, programs / "initdb", "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(made, cwd="/", check=True, capture_output=True)
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        command = [*as_user, programs / "postgres", "-D", data, "-p", str(port), "-k", name, *settings]
        with Path(name, "server.log").open("wb") as log:
            process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log)
        try:
            ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
            wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, "PostgreSQL answers")
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGQUIT)  # ends it at once
            process.wait(timeout=60)

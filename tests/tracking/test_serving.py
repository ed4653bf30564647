"""A real tracking server, a registration through it, and a real `mlflow models serve` of the champion."""

import base64
import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
import torch
from mlflow import MlflowClient
from packages import noise, package, resnet, validation_transform, write_every_mode
from servers import free_port

from mlflow_ssl.datasets.decode import decode
from mlflow_ssl.tracking.registry import register_package
from mlflow_ssl.transforms import apply, to_tensor

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # MLflow warns about itself

STARTS_WITHIN_SECONDS = 180


class Server:
    """A process group that answers at an address, until the block ends."""

    def __init__(self, *arguments, folder, **environment):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{arguments[0]}.log"
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *arguments, "--port", str(self.port)],
                cwd=folder,
                env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | quiet | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self):
        try:
            self.await_answer()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def await_answer(self):
        deadline = time.monotonic() + STARTS_WITHIN_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no server: {self.log.read_text()[-3000:]}")
            time.sleep(0.3)

    def answers(self):
        try:
            return requests.get(f"{self.address}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracking")
    with Server("server", "-w", "1", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", folder=folder) as server:
        yield server


@pytest.fixture(scope="module")
def registered(tracking, tmp_path_factory):
    """Register through the server, its artifacts by proxy, and return client, run and package."""
    folder = package(tmp_path_factory.mktemp("packaged") / "package", resnet())
    client = MlflowClient(tracking.address)
    run_id = client.create_run(client.create_experiment("here")).info.run_id
    register_package(client, run_id, folder)
    return client, run_id, folder


@pytest.fixture(scope="module")
def service(tracking, registered, tmp_path_factory):
    arguments = ("models", "serve", "-m", "models:/tiny@champion", "--env-manager", "local")
    folder = tmp_path_factory.mktemp("service")
    with Server(*arguments, folder=folder, MLFLOW_TRACKING_URI=tracking.address) as server:
        yield server


def ask(service, inputs, **rest):
    return requests.post(f"{service.address}/invocations", json={"inputs": inputs, **rest}, timeout=300)


def predictions(answer):
    assert answer.status_code == 200, answer.text[:2000]
    return answer.json()["predictions"]


def coded(data):
    return base64.b64encode(data).decode()


@torch.no_grad()
def embedded(backbone, file):
    """Return the embedding of a file as the training's validation makes it."""
    normalized = to_tensor(apply(validation_transform(), decode(file.read_bytes()), draw=(42, 0, 7, 0)))
    return backbone(normalized[None])[0]


def cosine(a, b):
    return torch.cosine_similarity(torch.as_tensor(a).double(), torch.as_tensor(b).double(), dim=-1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_every_mode(tmp_path_factory.mktemp("pictures") / "every_mode")


def test_registering_through_a_server_with_proxied_artifacts_is_done_once(registered):
    client, run_id, folder = registered
    assert register_package(MlflowClient(client.tracking_uri), run_id, folder) == "1"
    assert len(client.search_model_versions("name = 'tiny'")) == 1
    (output,) = client.get_run(run_id).outputs.model_outputs
    assert client.get_logged_model(output.model_id).artifact_location.startswith("mlflow-artifacts:")
    assert client.get_model_version_by_alias("tiny", "champion").version == "1"


def test_embeddings_over_http_are_those_of_the_training(service, pictures):
    backbone = resnet().backbone
    got = predictions(ask(service, [coded(file.read_bytes()) for file in pictures]))
    for file, embedding in zip(pictures, got, strict=True):
        assert cosine(embedding, embedded(backbone, file)) >= 0.9999, file.name


@pytest.mark.parametrize("count", [1, 32, 1000])
def test_any_number_of_images_is_answered_in_order(service, pictures, count):
    different = [coded(file.read_bytes()) for file in pictures]
    sent = [different[number % len(different)] for number in range(count)]
    got = predictions(ask(service, sent))
    assert np.shape(got) == (count, 512)
    expected = predictions(ask(service, different))
    assert (cosine(got, [expected[number % len(different)] for number in range(count)]) > 0.99999).all()


def test_tensors_and_pixels_are_taken_as_numbers(service):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = resnet()(images)
    assert (cosine(predictions(ask(service, images.tolist())), expected) > 0.9999).all()
    assert np.shape(predictions(ask(service, [noise().tolist()]))) == (1, 512)


def test_neighbours_come_when_they_are_asked_for(service, pictures):
    sent = [coded(pictures[0].read_bytes())]
    (row,) = predictions(ask(service, sent, params={"neighbours": 3}))
    assert row["embedding"] == pytest.approx(predictions(ask(service, sent))[0], rel=1e-4, abs=1e-5)
    assert len(row["neighbours"]) == 3
    assert {neighbour["label"] for neighbour in row["neighbours"]} <= {"cat", "dog", "élan"}
    distances = [neighbour["distance"] for neighbour in row["neighbours"]]
    assert distances == sorted(distances)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (coded(b"no image"), "image 2 is not an image file that Pillow reads"),
        ("%%%", "image 2 is not base64"),
        (None, "image 2 must be a file"),
    ],
)
def test_a_bad_image_is_named_and_the_server_lives(service, pictures, bad, reason):
    good = coded(pictures[0].read_bytes())
    answer = ask(service, [good, good, bad, good])
    assert answer.status_code == 400
    assert reason in answer.json()["message"]
    assert len(answer.content) < 500  # and not the request
    assert len(predictions(ask(service, [good]))) == 1


@pytest.mark.parametrize("neighbours", [-1, 31, "three"])
def test_a_bad_number_of_neighbours_is_refused(service, pictures, neighbours):
    answer = ask(service, [coded(pictures[0].read_bytes())], params={"neighbours": neighbours})
    assert answer.status_code == 400
    assert "neighbours" in answer.json()["message"]


def test_eight_clients_at_once_are_answered_each_its_own(service, pictures):
    texts = [coded(file.read_bytes()) for file in pictures]
    expected = predictions(ask(service, texts))
    wanted = [number % len(texts) for number in range(64)]
    with ThreadPoolExecutor(8) as clients:
        got = list(clients.map(lambda number: predictions(ask(service, [texts[number]] * 3)), wanted))
    for number, rows in zip(wanted, got, strict=True):
        assert (cosine(rows, [expected[number]] * 3) > 0.99999).all()

"""MLflow's Kubernetes backend on our image, job template and entry points; Docker and the cluster are pretended."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kubernetes_validate
import mlflow
import pytest
import yaml
from launching import assert_one_whole_run, small_words
from mlflow.exceptions import ExecutionException
from servers import wait_until
from training import only_run

from mlflow_ssl.launch.pod import unquoted

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""Names of jobs and containers: a label of RFC 1123, of at most 63 characters."""
IMAGE = "registry.example.com/mlflow_ssl"
DIGEST = "sha256:" + 64 * "0"


class Docker:
    """What MLflow asks of Docker: that an image is there, can be pushed, and has a digest."""

    def __init__(self):
        self.images = self
        self.pushed = []

    def list(self, name):
        return []

    def pull(self, name):
        return SimpleNamespace(id="sha256:1", tags=[f"{name}:latest"])

    def push(self, repository, **_):
        self.pushed.append(repository)
        return []

    def get_registry_data(self, name):
        return SimpleNamespace(id=DIGEST)


class Cluster:
    """What MLflow asks of a cluster: that it takes a job, and how that is.

    Args:
        ends: returns how a job ends, ``Complete`` or ``Failed``.
    """

    def __init__(self, ends):
        self.jobs = []
        self._ends = ends

    def create_namespaced_job(self, namespace, body, **_):
        self.jobs.append(body)

    def read_namespaced_job_status(self, **_):
        condition = SimpleNamespace(type=self._ends(*self.jobs), status="True", message="over")
        return SimpleNamespace(status=SimpleNamespace(start_time=1, conditions=[condition]))


@pytest.fixture
def launch(store, tmp_path, monkeypatch):
    """Return a function that does what ``mlflow run k8s --backend kubernetes`` does, and returns the job."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")  # `docker info` finds its daemon
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    docker = Docker()
    monkeypatch.setattr("docker.from_env", lambda **_: docker)
    monkeypatch.setattr("kubernetes.config.load_kube_config", lambda context: None)
    monkeypatch.chdir(ROOT)  # where its words are typed
    config = json.loads((ROOT / "k8s" / "config.json").read_text())

    def start(ends=lambda _: "Complete", **parameters):
        cluster = Cluster(ends)
        monkeypatch.setattr("kubernetes.client.BatchV1Api", lambda: cluster)
        try:
            mlflow.projects.run("k8s", parameters=parameters, backend="kubernetes", backend_config=dict(config))
        finally:
            (job,) = cluster.jobs
        assert docker.pushed == [f"{IMAGE}:latest"]
        return job

    return start


def container_of(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def test_the_job_is_one_that_kubernetes_takes(launch):
    job = launch(experiment="byol", data_path="/data")
    for version in ("1.31", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(job, version, strict=True)
    container = container_of(job)
    assert NAME.fullmatch(job["metadata"]["name"])
    assert NAME.fullmatch(container["name"])
    assert container["image"] == f"{IMAGE}:latest@{DIGEST}"
    assert {each["name"] for each in container["env"]} >= {"MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI"}


def test_every_volume_of_the_template_is_there_and_mounted():
    pod = yaml.safe_load((ROOT / "k8s" / "job.yaml").read_text())["spec"]["template"]["spec"]
    mounted = [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]
    assert sorted(mounted) == sorted(volume["name"] for volume in pod["volumes"])


def test_the_outputs_lie_where_the_image_runs():
    dockerfile = (ROOT / "Dockerfile").read_text()
    (folder,) = re.findall(r"^WORKDIR (.*)$", dockerfile, re.MULTILINE)
    (user,) = re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE)
    pod = yaml.safe_load((ROOT / "k8s" / "job.yaml").read_text())["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["outputs"] == f"{folder}/outputs"
    assert pod["securityContext"]["runAsUser"] == int(user)


def test_the_image_holds_what_a_run_needs():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    pyproject = {"pyproject.toml", "README.md", "LICENSE"}  # the build reads these
    assert kept == {"MLproject", "configs", "mlflow_ssl"} | pyproject
    assert all((ROOT / name).exists() for name in kept)


def test_both_projects_have_the_same_entry_points():
    local, image = (yaml.safe_load((ROOT / name).read_text()) for name in ("MLproject", "k8s/MLproject"))
    for entry_point in local["entry_points"].values():
        entry_point["command"] = entry_point["command"].replace("-m mlflow_ssl", "-m mlflow_ssl.launch.pod", 1)
    assert image["entry_points"] == local["entry_points"]


@pytest.mark.parametrize(
    "words",
    [
        {"experiment": "byol", "data_path": "/data/my images"},
        {"export.types": "[torchscript,onnx]"},
        {"overrides": "+a=1 '~b' \"c='two words'\""},
    ],
)
def test_a_pod_gets_the_words_that_were_typed(launch, words):
    command = container_of(launch(**words))["command"]
    assert command[:3] == ["python", "-m", "mlflow_ssl.launch.pod"]
    got = unquoted(command[3:])
    for key, value in words.items():
        assert got[got.index(f"--{key}") + 1] == value
    assert got[got.index("--overrides") + 1] == words.get("overrides", "")


def test_a_failed_job_ends_its_run_failed(launch, store):
    with pytest.raises(ExecutionException, match="failed"):
        launch(lambda _: "Failed", experiment="byol")
    assert only_run(store).info.status == "FAILED"


@contextlib.contextmanager
def pod_of(job):
    """Start what a job's container runs, as the image would, and end it with the context."""
    container = container_of(job)
    run = {each["name"]: each["value"] for each in container["env"] if each["name"] != "MLFLOW_SSL_CACHE"}
    words = [sys.executable, *container["command"][1:]]
    with subprocess.Popen(words, cwd=ROOT, env=os.environ | run | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_pod_in_an_evicted_ones_place_goes_on_in_its_run(launch, store, image_folder, tmp_path):
    two = ["trainer.devices=2", "trainer.strategy=ddp"]  # as a pod with two GPUs
    words = [*small_words(image_folder({"a": 20, "b": 20}), tmp_path, epochs=60), *two]
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"

    def ends(job):
        with pod_of(job) as pod:
            wait_until(lambda: last.exists() or pod.poll() is not None, "the training has saved")
            pod.terminate()
            assert pod.wait(60) == 128 + signal.SIGTERM
        with pod_of(job) as pod:
            return "Complete" if pod.wait(120) == 0 else "Failed"

    launch(ends, **dict(word.split("=", 1) for word in words))
    run = only_run(store)
    assert_one_whole_run(store, run, backend="kubernetes", steps=60)
    assert f"going on with run {run.info.run_id} from {last}" in (tmp_path / "out" / "main.log").read_text()

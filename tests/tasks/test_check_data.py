import os
import shutil
import subprocess
import sys

import pytest
from conftest import write_images
from mlflow import MlflowClient
from PIL import Image

from mlflow_ssl.cli import main


@pytest.fixture
def messy(tmp_path):
    """Write 60 and 20 images of two classes with every kind of trouble among them."""
    root = write_images(tmp_path / "my data", {"a": 60, "b": 20})
    (root / "a" / "bad.png").write_bytes(b"xx")
    (root / "a" / "empty.jpg").write_bytes(b"")
    shutil.copy(root / "a" / "010.png", root / "b" / "copy of a.png")
    shutil.copytree(root / "a", root / "c", ignore=lambda *_: [f"{n:03d}.png" for n in range(8, 60)])
    Image.new("RGB", (900, 10)).save(root / "b" / "wide.png")
    return root


@pytest.fixture
def report(capsys):
    def run(*words):
        code = main(["check-data", *map(str, words)])
        return code, capsys.readouterr()

    return run


def test_everything_that_is_wrong_is_named(messy, report):
    code, said = report(messy, "val_size=0.2")
    assert code == 0
    text = " ".join(said.out.split())
    assert "is empty │ 2 │ a/empty.jpg" in text
    assert "is no image of a format that is read │ 2 │ a/bad.png" in text
    assert "The same content in several classes: one label is wrong" in text
    assert "The same content in several splits: what is measured was trained on" in text
    assert "b/wide.png │ unusually" in text
    assert "│ a │ 60 │" in text
    assert "datamodule.on_bad_image=skip or replace" in text
    assert "\x1b" not in said.out  # a pipe takes it


def test_a_clean_folder_has_nothing_in_its_way(tmp_path, report):
    write_images(tmp_path, {"a": 250, "b": 250}, size=6)
    _, said = report(tmp_path)
    assert "-> nothing stands in the way of a training" in said.out
    assert "several" not in said.out


def test_options_mean_what_they_mean_in_a_training(messy, report):
    _, said = report(f"data_path={messy}", "datamodule.exclude_filter=[c/, bad, empty]", "labels=none")
    text = " ".join(said.out.split())
    assert "classes │ none" in text
    assert "cannot be read │ 0" in text


def test_a_list_is_checked_too(messy, report):
    (messy / "list.csv").write_text("path,label\na/000.png,x\na/001.png,y\ngone.png,y\n")
    _, said = report(messy / "list.csv", "val_size=0", "test_size=0")
    assert "cannot be looked at" in said.out
    assert "gone.png" in said.out


def test_a_report_is_files_too(messy, report, tmp_path):
    code, said = report(messy, f"report={tmp_path / 'report'}")
    assert code == 0
    assert (tmp_path / "report" / "report.txt").read_text() == said.out
    assert len((tmp_path / "report" / "bad_images.csv").read_text().splitlines()) == 5
    for name in ("classes", "copies", "leaks", "contradictions", "oddest"):
        assert "," in (tmp_path / "report" / f"{name}.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "error: datamodule.data_path must be an existing folder, got "),
        ([], "error: data_path must be given"),
        (["nowhere", "vall_size=0.2"], "vall_size"),
    ],
)
def test_a_mistake_is_one_line(words, message, report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = report(*words)
    assert code == 2
    assert message in said.err
    assert "Traceback" not in said.err


@pytest.mark.slow
def test_launched_by_mlflow_the_report_is_in_the_run(messy, store):
    experiment = store.create_experiment("checks")
    run = store.create_run(experiment)
    command = [
        sys.executable,
        "-m",
        "mlflow_ssl",
        "check-data",
        "--data_path",
        str(messy),
        "--overrides",
        "val_size=0.2",
    ]

    subprocess.run(command, env=os.environ | {"MLFLOW_RUN_ID": run.info.run_id}, check=True, capture_output=True)
    ended = store.get_run(run.info.run_id)
    assert ended.info.status == "FINISHED"
    assert (ended.data.metrics["data/bad_images"], ended.data.metrics["data/images"]) == (4, 90)
    assert ended.data.metrics["data/copies"] == 9
    assert len(ended.data.tags["data.digest"]) == 32
    artifacts = {file.path for file in MlflowClient().list_artifacts(run.info.run_id, "data")}
    assert {"data/report.txt", "data/bad_images.csv", "data/leaks.csv"} <= artifacts

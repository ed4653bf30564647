"""What a start imports and an epoch reads: counts, which are the same on a slow machine as on a fast one."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from tiny import fit, tiny_method
from training import SMALL

from mlflow_ssl.callbacks import Health, KNNEvaluation, LinearProbe, StepMetrics
from mlflow_ssl.config import build, compose_config, resolve
from mlflow_ssl.datasets import image
from mlflow_ssl.datasets.sources.folder import FileReader

HEAVY = ["albumentations", "bokeh", "cv2", "datasets", "joblib", "lightning_fabric", "matplotlib", "mlflow", "numba"]
HEAVY += ["onnx", "onnxruntime", "pandas", "PIL", "pyarrow", "pytorch_lightning", "scipy", "sklearn", "sqlalchemy"]
HEAVY += ["timm", "torch", "torchmetrics", "torchvision", "umap", "webdataset"]
LATER = ["bokeh", "datasets", "numba", "onnx", "onnxruntime", "onnxscript", "sklearn", "umap", "webdataset"]
"""What only the drawing, the test, an export or another source of data needs."""


def imported(code, *words):
    """Return the names of the modules that some code has imported."""
    report = f"{code}\nimport sys, json; json.dump(sorted(sys.modules), open(sys.argv[-1], 'w'))"
    done = subprocess.run([sys.executable, "-c", report, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "said", "most"),
    [
        (["--help"], "python -m mlflow_ssl", 550),
        (["--version"], "mlflow_ssl 0", 150),
        (["experiment=nonsense"], "experiment has no option 'nonsense'", 550),
        (["trainer.max_epoks=3"], "no config key is named 'trainer.max_epoks'", 550),
        (["--seed"], "--seed must have a value", 550),
    ],
)
def test_an_answer_imports_little_and_nothing_heavy(tmp_path, words, said, most):
    code = f"from mlflow_ssl.cli import main; main({words!r})"
    assert said in imported(code, str(tmp_path / "modules"))
    modules = json.loads((tmp_path / "modules").read_text())
    assert not [name for name in HEAVY if name in modules]
    assert len(modules) <= most


def test_the_package_itself_imports_nothing_else(tmp_path):
    imported("pass", str(tmp_path / "before"))
    imported("import mlflow_ssl", str(tmp_path / "after"))
    before, after = (set(json.loads((tmp_path / name).read_text())) for name in ("before", "after"))
    assert after - before <= {"mlflow_ssl", "__future__"}


def test_a_training_imports_nothing_that_its_first_step_does_not_need(tmp_path):
    parts = ("tasks.ssl", "callbacks", "datamodules", "datasets", "methods", "optimizers", "schedules", "views")
    imported("import " + ", ".join(f"mlflow_ssl.{part}" for part in parts), str(tmp_path / "modules"))
    modules = json.loads((tmp_path / "modules").read_text())
    assert not [name for name in LATER if name in modules]


@pytest.fixture
def reads(monkeypatch):
    """Count what is decoded, and which bytes are read of which file."""
    decoded, read = Counter(), Counter()
    decode, get = image.decode, FileReader.__getitem__

    def counting_decode(data, **kwargs):
        decoded[data] += 1
        return decode(data, **kwargs)

    def counting_get(self, row):
        data = get(self, row)
        read[data] += len(data)
        return data

    monkeypatch.setattr(image, "decode", counting_decode)
    monkeypatch.setattr(FileReader, "__getitem__", counting_get)
    return decoded, read


def datamodule_of(folder, *words):
    config = resolve(compose_config([*SMALL, f"data_path={folder}", "datamodule.val_size=0.25", *words]))
    datamodule = build(config.datamodule)
    datamodule.prepare_data()
    return datamodule


def contents(datamodule, split):
    """Return the bytes of the files of a split: each image is another."""
    return [(datamodule.root / path).read_bytes() for path in datamodule.index.split(split).paths]


def train(datamodule, *, epochs):
    callbacks = [KNNEvaluation(num_neighbours=3), Health(), LinearProbe(), StepMetrics()]
    settings = {"max_epochs": epochs, "check_val_every_n_epoch": epochs, "callbacks": callbacks}
    fit(tiny_method(), datamodule, **settings)


def test_an_epoch_decodes_each_image_once_for_two_views_and_a_validation_once(image_folder, reads):
    decoded, read = reads
    datamodule = datamodule_of(image_folder({"a": 24, "b": 24}))
    decoded.clear(), read.clear()
    train(datamodule, epochs=2)
    seen, validated = contents(datamodule, "train"), contents(datamodule, "val")
    # two epochs of views, and one validation whose bank the training images are
    assert decoded == Counter(dict.fromkeys(seen, 3) | dict.fromkeys(validated, 1))
    assert read == Counter({data: times * len(data) for data, times in decoded.items()})


def test_an_epoch_from_the_cache_decodes_and_reads_nothing(image_folder, reads, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_SSL_CACHE", str(tmp_path / "cache"))
    decoded, read = reads
    datamodule = datamodule_of(image_folder({"a": 24, "b": 24}), "datamodule.cache=disk")
    datamodule.setup()
    decoded.clear(), read.clear()
    loader = datamodule.train_dataloader()
    for _ in loader:
        pass
    assert decoded == Counter(contents(datamodule, "train"))
    decoded.clear(), read.clear()
    loader.sampler.set_epoch(1)
    assert sum(len(labels) for _, labels in loader) == len(datamodule.index.split("train"))
    assert not decoded
    assert not read

"""What the tests share: made-up images and a fresh tracking store."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def migrated_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty SQLite store; migrating one takes seconds, copying it does not."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the default experiment keeps its artifacts
        MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments(max_results=1)
    return folder / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, migrated_store: Path, monkeypatch: pytest.MonkeyPatch):
    """Give the test a tracking store of its own, and an empty current folder beside it."""
    import mlflow
    from mlflow import MlflowClient

    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copy(migrated_store, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    yield MlflowClient()
    mlflow.set_tracking_uri(None)  # a test may have set it, for the whole process


def write_images(root: Path, counts: Mapping[str, int], *, size: int = 24, seed: int = 0) -> Path:
    """Write noise with a brightness of its own for each class: ``counts`` images below ``root / class``."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for image in range(count):
            pixels = rng.integers(0, 100, (size, size, 3)) + 155 * number // max(len(counts) - 1, 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{image:03d}.png")
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes class folders: ``image_folder({"a": 3, "b": 2})``."""

    def make(counts: Mapping[str, int], *, size: int = 24, seed: int = 0, name: str = "images") -> Path:
        return write_images(tmp_path / name, counts, size=size, seed=seed)

    return make


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Keep the embedded digits out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SSL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield

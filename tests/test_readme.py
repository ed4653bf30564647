"""What the README tells people to copy."""

import re
from pathlib import Path

import pytest

from mlflow_ssl.config import compose_config, options, resolve
from mlflow_ssl.export import WRITERS

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def custom(tmp_path, monkeypatch):
    """Write the custom experiment, with the changed transformations, where the README says."""
    experiment, transforms = blocks("yaml")
    file = tmp_path / "configs" / "experiment" / "custom_experiment" / "byol.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(experiment + "\n" + transforms)
    monkeypatch.chdir(tmp_path)
    return resolve(compose_config(["experiment=custom_experiment/byol"]))


def test_the_custom_experiment_is_taken(custom):
    assert (custom.backbone.model_name, custom.trainer.max_epochs) == ("vit_tiny_patch16_224", 100)
    assert (custom.registry.name, custom.datamodule.data_path) == ("my_images", "/path/to/images")


def test_the_changed_transformations_draw_both_views(custom):
    first, second = custom.datamodule.augmentation_dataset.transform
    assert len(first.transforms) == 3
    assert first == second
    assert "GaussianBlur" not in str(first)


def test_the_choices_of_the_tables_exist():
    named = re.findall(r"`([\w/.]+)`", README[README.index("| choose") : README.index("## A custom experiment")])
    known = {option for group in ("trainer", "backbone", "optimizer") for option in options(group)} | set(WRITERS)
    plain = [name for name in named if re.fullmatch(r"[a-z0-9_]+", name)]
    assert len(plain) > 15
    assert set(plain) <= known


def test_the_experiments_of_the_table_exist():
    table = README[README.index("| experiment |") : README.index("Any `-P")]
    assert set(re.findall(r"`((?:base|paper)/\w+(?:/\w+)?)`", table)) <= set(options("experiment"))

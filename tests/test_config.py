"""Configs compose, build, and refuse what they do not know."""

import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from mlflow_ssl.config import (
    build,
    compose_config,
    config_folder,
    options,
    parse_word,
    resolve,
    write_composed,
    write_resolved,
)
from mlflow_ssl.errors import InputError

GROUPS = sorted(folder.name for folder in config_folder().iterdir() if folder.is_dir())
OPTIONS = [f"{group}={option}" for group in GROUPS for option in sorted(options(group))]


def composed(*words):
    return resolve(compose_config(["data_path=/data", "trainer.accelerator=cpu", *words]))


def test_the_groups_are_the_tutorials():
    named = (
        "core datamodule backbone model optimizer scheduler transforms loss task trainer callbacks export experiment"
    )
    assert set(named.split()) <= set(GROUPS)


@pytest.fixture(scope="session")
def registered(tmp_path_factory):
    """Return the folder of a network that finetuning can start from."""
    from packages import package, trained_here

    return package(tmp_path_factory.mktemp("packaged") / "package", trained_here()) / "model"


def needed(option, registered):
    """Return what else must be given with an option."""
    words = {"backbone=timm": "backbone.model_name=resnet18", "experiment=finetune": f"model_uri={registered}"}
    alone = [] if option.startswith("experiment=") else ["~experiment"]
    return [*alone, *([words[option]] if option in words else [])]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.filterwarnings("default")  # MLflow warns about its own type hints
def test_every_shipped_config_composes(option, registered):
    config = composed(option, *needed(option, registered))
    assert OmegaConf.missing_keys(config) == set()


@pytest.mark.parametrize("option", sorted(options("experiment")))
@pytest.mark.filterwarnings("default")
def test_every_experiment_builds_a_method_and_its_data(option, registered):
    option = f"experiment={option}"
    config = composed(option, "model.channels_last=false", "backbone.image_size=[32,32]", *needed(option, registered))
    if config.model.get("num_classes") == "auto":  # the data decide
        config.model.num_classes = 3
    method = build(config.model)
    assert method.embedder.num_features > 0
    assert build(config.datamodule).batch_size == config.datamodule.batch_size


@pytest.mark.parametrize("option", [option for option in options("backbone") if option != "timm"])
def test_every_backbone_file_names_a_timm_network(option):
    import timm

    assert composed("experiment=base/ssl/byol", f"backbone={option}").backbone.model_name in timm.list_models()


@pytest.mark.parametrize("option", sorted(options("optimizer")))
def test_every_optimizer_builds(option):
    import torch

    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = build(composed("experiment=base/ssl/byol", f"optimizer={option}").optimizer)([parameter])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("preset", "epochs", "lr", "decay", "tau"),
    [
        ("byol_40", 40, 0.45, 1e-6, 0.97),
        ("byol_100", 100, 0.45, 1e-6, 0.99),
        ("byol_300", 300, 0.3, 1e-6, 0.99),
        ("byol_1000", 1000, 0.2, 1.5e-6, 0.996),
        ("byol_small_batch", 1000, 0.4, 1.5e-6, 0.9995),
    ],
)
def test_presets_are_the_papers(preset, epochs, lr, decay, tau):
    config = composed(f"experiment=paper/{preset}")
    found = (config.trainer.max_epochs, config.optimizer.lr, config.optimizer.weight_decay, config.model.base_tau)
    assert found == (epochs, lr, decay, tau)


def test_the_learning_rate_of_the_command_line_reaches_schedule_and_optimizer():
    config = composed("experiment=base/ssl/byol", "optimizer.lr=0.1")
    assert (config.optimizer.lr, config.scheduler.init_lr) == (0.1, 0.1)


def test_a_users_experiment_is_found_in_the_current_folder(tmp_path, monkeypatch):
    file = tmp_path / "configs" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\ndefaults:\n  - base/ssl/byol\n  - _self_\ncore:\n  name: mine\n")
    monkeypatch.chdir(tmp_path)
    assert composed("experiment=mine").core.name == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=byoll"], "experiment has no option 'byoll'; close matches: byol"),
        (["backbone=resnet19"], "backbone has no option 'resnet19'; close matches: resnet18.*backbone=timm"),
        (["trainer.max_epoch=3"], "no config key is named 'trainer.max_epoch'; close matches: trainer.max_epochs"),
        (["optimiser=lars"], "no config key is named 'optimiser'; close matches: optimizer"),
        (["optimiser=lars", "nonsense=1"], "no config key is named 'optimiser'; close matches: optimizer"),
        (["trainer.sync_batchnorm=perhaps"], "trainer.sync_batchnorm must be true or false, got 'perhaps'"),
        (["model.channels_last=perhaps"], "model.channels_last must be auto, true or false, got 'perhaps'"),
        (["+trainer.max_epoch=3"], "trainer.max_epoch is not an argument of pytorch_lightning.Trainer.*max_epochs"),
        (["core.seed=-1"], "core.seed is wrong: .* got -1"),
        (["+core.sed=1"], "core.sed is wrong"),
        (["export.types=[torchscrip]"], "export.types.0 is wrong"),
        (["core.tag=${nowhere}"], "cannot resolve the config"),
        (["a=b=[c"], "cannot read the override"),
        (["core.seed=1,2"], "core.seed=1,2 gives several values; add -m to try each of them"),
        (["+callbacks.new={_target_: mlflow_ssl.nothing}"], "callbacks.new._target_ must be an importable name"),
        (["experiment=base/ssl/byol"], "datamodule.data_path must be given; add data_path=VALUE"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(words, message):
    with pytest.raises(InputError, match=message) as caught:
        resolve(compose_config(words))
    assert "\n" not in str(caught.value)


def test_a_typo_in_a_users_file_is_named(tmp_path, monkeypatch):
    file = tmp_path / "configs" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\ndefaults:\n  - byol\n  - _self_\ndatamodule:\n  batchsize: 3\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"datamodule.batchsize is not an argument of .*SSLDataModule.*batch_size"):
        composed("experiment=mine")


def test_a_file_that_is_not_yaml_is_named(tmp_path, monkeypatch):
    file = tmp_path / "configs" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\ncore: [")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot compose the config"):
        composed("experiment=mine")


def test_a_part_that_refuses_its_arguments_is_one_line():
    with pytest.raises(InputError, match=r"refuses its arguments"):
        build(OmegaConf.create({"_target_": "albumentations.Resize", "height": -1, "width": "x"}))


def test_what_finetuning_starts_from_must_be_given():
    with pytest.raises(InputError, match="model_uri must be given; add model_uri=VALUE"):
        composed("experiment=finetune")


@pytest.mark.filterwarnings("default")
def test_what_a_resolver_of_ours_has_to_say_stands_alone(tmp_path):
    with pytest.raises(InputError, match=r"^model_uri must be a registered model or a folder, got .*nothing$"):
        composed("experiment=finetune", f"model_uri={tmp_path / 'nothing'}")


def test_finetuning_takes_size_normalization_and_network_from_the_registered_one(registered):
    config = composed("experiment=finetune", f"model_uri={registered}")
    assert (config.backbone.model_name, config.backbone.small_stem) == ("resnet10t", True)
    assert (config.transforms.input_height, config.transforms.input_width) == (32, 32)
    assert (config.transforms.mean, config.transforms.std) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    assert config.transforms.val_transform.transforms[1].mean == [0.5, 0.4, 0.3]
    assert config.model.backbone.checkpoint_path == str(registered)
    assert config.registry.name == "resnet10t_classifier"
    wider = composed("experiment=finetune", f"model_uri={registered}", "transforms.input_width=48")
    assert wider.backbone.image_size == [32, 48]


def test_the_resolved_config_composes_to_itself():
    config = composed("experiment=byol")
    again = yaml.safe_load(OmegaConf.to_yaml(config))
    assert OmegaConf.to_container(resolve(OmegaConf.create(again))) == OmegaConf.to_container(config)


def test_shipped_configs_are_found_beside_the_package():
    assert (config_folder() / "config.yaml").is_file()
    assert isinstance(config_folder(), Path)


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("trainer.max_epochs=5", "trainer.max_epochs", 5),
        ("data_path=/a", "datamodule.data_path", "/a"),
        ("optimizer.lr=1e-3", "scheduler.init_lr", 1e-3),
        ("+trainer.devices=[0,1]", "trainer.devices", [0, 1]),
        ("core.tag='two words'", "core.tag", "two words"),
        ("resume=", "resume", ""),
    ],
)
def test_a_word_is_a_key_and_a_value(word, key, value):
    assert parse_word(word) == (key, value)


@pytest.mark.parametrize("word", ["a=[", "no equals sign", ""])
def test_a_word_that_cannot_be_read_is_named(word):
    with pytest.raises(InputError, match=re.escape(f"cannot read the override {word!r}")) as caught:
        parse_word(word)
    assert "\n" not in str(caught.value)


def test_what_is_written_of_a_config_holds_no_credential(tmp_path):
    words = ["tracking.uri=http://me:hunter2@host", "+tracking.password=hunter2"]
    unresolved = compose_config([word for word in words if "uri" in word])
    resolved = resolve(unresolved)
    write_resolved(resolved, tmp_path)
    write_composed(unresolved, words, tmp_path)
    names = ["config_resolved.yaml", "config_tree.txt", "config_unresolved.yaml", "overrides.yaml"]
    texts = {name: (tmp_path / name).read_text() for name in names}
    assert all("http://***@host" in text and "hunter2" not in text for text in texts.values())
    assert yaml.safe_load(texts["overrides.yaml"]) == ["tracking.uri=http://***@host", "+tracking.password=***"]
    assert "${core.output_dir}" in texts["config_unresolved.yaml"]
    assert "${" not in texts["config_resolved.yaml"]
    # the rest is as it was, and what the training takes keeps its password
    written = yaml.safe_load(texts["config_resolved.yaml"])
    assert written | {"tracking": 0} == OmegaConf.to_container(resolved) | {"tracking": 0}
    assert resolved.tracking.uri == "http://me:hunter2@host"

"""What a resumed training may be told anew, and whose word is taken for it."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mlflow_ssl.config import build, check_resolved, compose_config, recorded_config, resolve
from mlflow_ssl.errors import InputError
from mlflow_ssl.tasks.reproduce import package_differences
from mlflow_ssl.tasks.resume import MAY_CHANGE, Start, change, moved


@pytest.fixture(scope="module")
def composed():
    return resolve(compose_config(["experiment=byol"]))


@pytest.fixture
def config(composed):
    """Return the recorded config of a run."""
    return composed.copy()


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("trainer.max_epochs=7", "trainer.max_epochs", 7),
        ("trainer.max_time='00:00:10:00'", "trainer.max_time", "00:00:10:00"),
        ("trainer.devices=4", "trainer.devices", 4),
        ("+trainer.devices=[0,1]", "trainer.devices", [0, 1]),
        ("trainer.strategy=ddp", "trainer.strategy", "ddp"),
        ("datamodule.num_workers=3", "datamodule.num_workers", 3),
        ("data_path=/elsewhere", "datamodule.data_path", "/elsewhere"),
        ("tracking.uri=http://host:5000", "tracking.uri", "http://host:5000"),
        ("tracking.system_metrics=false", "tracking.system_metrics", False),
        ("callbacks.progress.every_seconds=1.5", "callbacks.progress.every_seconds", 1.5),
        ("callbacks.checkpoint_upload.every_n_epochs=3", "callbacks.checkpoint_upload.every_n_epochs", 3),
        ("callbacks.last_checkpoint.every_seconds=5", "callbacks.last_checkpoint.every_seconds", 5),
        ("core.log_level=debug", "core.log_level", "debug"),
    ],
)
def test_what_changes_no_result_may_be_changed(config, word, key, value):
    before = OmegaConf.to_container(config)
    change(config, [word])
    assert OmegaConf.select(config, key) == value
    OmegaConf.update(config, key, OmegaConf.select(OmegaConf.create(before), key))
    assert OmegaConf.to_container(config) | {"trainer": before["trainer"]} == before  # and nothing else


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("core.seed=1", r"the run's core.seed must stay: it is 42, asked for 1; leave it out, or start a new run"),
        ("datamodule.batch_size=3", r"the run's datamodule.batch_size must stay: it is \d+, asked for 3"),
        ("optimizer.lr=1", r"the run's optimizer.lr must stay"),
        ("backbone=resnet50", r"the run's backbone must stay; leave it out"),
        ("experiment=base/ssl/byol", r"the run's experiment must stay; leave it out"),
        ("callbacks.knn.num_neighbours=1", r"the run's callbacks.knn.num_neighbours must stay: it is \d+, asked for 1"),
        ("callbacks.last_checkpoint.dirpath=/x", r"the run's callbacks.last_checkpoint.dirpath must stay"),
        ("trainer.precision=64-true", r"the run's trainer.precision must stay"),
        ("+trainer.max_epochs_=1", r"the run's trainer.max_epochs_ must stay"),
        ("core.output_dir=/x", r"the run's core.output_dir must stay"),
    ],
)
def test_anything_else_is_refused_by_name(config, word, message):
    before = config.copy()
    with pytest.raises(InputError, match=message) as caught:
        change(config, [word])
    assert "\n" not in str(caught.value)
    assert config == before


@pytest.mark.parametrize(
    "word",
    [
        "core.seed=42",
        "core.tag=run",
        "resume=last",
        "resume_changed_data=true",
        "trust_config=true",
        "transforms.mean=[0.5,0.5,0.5]",
        "+core.demonstration=[backbone,transforms,optimizer,scheduler,model,trainer.max_epochs,datamodule.batch_size]",
    ],
)
def test_what_is_as_it_was_may_be_said_again(config, word):
    before = config.copy()
    change(config, [word])
    assert config == before


def test_a_list_of_one_is_its_only_value(config):
    config.scheduler.init_lr = [0.3]
    change(config, ["optimizer.lr=0.3"])
    assert config.scheduler.init_lr == [0.3]


def test_all_words_are_looked_at(config):
    with pytest.raises(InputError, match=r"the run's core.seed must stay"):
        change(config, ["trainer.max_epochs=7", "core.seed=1"])


def test_who_asks_may_allow_and_ignore_other_words(config):
    change(config, ["core.seed=1", "run_id=abc"], allowed=["core.seed"], ignored=["run_id"])
    assert config.core.seed == 1
    assert "run_id" not in config
    with pytest.raises(InputError, match=r"the run's trainer.max_epochs must stay"):
        change(config, ["trainer.max_epochs=7"], allowed=["core.seed"])


def test_every_key_that_may_change_is_one(config):
    known = {"trainer.max_time", "trainer.num_nodes", "trainer.strategy"}  # Lightning's, by default not in the config
    absent = object()
    for key in set(MAY_CHANGE) - known:
        assert OmegaConf.select(config, key.rstrip("."), default=absent) is not absent, key  # null is a value


def test_paths_in_the_output_folder_move_with_it(config):
    old = config.core.output_dir
    new = moved(config, old, "/elsewhere")
    assert new.core.output_dir == "/elsewhere"
    assert new.callbacks.last_checkpoint.dirpath == "/elsewhere/checkpoints"
    assert old not in OmegaConf.to_yaml(new)
    assert new.datamodule == config.datamodule
    assert config.core.output_dir == old


@pytest.mark.parametrize("kept", [5, 0.5, None, True, "elsewhere/out", "/outside"])
def test_nothing_else_moves(kept):
    config = OmegaConf.create({"kept": kept, "list": [{"path": "/out/a"}, "/out", kept]})
    expected = {"kept": kept, "list": [{"path": "/new/a"}, "/new", kept]}
    assert OmegaConf.to_container(moved(config, "/out", "/new")) == expected


def recorded(config, *, trusted=False):
    return recorded_config(OmegaConf.to_container(config), source="config of run 1", trusted=trusted)


def test_a_recorded_config_of_ours_needs_no_trust(config):
    assert recorded(config) == config


@pytest.mark.parametrize("record", [None, [], "text", {}, {"trainer": {}}])
def test_what_is_no_config_is_refused(record):
    with pytest.raises(InputError, match="config of run 1 is not a config of mlflow_ssl"):
        recorded_config(record, source="config of run 1", trusted=True)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("text", ["${core.seed}", "${oc.env:HOME}", "a ${oc.env:HOME} b"])
def test_an_interpolation_is_refused_and_not_resolved(config, trusted, text):
    record = OmegaConf.to_container(config)
    record["core"]["tag"] = text
    with pytest.raises(InputError, match="config of run 1 must be resolved, and holds an interpolation"):
        recorded_config(record, source="config of run 1", trusted=trusted)


UNKNOWN = [
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "torch.load",
    "torch.hub.load",
    "joblib.load",
    "mlflow_sslx.thing",
    "hydra.utils.instantiate",
    # through the modules that known ones import
    "mlflow_ssl.datasets.contents.os.system",
    "mlflow_ssl.tasks.finetune.write_classes",
    "torch.nn.modules.module.torch.hub.load",
    "albumentations.core.serialization.yaml.load",
    # ours, but they run what they are given
    "mlflow_ssl.cli.main",
    "mlflow_ssl.config.build",
    "mlflow_ssl.tasks.training.train",
    "mlflow_ssl.tasks.reproduce.reproduce",
    "torch.nn.Module.__subclasses__",
]


@pytest.mark.parametrize("target", UNKNOWN)
def test_what_is_not_known_to_be_harmless_is_refused_where_it_stands(config, target):
    config.callbacks.evil = {"_target_": target}
    with pytest.raises(InputError, match=rf"config of run 1 builds {target} \(at callbacks.evil\).*trust_config=true"):
        recorded(config)
    assert recorded(config, trusted=True) == config


@pytest.mark.parametrize(
    "place", ["model.loss", "datamodule.train_transform.transforms.0", "trainer.plugins.0.deep.inside", "core.tag"]
)
def test_it_is_refused_at_any_depth(place):
    config = OmegaConf.create({"_target_": "os.system"})
    for key in reversed(place.split(".")):
        config = OmegaConf.create([config] if key.isdigit() else {key: config})
    record = {"core": {}} | OmegaConf.to_container(config)
    with pytest.raises(InputError, match=rf"builds os.system \(at {place}\)"):
        recorded_config(record, source="it", trusted=False)


@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.ReLU",
        "torch.optim.AdamW",
        "timm.optim.Lamb",
        "albumentations.HorizontalFlip",
        "pytorch_lightning.Trainer",
        "pytorch_lightning.callbacks.EarlyStopping",
        "pytorch_lightning.strategies.DDPStrategy",
        "mlflow_ssl.tasks.ssl.BYOL",
        "mlflow_ssl.tasks.finetune.Finetune",
    ],
)
def test_parts_that_others_use_are_known(config, target):
    config.callbacks.other = {"_target_": target}
    assert recorded(config) == config


def test_a_part_that_is_there_no_more_is_named_as_such(config):
    config.callbacks.other = {"_target_": "mlflow_ssl.callbacks.Gone"}
    with pytest.raises(InputError, match=r"callbacks.other._target_ must be an importable name"):
        check_resolved(recorded(config))


def start(digest):
    return Start(OmegaConf.create({}), Path("out"), run_id="abc", data_digest=digest)


@pytest.mark.parametrize("begun_with", [None, "d1"])
def test_the_data_that_the_run_began_with_are_gone_on_with(begun_with, caplog):
    start(begun_with).check_data("d1", changed_allowed=False)
    assert caplog.messages == []


def test_other_data_are_refused_unless_told_so(caplog):
    message = "the data have changed since run abc began: digest d2, then d1;.* resume_changed_data=true"
    with pytest.raises(InputError, match=message):
        start("d1").check_data("d2", changed_allowed=False)
    start("d1").check_data("d2", changed_allowed=True)
    assert caplog.messages == ["going on with other data than run abc began with"]


@pytest.mark.parametrize(
    ("then", "now", "lines"),
    [
        ({}, {}, []),
        ({"a": "1", "b": "2"}, {"b": "2", "a": "1"}, []),
        ({"a": "1"}, {"a": "2"}, ["package a: 1 then, 2 now"]),
        ({"b": "1"}, {"a": "1"}, ["package a: missing then, 1 now", "package b: 1 then, missing now"]),
    ],
)
def test_packages_differ_by_version_or_presence(then, now, lines):
    assert package_differences(then, now) == lines


def test_a_recorded_config_builds_what_the_first_one_did(config):
    callbacks = recorded(config).callbacks
    assert build(callbacks.last_checkpoint).path == Path(config.core.output_dir, "checkpoints", "last.ckpt")

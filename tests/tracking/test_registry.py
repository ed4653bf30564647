import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import Model
from packages import package, tiny_network
from pydantic import ValidationError

from mlflow_ssl.errors import InputError
from mlflow_ssl.export import traced
from mlflow_ssl.schema import Registry
from mlflow_ssl.tracking.packaging import Registration
from mlflow_ssl.tracking.registry import Judged, decide, load_backbone_weights, register_package

pytestmark = pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy warn about themselves


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    return package(tmp_path_factory.mktemp("packaged") / "package", tiny_network())


@pytest.fixture
def new_package(packaged, tmp_path):
    """Return a function that gives a package of its own, registered as told."""

    def make(**changes):
        registration = dataclasses.replace(Registration.read(packaged), **changes)
        if "package" not in changes:
            registration = dataclasses.replace(registration, package=f"{len(list(tmp_path.glob('package*'))):032x}")
        text = registration.description.replace("models:/tiny/", f"models:/{registration.name}/")
        registration = dataclasses.replace(registration, description=text)
        folder = shutil.copytree(packaged, tmp_path / f"package-{registration.package}")
        registration.write(folder)
        return folder

    return make


@pytest.fixture
def new_run(store):
    """Return a function that opens a run in an experiment with a folder of its own."""
    experiment = store.create_experiment("here")
    return lambda: store.create_run(experiment).info.run_id


def judged(test_acc, digest="d1"):
    return {"test_acc": f"{test_acc:.6f}", "data.digest": digest}


def champion(store, name="tiny"):
    alias = store.get_registered_model(name).aliases.get("champion")
    return alias and str(alias)  # a number from a local store, text from a server


def promotion(store, version):
    return store.get_model_version("tiny", version).tags["promotion"]


def logged_models(store):
    return store.search_logged_models([experiment.experiment_id for experiment in store.search_experiments()])


# one registration


def test_a_version_knows_its_run_its_figures_and_how_to_be_used(store, new_run, new_package):
    run_id = new_run()
    assert register_package(store, run_id, new_package()) == "1"
    version = store.get_model_version("tiny", "1")
    assert version.run_id == run_id
    assert version.tags.items() >= {"test_acc": "0.900000", "data.digest": "d1"}.items()
    assert 'mlflow models serve -m "models:/tiny/1"' in version.description
    assert 'mlflow.pytorch.load_model("models:/tiny/1")' in version.description


def test_the_run_page_shows_the_model_as_an_output_and_the_model_page_its_version(store, new_run, new_package):
    run_id = new_run()
    register_package(store, run_id, new_package())
    (output,) = store.get_run(run_id).outputs.model_outputs
    model = store.get_logged_model(output.model_id)
    assert (model.status, model.source_run_id) == ("READY", run_id)
    assert model.tags["test_acc"] == "0.900000"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "tiny", "version": "1"}]


def test_the_mlmodel_file_names_run_and_model_and_both_flavours(store, new_run, new_package):
    run_id = new_run()
    register_package(store, run_id, new_package())
    (model,) = logged_models(store)
    info = mlflow.models.get_model_info("models:/tiny@champion")
    assert (info.run_id, info.model_id) == (run_id, model.model_id)
    assert set(info.flavors) == {"pytorch", "python_function"}


def test_the_champion_loads_back_as_the_same_network(store, new_run, new_package):
    register_package(store, new_run(), new_package())
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = tiny_network()(images)
        got = mlflow.pytorch.load_model("models:/tiny@champion")(images)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.tensor(mlflow.pyfunc.load_model("models:/tiny@champion").predict(images.numpy())), expected
    )


def test_registering_goes_to_the_clients_store_whatever_the_current_one_is(store, new_run, new_package, monkeypatch):
    run_id, uri = new_run(), store.tracking_uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd() / 'other.db'}")
    assert register_package(MlflowClient(uri), run_id, new_package()) == "1"


# repeated


def test_registering_twice_is_registering_once(store, new_run, new_package):
    run_id, folder = new_run(), new_package()
    first = register_package(store, run_id, folder)
    before = store.get_model_version("tiny", first)
    assert register_package(MlflowClient(), run_id, folder) == first
    assert len(store.search_model_versions("name = 'tiny'")) == 1
    assert len(logged_models(store)) == 1
    assert store.get_model_version("tiny", first).tags == before.tags


def test_two_packages_of_one_run_are_two_versions(store, new_run, new_package):
    run_id = new_run()
    versions = [register_package(store, run_id, new_package()) for _ in range(2)]
    assert versions == ["1", "2"]


def test_one_package_of_two_runs_is_two_versions(store, new_run, new_package):
    folder = new_package()
    assert [register_package(store, new_run(), folder) for _ in range(2)] == ["1", "2"]


class Failing:
    """A client whose call number ``fatal`` raises: before it is made, or after, its answer lost."""

    def __init__(self, client, fatal, *, after):
        self.client, self.left, self.after = client, fatal, after

    def __getattr__(self, name):
        method = getattr(self.client, name)

        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0 and not self.after:
                raise ConnectionError(name)
            result = method(*args, **kwargs)
            if self.left == 0:
                raise ConnectionError(name)
            return result

        return call


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after it"])
def test_a_registration_that_fails_at_any_call_is_completed_by_the_next(store, new_run, new_package, after):
    survived = 0
    for fatal in range(1, 100):
        name = f"tiny{fatal}"
        run_id, folder = new_run(), new_package(name=name)
        try:
            register_package(Failing(store, fatal, after=after), run_id, folder)
        except ConnectionError:
            survived += 1
            register_package(MlflowClient(), run_id, folder)
        (version,) = store.search_model_versions(f"name = '{name}'")
        (output,) = store.get_run(run_id).outputs.model_outputs
        (model,) = [model for model in logged_models(store) if model.source_run_id == run_id]
        assert (output.model_id, model.status) == (model.model_id, "READY")
        assert f"models:/{name}/1" in version.description
        assert store.get_model_version(name, "1").tags["promotion"].startswith("champion: ")
        assert champion(store, name) == "1"
        assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": name, "version": "1"}]
        assert Model.load(f"models:/{name}/1").model_id == model.model_id
        if survived < fatal:
            break
    assert survived >= 10  # each of the calls that a registration makes


# the champion


OLD = Judged("3", 0.961, "d1")


@pytest.mark.parametrize(
    ("new", "champion", "promote", "expected"),
    [
        (Judged("4", 0.972, "d1"), OLD, "auto", (True, "champion: test_acc 0.9720 > 0.9610 of version 3")),
        (Judged("4", 0.5, "d1"), None, "auto", (True, "champion: there was none")),
        (Judged("4", None, "d1"), None, "auto", (True, "champion: there was none")),
        (Judged("4", 0.95, "d1"), OLD, "auto", (False, "not promoted: test_acc of version 3 is 0.9610 >= 0.9500")),
        (Judged("4", 0.961, "d1"), OLD, "auto", (False, "not promoted: test_acc of version 3 is 0.9610 >= 0.9610")),
        (
            Judged("4", 0.961001, "d1"),
            OLD,
            "auto",
            (True, "champion: test_acc 0.961001 > 0.961000 of version 3"),
        ),
        (
            Judged("4", 0.99, "d2"),
            OLD,
            "auto",
            (False, "not promoted: version 3 was measured on other data (digest d1)"),
        ),
        (Judged("4", None, "d1"), OLD, "auto", (False, "not promoted: no test_acc")),
        (Judged("4", 0.9, "d1"), Judged("3", None, "d1"), "auto", (False, "not promoted: version 3 has no test_acc")),
        (Judged("4", 0.99, "d1"), OLD, "never", (False, "not promoted: registry.promote is never")),
        (Judged("4", 0.99, "d1"), None, "never", (False, "not promoted: registry.promote is never")),
    ],
)
def test_the_champion_is_the_better_of_two_that_compare(new, champion, promote, expected):
    assert decide(new, champion, metric="test_acc", promote=promote) == expected


def test_the_alias_follows_the_best_and_each_version_says_why(store, new_run, new_package):
    for tags in (judged(0.8), judged(0.9), judged(0.85), judged(0.99, "d2"), {"data.digest": "d1"}):
        register_package(store, new_run(), new_package(tags=tags))
    assert champion(store) == "2"
    assert [promotion(store, version) for version in "12345"] == [
        "champion: there was none",
        "champion: test_acc 0.9000 > 0.8000 of version 1",
        "not promoted: test_acc of version 2 is 0.9000 >= 0.8500",
        "not promoted: version 2 was measured on other data (digest d1)",
        "not promoted: no test_acc",
    ]


@pytest.mark.parametrize("written", ["nan", "inf", "good"])
def test_a_figure_that_is_no_number_counts_as_none(written, store, new_run, new_package):
    register_package(store, new_run(), new_package(tags=judged(0.8)))
    register_package(store, new_run(), new_package(tags=judged(0.8) | {"test_acc": written}))
    assert promotion(store, "2") == "not promoted: no test_acc"


def test_where_promotion_is_off_there_is_no_champion(store, new_run, new_package):
    register_package(store, new_run(), new_package(promote="never"))
    assert champion(store) is None
    assert promotion(store, "1") == "not promoted: registry.promote is never"


def test_the_config_knows_no_other_way_of_promotion():
    assert {Registry(name="tiny", promote=promote).promote for promote in ("auto", "never")} == {"auto", "never"}
    with pytest.raises(ValidationError, match="promote"):
        Registry(name="tiny", promote="always")


def test_another_metric_decides_where_it_is_named(store, new_run, new_package):
    tags = {"data.digest": "d1", "val_acc": "0.5", "test_acc": "0.9"}
    for val_acc in ("0.5", "0.6"):
        changed = tags | {"val_acc": val_acc, "test_acc": f"{1 - float(val_acc)}"}
        register_package(store, new_run(), new_package(metric="val_acc", tags=changed))
    assert promotion(store, "2") == "champion: val_acc 0.6000 > 0.5000 of version 1"


def test_repeating_an_old_registration_leaves_a_later_champion_alone(store, new_run, new_package):
    run_id, folder = new_run(), new_package(tags=judged(0.8))
    register_package(store, run_id, folder)
    register_package(store, new_run(), new_package(tags=judged(0.9)))
    register_package(store, run_id, folder)
    assert champion(store) == "2"
    assert promotion(store, "1") == "champion: there was none"


def test_repeating_a_registration_leaves_an_alias_that_somebody_moved_back(store, new_run, new_package):
    register_package(store, new_run(), new_package(tags=judged(0.8)))
    run_id, folder = new_run(), new_package(tags=judged(0.9))
    register_package(store, run_id, folder)
    store.set_registered_model_alias("tiny", "champion", "1")
    register_package(store, run_id, folder)
    assert champion(store) == "1"


# loading


def test_the_backbones_weights_come_back_by_name(store, new_run, new_package):
    register_package(store, new_run(), new_package())
    got, expected = load_backbone_weights("models:/tiny@champion"), tiny_network().backbone.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_the_backbones_weights_come_back_from_a_version_of_before_the_service(store, tmp_path):
    mlflow.pytorch.log_model(
        traced(tiny_network(), torch.rand(2, 3, 32, 32)),
        name="model",
        registered_model_name="old",
        pip_requirements=["torch"],
        serialization_format="pickle",
    )
    mlflow.end_run()
    got = load_backbone_weights("models:/old/1")
    assert torch.equal(got["conv.weight"], tiny_network().backbone.conv.weight)


def test_a_name_without_a_model_is_an_input_error(store):
    with pytest.raises(InputError, match=r"backbone\.checkpoint_path: no registered model at models:/nobody/1"):
        load_backbone_weights("models:/nobody/1")


def test_torchscript_loads_without_this_package_without_mlflow_and_without_unpickling(packaged, tmp_path):
    code = """
import sys, pickle
sys.modules["mlflow_ssl"] = sys.modules["mlflow"] = sys.modules["timm"] = None
import torch  # imports dill where it is installed, which derives from the unpickler
def refuse(*args, **kwargs):
    raise SystemExit("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = refuse
network = torch.jit.load(sys.argv[1])
print(tuple(network(torch.rand(2, 3, 32, 32)).shape))
"""
    ran = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", code, str(packaged / "model/data/model.pth")],
        cwd=tmp_path,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "(2, 6)\n"), ran.stderr

import json

import pytest
import yaml
from packages import MEAN, SIZE, package, resnet, trained_here

from mlflow_ssl.backbones import read_call
from mlflow_ssl.errors import InputError
from mlflow_ssl.tracking.registered import find_registered
from mlflow_ssl.tracking.registry import register_package

pytestmark = pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy warn about themselves


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    return package(tmp_path_factory.mktemp("packaged") / "package", trained_here())


def test_an_alias_is_the_version_that_it_means_now(store, packaged):
    run_id = store.create_run(store.create_experiment("training")).info.run_id
    register_package(store, run_id, packaged)
    found = find_registered("models:/tiny@champion")
    assert (found.uri, found.name) == ("models:/tiny/1", "tiny")
    assert found.model_id == store.get_run(run_id).outputs.model_outputs[0].model_id
    assert (found.backbone, found.small_stem, found.input_height) == ("resnet10t", True, SIZE)
    assert found.mean == list(MEAN)


def test_a_folder_has_no_registered_name(packaged):
    found = find_registered(str(packaged / "model"))
    assert (found.name, found.model_id) == ("resnet10t", None)


def test_arguments_on_somebody_elses_card_are_named_and_not_used(tmp_path, caplog):
    folder = package(tmp_path / "package", trained_here(drop_path_rate=0.1)) / "model"
    assert vars(find_registered(str(folder))).keys() >= {"backbone", "small_stem"}
    assert "to have them again add +backbone.drop_path_rate=0.1" in caplog.text


@pytest.mark.parametrize("uri", ["models:/no/1", "models:/no@champion", "/no/such/folder", "no"])
def test_what_is_not_there_is_one_line(store, uri):
    with pytest.raises(InputError, match="model_uri") as caught:
        find_registered(uri)
    assert "\n" not in str(caught.value)


def test_a_model_of_others_is_refused(tmp_path):
    other = package(tmp_path / "package", resnet()) / "model"  # its card names no call
    with pytest.raises(InputError, match="model_uri must be a network that this project registered"):
        find_registered(str(other))
    described = yaml.safe_load((other / "MLmodel").read_text())
    del described["metadata"]
    (other / "MLmodel").write_text(json.dumps(described))
    with pytest.raises(InputError, match="model_uri must be a network that this project registered"):
        find_registered(str(other))


@pytest.mark.parametrize(
    "text", ["nothing", "os.system('x')", "timm.create_model", "timm.create_model('a', b=open('c'))", "a b", "1"]
)
def test_only_the_calls_that_make_networks_are_read_and_none_is_run(text):
    with pytest.raises(ValueError, match=r"made_by must be a call|malformed"):
        read_call(text)

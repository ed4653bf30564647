import json

import albumentations as A
import numpy as np
import pytest
import torch
import yaml
from packages import bank, card, noise, package, tiny_network, validation_transform

from mlflow_ssl.errors import InputError
from mlflow_ssl.export import load_torchscript
from mlflow_ssl.tracking import packaging
from mlflow_ssl.tracking.packaging import LabelledEmbeddings, Registration, check_servable, package_network

pytestmark = pytest.mark.filterwarnings("default")  # MLflow warns about its own type hints


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    return package(tmp_path_factory.mktemp("packaged") / "package", tiny_network())


def mlmodel(folder):
    return yaml.safe_load((folder / "model/MLmodel").read_text())


def test_packaging_asks_no_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody there; a call would raise
    package(tmp_path / "package", tiny_network())
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_both_flavours_take_the_one_file_of_weights(packaged):
    flavours = mlmodel(packaged)["flavors"]
    assert flavours["python_function"]["artifacts"]["network"]["path"] == "data/model.pth"
    assert flavours["pytorch"]["model_data"] == "data"
    assert [str(path.relative_to(packaged)) for path in packaged.rglob("*.pth")] == ["model/data/model.pth"]


def test_the_torchscript_file_is_the_network(packaged):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load_torchscript(packaged / "model/data/model.pth")(images), tiny_network()(images))


def test_a_model_says_what_it_needs_and_takes(packaged):
    described = mlmodel(packaged)
    assert described["metadata"]["input_size"] == [32, 32]
    assert described["signature"]["params"] == json.dumps(
        [{"name": "neighbours", "default": 0, "shape": None, "type": "long"}]
    )
    names = [line.split("==")[0] for line in (packaged / "model/requirements.txt").read_text().split()]
    assert names == ["mlflow", "torch", "numpy", "pillow", "albumentations", "opencv-python-headless"]
    assert "+" not in (packaged / "model/requirements.txt").read_text()


def test_a_model_tells_nothing_of_the_machine_that_made_it(packaged):
    assert str(packaged.parent.parent) not in (packaged / "model/MLmodel").read_text()
    assert str(packaging.SERVICE.parent) not in (packaged / "model/MLmodel").read_text()


def test_the_very_files_of_the_training_are_in_the_model(packaged):
    source = packaging.SERVICE.parent.parent
    for copied, original in (("decode.py", "datasets/decode.py"), ("transforms.py", "transforms.py")):
        assert (packaged / "model/artifacts" / copied).read_bytes() == (source / original).read_bytes()


def test_a_package_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def breaks(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(packaging, "_write_bank", breaks)
    with pytest.raises(OSError, match="no space left"):
        package(tmp_path / "package", tiny_network())
    assert list(tmp_path.iterdir()) == []


def test_packaging_goes_over_what_a_killed_attempt_left(tmp_path):
    (tmp_path / "package.part/model").mkdir(parents=True)
    package(tmp_path / "package", tiny_network())
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_second_package_in_one_folder_is_refused(packaged):
    with pytest.raises(FileExistsError, match="there is a package already"):
        package(packaged, tiny_network())


def test_each_package_has_a_name_of_its_own():
    first, second = (Registration("tiny", "auto", {}) for _ in range(2))
    assert first.package != second.package


def test_a_registration_comes_back_as_it_was_written(tmp_path):
    registration = Registration("tiny", "never", {"val_acc": "0.5"}, metric="val_acc", description="ä")
    registration.write(tmp_path)
    assert Registration.read(tmp_path) == registration


def test_the_bank_is_capped_evenly_and_holds_unit_rows_without_pickles(tmp_path, monkeypatch):
    monkeypatch.setattr(packaging, "MOST_ENTRIES", 4)
    whole = LabelledEmbeddings(np.eye(10, 6, dtype=np.float32) * 5 + 1, np.arange(10) % 3, ("a", "b", "c"))
    folder = package(tmp_path / "package", tiny_network(), bank=whole)
    with np.load(folder / "model/artifacts/bank.npz", allow_pickle=False) as stored:
        assert stored["labels"].tolist() == [0, 0, 0, 0]  # rows 0, 3, 6 and 9
        expected = whole.embeddings[[0, 3, 6, 9]]
        np.testing.assert_allclose(
            stored["embeddings"], expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-3
        )
        assert stored["classes"].tolist() == ["a", "b", "c"]


def test_without_labels_there_is_no_bank_and_no_word_of_neighbours(tmp_path):
    folder = package(tmp_path / "package", tiny_network(), bank=None)
    assert not (folder / "model/artifacts/bank.npz").exists()
    assert "neighbours" not in Registration.read(folder).description


# what can be served


class Inverted(A.ImageOnlyTransform):
    """A user's own."""

    def apply(self, img, **params):
        return 255 - img


class Forgetful(A.Normalize):
    """One that is written down under its own name, but not as it is."""


def unchanged(img, **_):
    return img


@pytest.mark.parametrize(
    "transform",
    [
        None,
        validation_transform(),
        A.Compose([A.SmallestMaxSize(40), A.CenterCrop(32, 32), A.Normalize(), A.ToTensorV2()]),
        A.Compose([A.LongestMaxSize(32), A.PadIfNeeded(32, 32, border_mode=0), A.CLAHE(p=1), A.ToGray(p=1)]),
        A.Compose([A.RandomResizedCrop((32, 32)), A.Normalize()]),
        A.CenterCrop(500, 500),
    ],
)
def test_albumentations_own_transforms_can_be_served(transform):
    check_servable(transform)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (A.Compose([Inverted(p=1)]), r"must be of albumentations' own transforms, .* got test_packaging\.Inverted$"),
        (Forgetful(), r"must be of albumentations' own transforms, .* got test_packaging\.Forgetful$"),
        (A.Compose([A.Lambda(image=unchanged, p=1)]), r"cannot be written down for the service: "),
        (A.Compose([A.Lambda(image=unchanged, name="mine", p=1)]), r"cannot be written down for the "),
        (lambda image: {"image": image}, r"cannot be written down for the service: "),
    ],
)
def test_what_cannot_be_served_is_an_input_error_before_any_training(transform, message):
    with pytest.raises(InputError, match=rf"datamodule\.val_transform {message}"):
        check_servable(transform)


def test_a_transform_that_comes_back_as_another_is_an_input_error():
    transform = validation_transform()
    transform.transforms[1].mean_np = transform.transforms[1].mean_np + 0.1  # state that to_dict does not know
    transform.transforms[1].mean = (0.9, 0.9, 0.9)
    rebuilt = A.from_dict(A.to_dict(transform))
    assert rebuilt.transforms[1].mean == (0.9, 0.9, 0.9)
    with pytest.raises(InputError, match="does something else once written down and read again"):
        check_servable(transform)


def test_an_unservable_transform_leaves_no_package(tmp_path):
    network = tiny_network()
    with pytest.raises(InputError, match=r"datamodule\.val_transform"):
        package_network(
            tmp_path / "package",
            network,
            card=card(network),
            registration=Registration("tiny", "auto", {}),
            transform=Inverted(p=1),
            bank=bank(6),
            example=noise(),
        )
    assert list(tmp_path.iterdir()) == []

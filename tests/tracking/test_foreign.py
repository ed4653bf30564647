import shutil

import foreign
import mlflow
import numpy as np
import pytest
import torch
from mlflow.types import ColSpec, Schema, TensorSpec

from mlflow_ssl.errors import InputError
from mlflow_ssl.tracking.embedder import open_embedder
from mlflow_ssl.tracking.preprocessing import Preprocessing

pytestmark = pytest.mark.filterwarnings("default")  # MLflow, torch.export and SQLAlchemy warn about themselves

SAID = Preprocessing((foreign.SIZE, foreign.SIZE))


class Explosive:
    """Unpickling it writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


def trusted(folder, said=SAID, device="cpu"):
    return open_embedder(str(folder), device=device, said=said, trusted=True)


def images(count=5, seed=0, size=foreign.SIZE):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_what_is_not_trusted_is_not_unpickled(tmp_path):
    network = foreign.network()
    network.trap = Explosive(tmp_path / "executed")
    folder = foreign.save_torch(tmp_path / "model", network)
    with pytest.raises(InputError, match=r"runs its code .*; add trust_model=true if you trust whoever made it$"):
        open_embedder(str(folder), device="cpu", said=SAID)
    assert not (tmp_path / "executed").exists()
    trusted(folder)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("form", ["pickled", "script", "exported", "exported for one image"])
def test_a_torch_network_answers_as_it_does_by_itself(tmp_path, form):
    network = foreign.network()
    if form == "pickled":
        folder = foreign.save_torch(tmp_path / "model", network)
    elif form == "script":
        folder = foreign.save_torch(tmp_path / "model", torch.jit.script(network))
    else:
        folder = foreign.save_exported(tmp_path / "model", network, example=2 if form == "exported" else 1)
    ones = Preprocessing(None if form.startswith("exported") else SAID.input_size, (0.0,) * 3, (1.0,) * 3)
    embedder = trusted(folder, ones)
    assert embedder.embedding_size == 512
    assert embedder.preprocessing.input_size == SAID.input_size
    for count in (5, 1):
        expected = network(images(count)).detach()
        torch.testing.assert_close(embedder.embed(images(count)), expected, atol=1e-5, rtol=1e-4)


def test_images_are_normalized_as_timms_description_says(tmp_path):
    network = foreign.network()
    embedder = trusted(foreign.save_torch(tmp_path / "model", network))
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    seen = torch.from_numpy(embedder.transform(image=pixels)["image"].transpose(2, 0, 1))
    assert seen.shape == (3, 32, 32)
    assert seen.mean((1, 2)).tolist() == pytest.approx(((0.5 - mean) / std).flatten().tolist(), abs=0.1)
    torch.testing.assert_close(embedder.embed(seen[None]), network(seen[None]).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("key", ["pretrained_cfg", "default_cfg"])
def test_metadata_says_what_an_exported_graph_has_forgotten(tmp_path, key):
    described = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3), "input_size": (3, 999, 999)}
    folder = foreign.save_exported(tmp_path / "model", foreign.network(), metadata={key: described})
    expected = Preprocessing((32, 32), (0.5, 0.4, 0.3), (0.2, 0.2, 0.3))  # the signature knows the size
    assert trusted(folder, Preprocessing()).preprocessing == expected


def test_words_go_before_the_description(tmp_path):
    said = Preprocessing((64, 48), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert trusted(foreign.save_torch(tmp_path / "model", foreign.network()), said).preprocessing == said


@pytest.mark.parametrize("inputs", [None, foreign.TENSOR, foreign.NAMED, foreign.TEXT, foreign.FILES])
def test_a_service_gets_images_in_the_form_of_its_signature(tmp_path, inputs):
    embedder = trusted(foreign.save_pyfunc(tmp_path / "model", inputs=inputs))
    given = (images() * 255).round() / 255
    expected = torch.cat([given.mean((2, 3)), given.std((2, 3), correction=0)], dim=1)
    torch.testing.assert_close(embedder.embed(given), expected, atol=1e-5, rtol=0)
    assert embedder.untrained() is None


def test_an_untrained_network_has_the_shape_and_nothing_else_of_the_trained(tmp_path):
    embedder = trusted(foreign.save_torch(tmp_path / "model", foreign.network()))
    untrained = embedder.untrained()
    assert untrained.embed(images()).shape == (5, 512)
    assert untrained.embed(images()).equal(embedder.untrained().embed(images()))
    assert not untrained.embed(images()).allclose(embedder.embed(images()))


def test_the_digest_is_of_the_files_and_the_preprocessing_and_of_nothing_else(tmp_path):
    folder = foreign.save_torch(tmp_path / "model", foreign.network())
    digest = trusted(folder).digest
    again = shutil.copytree(folder, tmp_path / "again")
    description = mlflow.models.Model.load(again)
    description.run_id = "another"
    description.save(again / "MLmodel")
    (again / "requirements.txt").write_text("torch==1\n")
    assert trusted(again).digest == digest
    assert trusted(folder, Preprocessing((48, 48))).digest != digest
    assert trusted(foreign.save_torch(tmp_path / "other", foreign.network(seed=1))).digest != digest


def fails(model_input):
    raise KeyError("no such column\nand more")


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (lambda model_input: np.zeros((len(model_input), 6, 7, 7)), None, r"feature maps of shape \(2, 6, 7, 7\); reg"),
        (lambda model_input: np.zeros(len(model_input)), None, r"must give vectors, an array \(N, D\), got the shape"),
        (lambda model_input: {"a": 1, "b": 2}, None, r"got a dictionary of a, b$"),
        (lambda model_input: np.full((len(model_input), 6), np.nan), None, "must give finite numbers"),
        (lambda model_input: np.zeros((3, 6)), None, "a vector for each image, got 3 for 2"),
        (fails, None, r"fails on images \(2, 3, 32, 32\): KeyError: .*no such column"),
        (None, Schema([ColSpec("double", "a"), ColSpec("double", "b")]), "must take images, its signature says"),
        (None, Schema([TensorSpec(np.dtype("float32"), (-1, 784))]), r"must take float images \(B, 3, H, W\), its"),
        (None, Schema([TensorSpec(np.dtype("uint8"), (-1, 3, 32, 32))]), "must take float images"),
        (None, Schema([TensorSpec(np.dtype("float32"), (-1, 1, 32, 32))]), "must take float images"),
    ],
)
def test_what_gives_no_vectors_of_images_is_refused_in_one_line(tmp_path, model, inputs, message):
    folder = foreign.save_pyfunc(tmp_path / "model", model, inputs=inputs)
    with pytest.raises(InputError, match=message) as refused:
        trusted(folder)
    assert "\n" not in str(refused.value)


def test_the_size_of_the_images_must_be_known(tmp_path):
    folder = foreign.save_pyfunc(tmp_path / "model")
    with pytest.raises(InputError, match=r"^input_size must be given, as .*model does not say .*; add input_size=224$"):
        trusted(folder, Preprocessing())


def test_a_model_that_does_not_load_is_named(tmp_path):
    folder = foreign.save_torch(tmp_path / "model", foreign.network())
    (folder / "data" / "model.pth").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"^model_uri: .*model cannot be loaded: .*; its requirements.txt names"):
        trusted(folder)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_size": "big"}, r"^input_size must be pixels, such as 224 or \[224, 320\], got big$"),
        ({"input_size": [3, 4, 5, 6]}, "^input_size must be pixels"),
        ({"input_size": 0}, "^input_size must be pixels"),
        ({"input_size": True}, "^input_size must be pixels"),
        ({"mean": [0.5, 0.5], "std": [1, 1, 1]}, "^mean must be three numbers"),
        ({"mean": [0.5, 0.5, 0.5]}, "^mean and std must be given together$"),
        ({"mean": [0, 0, 0], "std": [1, 0, 1]}, "^std must be above 0"),
    ],
)
def test_words_that_make_no_sense_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        Preprocessing.of(given)


def test_a_preprocessing_comes_back_from_its_words():
    said = Preprocessing((64, 48), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert Preprocessing.of(said.as_dict()) == said
    assert Preprocessing.of(SAID.as_dict()) == SAID
    assert Preprocessing.of({"input_size": (3, 64, 48)}).input_size == (64, 48)

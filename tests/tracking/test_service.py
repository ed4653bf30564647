import base64
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import albumentations as A
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from packages import (
    CLASSES,
    MEAN,
    STD,
    bank,
    noise,
    package,
    resnet,
    tiny_network,
    validation_transform,
    write_every_mode,
)
from PIL import Image

from mlflow_ssl.datasets.decode import decode
from mlflow_ssl.export import DeploymentNetwork
from mlflow_ssl.transforms import apply, to_tensor

pytestmark = pytest.mark.filterwarnings("default")  # MLflow warns about its own type hints


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    return package(tmp_path_factory.mktemp("packaged") / "package", resnet())


@pytest.fixture(scope="module")
def service(packaged):
    return mlflow.pyfunc.load_model(str(packaged / "model"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_every_mode(tmp_path_factory.mktemp("pictures") / "every_mode")


@pytest.fixture(scope="module")
def backbone():
    return resnet().backbone


@torch.no_grad()
def embedded(backbone, file):
    """Return the embedding of a file as the training's validation makes it."""
    normalized = to_tensor(apply(validation_transform(), decode(file.read_bytes()), draw=(42, 0, 7, 0)))
    return backbone(normalized[None])[0]


def coded(data):
    return base64.b64encode(data).decode()


def cosine(a, b):
    return torch.cosine_similarity(torch.as_tensor(a).double(), torch.as_tensor(b).double(), dim=-1)


# the same embeddings as in the training


def test_files_of_every_mode_embed_as_in_the_training(service, files, backbone):
    got = service.predict([coded(file.read_bytes()) for file in files])
    for file, embedding in zip(files, got, strict=True):
        assert cosine(embedding, embedded(backbone, file)) >= 0.9999, file.name


def test_all_ways_to_send_a_file_are_one(service, files):
    data = files[0].read_bytes()
    text = coded(data)
    expected = service.predict([text])
    for sent in (
        [data],
        [bytearray(data)],
        [f"data:image/png;base64,{text}"],
        [base64.encodebytes(data).decode()],  # with line breaks
        (text,),
        np.array([text]),
        np.array([data], dtype=object),
        pd.Series([text]),
        pd.DataFrame({"any": [text]}),
    ):
        assert service.predict(sent) == expected


def test_pixels_get_the_preprocessing_of_files(service, files, backbone):
    pixels = np.stack([decode(files[0].read_bytes())] * 2)
    expected = embedded(backbone, files[0])
    for sent in (pixels, pixels.tolist(), list(pixels.astype(np.int64))):
        assert (cosine(service.predict(sent), expected) >= 0.9999).all()


def test_pictures_of_several_sizes_go_into_one_request(service):
    pictures = [noise(40, 30), noise(7, 90), noise(32, 32)]
    alone = [service.predict([picture])[0] for picture in pictures]
    assert (cosine(service.predict(pictures), alone) > 0.999999).all()


def test_a_tensor_goes_to_the_network_as_it_is(service):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = resnet()(images)
    for sent in (images.numpy(), images.double().numpy(), images.numpy().tolist()):
        torch.testing.assert_close(torch.tensor(service.predict(sent)), expected, rtol=1e-4, atol=1e-4)


def test_rows_answer_images_in_their_order_across_batches(service):
    pictures = [noise(seed=seed) for seed in range(130)]  # two batches and a rest
    got = service.predict(pictures)
    for number in (0, 63, 64, 129):
        assert cosine(got[number], service.predict([pictures[number]])[0]) > 0.999999


def test_no_images_give_no_rows(service):
    assert service.predict([]) == []


# neighbours


def test_neighbours_are_the_nearest_of_the_bank_with_their_cosine_distances(service):
    (row,) = service.predict([noise()], params={"neighbours": 5})
    stored = bank(512)
    distances = 1 - cosine(stored.embeddings, row["embedding"])
    nearest = distances.argsort()[:5].tolist()
    assert [each["label"] for each in row["neighbours"]] == [stored.classes[stored.labels[i]] for i in nearest]
    assert [each["distance"] for each in row["neighbours"]] == pytest.approx(distances[nearest].tolist(), abs=1e-3)
    assert row["embedding"] == service.predict([noise()])[0]


def test_a_bank_entry_finds_itself_at_distance_nought(tmp_path):
    network = tiny_network()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    stored = bank(6)
    with torch.no_grad():
        stored.embeddings[10] = network(image)[0]
    folder = package(tmp_path / "package", network, bank=stored)
    (row,) = mlflow.pyfunc.load_model(str(folder / "model")).predict(image.numpy(), params={"neighbours": 1})
    assert row["neighbours"] == [{"label": "dog", "distance": pytest.approx(0, abs=1e-3)}]
    assert row["neighbours"][0]["distance"] >= 0


@pytest.mark.parametrize("asked", [-1, 31])
def test_neighbours_beyond_the_bank_are_refused(service, asked):
    with pytest.raises(mlflow.MlflowException, match=rf"between 0 and the 30 images of the bank, got {asked}"):
        service.predict([noise()], params={"neighbours": asked})


def test_neighbours_are_refused_where_the_images_had_no_labels(tmp_path):
    folder = package(tmp_path / "package", tiny_network(), bank=None)
    service = mlflow.pyfunc.load_model(str(folder / "model"))
    assert np.shape(service.predict([noise()])) == (1, 6)
    with pytest.raises(mlflow.MlflowException, match="must be 0, got 3: this model was trained on images without"):
        service.predict([noise()], params={"neighbours": 3})


# classes


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Return the service of a classifier, and its network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DeploymentNetwork(resnet().backbone, MEAN, STD, head=torch.nn.Linear(512, 3))
    network.backbone.made_by = 'timm.create_model("resnet10t", num_classes=0)'
    folder = package(tmp_path_factory.mktemp("classifier") / "package", network, bank=None)
    return mlflow.pyfunc.load_model(str(folder / "model")), network


def test_a_classifier_answers_with_names_and_probabilities_the_likeliest_first(classifier, files):
    service, network = classifier
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (expected,) = network(image).softmax(1)
    (row,) = service.predict(image.numpy())
    assert [each["label"] for each in row["top"]] == [CLASSES[number] for number in expected.argsort(descending=True)]
    assert [each["probability"] for each in row["top"]] == pytest.approx(sorted(expected.tolist())[::-1], abs=1e-5)
    assert (row["label"], row["probability"]) == (row["top"][0]["label"], row["top"][0]["probability"])
    assert len(service.predict([coded(file.read_bytes()) for file in files])) == len(files)


@pytest.mark.parametrize(("asked", "named"), [(1, 1), (2, 2), (100, 3)])
def test_as_many_classes_are_named_as_are_asked_for_and_there(classifier, asked, named):
    (row,) = classifier[0].predict([GOOD], params={"top_k": asked})
    assert len(row["top"]) == named


def test_less_than_one_class_is_refused(classifier):
    with pytest.raises(mlflow.MlflowException, match=r"params\.top_k must be 1 or more, got 0"):
        classifier[0].predict([GOOD], params={"top_k": 0})


# mistakes of the client


GOOD = noise()


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        ([GOOD, "%%%"], "image 1 is not base64"),
        (["abc"], "image 0 is not base64: Incorrect padding"),
        (["data:image/svg+xml,<svg/>"], "image 0 must be a data: URL in base64"),
        ([GOOD, GOOD, b"no image"], "image 2 is not an image file that Pillow reads"),
        ([coded(b"")], "image 0 is not an image file that Pillow reads"),
        ([GOOD] * 70 + [b"no image"], "image 70 is not an image file that Pillow reads"),
        ([None], "image 0 must be a file, base64 of one, or numbers, got NoneType"),
        ([{"a": 1}], "image 0 must be a file, base64 of one, or numbers, got dict"),
        ([[[1], [1, 2]]], "image 0 must have rows of one length"),
        (np.zeros((2, 3, 32, 33)), r"image 0 must be .* of shape \(3, 32, 32\), got float64 of shape \(3, 32, 33\)"),
        (np.zeros((1, 40, 40, 3)), r"image 0 must be .* integers of shape .* got float64 of shape \(40, 40, 3\)"),
        (np.full((1, 40, 40, 3), 256), r"image 0 must have pixels of 0\.\.255"),
        (np.zeros((1, 0, 40, 3), dtype=np.uint8), r"image 0 must have pixels of 0\.\.255"),
        ([np.zeros((3, 32, 32)), np.full((3, 32, 32), 255.0)], r"image 1 must be in \[0, 1\], got 255 to 255"),
        (np.full((1, 3, 32, 32), np.nan), r"image 0 must be in \[0, 1\], got nan"),
        ("abc", "inputs must be a list of images, got str"),
        (5, "inputs must be a list of images, got int"),
        ({"a": ["b"]}, "inputs must be a list of images, got dict"),
        (np.array(5), "inputs must be a list of images, got ndarray"),
        (pd.DataFrame({"a": ["b"], "c": ["d"]}), "inputs must be one column of images, got 2 columns"),
    ],
)
def test_a_mistake_names_the_image_and_the_reason(service, sent, reason):
    with pytest.raises(mlflow.MlflowException, match=reason) as raised:
        service.predict(sent)
    assert raised.value.get_http_status_code() == 400


def test_half_a_file_is_refused(service, files):
    whole = next(file for file in files if file.name == "rgb.jpg").read_bytes()
    with pytest.raises(mlflow.MlflowException, match=r"image 0 cannot be decoded: .*truncated"):
        service.predict([whole[: len(whole) // 2]])


@pytest.mark.parametrize("factor", [1, 3], ids=["beyond the limit", "far beyond it"])
def test_a_decompression_bomb_is_refused_unopened(service, tmp_path, monkeypatch, factor):
    Image.new("1", (200, 100 * factor + 1)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 100)
    with pytest.raises(mlflow.MlflowException, match=r"image 0 (has 20200 pixels, at most 20000|cannot be .*bomb)"):
        service.predict([(tmp_path / "bomb.png").read_bytes()])


def test_the_body_of_an_error_is_the_reason_and_not_the_request(service):
    with pytest.raises(mlflow.MlflowException) as raised:
        service.predict([b"no image"])
    raised.value.message = "what MLflow's server makes of it"
    assert "image 0 is not an image file" in raised.value.serialize_as_json()
    assert "what MLflow" not in raised.value.serialize_as_json()


def test_a_size_that_no_transform_mends_is_refused(tmp_path):
    folder = package(tmp_path / "package", tiny_network(), transform=None)
    service = mlflow.pyfunc.load_model(str(folder / "model"))
    with pytest.raises(mlflow.MlflowException, match=r"image 0 must be of height and width \(32, 32\), got \(40, 30\)"):
        service.predict([noise()])


def test_a_picture_that_the_transform_refuses_is_named(tmp_path):
    folder = package(tmp_path / "package", tiny_network(), transform=A.Compose([A.CenterCrop(32, 32), A.Normalize()]))
    service = mlflow.pyfunc.load_model(str(folder / "model"))
    with pytest.raises(mlflow.MlflowException, match="image 1 cannot be preprocessed: Crop size"):
        service.predict([noise(40, 40), noise(20, 20)])


# how it runs


def test_eight_threads_get_what_one_gets(tmp_path):
    transform = A.Compose([A.RandomCrop(20, 20), A.Resize(32, 32), A.GaussNoise(p=1), A.Normalize(MEAN, STD)])
    folder = package(tmp_path / "package", tiny_network(), transform=transform)
    service = mlflow.pyfunc.load_model(str(folder / "model"))
    requests = [[noise(60, 50, seed=seed)] * 5 for seed in range(40)]
    alone = [service.predict(request) for request in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(service.predict, requests))
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_the_input_example_is_an_input(service):
    assert np.shape(service.predict(service.input_example)) == (1, 512)


def test_it_runs_where_this_package_is_not_installed(packaged, tmp_path):
    code = """
import sys
sys.modules["mlflow_ssl"] = sys.modules["timm"] = sys.modules["pytorch_lightning"] = None
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
print(len(model.predict(model.input_example)[0]))
"""
    ran = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", code, str(packaged / "model")],
        cwd=tmp_path,
        env={"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "512\n"), ran.stderr

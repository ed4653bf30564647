import importlib.util
import json

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from mlflow_ssl import export
from mlflow_ssl.backbones import build_backbone
from mlflow_ssl.errors import InputError
from mlflow_ssl.export import (
    WRITERS,
    DeploymentNetwork,
    ModelCard,
    check_types,
    export_network,
    load_torchscript,
    traced,
)

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NAMES = ["resnet10t", "vit_tiny_patch16_224"]


def images(batch, size=32):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def trained(name="resnet10t"):
    """Return a backbone whose BatchNorm statistics have moved, in train mode as a training leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = build_backbone(name, image_size=(32, 32))
        with torch.no_grad():
            backbone.train()(torch.randn(8, 3, 32, 32))
    return backbone


def card(backbone, classes=("cat", "dog")):
    return ModelCard(
        backbone="resnet10t",
        state_dict_fits=backbone.made_by,
        input_size=(32, 32),
        mean=MEAN,
        std=STD,
        embedding_size=backbone.num_features,
        classes=classes,
    )


def exported(backbone, folder, *types):
    network = DeploymentNetwork(backbone, MEAN, STD)
    export_network(network, card(backbone), types=types, folder=folder)
    return network


def by_hand(backbone, batch):
    """Return the embeddings of images in [0, 1], normalized here."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        return backbone.eval()((batch - mean) / std)


def assert_same(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_deployment_network_normalizes_inside():
    backbone = trained()
    got = DeploymentNetwork(backbone, MEAN, STD)(images(3))
    assert_same(got, by_hand(backbone, images(3)))


def test_the_deployment_network_leaves_the_trained_one_as_it_is():
    backbone = trained().to(memory_format=torch.channels_last)
    network = DeploymentNetwork(backbone, MEAN, STD)
    assert backbone.training
    assert all(p.requires_grad for p in backbone.parameters())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert all(p.is_contiguous() for p in network.parameters())
    assert not any(p is q for p, q in zip(network.parameters(), backbone.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 7])
def test_torchscript_equals_eager(name, batch, tmp_path):
    backbone = trained(name)
    exported(backbone, tmp_path / "out", "torchscript")
    with torch.no_grad():
        assert_same(load_torchscript(tmp_path / "out/model.pt")(images(batch)), by_hand(backbone, images(batch)))


@pytest.mark.parametrize("name", NAMES)
def test_onnx_equals_eager_for_two_batch_sizes(name, tmp_path):
    backbone = trained(name)
    exported(backbone, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        (got,) = session.run(["embeddings"], {"images": images(batch).numpy()})
        assert_same(torch.from_numpy(got), by_hand(backbone, images(batch)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("kind", "read"), [("pytorch", torch.load), ("safetensors", load_file)])
def test_a_state_dict_is_the_backbone_alone_and_fits_what_the_card_names(name, kind, read, tmp_path):
    backbone = trained(name)
    exported(backbone, tmp_path / "out", kind)
    said = json.loads((tmp_path / "out/model.json").read_text())["state_dict_fits"]
    empty = eval(said, {"timm": timm, "mlflow_ssl": __import__("mlflow_ssl.backbones")})
    empty.load_state_dict(read(tmp_path / "out" / WRITERS[kind][0]))
    normalized = images(2) * 2 - 1
    with torch.no_grad():
        assert_same(empty.eval()(normalized), backbone.eval()(normalized))


def test_a_state_dict_without_the_small_stem_loads_into_plain_timm(tmp_path):
    backbone = build_backbone("resnet10t", image_size=(96, 96), small_stem=False)
    exported(backbone, tmp_path / "out", "pytorch")
    plain = timm.create_model("resnet10t", num_classes=0)
    plain.load_state_dict(torch.load(tmp_path / "out/model.pth", weights_only=True))
    with torch.no_grad():
        assert plain.eval()(images(2, 96)).equal(backbone.eval()(images(2, 96)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_is_exported_in_float32(dtype, tmp_path):
    backbone = trained().to(dtype)
    network = exported(backbone, tmp_path / "out", "torchscript", "pytorch")
    script = load_torchscript(tmp_path / "out/model.pt")
    floating = [t for t in (*script.state_dict().values(), *network.state_dict().values()) if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float32}
    assert script(images(2)).dtype == torch.float32
    assert_same(script(images(2)), by_hand(backbone.float(), images(2)))


def test_every_type_is_written_beside_its_card(tmp_path, monkeypatch):
    # the real ONNX export has its own test; here only its place in the folder counts
    monkeypatch.setitem(WRITERS, "onnx", ("model.onnx", lambda network, example, file: file.touch()))
    exported(trained(), tmp_path / "out", *WRITERS)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.pt", "model.onnx", "model.pth", "model.safetensors", "model.json"}


def test_the_card_says_what_a_caller_has_to_know(tmp_path):
    exported(trained(), tmp_path / "out")
    assert json.loads((tmp_path / "out/model.json").read_text()) == {
        "backbone": "resnet10t",
        "state_dict_fits": 'mlflow_ssl.backbones.build_backbone("resnet10t", image_size=(32, 32), small_stem=True)',
        "input_size": [32, 32],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
        "embedding_size": 512,
        "classes": ["cat", "dog"],
        "channel_order": "RGB",
        "layout": "NCHW",
        "input_range": [0.0, 1.0],
        "dtype": "float32",
        "normalization": "inside the network; the state dicts (pytorch, safetensors) are without it",
        "output": "embeddings",
    }


class BatchBound(nn.Module):
    """Gives other embeddings for other batch sizes, once traced."""

    num_features = 3
    made_by = "nothing"

    def forward(self, images):
        return images.mean((2, 3)) * float(len(images))


def test_an_export_that_differs_raises_and_leaves_no_folder(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"the exported torchscript network differs from the trained one by .* 5 images"
    ):
        exported(BatchBound(), tmp_path / "deployment_model", "pytorch", "torchscript")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_breaks_raises_and_leaves_no_folder(tmp_path, monkeypatch):
    def breaks(*_):
        raise OSError("no space left on device")

    monkeypatch.setitem(WRITERS, "pytorch", ("model.pth", breaks))
    with pytest.raises(OSError, match="no space left"):
        exported(trained(), tmp_path / "deployment_model", "torchscript", "pytorch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [float("nan"), 1e-4])
def test_a_difference_above_rounding_is_found(wrong, tmp_path, monkeypatch):
    write = WRITERS["torchscript"][1]
    spoil = lambda *args: lambda batch: write(*args)(batch) + wrong  # noqa: E731
    monkeypatch.setitem(WRITERS, "torchscript", ("model.pt", spoil))
    with pytest.raises(RuntimeError, match="at most 1e-05 is rounding"):
        exported(BatchBound(), tmp_path / "out", "torchscript")


def test_every_known_type_can_be_written_here():
    check_types(list(WRITERS))


def test_an_unknown_type_is_refused_with_the_choices():
    with pytest.raises(
        InputError, match=r"export\.types must be of torchscript, onnx, pytorch, safetensors, got 'tensorrt'"
    ):
        check_types(["pytorch", "tensorrt"])


@pytest.mark.parametrize(("kind", "missing"), [("onnx", "onnxscript"), ("safetensors", "safetensors")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(kind, missing, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(InputError, match=rf"export\.types={kind} needs packages .* pip install {missing}$"):
        check_types(["torchscript", kind])
    check_types(["torchscript", "pytorch"])


def test_tracing_gives_the_network_for_other_batch_sizes():
    network = DeploymentNetwork(trained(), MEAN, STD)
    with torch.no_grad():
        assert_same(traced(network, images(2))(images(5)), network(images(5)))

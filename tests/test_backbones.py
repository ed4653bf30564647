import logging

import pytest
import timm
import torch
from safetensors.torch import save_file

from mlflow_ssl.backbones import build_backbone, stride_past_the_edge
from mlflow_ssl.errors import InputError

SMALL = {"image_size": (32, 32)}
LARGE = {"image_size": (224, 224)}


def images(size=32, seed=0):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    return same_state(a.state_dict(), b.state_dict())


def same_state(a, b):
    return a.keys() == b.keys() and all(value.equal(b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    ("name", "width"), [("resnet10t", 512), ("vit_tiny_patch16_224", 192), ("mobilenetv3_small_050", 1024)]
)
def test_a_backbone_gives_embeddings_of_num_features(name, width):
    backbone = build_backbone(name, **SMALL).eval()
    assert backbone.num_features == width
    assert backbone(images()).shape == (2, width)


def test_an_unknown_name_is_answered_with_close_matches():
    with pytest.raises(InputError, match=r"must be a timm model name, got 'resnet5'; close matches: .*\bresnet50\b"):
        build_backbone("resnet5", **LARGE)


def test_an_unknown_name_like_no_other_is_answered_with_none():
    with pytest.raises(InputError, match="got '!!'; close matches: none"):
        build_backbone("!!", **LARGE)


def test_a_transformer_gets_the_image_size():
    backbone = build_backbone("vit_tiny_patch16_224", image_size=(32, 48))
    assert backbone.patch_embed.grid_size == (2, 3)
    assert backbone.pos_embed.shape == (1, 2 * 3 + 1, 192)


@pytest.mark.parametrize(
    ("name", "size", "found"),
    [
        ("resnet18", (16, 16), "layer4.0.conv1"),
        ("resnet18", (64, 16), "layer4.0.conv1"),  # however high
        ("resnet18", (16, 64), None),
        ("resnet18", (32, 32), None),
        ("vit_tiny_patch16_224", (16, 16), None),  # as wide as its stride is enough
    ],
)
def test_a_stride_that_is_wider_than_its_input_is_found(name, size, found):
    backbone = build_backbone(name, image_size=size, small_stem=False)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    assert stride_past_the_edge(backbone, size) == found
    assert not any(module._forward_pre_hooks for module in backbone.modules())
    assert same_state(before, backbone.state_dict())


def has_small_stem(backbone):
    return isinstance(backbone.conv1, torch.nn.Conv2d) and backbone.conv1.stride == (1, 1)


@pytest.mark.parametrize(("size", "small"), [((64, 64), True), ((64, 65), False), ((65, 64), False)])
def test_a_resnet_gets_the_small_stem_for_images_of_up_to_64_pixels(size, small):
    assert has_small_stem(build_backbone("resnet10t", image_size=size)) == small


def test_the_small_stem_keeps_the_resolution_up_to_the_first_stage():
    backbone = build_backbone("resnet18", **SMALL)
    x = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(images()))))
    assert x.shape == (2, 64, 32, 32)


@pytest.mark.parametrize("small_stem", [True, False])
def test_the_user_decides_the_stem_whatever_the_image_size(small_stem):
    assert has_small_stem(build_backbone("resnet10t", **SMALL, small_stem=small_stem)) == small_stem
    assert has_small_stem(build_backbone("resnet10t", **LARGE, small_stem=small_stem)) == small_stem


def test_auto_leaves_a_transformer_its_stem():
    backbone = build_backbone("vit_tiny_patch16_224", **SMALL)
    assert backbone.patch_embed.proj.kernel_size == (16, 16)


def test_a_small_stem_is_refused_where_there_is_none():
    with pytest.raises(InputError, match="must be false for vit_tiny_patch16_224: only resnets have such a stem"):
        build_backbone("vit_tiny_patch16_224", **SMALL, small_stem=True)


def test_a_small_stem_must_be_one_of_three():
    with pytest.raises(InputError, match=r"backbone\.small_stem must be true, false or auto, got 'yes'"):
        build_backbone("resnet10t", **SMALL, small_stem="yes")


def fetching_nothing(*_, pretrained, **kwargs):
    if pretrained:
        raise OSError("no route to host")
    return timm.models.resnet10t(**kwargs)


def test_weights_that_cannot_be_fetched_are_one_line_with_a_remedy(monkeypatch):
    monkeypatch.setattr(timm, "create_model", fetching_nothing)
    with pytest.raises(
        InputError, match=r"^backbone\.pretrained: .* \(OSError\); use backbone\.pretrained=false"
    ) as info:
        build_backbone("resnet10t", **LARGE, pretrained=True)
    assert "\n" not in str(info.value)


def test_auto_leaves_pretrained_weights_their_stem(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kwargs: create(name, **kwargs))
    assert not has_small_stem(build_backbone("resnet10t", **SMALL, pretrained=True))


def test_a_wrong_argument_of_timm_is_not_taken_for_a_missing_download():
    with pytest.raises(TypeError, match="no_such"):
        build_backbone("resnet10t", **LARGE, no_such=1)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_made_by_is_the_call_that_takes_the_state_dict(name):
    backbone = build_backbone(name, **SMALL)
    made = eval(backbone.made_by, {"timm": timm, "mlflow_ssl": __import__("mlflow_ssl.backbones")})
    made.load_state_dict(backbone.state_dict())
    assert made.eval()(images()).equal(backbone.eval()(images()))


def test_made_by_is_plain_timm_without_the_small_stem():
    assert build_backbone("resnet10t", **LARGE).made_by == 'timm.create_model("resnet10t", num_classes=0)'


def save_state_dict(backbone, folder):
    torch.save(backbone.state_dict(), folder / "w.pth")
    return folder / "w.pth"


def save_safetensors(backbone, folder):
    save_file(backbone.state_dict(), folder / "w.safetensors")
    return folder / "w.safetensors"


def save_training(backbone, folder):
    state = {f"online.backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"target.backbone.{name}": value + 1 for name, value in backbone.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize("save", [save_state_dict, save_safetensors, save_training])
def test_a_backbone_starts_from_a_file(save, tmp_path):
    trained, fresh = build_backbone("resnet10t", **SMALL), build_backbone("resnet10t", **SMALL)
    assert not same(trained, fresh)
    path = save(trained, tmp_path)
    assert same(trained, build_backbone("resnet10t", **SMALL, checkpoint_path=str(path)))


def wrong_network(path):
    torch.save(build_backbone("vit_tiny_patch16_224", **SMALL).state_dict(), path)


def other_stem(path):
    torch.save(build_backbone("resnet10t", **LARGE).state_dict(), path)


def a_list(path):
    torch.save([1, 2], path)


def text(path):
    path.write_text("not weights")


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        (wrong_network, "w.pth", "does not fit this backbone"),
        (other_stem, "w.pth", "does not fit this backbone"),
        (a_list, "w.pth", "does not fit this backbone"),
        (text, "w.pth", "cannot be read as weights"),
        (text, "w.safetensors", "cannot be read as weights"),
        (lambda path: None, "w.pth", "must be an existing file or models:/name/version, got"),
    ],
)
def test_a_file_without_fitting_weights_is_one_short_line_that_names_it(write, name, message, tmp_path):
    write(tmp_path / name)
    with pytest.raises(InputError, match=rf"^backbone\.checkpoint_path {message}.*{name}") as info:
        build_backbone("resnet10t", **SMALL, checkpoint_path=str(tmp_path / name))
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 300 + len(str(tmp_path))


def test_the_small_stem_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="mlflow_ssl.backbones"):
        build_backbone("resnet10t", **SMALL)
    assert caplog.messages == ["resnet10t has the small-image stem: one 3x3 convolution, no pool"]

"""Small untrained networks as packages, and pictures as clients have them."""

from pathlib import Path

import albumentations as A
import numpy as np
import timm
import torch
from PIL import Image
from tiny import Backbone

from mlflow_ssl.backbones import build_backbone
from mlflow_ssl.export import DeploymentNetwork, ModelCard
from mlflow_ssl.tracking.packaging import LabelledEmbeddings, Registration, package_network

MEAN, STD, SIZE = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 32
CLASSES = ("cat", "dog", "élan")


def validation_transform():
    """Return a resize to the network's size and its normalization."""
    return A.Compose([A.Resize(SIZE, SIZE, interpolation=2), A.Normalize(MEAN, STD)])


def tiny_network():
    """Return a network of a few hundred weights; it takes images of any size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DeploymentNetwork(Backbone(), MEAN, STD)


def resnet():
    """Return a resnet10t whose BatchNorm statistics have moved."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = timm.create_model("resnet10t", pretrained=False, num_classes=0)
        with torch.no_grad():
            backbone.train()(torch.randn(8, 3, SIZE, SIZE))
        return DeploymentNetwork(backbone, MEAN, STD)


def trained_here(**kwargs):
    """Return a resnet10t as a training of this project registers it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DeploymentNetwork(build_backbone("resnet10t", image_size=(SIZE, SIZE), **kwargs), MEAN, STD)


def card(network):
    """Return what `network` takes and gives."""
    return ModelCard(
        backbone="resnet10t",
        state_dict_fits=network.made_by if hasattr(network.backbone, "made_by") else "nothing",
        input_size=(SIZE, SIZE),
        mean=MEAN,
        std=STD,
        embedding_size=network.backbone.num_features,
        classes=CLASSES,
        output=network.output,
    )


def bank(embedding_size, size=30):
    """Return random embeddings, their labels in turn."""
    rng = np.random.default_rng(0)
    return LabelledEmbeddings(
        rng.normal(size=(size, embedding_size)).astype(np.float32), np.arange(size) % len(CLASSES), CLASSES
    )


def noise(height=40, width=30, seed=0):
    """Return RGB pixels."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def package(folder, network, **changes):
    """Package `network` with a bank, for a model named tiny."""
    arguments = {
        "card": card(network),
        "registration": Registration("tiny", "auto", {"test_acc": "0.900000", "data.digest": "d1"}),
        "transform": validation_transform(),
        "bank": bank(network.backbone.num_features),
        "example": noise(),
    }
    package_network(folder, network, **arguments | changes)
    return folder


def write_every_mode(folder: Path):
    """Write pictures of many sizes, formats and modes, and return their files."""
    folder.mkdir(parents=True)
    rgb = Image.fromarray(noise(50, 41).repeat(2, 0).repeat(2, 1))  # coarse enough to survive JPEG
    alpha = Image.fromarray(noise(100, 82, seed=1)[..., 0])
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    palette = rgb.quantize(16)
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    written = {
        "rgb.png": (rgb, {}),
        "rgb.jpg": (rgb, {}),
        "rgb.webp": (rgb, {"lossless": True}),
        "rgb.bmp": (rgb, {}),
        "rgba.webp": (rgba, {}),
        "rgba.png": (rgba, {}),
        "grey.png": (rgb.convert("L"), {}),
        "grey.jpg": (rgb.convert("L"), {}),
        "grey_alpha.png": (rgba.convert("LA"), {}),
        "one_bit.png": (rgb.convert("1"), {}),
        "palette.gif": (palette, {}),
        "palette_transparent.png": (palette, {"transparency": 3}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "cmyk.tif": (rgb.convert("CMYK"), {}),
        "deep.png": (deep, {}),
        "deep.tif": (deep, {}),
        "turned.jpg": (rgb, {"exif": exif}),
        "dot.png": (rgb.resize((1, 1)), {}),
    }
    for name, (image, settings) in written.items():
        image.save(folder / name, **settings)
    return sorted(folder.iterdir())

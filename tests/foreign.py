"""Models that this project did not register, as others write them with plain MLflow."""

import base64
import io

import mlflow
import numpy as np
import timm
import torch
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec
from PIL import Image

SIZE = 32
REQUIREMENTS = ["torch"]  # or MLflow tries to find out for a minute


def network(seed=0, **settings):
    """Return a resnet10t with random weights that gives vectors of 512."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model("resnet10t", pretrained=False, **{"num_classes": 0} | settings).eval()


def save_torch(folder, module, **settings):
    """Save a torch module as MLflow's users do."""
    settings = {"serialization_format": "pickle"} | settings
    mlflow.pytorch.save_model(module, folder, pip_requirements=REQUIREMENTS, **settings)
    return folder


def save_exported(folder, module, *, example=2, **settings):
    """Save the graph that MLflow exports by default, from an example of so many images."""
    images = np.random.default_rng(0).random((example, 3, SIZE, SIZE), dtype=np.float32)
    return save_torch(folder, module, serialization_format="pt2", input_example=images, **settings)


def brightness():
    """Return a model of six numbers of an image, in one of the forms that it may come in; it has no weights."""

    class Brightness(mlflow.pyfunc.PythonModel):  # inside, as pytest collects before warnings are allowed
        def predict(self, context, model_input, params=None):
            images = [_read(image) for image in _images(model_input)]
            return np.stack([np.concatenate([image.mean((0, 1)), image.std((0, 1))]) for image in images])

    return Brightness()


def _images(given):
    if isinstance(given, dict):
        (given,) = given.values()
    return given.iloc[:, 0] if hasattr(given, "iloc") else given


def _read(image):
    if isinstance(image, str):
        image = base64.b64decode(image)
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            return np.asarray(opened.convert("RGB")) / 255
    return np.moveaxis(image, 0, -1)


TENSOR = Schema([TensorSpec(np.dtype("float32"), (-1, 3, SIZE, SIZE))])
NAMED = Schema([TensorSpec(np.dtype("float64"), (-1, 3, SIZE, SIZE), name="images")])
TEXT = Schema([ColSpec("string", "image")])
OUTPUT = Schema([TensorSpec(np.dtype("float64"), (-1, 6))])
FILES = Schema([ColSpec("binary", "image")])


def save_pyfunc(folder, model=None, *, inputs=None, **settings):
    """Save a python_function model; without a signature unless ``inputs`` are given."""
    signature = None if inputs is None else ModelSignature(inputs, OUTPUT)
    mlflow.pyfunc.save_model(
        folder, python_model=model or brightness(), signature=signature, pip_requirements=REQUIREMENTS, **settings
    )
    return folder

"""Backbones: any timm network, ready to embed."""

import ast
import difflib
import functools
import logging
import textwrap
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import ResNet, get_pretrained_cfg
from torch import nn

from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

SMALL_IMAGE = 64
"""Inputs of at most this many pixels get the small stem under ``small_stem="auto"``."""


def build_backbone(
    model_name: str,
    *,
    image_size: tuple[int, int],
    pretrained: bool = False,
    checkpoint_path: str | None = None,
    small_stem: bool | str = "auto",
    num_classes: int = 0,
    **kwargs: Any,
) -> nn.Module:
    """Return a timm network without classifier, ``(B, 3, H, W) -> (B, num_features)``.

    Args:
        model_name: any name that ``timm.list_models()`` knows.
        num_classes: with a classifier all the same, of so many classes, as a finetuned state dict fits.
        image_size: height and width of the input in pixels; fixes the patch grid of transformers.
        pretrained: start from timm's weights, fetched from the hub or found in its cache.
        checkpoint_path: start from a state dict of this same backbone: a local file, or for one that this project
            registered ``models:/name/version``, or the folder of the model.
        small_stem: replace a resnet's 7x7 stride-2 stem and its pool by one 3x3 convolution, as is usual for
            CIFAR-sized images; ``auto`` does so for images of up to 64 px, and not for pretrained weights.
        kwargs: handed to ``timm.create_model``.

    Raises:
        InputError: if the name is unknown, the weights cannot be had or do not fit, or the stem is not a resnet's.
    """
    if model_name not in timm.list_models():
        close = ", ".join(difflib.get_close_matches(model_name, timm.list_models(), n=4)) or "none"
        raise InputError(f"backbone.model_name must be a timm model name, got {model_name!r}; close matches: {close}")
    if _fixed_size(model_name):
        kwargs["img_size"] = tuple(image_size)
    backbone = _create(model_name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    # the call that makes an empty network for an exported state dict
    made_by = f"timm.create_model({_call(model_name, kwargs)}, num_classes=0)"
    if _wants_small_stem(backbone, small_stem, image_size=image_size, pretrained=pretrained):
        _shrink_stem(backbone, model_name)
        shape = _call(model_name, {"image_size": tuple(image_size), **kwargs, "small_stem": True})
        made_by = f"mlflow_ssl.backbones.build_backbone({shape})"
    backbone.made_by = made_by  # type: ignore[assignment]
    # mobilenets and some others widen the embedding after their last stage, and name that width apart
    backbone.num_features = getattr(backbone, "head_hidden_size", backbone.num_features)
    if checkpoint_path is not None:
        _load_weights(backbone, checkpoint_path)
    return backbone


def stride_past_the_edge(backbone: nn.Module, image_size: tuple[int, int]) -> str | None:
    """Return the name of a convolution whose stride is wider than its input is for images of a size; None without one.

    Only shapes are worked out: on torch's meta device, with the weights left alone.
    """
    wide: list[str] = []

    def look(name: str, convolution: nn.Conv2d, inputs: tuple[torch.Tensor]) -> None:
        if max(convolution.kernel_size) > 1 and inputs[0].shape[-1] < convolution.stride[-1]:
            wide.append(name)

    convolutions = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_pre_hook(functools.partial(look, name)) for name, module in convolutions]
    state = [*backbone.named_parameters(), *backbone.named_buffers()]
    try:
        with torch.no_grad():
            weights = {name: tensor.to("meta") for name, tensor in state}
            torch.func.functional_call(backbone, weights, torch.empty(2, 3, *image_size, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return wide[0] if wide else None


def with_classes(made_by: str, num_classes: int) -> str:
    """Return the call that makes a network with a classifier, for the one that makes it without.

    Example:
        >>> with_classes('timm.create_model("resnet18", num_classes=0)', 3)
        'timm.create_model("resnet18", num_classes=3)'
    """
    without, _, _ = made_by.removesuffix(")").partition(", num_classes=")
    return f"{without}, num_classes={num_classes})"


def classifier_name(backbone: nn.Module) -> str:
    """Return what a timm network calls its classifier, such as ``fc``; ``head`` where it does not say."""
    name = getattr(backbone, "pretrained_cfg", {}).get("classifier")
    return name if isinstance(name, str) else "head"


def read_call(made_by: str) -> dict[str, Any]:
    """Return the arguments of the call that a network was made by; nothing is run.

    Args:
        made_by: as ``build_backbone(...).made_by`` has it.

    Returns:
        ``model_name``, ``small_stem``, and what else ``timm.create_model`` was told, but for the size.

    Raises:
        ValueError: if it is another expression.

    Example:
        >>> read_call('timm.create_model("resnet18", drop_path_rate=0.1, num_classes=0)')
        {'model_name': 'resnet18', 'small_stem': False, 'drop_path_rate': 0.1}
    """
    try:
        call = ast.parse(made_by, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"made_by must be a call, got {made_by!r}") from error
    makers = ("timm.create_model", "mlflow_ssl.backbones.build_backbone")
    if not isinstance(call, ast.Call) or ast.unparse(call.func) not in makers or len(call.args) != 1:
        raise ValueError(f"made_by must be a call of {' or '.join(makers)}, got {made_by!r}")
    told = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    told = {name: value for name, value in told.items() if name not in ("num_classes", "image_size", "img_size")}
    return {"model_name": str(ast.literal_eval(call.args[0])), "small_stem": False} | told


def _fixed_size(model_name: str) -> bool:
    config = get_pretrained_cfg(model_name)
    return config is not None and config.fixed_input_size


def _call(model_name: str, kwargs: dict[str, Any]) -> str:
    return ", ".join([f'"{model_name}"', *(f"{name}={value!r}" for name, value in kwargs.items())])


def _create(model_name: str, **kwargs: Any) -> nn.Module:
    try:
        return timm.create_model(model_name, **kwargs)
    except Exception as error:
        if not kwargs["pretrained"]:
            raise
        # the hub client has a dozen ways to say that it found no weights or no network
        raise InputError(
            f"backbone.pretrained: the weights of {model_name} could not be fetched from the hub "
            f"({type(error).__name__}); use backbone.pretrained=false or backbone.checkpoint_path=FILE"
        ) from error


def _wants_small_stem(
    backbone: nn.Module, small_stem: bool | str, *, image_size: tuple[int, int], pretrained: bool
) -> bool:
    if small_stem == "auto":
        return isinstance(backbone, ResNet) and max(image_size) <= SMALL_IMAGE and not pretrained
    if not isinstance(small_stem, bool):
        raise InputError(f"backbone.small_stem must be true, false or auto, got {small_stem!r}")
    return small_stem


def _shrink_stem(backbone: nn.Module, model_name: str) -> None:
    if not isinstance(backbone, ResNet):
        raise InputError(f"backbone.small_stem must be false for {model_name}: only resnets have such a stem")
    stem = nn.Conv2d(3, int(backbone.bn1.num_features), kernel_size=3, padding=1, bias=False)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    backbone.add_module("conv1", stem)
    backbone.add_module("maxpool", nn.Identity())
    log.info("%s has the small-image stem: one 3x3 convolution, no pool", model_name)


def _load_weights(backbone: nn.Module, checkpoint_path: str) -> None:
    if ":/" in checkpoint_path or Path(checkpoint_path, "MLmodel").is_file():
        from mlflow_ssl.tracking.registry import load_backbone_weights

        state = load_backbone_weights(checkpoint_path)
    else:
        state = _read_state_dict(Path(checkpoint_path))
    try:
        backbone.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        reason = textwrap.shorten(reason, width=200, placeholder=" ...")
        raise InputError(f"backbone.checkpoint_path does not fit this backbone: {checkpoint_path}: {reason}") from error


def _read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InputError(f"backbone.checkpoint_path must be an existing file or models:/name/version, got {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"backbone.checkpoint_path cannot be read as weights: {path}") from error
    # a checkpoint of a training here holds the whole method; take its online backbone
    prefix = "online.backbone."
    if isinstance(state, dict) and "state_dict" in state:
        state = {k.removeprefix(prefix): v for k, v in state["state_dict"].items() if k.startswith(prefix)}
    return state  # type: ignore[no-any-return]

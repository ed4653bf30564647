"""The trained network for others: the one place that touches TorchScript and ONNX.

Every format holds the same function: RGB images ``(B, 3, H, W)``, float32 in [0, 1], to embeddings ``(B, D)``, or, of a
classifier, to logits ``(B, C)``. The normalization of the training is inside. Only the state dicts are without it.
"""

import copy
import importlib.util
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlflow_ssl.backbones import classifier_name, with_classes
from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference of an exported output, as a share of the largest value, in float32."""


@dataclass(frozen=True)
class ModelCard:
    """What ``model.json`` says: all that a caller of the exported network has to know."""

    backbone: str
    state_dict_fits: str
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    embedding_size: int
    classes: tuple[str, ...]
    channel_order: str = "RGB"
    layout: str = "NCHW"
    input_range: tuple[float, float] = (0.0, 1.0)
    dtype: str = "float32"
    normalization: str = "inside the network; the state dicts (pytorch, safetensors) are without it"
    output: str = "embeddings"
    """Or ``logits``: one for each of ``classes``."""


class DeploymentNetwork(nn.Module):
    """Normalization and backbone in one: images in [0, 1] to embeddings, or with a head to logits.

    Args:
        backbone: the trained network; copied, in float32 and evaluation mode, on the CPU.
        mean: per channel, in [0, 1].
        std: per channel, in [0, 1].
        head: of embeddings ``(B, D)`` to logits ``(B, C)``; None gives the embeddings.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float], *, head: nn.Linear | None = None
    ) -> None:
        super().__init__()
        copied = copy.deepcopy(backbone).to(device="cpu", dtype=torch.float32)
        self.backbone = copied.to(memory_format=torch.contiguous_format).requires_grad_(requires_grad=False)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.head = None if head is None else copy.deepcopy(head).requires_grad_(requires_grad=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings or logits of RGB images ``(B, 3, H, W)`` in [0, 1]."""
        embeddings: Tensor = self.backbone((images - self.mean) / self.std)
        return embeddings if self.head is None else self.head(embeddings)

    @property
    def output(self) -> str:
        """What it gives: ``embeddings``, or ``logits``."""
        return "embeddings" if self.head is None else "logits"

    @property
    def made_by(self) -> str:
        """The call that makes an empty network for `weights`."""
        made_by = str(self.backbone.made_by)
        return made_by if self.head is None else with_classes(made_by, self.head.out_features)

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict of backbone and head under timm's names, without the normalization."""
        weights: dict[str, Tensor] = self.backbone.state_dict()
        if self.head is not None:
            name = classifier_name(self.backbone)
            weights |= {f"{name}.{key}": value for key, value in self.head.state_dict().items()}
        return weights


Writer = Callable[[DeploymentNetwork, Tensor, Path], Callable[[Tensor], Tensor] | None]
"""Writes a network to a file, given an example; returns the file's own function for the check, if it has one."""


def traced(network: DeploymentNetwork, example: Tensor) -> Any:
    """Return ``network`` as TorchScript, for images of the size of ``example``, ``(B, 3, H, W)``."""
    with _without_deprecation(), torch.no_grad():
        return torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]


def _write_torchscript(network: DeploymentNetwork, example: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    with _without_deprecation():
        torch.jit.save(traced(network, example), file)
    written: Callable[[Tensor], Tensor] = load_torchscript(file)
    return written


def _write_onnx(network: DeploymentNetwork, example: Tensor, file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    with _without_deprecation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own operator registry
        torch.onnx.export(
            network,
            (example,),
            file,
            input_names=["images"],
            output_names=[network.output],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_state_dict(network: DeploymentNetwork, _: Tensor, file: Path) -> None:
    torch.save(network.weights(), file)


def _write_safetensors(network: DeploymentNetwork, _: Tensor, file: Path) -> None:
    from safetensors.torch import save_file

    save_file(network.weights(), file)


WRITERS: dict[str, tuple[str, Writer]] = {
    "torchscript": ("model.pt", _write_torchscript),
    "onnx": ("model.onnx", _write_onnx),
    "pytorch": ("model.pth", _write_state_dict),
    "safetensors": ("model.safetensors", _write_safetensors),
}
"""Export type to its file and how it is written."""

_NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}


def check_types(types: Sequence[str]) -> None:
    """Check that every type can be written here, before a training is spent on it.

    Raises:
        InputError: if a type is unknown or its packages are missing.
    """
    for kind in types:
        if kind not in WRITERS:
            raise InputError(f"export.types must be of {', '.join(WRITERS)}, got {kind!r}")
        missing = [name for name in _NEEDED.get(kind, ()) if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(f"export.types={kind} needs packages that are missing: pip install {' '.join(missing)}")


def export_network(network: DeploymentNetwork, card: ModelCard, *, types: Sequence[str], folder: Path) -> None:
    """Write ``network`` in every format, and ``model.json``, into ``folder``, in place of what is there.

    Each file with a function of its own is asked about batches of two sizes and compared with ``network``. The folder
    appears whole or not at all.

    Raises:
        RuntimeError: if an exported network does not give what the trained one does.
    """
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir(parents=True)
    try:
        _write_all(network, card, types, scratch)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch)
        raise
    log.info("exported %s to %s", ", ".join(types), folder)


def _write_all(network: DeploymentNetwork, card: ModelCard, types: Sequence[str], folder: Path) -> None:
    example = torch.rand(2, 3, *card.input_size, generator=torch.Generator().manual_seed(0))
    for kind in types:
        name, write = WRITERS[kind]
        exported = write(network, example, folder / name)
        if exported is not None:
            _check_same(network, exported, example, kind)
    (folder / "model.json").write_text(json.dumps(asdict(card), indent=2) + "\n")


@torch.no_grad()
def _check_same(network: DeploymentNetwork, exported: Callable[[Tensor], Tensor], example: Tensor, kind: str) -> None:
    for batch in (example, torch.cat([example, example.flip(-1), example[:1]])):  # 2 and 5 images
        expected, got = network(batch), exported(batch)
        if expected.shape != got.shape:
            raise RuntimeError(
                f"the exported {kind} network gives {network.output} of shape {tuple(got.shape)}, the trained one "
                f"{tuple(expected.shape)}"
            )
        difference = ((expected - got).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"the exported {kind} network differs from the trained one by {difference:.1e} of the largest value "
                f"for {len(batch)} images; at most {TOLERANCE:.0e} is rounding"
            )


def load_torchscript(file: Path) -> Any:
    """Return the network in a TorchScript file, on the CPU."""
    with _without_deprecation():
        return torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]


class _without_deprecation(warnings.catch_warnings):  # noqa: N801 reads as the statement it is
    """Silence torch's notice that TorchScript is deprecated: it is what the registry serves."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.", category=FutureWarning)
        warnings.filterwarnings("ignore", category=torch.jit._trace.TracerWarning)
        return entered

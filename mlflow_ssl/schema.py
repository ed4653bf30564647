"""The groups that are plain values rather than objects, and what may stand in them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlflow_ssl.errors import InputError


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=False)


class Core(_Group):
    """``core``: what is said of a run as a whole."""

    name: str = Field(min_length=1)
    tag: str
    seed: int = Field(ge=0)
    output_dir: str = Field(min_length=1)
    log_level: Literal["debug", "info", "warning", "error"]
    demonstration: list[str]
    hang_seconds: float | None = Field(45, gt=0)


class Transforms(BaseModel):
    """``transforms``: the sizes and numbers that the network is exported with; any node may stand beside them."""

    model_config = ConfigDict(extra="allow")
    input_height: int = Field(ge=1)
    input_width: int = Field(ge=1)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)


class Export(_Group):
    """``export``: the formats of the network."""

    types: list[Literal["torchscript", "onnx", "pytorch", "safetensors"]] = Field(min_length=1)


class Tracking(_Group):
    """``tracking``: where runs go."""

    uri: str | None
    system_metrics: bool
    wait_at_end_seconds: float = Field(ge=0)


class Registry(_Group):
    """``registry``: whether and under which name the network is registered, and whether it may become the champion."""

    name: str = Field(min_length=1, pattern=r"^[^/:]+$")
    promote: Literal["auto", "never"]
    register_: bool = Field(True, alias="register")


class Sweep(_Group):
    """``sweep``: which trainings a sweep makes, how many at once, where, and what is the best of them."""

    name: str = Field(min_length=1)
    space: list[str]
    trials: int | None = Field(ge=1)
    monitor: str = Field(min_length=1)
    direction: Literal["maximize", "minimize"]
    jobs: Literal["auto"] | Annotated[int, Field(ge=1)]
    launcher: Literal["local", "ray", "submitit"]
    storage: str = Field(min_length=1)
    retry_failed: bool
    sampler: dict[str, Any] | None
    pruner: dict[str, Any] | None
    submitit: dict[str, Any]
    ray: dict[str, Any]


_GROUPS: dict[str, type[BaseModel]] = {
    "core": Core,
    "transforms": Transforms,
    "export": Export,
    "tracking": Tracking,
    "registry": Registry,
    "sweep": Sweep,
}
_OPTIONAL = frozenset({"sweep"})


def check_plain_groups(config: dict[str, Any]) -> None:
    """Check the plain groups of a resolved config.

    Raises:
        InputError: naming the first key that is wrong, and why.
    """
    for name, group in _GROUPS.items():
        if name in _OPTIONAL and name not in config:
            continue
        try:
            group.model_validate(config[name])
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([name, *(str(part) for part in first["loc"])])
            raise InputError(f"{key} is wrong: {first['msg']}, got {first['input']!r}") from error

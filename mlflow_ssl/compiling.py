"""`torch.compile` for the networks of a training step: whether it can be had, and how it is put on."""

import logging
import os
import shutil
from collections.abc import Iterable

from torch import nn

from mlflow_ssl.errors import InputError

log = logging.getLogger(__name__)

MODES = ("default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead")
"""Modes of `torch.compile`; reduce-overhead and max-autotune record CUDA graphs."""
COMPILERS = {"cpu": ("CXX", "c++", "g++", "clang++"), "gpu": ("CC", "cc", "gcc", "clang")}
"""What kernels are built with on each accelerator: a variable that names it, and its usual names."""


def compile_mode(compile: bool | str) -> str | None:
    """Return the mode of `torch.compile` that ``model.compile`` asks for; None for none.

    Raises:
        InputError: if it is neither true, false nor a mode.

    Example:
        >>> compile_mode(False), compile_mode(True), compile_mode("reduce-overhead")
        (None, 'default', 'reduce-overhead')
    """
    if isinstance(compile, bool):
        return "default" if compile else None
    if compile not in MODES:
        raise InputError(f"model.compile must be true, false or one of {', '.join(MODES)}, got {compile!r}")
    return compile


def check_compiler(accelerator: str) -> None:
    """Check that the machine has what the kernels of an accelerator are built with.

    Raises:
        InputError: if it has not: torch would say so in the first step, with a page of its own frames.
    """
    variable, *usual = COMPILERS.get(accelerator, COMPILERS["gpu"])
    asked = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([asked] if asked else usual)):
        raise InputError(
            f"model.compile needs a compiler for its kernels, {usual[1]} for instance, and "
            f"{asked or 'none'} is on the PATH; install one, set {variable}, or leave model.compile=false"
        )


def compile_networks(networks: Iterable[nn.Module], mode: str) -> None:
    """Have each network compiled at its first call, in place; names of weights stay as they are.

    Batches of a training all have one shape, so kernels are made for that one.
    """
    for network in networks:
        network.compile(mode=mode, dynamic=False)
    log.info("networks are compiled (%s): the first step takes longer", mode)

"""What this machine does best, and what it cannot do: ``auto`` in a config becomes a value here."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from omegaconf import DictConfig

from mlflow_ssl.compiling import check_compiler
from mlflow_ssl.datamodules.loading import usable_cores
from mlflow_ssl.errors import InputError
from mlflow_ssl.memory import keep_freed_memory

log = logging.getLogger(__name__)


def settle(config: DictConfig) -> None:
    """Replace every ``auto`` of trainer and model, and fit ``devices`` to the accelerator, in place.

    Raises:
        InputError: if the trainer wants GPUs that are not there, or ``model.compile`` a compiler that is not.
    """
    trainer = config.trainer
    asked_auto = "auto" in (trainer.accelerator, trainer.precision)
    gpu = torch.cuda.is_available()
    if trainer.accelerator == "auto":
        trainer.accelerator = "gpu" if gpu else "cpu"
    trainer.devices = fitting_devices(trainer.accelerator, trainer.devices, num_gpus=torch.cuda.device_count())
    if trainer.precision == "auto":
        trainer.precision = best_precision(trainer.accelerator)
    if config.model.get("channels_last") == "auto":
        config.model.channels_last = True  # never slower for convolutions, and no change of results
    if trainer.accelerator == "cpu":
        keep_freed_memory()
    if config.model.get("compile"):
        check_compiler(trainer.accelerator)
    if asked_auto:
        layout = "channels_last" if config.model.get("channels_last") else "contiguous"
        chosen = [trainer.accelerator, trainer.precision, layout]
        if trainer.accelerator == "cpu":
            torch.set_num_threads(
                best_threads(os.environ, cores=usable_cores(), physical=psutil.cpu_count(logical=False))
            )
            threads = torch.get_num_threads()
            chosen.append(f"{threads} thread{'s' * (threads > 1)}")
        log.info("trainer on this machine: %s", ", ".join(chosen))


def fitting_devices(accelerator: str, devices: Any, *, num_gpus: int) -> Any:
    """Return ``trainer.devices`` as this machine can have it.

    GPU numbers mean nothing to a CPU: there any list becomes one process.

    Raises:
        InputError: if a GPU is wanted that is not there.

    Example:
        >>> fitting_devices("cpu", [2], num_gpus=0)
        1
    """
    if accelerator == "cpu":
        return devices if isinstance(devices, int) and devices > 0 else 1
    if accelerator != "gpu":
        return devices
    if num_gpus == 0:
        raise InputError("trainer wants a GPU and this machine shows none; use trainer=lightning_cpu or trainer=auto")
    if isinstance(devices, int) and devices > num_gpus:
        raise InputError(f"trainer.devices must be at most the {num_gpus} GPUs of this machine, got {devices}")
    missing = [number for number in devices if number >= num_gpus] if not isinstance(devices, int | str) else []
    if missing:
        raise InputError(f"trainer.devices must name GPUs 0 to {num_gpus - 1} of this machine, got {list(devices)}")
    return devices


def best_threads(environment: Mapping[str, str], *, cores: int, physical: int | None) -> int:
    """Return how many threads compute on a CPU: one a processor core, of those that this process may use.

    torch counts the cores of the machine, also in a container that may use two of its sixty-four.

    Args:
        environment: ``OMP_NUM_THREADS`` in it, if it is a number, is taken as it is.
        cores: logical ones that this process may use.
        physical: of the machine; None if it does not say.

    Example:
        >>> best_threads({}, cores=8, physical=4), best_threads({}, cores=2, physical=32)
        (4, 2)
        >>> best_threads({"OMP_NUM_THREADS": "3"}, cores=8, physical=4)
        3
    """
    asked = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdigit() and int(asked):
        return int(asked)
    return min(cores, physical or cores)


def best_precision(accelerator: str) -> str:
    """Return the fastest precision that trains as well as float32 on this machine."""
    if accelerator == "gpu":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    # without such instructions bfloat16 is emulated on a CPU, and slower than float32
    return "bf16-mixed" if _has_bf16_instructions() else "32-true"


def _has_bf16_instructions() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))

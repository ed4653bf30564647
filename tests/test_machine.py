import pytest
import torch
from omegaconf import OmegaConf

from mlflow_ssl import machine as machine_module
from mlflow_ssl.errors import InputError
from mlflow_ssl.machine import best_precision, fitting_devices, settle


@pytest.fixture
def machine(monkeypatch):
    """Return a function that pretends a machine."""

    def pretend(*, gpus=0, gpu_bf16=True, cpu_bf16=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        # emulated bf16 is there on every GPU, and slow
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or gpu_bf16
        )
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": cpu_bf16, "amx_bf16": False})

    return pretend


def config(accelerator="auto", devices=1, precision="auto", **model):
    return OmegaConf.create(
        {"trainer": {"accelerator": accelerator, "devices": devices, "precision": precision}, "model": model}
    )


@pytest.mark.parametrize(("devices", "fitted"), [(2, 2), (1, 1), ([0], 1), ([1, 2], 1), (-1, 1), ("auto", 1), (0, 1)])
def test_a_cpu_gets_a_number_of_processes(devices, fitted):
    assert fitting_devices("cpu", devices, num_gpus=4) == fitted


@pytest.mark.parametrize("devices", [1, 2, -1, "auto", [0], [1, 0]])
def test_gpus_that_are_there_stay_as_the_user_wrote_them(devices):
    assert fitting_devices("gpu", devices, num_gpus=2) == devices


@pytest.mark.parametrize("devices", [[2], [0, 5], 3])
def test_gpus_that_are_not_there_are_refused(devices):
    with pytest.raises(InputError, match=r"trainer\.devices must .* of this machine, got (\[\d|3)"):
        fitting_devices("gpu", devices, num_gpus=2)


@pytest.mark.parametrize("devices", [1, [0], -1, "auto"])
def test_a_machine_without_gpu_is_told_of_the_cpu_trainer(devices):
    with pytest.raises(InputError, match=r"this machine shows none; use trainer=lightning_cpu or trainer=auto"):
        fitting_devices("gpu", devices, num_gpus=0)


def test_other_accelerators_are_left_to_lightning():
    assert fitting_devices("tpu", 8, num_gpus=0) == 8


@pytest.mark.parametrize(("gpu_bf16", "precision"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_a_gpu_trains_in_bf16_unless_it_would_be_emulated(machine, gpu_bf16, precision):
    machine(gpus=1, gpu_bf16=gpu_bf16)
    assert best_precision("gpu") == precision


@pytest.mark.parametrize(("cpu_bf16", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_cpu_trains_in_bf16_only_with_instructions_for_it(machine, cpu_bf16, precision):
    machine(cpu_bf16=cpu_bf16)
    assert best_precision("cpu") == precision


def test_auto_becomes_the_gpu_where_there_is_one(machine):
    machine(gpus=1)
    settled = config(devices=[0], channels_last="auto")
    settle(settled)
    assert settled.trainer == {"accelerator": "gpu", "devices": [0], "precision": "bf16-mixed"}
    assert settled.model.channels_last is True


def test_auto_becomes_one_process_on_a_cpu_where_there_is_no_gpu(machine):
    machine()
    settled = config(devices=[0])
    settle(settled)
    assert settled.trainer == {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
    assert "channels_last" not in settled.model


def test_what_the_user_wrote_is_kept(machine):
    machine(gpus=1)
    settled = config("cpu", 1, "64-true", channels_last=False)
    settle(settled)
    assert settled == config("cpu", 1, "64-true", channels_last=False)


def test_precision_follows_the_accelerator_that_the_user_chose(machine):
    machine(gpus=1, cpu_bf16=False)
    settled = config("cpu")
    settle(settled)
    assert settled.trainer.precision == "32-true"


def test_settle_refuses_a_gpu_trainer_without_gpu(machine):
    machine()
    with pytest.raises(InputError, match="use trainer=lightning_cpu"):
        settle(config("gpu", [0], "bf16-mixed"))


@pytest.fixture
def threads(monkeypatch):
    """Return the numbers of threads that torch is told, and tell it none."""
    told = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(machine_module, "usable_cores", lambda: 6)
    monkeypatch.setattr(machine_module.psutil, "cpu_count", lambda logical: 64 if logical else 32)
    return told


def test_the_choice_is_logged(machine, threads, caplog):
    machine()
    with caplog.at_level("INFO", logger="mlflow_ssl.machine"):
        settle(config(channels_last="auto"))
    assert caplog.messages == ["trainer on this machine: cpu, 32-true, channels_last, 6 threads"]


def test_a_cpu_computes_with_the_cores_it_may_use_unless_the_environment_says_otherwise(machine, threads, monkeypatch):
    machine()
    settle(config())
    monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
    settle(config())
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    settle(config())
    assert threads == [6, 3, 6]


def test_threads_are_left_alone_beside_a_gpu_and_where_nothing_is_auto(machine, threads):
    machine(gpus=1)
    settle(config(devices=[0]))
    settle(config("cpu", 1, "32-true"))
    assert threads == []


@pytest.mark.parametrize(("gpus", "kept"), [(0, [True]), (1, [])])
def test_a_cpu_keeps_the_memory_that_it_frees(machine, monkeypatch, gpus, kept):
    machine(gpus=gpus)
    called = []
    monkeypatch.setattr(machine_module, "keep_freed_memory", lambda: called.append(True))
    settle(config(devices=[0]))
    assert called == kept

"""Compiled networks: the same training, and plain networks afterwards."""

import copy
import warnings

import pytest
import torch
from tiny import fit, labelled, pairs, tiny_method

from mlflow_ssl.compiling import MODES, check_compiler, compile_mode
from mlflow_ssl.errors import InputError
from mlflow_ssl.export import DeploymentNetwork, traced


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_taken_by_its_name(mode):
    assert compile_mode(mode) == mode


@pytest.mark.parametrize("wrong", ["fast", "", 1])
def test_another_word_is_refused(wrong):
    with pytest.raises(InputError, match=r"^model\.compile must be true, false or one of default, .*, got "):
        tiny_method(compile=wrong)


@pytest.mark.parametrize(("accelerator", "variable"), [("cpu", "CXX"), ("gpu", "CC")])
def test_a_machine_without_a_compiler_is_told_so_before_any_step(monkeypatch, accelerator, variable):
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        InputError, match=rf"^model\.compile needs a compiler .* none is on the PATH; .* set {variable}"
    ):
        check_compiler(accelerator)
    monkeypatch.setenv(variable, "/nowhere/compiler")
    with pytest.raises(InputError, match="/nowhere/compiler is on the PATH"):
        check_compiler(accelerator)


def test_networks_are_left_alone_unless_they_are_to_be_compiled():
    method = tiny_method()
    fit(method, pairs(1), max_epochs=1)
    assert not any(network._compiled_call_impl for network in method.step_networks())


@pytest.fixture(scope="module")
def trained():
    """Return an eager method and a compiled one after the same three steps."""
    found = []
    for compile in (False, True):
        method = tiny_method(compile=compile)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own compiler
            fit(method, pairs(3), labelled(2), max_epochs=1)
        found.append(method)
    return found


@pytest.mark.slow
def test_compiled_steps_are_those_of_the_plain_networks(trained):
    plain, compiled = trained
    assert all(network._compiled_call_impl for network in compiled.step_networks())
    expected = plain.state_dict()
    assert compiled.state_dict().keys() == expected.keys()
    for name, value in compiled.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_method_is_copied_and_exported_as_any_other(trained):
    _, compiled = trained
    ((images, _),) = labelled(1)
    network = DeploymentNetwork(copy.deepcopy(compiled).online.backbone, [0.5] * 3, [0.25] * 3).eval()
    torch.testing.assert_close(traced(network, images)(images), network(images))

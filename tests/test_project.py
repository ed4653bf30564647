"""The project's own files agree with each other."""

import re
from pathlib import Path

import tomllib
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "conda.yaml").read_text())


def _launched():
    """Return what a launched project needs."""
    extras = PROJECT["optional-dependencies"]
    return PROJECT["dependencies"] + extras["onnx"] + extras["huggingface"]


def test_conda_environment_lists_what_the_package_needs():
    (pip,) = [item["pip"] for item in CONDA["dependencies"] if isinstance(item, dict)]
    assert sorted(pip) == sorted(_launched())


def test_conda_environment_pins_a_python_that_the_package_allows():
    (pin,) = [item for item in CONDA["dependencies"] if str(item).startswith("python=")]
    minor = int(pin.rpartition(".")[2])
    lowest, highest = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    assert int(lowest) <= minor < int(highest)


def test_every_dependency_states_its_lowest_version():
    assert [need for need in PROJECT["dependencies"] if ">=" not in need] == []


def test_the_test_command_of_the_readme_is_the_one_that_ci_runs():
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"<!-- newcomer: test -->\n```\w*\n(.*?)\n```", readme, re.DOTALL)[1]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()

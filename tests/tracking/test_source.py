"""Code and packages on record."""

import subprocess

import pytest

from mlflow_ssl.tracking import source


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Make the package seem to lie in a git checkout of its own."""
    (tmp_path / "mlflow_ssl" / "tracking").mkdir(parents=True)
    monkeypatch.setattr(source, "__file__", str(tmp_path / "mlflow_ssl" / "tracking" / "source.py"))
    return tmp_path


def git(folder, *words):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.com"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_commit_branch_and_dirtiness_are_told(checkout):
    git(checkout, "init", "-b", "trunk")
    git(checkout, "commit", "--allow-empty", "-m", "one")
    clean = source.git_tags()
    assert (len(clean["mlflow.source.git.commit"]), clean["mlflow.source.git.branch"]) == (40, "trunk")
    assert clean["git.dirty"] == "false"
    (checkout / "new.txt").touch()
    assert source.git_tags()["git.dirty"] == "true"


@pytest.mark.usefixtures("checkout")
def test_an_installed_package_tells_nothing_of_the_folder_around_it():
    assert source.git_tags() == {}


def test_a_repository_without_a_commit_tells_nothing(checkout):
    git(checkout, "init")
    assert source.git_tags() == {}


def test_every_package_is_pinned():
    lines = source.installed_packages().splitlines()
    assert all("==" in line for line in lines)
    assert any(line.startswith("torch==") for line in lines)

"""Which code made a run."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from mlflow_ssl import __version__

_TAGGED = ("torch", "pytorch-lightning", "timm", "albumentations", "mlflow", "numpy")


def git_tags() -> dict[str, str]:
    """Return commit, branch and dirtiness of the checkout that this package runs from; nothing outside one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an installed package; the folder around it is somebody else's
        return {}
    commit, branch, changes = (
        _git(root, *words) for words in (("rev-parse", "HEAD"), ("branch", "--show-current"), ("status", "--porcelain"))
    )
    if commit is None:
        return {}
    return {
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.branch": branch or "(detached)",
        "git.dirty": str(bool(changes)).lower(),
    }


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version_tags() -> dict[str, str]:
    """Return the versions of Python, this package and those that results depend on."""
    tags = {"version.python": platform.python_version(), "version.mlflow_ssl": __version__}
    for name in _TAGGED:
        try:
            tags[f"version.{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return tags


def installed_packages() -> str:
    """Return every installed package, pinned, one a line."""
    pins = {f"{found.name}=={found.version}" for found in distributions() if found.name}
    return "\n".join(sorted(pins, key=str.lower)) + "\n"

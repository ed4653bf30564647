"""Which code made a run."""

import platform
import re
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
    described = (found.read_text("METADATA") or found.read_text("PKG-INFO") or "" for found in distributions())
    pins = {pin for metadata in described if (pin := _pin(metadata))}
    return "\n".join(sorted(pins, key=str.lower)) + "\n"


def _pin(metadata: str) -> str | None:
    r"""Return name and version of a package, without parsing its whole description.

    Example:
        >>> _pin("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n\nName: of something else")
        'torch==2.11.0'
    """
    head = metadata.partition("\n\n")[0]
    name, version_ = (re.search(rf"^{key}:\s*(\S+)", head, re.MULTILINE) for key in ("Name", "Version"))
    return f"{name[1]}=={version_[1]}" if name and version_ else None

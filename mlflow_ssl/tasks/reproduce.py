"""Run an earlier run's config again, say what differs, and compare the two."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from mlflow_ssl.config import build, check_resolved, compose_config, parse_word, recorded_config
from mlflow_ssl.errors import InputError
from mlflow_ssl.tasks.resume import MAY_CHANGE, change, moved
from mlflow_ssl.tasks.training import train
from mlflow_ssl.tracking.history import curve
from mlflow_ssl.tracking.source import git_tags, installed_packages
from mlflow_ssl.tracking.stored import StoredRun, find_run

log = logging.getLogger(__name__)

METRIC = "val_acc"


def reproduce(words: Sequence[str]) -> None:
    """Run the config of the run that ``run_id=ID`` names again, as a new run with the tag ``reproduces``.

    Args:
        words: overrides; beside ``run_id`` and ``trust_config`` those that a resumed run may be given.

    Raises:
        InputError: if there is no such run, or its config cannot be run here.
    """
    given = dict(parse_word(word) for word in words)
    if not given.get("run_id"):
        raise InputError("run_id must be given; add run_id=ID, as the UI shows it")
    run_id = str(given["run_id"])
    uri = given.get("tracking.uri")
    stored = find_run(run_id, experiment="", uri=uri)
    config = _config(stored, words, uri=uri, trusted=bool(given.get("trust_config")))
    differences = compare(stored, config)
    sys.stderr.write("".join(f"{line}\n" for line in differences or ["same commit, packages and data as then"]))
    outcome = train(config, words, tags={"reproduces": run_id, "reproduces.differences": "\n".join(differences)})
    _report(stored, outcome.run_id)


def _config(stored: StoredRun, words: Sequence[str], *, uri: str | None, trusted: bool) -> DictConfig:
    folder = stored.output_folder()
    record = stored.read_yaml("config_resolved.yaml", folder)
    source = f"config/config_resolved.yaml of run {stored.run_id}"
    config = recorded_config(record, source=source, trusted=trusted or folder is not None)
    fresh = str(Path(str(compose_config([f"core.name={config.core.name}"]).core.output_dir)).resolve())
    config = moved(config, config.core.output_dir, fresh)
    change(
        config, words, allowed=[key for key in MAY_CHANGE if not key.startswith("trainer.max_")], ignored=("run_id",)
    )
    OmegaConf.update(config, "resume", None)
    config.tracking.uri = uri  # an address in the record has lost its password
    check_resolved(config)
    return config


def compare(stored: StoredRun, config: DictConfig) -> list[str]:
    """Return every difference of code, packages and data between a run and what stands here, a line each."""
    then, now = stored.tags, git_tags()
    lines = []
    for tag, name in (("mlflow.source.git.commit", "commit"), ("git.dirty", "uncommitted changes")):
        if then.get(tag) != now.get(tag):
            lines.append(f"{name}: {then.get(tag, 'unknown')} then, {now.get(tag, 'unknown')} now")
    if now.get("git.dirty") == "true" == then.get("git.dirty"):
        lines.append("uncommitted changes: both have some, which may differ")
    packages = stored.read_text("packages.txt", stored.output_folder())
    lines += package_differences(_pins(packages), _pins(installed_packages()))
    digest = build(config.datamodule).index.digest
    if digest != stored.data_digest:
        lines.append(f"data digest: {stored.data_digest} then, {digest} now")
    return lines


def package_differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return how installed packages differ, a line each.

    Example:
        >>> package_differences({"torch": "2.11", "timm": "1.0"}, {"torch": "2.15", "timm": "1.0", "rich": "14.0"})
        ['package rich: missing then, 14.0 now', 'package torch: 2.11 then, 2.15 now']
    """
    return [
        f"package {name}: {then.get(name, 'missing')} then, {now.get(name, 'missing')} now"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def _pins(text: str) -> dict[str, str]:
    return {
        name.lower(): version for name, _, version in (line.partition("==") for line in text.splitlines()) if version
    }


def _report(stored: StoredRun, now: str) -> None:
    """Print both curves side by side and log how far they are apart."""
    client, then = stored.client, stored.run_id
    old, new = curve(client, then, METRIC), curve(client, now, METRIC)
    table = Table("step", f"{METRIC} then", f"{METRIC} now", "difference", title=f"run {then} reproduced as {now}")
    apart = {step: new[step] - old[step] for step in sorted(old.keys() & new.keys())}
    for step in sorted(old.keys() | new.keys()):
        values = [f"{values[step]:.4f}" if step in values else "" for values in (old, new, apart)]
        table.add_row(str(step), *values)
    Console(stderr=True).print(table)
    for step, difference in apart.items():
        client.log_metric(now, f"reproduce/{METRIC}_difference", difference, step=step)
    if apart:
        largest = max(apart.values(), key=abs)
        client.log_metric(now, f"reproduce/largest_{METRIC}_difference", largest)
        log.info("largest difference of %s: %.4f", METRIC, largest)

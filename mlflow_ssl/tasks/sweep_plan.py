"""What a sweep is to do: from the words of a command line, or from the sweep that it goes on with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from mlflow_ssl.config import (
    ALIASES,
    SWEEP_FLAGS,
    Swept,
    check_resolved,
    compose_config,
    parse_word,
    quote_text,
    read_swept,
    resolve,
    word_key,
)
from mlflow_ssl.errors import InputError
from mlflow_ssl.secret import HIDDEN, redact, redacted
from mlflow_ssl.sweeps.space import as_words
from mlflow_ssl.tasks.output import shared_output
from mlflow_ssl.tasks.resume import DEFAULT_EXPERIMENT, MAY_CHANGE
from mlflow_ssl.tracking.children import SWEEP_TAG
from mlflow_ssl.tracking.stored import StoredRun, find_run

RECORD = "sweep.yaml"
"""File of the output folder that says what a sweep does."""
SETTINGS_MAY_CHANGE = ("trials", "jobs", "launcher", "storage", "retry_failed", "submitit", "ray")
"""Settings of ``sweep`` that one which goes on may be given anew."""
WORDS_MAY_CHANGE = tuple(key for key in MAY_CHANGE if not key.startswith("trainer.max_"))
"""Keys of its trainings that may be, too: they change nothing that is compared."""


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do.

    Attributes:
        settings: the resolved group ``sweep``.
        given: the words that it was first asked for with.
        words: those of them that all trainings share.
        space: what they differ in.
        config: resolved config of a training.
        output: the output folder.
        study: name in the storage.
        run_id: of the sweep that goes on; None for a new one.
    """

    settings: Mapping[str, Any]
    given: Sequence[str]
    words: Sequence[str]
    space: Sequence[Swept]
    config: DictConfig
    output: Path
    study: str
    run_id: str | None = None

    @property
    def space_words(self) -> list[str]:
        """What is searched, as words of a command line."""
        return [_as_word(swept) for swept in self.space]

    def write(self) -> None:
        """Write down what is to be done, without what looks like a credential."""
        record = {
            "study": self.study,
            "sweep": redacted(dict(self.settings) | {"space": self.space_words}),
            "words": [redact(word) for word in self.words],
            "given": [redact(word) for word in self.given],
        }
        (self.output / RECORD).write_text(yaml.safe_dump(record, sort_keys=False))


def _as_word(swept: Swept) -> str:
    if swept.choices:
        return f"{swept.key}=choice({','.join(swept.choices)})"
    ends = f"interval({swept.low}, {swept.high})"
    typed = f"int({ends})" if isinstance(swept.low, int) else ends
    return f"{swept.key}={f'tag(log, {typed})' if swept.log else typed}"


def stored_sweep(config: DictConfig) -> StoredRun | None:
    """Return the sweep that ``resume`` names; None if it names a training."""
    if config.resume is None or shared_output():  # of the processes of a training the first one asks
        return None
    stored = find_run(str(config.resume), experiment=config.core.name, uri=config.tracking.uri)
    output = stored.output_folder()
    known = SWEEP_TAG in stored.tags or (output is not None and (output / RECORD).is_file())
    return stored if known else None


# a new one


def new_plan(overrides: Sequence[str]) -> Plan:
    """Return the plan of a new sweep, with every value that it may try checked.

    Raises:
        InputError: for the first word that is wrong, or the first value that no config can be composed with.
    """
    words = [word for word in overrides if word not in SWEEP_FLAGS]
    swept = {word: found for word in words if (found := read_swept(word))}
    fixed = [word for word in words if word not in swept]
    shared = [word for word in fixed if word_key(word) != "sweep" and not word_key(word).startswith("sweep.")]
    chosen = [word for word in fixed if word not in shared]
    if not any(word_key(word) == "sweep" for word in chosen) and "sweep" not in compose_config(shared):
        chosen.insert(0, "sweep=grid")
    config = compose_config([*shared, *chosen])
    if "sweep" not in config:
        raise InputError("sweep must not be none where something is swept; leave it out, or take sweep=grid")
    space = _space(config.sweep.space, list(swept.values()), {_name(word) for word in shared})
    output = Path(str(config.core.output_dir)).expanduser().resolve()
    settings, first = _checked(space, [*shared, f"core.output_dir={quote_text(str(output))}"], chosen)
    return Plan(settings, overrides, shared, space, first, output, study=f"{output.parent.name}/{output.name}")


def _space(listed: Sequence[str], given: Sequence[Swept], fixed: set[str]) -> list[Swept]:
    """Return what is searched: what the config lists, unless a word says otherwise of a key, and what words add."""
    found = []
    for word in listed:
        swept = read_swept(word)
        if swept is None:
            raise InputError(f"sweep.space must hold words that give several values, got {word!r}")
        found.append(swept)
    said = {swept.name for swept in given} | fixed
    space = [swept for swept in found if swept.name not in said] + list(given)
    if not space:
        raise InputError("a sweep must have something to try; give a key several values: optimizer.lr=0.1,0.2")
    names = [swept.name for swept in space]
    for swept in space:
        if names.count(swept.name) > 1:
            raise InputError(f"{swept.key} must be swept once, got {names.count(swept.name)} words for it")
    return space


def _checked(space: Sequence[Swept], shared: Sequence[str], chosen: Sequence[str]) -> tuple[dict[str, Any], DictConfig]:
    """Return the settings, and the config of a training, after each value was tried beside the first of the others."""
    base = {swept.key: swept.extremes[0] for swept in space}
    config = resolve(compose_config([*shared, *chosen, *as_words(base)]))
    settings: Any = OmegaConf.to_container(config.pop("sweep"))
    continuous = [swept.key for swept in space if not swept.choices]
    if settings["sampler"] is None and continuous:
        raise InputError(
            f"{continuous[0]} must be given values to choose from in a grid, got an interval; take sweep=tpe"
        )
    if settings["sampler"] is not None and settings["trials"] is None:
        raise InputError("sweep.trials must be given where a sampler chooses; add sweep.trials=N")
    for swept in space:
        for value in swept.extremes[1:]:
            resolve(compose_config([*shared, "sweep=none", *as_words(base | {swept.key: value})]))
    return settings, config


# one that goes on


def resumed_plan(stored: StoredRun, overrides: Sequence[str]) -> Plan:
    """Return the plan of a sweep that goes on.

    Args:
        stored: its run.
        overrides: words, of which those that it was first asked for with say nothing new.

    Raises:
        InputError: if its output folder is gone, or a word would change what is compared.
    """
    output = stored.output_folder()
    if output is None or not (output / RECORD).is_file():
        raise InputError(
            f"the output folder of sweep {stored.run_id} must be there to go on with it: it holds the trainings; start "
            "a new sweep, or resume its trainings one by one"
        )
    record = yaml.safe_load((output / RECORD).read_text())
    settings = OmegaConf.create({"sweep": record["sweep"]})
    more: list[str] = []
    for word in overrides:
        if word in record["given"] or word in SWEEP_FLAGS or word == DEFAULT_EXPERIMENT or _is_about_resuming(word):
            continue
        if _changes_settings(word, settings):
            continue
        if not _may_change(_name(word)):
            raise InputError(f"the sweep's {word.lstrip('+~').partition('=')[0]} must stay; start a new sweep for it")
        more.append(word)
    plain: Any = OmegaConf.to_container(settings)
    if HIDDEN in plain["sweep"]["storage"]:
        raise InputError("sweep.storage must be given again, since its password is not kept; add sweep.storage=URL")
    space = [swept for word in plain["sweep"]["space"] if (swept := read_swept(word))]
    words = [*(word for word in record["words"] if HIDDEN not in word), *more]
    base = {swept.key: swept.extremes[0] for swept in space}
    config = resolve(
        compose_config([*words, f"core.output_dir={quote_text(str(output))}", "sweep=none", *as_words(base)])
    )
    check_resolved(DictConfig(OmegaConf.merge(config, settings)))
    return Plan(plain["sweep"], record["given"], words, space, config, output, record["study"], stored.run_id)


def _changes_settings(word: str, settings: DictConfig) -> bool:
    """Take a word of the settings over, and return whether it is one."""
    name = _name(word)
    if not name.startswith("sweep."):
        return False
    if name.split(".")[1] not in SETTINGS_MAY_CHANGE:
        raise InputError(f"the sweep's {name} must stay; start a new sweep for it")
    OmegaConf.update(settings, name, parse_word(word)[1])
    return True


def _may_change(name: str) -> bool:
    return any(name == key or (key.endswith(".") and name.startswith(key)) for key in WORDS_MAY_CHANGE)


def _is_about_resuming(word: str) -> bool:
    return word_key(word) in ("resume", "trust_config", "resume_changed_data")


def _name(word: str) -> str:
    return ALIASES.get(word_key(word), word_key(word))

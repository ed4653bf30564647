"""What a training starts from: a config, or an earlier run that it goes on in."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from mlflow_ssl.config import check_resolved, parse_word, recorded_config, resolve
from mlflow_ssl.errors import InputError
from mlflow_ssl.processes import fit_to_processes, from_first, join
from mlflow_ssl.tasks.output import shared_output
from mlflow_ssl.tracking.run import RunRecord
from mlflow_ssl.tracking.stored import StoredRun, begun_run, find_run

log = logging.getLogger(__name__)

MAY_CHANGE = (
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accelerator",
    "datamodule.num_workers",
    "datamodule.data_path",
    "datamodule.list_folder",
    "datamodule.unlabelled_path",
    "tracking.",
    "registry.register",
    "callbacks.progress.",
    "callbacks.checkpoint_upload.",
    "callbacks.profile.",
    "callbacks.last_checkpoint.every_seconds",
    "core.log_level",
    "core.hang_seconds",
)
"""Keys, and beginnings of keys, that a resumed training may be given anew: none of them changes what is computed.

Another ``data_path`` has to hold the same images.
"""


DEFAULT_EXPERIMENT = "experiment=byol"
"""What a run without the word was started with."""


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    Attributes:
        config: resolved config.
        output: the output folder.
        run_id: the run to go on in; None for a new one.
        checkpoint: the state to go on from; None begins at the beginning.
        data_digest: of the data that the run began with.
    """

    config: DictConfig
    output: Path
    run_id: str | None = None
    checkpoint: Path | None = None
    data_digest: str | None = None

    def check_data(self, digest: str, *, changed_allowed: bool) -> None:
        """Check that a resumed training goes on with the images that it began with.

        Raises:
            InputError: if it does not, and was not told so.
        """
        if self.data_digest in (None, digest):
            return
        if not changed_allowed:
            raise InputError(
                f"the data have changed since run {self.run_id} began: digest {digest}, then {self.data_digest}; "
                "restore them, or go on all the same with resume_changed_data=true"
            )
        log.warning("going on with other data than run %s began with", self.run_id)


def find_start(unresolved: DictConfig, overrides: Sequence[str]) -> Start:
    """Return what a training starts from; processes that a launcher has started at once take it from the first.

    Args:
        unresolved: composed config; its ``resume`` names a run, or ``last``, or nothing: then it is a new one, or the
            launcher's, if that is begun.
        overrides: the words that it was composed from.

    Raises:
        InputError: if the config is wrong, there is no such run, or it may not be resumed in this way.
    """
    join(gpu=unresolved.trainer.accelerator != "cpu" and torch.cuda.is_available())
    start = from_first(lambda: _find_start(unresolved, overrides))
    fit_to_processes(start.config.trainer)
    return start


def _find_start(unresolved: DictConfig, overrides: Sequence[str]) -> Start:
    shared = shared_output()
    if shared and _is_resumed(Path(shared), unresolved):
        return _found_by_the_first_process(Path(shared))
    wanted = None if shared else unresolved.resume or begun_run(unresolved.tracking.uri)
    if wanted is None:
        # absolute, so that the run can be resumed from anywhere
        folder = Path(shared or str(unresolved.core.output_dir)).expanduser().resolve()
        unresolved.core.output_dir = str(folder)
        return Start(resolve(unresolved), folder)
    stored = find_run(str(wanted), experiment=unresolved.core.name, uri=unresolved.tracking.uri)
    left = stored.output_folder()
    source = f"config/config_resolved.yaml of run {stored.run_id}"
    config = recorded_config(
        stored.read_yaml("config_resolved.yaml", left),
        source=source,
        trusted=left is not None or unresolved.trust_config,
    )
    earlier = stored.read_yaml("overrides.yaml", left)
    folder = left or Path(str(unresolved.core.output_dir)).expanduser().resolve()
    if left is None:
        config = moved(config, config.core.output_dir, str(folder))
    # an address in the record has lost its password
    config.tracking.uri = unresolved.tracking.uri
    change(config, [word for word in overrides if word not in earlier and not _is_default(word, earlier)])
    check_resolved(config)
    _refuse_finished(stored, config)
    checkpoint = stored.checkpoint(folder)
    return Start(config, folder, stored.run_id, checkpoint, stored.data_digest)


def _refuse_finished(stored: StoredRun, config: DictConfig) -> None:
    epochs = OmegaConf.create(stored.read_yaml("config_resolved.yaml", stored.output_folder())).trainer.max_epochs
    if stored.run.info.status == "FINISHED" and config.trainer.max_epochs <= epochs:
        raise InputError(
            f"run {stored.run_id} is finished after {epochs} epochs; to train it for longer add trainer.max_epochs=MORE"
        )


def _is_resumed(folder: Path, unresolved: DictConfig) -> bool:
    """Return whether the first process of this training goes on, which started this one before it trained."""
    return unresolved.resume is not None or _last_checkpoint(folder).exists()


def _last_checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def _found_by_the_first_process(folder: Path) -> Start:
    run_id = RunRecord.read(folder).run_id
    record = yaml.safe_load((folder / "config_resolved.yaml").read_text())
    config = recorded_config(record, source=str(folder), trusted=True)
    checkpoint = _last_checkpoint(folder)
    return Start(config, folder, run_id, checkpoint if checkpoint.exists() else None)


def moved(config: DictConfig, old: str, new: str) -> DictConfig:
    """Return a config whose paths in the old output folder are in the new one."""

    def move(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: move(value) for key, value in node.items()}
        if isinstance(node, list):
            return [move(value) for value in node]
        inside = isinstance(node, str) and (node == old or node.startswith(f"{old}/"))
        return new + node[len(old) :] if inside else node

    result: DictConfig = OmegaConf.create(move(OmegaConf.to_container(config)))
    return result


def change(
    config: DictConfig, words: Sequence[str], *, allowed: Sequence[str] = MAY_CHANGE, ignored: Sequence[str] = ()
) -> None:
    """Change a recorded config as words ask, in place, where that is allowed.

    Raises:
        InputError: naming the first key that may not be changed.
    """
    for word in words:
        key, value = parse_word(word)
        if key in ("resume", "resume_changed_data", "trust_config", *ignored):
            continue
        was = OmegaConf.select(config, key, default=None)
        if _same(was, value):
            continue
        if not any(key == name or (name.endswith(".") and key.startswith(name)) for name in allowed):
            words_of_values = "" if was is None or OmegaConf.is_config(was) else f": it is {was}, asked for {value}"
            named = word.lstrip("+~").partition("=")[0]
            raise InputError(f"the run's {named} must stay{words_of_values}; leave it out, or start a new run for it")
        OmegaConf.update(config, key, value)


def _is_default(word: str, earlier: Sequence[str]) -> bool:
    return word == DEFAULT_EXPERIMENT and not any(word.startswith("experiment=") for word in earlier)


def _same(was: Any, value: Any) -> bool:
    plain = OmegaConf.to_container(was) if OmegaConf.is_config(was) else was
    return plain in (value, [value])  # the tutorial spells a learning rate as a list of one

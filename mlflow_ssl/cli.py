"""Words to overrides. Nothing heavy is imported until they make sense, so help and mistakes answer at once."""

import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_ssl import __version__
from mlflow_ssl.errors import InputError, Interrupted, MachineError, NotSynced
from mlflow_ssl.signals import stop_signals
from mlflow_ssl.startup import collector_at_rest

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

USAGE = """\
Train self-supervised, with everything in MLflow.

  mlflow run . -P experiment=byol [-P data_path=FOLDER] [-P KEY=VALUE ...] [-P overrides='+NEW=1 ~GONE']
  python -m mlflow_ssl experiment=byol [data_path=FOLDER] [KEY=VALUE ...]
  mlflow-ssl experiment=byol ...

Try several values, each training a run below one that holds the table, the picture and the best:

  python -m mlflow_ssl -m experiment=byol optimizer.lr=0.1,0.2 backbone=resnet18,vit16_tiny [sweep.jobs=2]
  mlflow run . -P experiment=byol -P sweep=optimizer [-P sweep.trials=20]

Go on with a run that was stopped, or a sweep, in the same run; run another one's config again; send what MLflow missed:

  mlflow run . -P resume=last|RUN_ID
  mlflow run . -e reproduce -P run_id=RUN_ID
  python -m mlflow_ssl sync OUTPUT_FOLDER

Find what is wrong with a data set before a training:

  python -m mlflow_ssl check-data FOLDER [KEY=VALUE ...] [report=FOLDER]
  mlflow run . -e check-data -P data_path=FOLDER

Make a classifier of a registered network and labelled images:

  python -m mlflow_ssl finetune model_uri=models:/NAME/VERSION data_path=FOLDER [KEY=VALUE ...]
  mlflow run . -e finetune -P model_uri=models:/NAME/VERSION -P data_path=FOLDER

Measure a registered network, against others and against what needs no training:

  python -m mlflow_ssl evaluate model_uri=models:/NAME/VERSION data_path=FOLDER [against=[URI,...]] [KEY=VALUE ...]
  mlflow run . -e evaluate -P model_uri=models:/NAME/VERSION -P data_path=FOLDER

Embed a data set with a registered network; find an image's nearest in it; find copies and wrong labels:

  python -m mlflow_ssl embed model_uri=models:/NAME/VERSION data_path=FOLDER [output=FOLDER] [KEY=VALUE ...]
  python -m mlflow_ssl search embeddings=FOLDER image=FILE [neighbours=10] [report=FOLDER]
  python -m mlflow_ssl duplicates embeddings=FOLDER [threshold=0.98] [report=FOLDER]
  mlflow run . -e embed|search|duplicates -P KEY=VALUE ...

evaluate, embed and search take networks of others, too: add trust_model=true, as loading one runs its code, and
input_size=224 'mean=[R,G,B]' 'std=[R,G,B]' where the model does not say so. embed index=true adds a faiss index.

KEY=VALUE is a Hydra override; --KEY VALUE says the same. Experiments:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the words ask for and return the exit code.

    It is 0, 1 for what the machine refuses, 2 for a mistake of the user, 3 where MLflow does not have everything yet,
    and 128 + n for a signal.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(USAGE + "".join(f"  {name}\n" for name in _experiments()))
        return 0
    if words == ["--version"]:
        sys.stdout.write(f"mlflow_ssl {__version__}\n")
        return 0
    try:
        with stop_signals.raised():
            _run(words)
    except InputError as error:
        _give_back_run("FAILED", str(error))
        _say(f"error: {error}")
        return 2
    except MachineError as error:
        _give_back_run("FAILED", str(error))
        _say(f"error: {error}")
        return 1
    except NotSynced as error:
        _say(str(error))
        return 3
    except Interrupted as error:
        _give_back_run("KILLED", str(error))
        _say(str(error))
        return error.exit_code
    except Exception as error:
        _give_back_run("FAILED", f"{type(error).__name__}: {error}")
        raise
    return 0


def _run(words: Sequence[str]) -> None:
    if words and words[0] in COMMANDS:
        COMMANDS[words[0]](words[1:])
        return
    _train(to_overrides(words))


def _train(overrides: list[str]) -> None:
    with collector_at_rest():
        from mlflow_ssl.config import asks_for_sweep, compose_config

        if asks_for_sweep(overrides):
            _sweep(overrides)
            return
        config = compose_config(overrides)
        if "sweep" in config:  # by the experiment's own choice
            _sweep(overrides)
            return
        if config.resume is not None and _goes_on_with_sweep(config, overrides):
            return
        from mlflow_ssl.tasks.training import train

        train(config, overrides)


def _finetune(words: Sequence[str]) -> None:
    overrides = to_overrides(words)
    named = any(word.startswith("experiment=") for word in overrides)
    _train(overrides if named else ["experiment=finetune", *overrides])


def _sweep(overrides: Sequence[str]) -> None:
    from mlflow_ssl.tasks.sweep import sweep

    sweep(overrides)


def _goes_on_with_sweep(config: "DictConfig", overrides: Sequence[str]) -> bool:
    from mlflow_ssl.tasks.sweep import go_on

    return go_on(config, overrides)


def _reproduce(words: Sequence[str]) -> None:
    from mlflow_ssl.tasks.reproduce import reproduce

    reproduce(to_overrides(words))


def _sync(words: Sequence[str]) -> None:
    if len(words) != 1:
        raise InputError(f"sync must be given one output folder, got {' '.join(words) or 'none'}")
    from mlflow_ssl.tracking.lifecycle import sync

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sync(Path(words[0]).resolve())


def _check_data(words: Sequence[str]) -> None:
    from mlflow_ssl.tasks.check_data import check_data

    path = [word for word in words[:1] if "=" not in word and not word.startswith("--")]
    check_data([*path, *to_overrides(words[len(path) :])])


def _embed(words: Sequence[str]) -> None:
    from mlflow_ssl.tasks.embed import embed

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    embed(to_overrides(words))


def _search(words: Sequence[str]) -> None:
    from mlflow_ssl.tasks.search import search

    search(to_overrides(words))


def _duplicates(words: Sequence[str]) -> None:
    from mlflow_ssl.tasks.duplicates import duplicates

    duplicates(to_overrides(words))


def _evaluate(words: Sequence[str]) -> None:
    from mlflow_ssl.tasks.evaluate import evaluate

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    evaluate(to_overrides(words))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "check-data": _check_data,
    "duplicates": _duplicates,
    "embed": _embed,
    "evaluate": _evaluate,
    "finetune": _finetune,
    "reproduce": _reproduce,
    "search": _search,
    "sync": _sync,
}
"""First words that ask for something else than self-supervised training."""


def to_overrides(words: Sequence[str]) -> list[str]:
    """Return Hydra overrides for the words of a command line.

    MLflow hands a parameter of its own choosing over as ``--key value``, a declared one that is empty as an empty
    word, and free Hydra syntax in one word behind ``--overrides``.

    Raises:
        InputError: if a ``--key`` has no value.

    Example:
        >>> to_overrides(["--experiment", "byol", "--data_path", "", "--overrides", "+a=1 ~b"])
        ['experiment=byol', '+a=1', '~b']
    """
    from mlflow_ssl.config import SWEEP_FLAGS

    overrides: list[str] = []
    # a sweep's words may give several values
    swept = any(
        part in SWEEP_FLAGS or part.startswith(("sweep=", "--sweep")) for word in words for part in word.split()
    )
    left = iter(words)
    for word in left:
        if not word.startswith("--") or word in SWEEP_FLAGS:
            overrides += [word] if word else []
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            given = next(left, None)
            if given is None:
                raise InputError(f"--{key} must have a value")
            value = given
        overrides += _override(key, value, swept=swept)
    return overrides


def _override(key: str, value: str, *, swept: bool) -> list[str]:
    from mlflow_ssl.config import quote, quote_text

    if not value:
        return []
    if key == "overrides":
        try:
            return shlex.split(value)
        except ValueError as error:
            raise InputError(f"overrides must be words as a shell reads them: {error}, got {value!r}") from error
    # a path may hold anything; the rest is Hydra's to read where it can
    return [f"{key}={quote_text(value) if key == 'data_path' else quote(value, swept=swept)}"]


def _experiments() -> list[str]:
    from mlflow_ssl.config import options

    return sorted(options("experiment"))


def _give_back_run(status: str, reason: str) -> None:
    """End the run that ``mlflow run`` opened, if we failed before we took it over."""
    if "MLFLOW_RUN_ID" in os.environ and _is_first():
        from mlflow_ssl.tracking.lifecycle import end_launched_run

        end_launched_run(os.environ.pop("MLFLOW_RUN_ID"), status=status, reason=reason)


def _say(words: str) -> None:
    if _is_first():
        sys.stderr.write(f"{words}\n")


def _is_first() -> bool:
    """Return whether this process speaks for all that a launcher has started."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))

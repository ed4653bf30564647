"""The only door to Hydra: words in, one checked and resolved config out, parts built from it."""

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from mlflow_ssl.albumentations_v1 import modernize
from mlflow_ssl.errors import InputError
from mlflow_ssl.schema import check_plain_groups
from mlflow_ssl.secret import redact, redacted

ALIASES = {
    "data_path": "datamodule.data_path",
    "optimizer.lr": "scheduler.init_lr",
    "profile": "callbacks.profile.enabled",
}
"""Short or customary keys, and where the value really stands: the schedule owns the learning rate."""

KNOWN_PARTS = (
    "mlflow_ssl.backbones.",
    "mlflow_ssl.callbacks.",
    "mlflow_ssl.datamodules.",
    "mlflow_ssl.datasets.",
    "mlflow_ssl.heads.",
    "mlflow_ssl.losses.",
    "mlflow_ssl.methods.",
    "mlflow_ssl.optimizers.",
    "mlflow_ssl.schedules.",
    "mlflow_ssl.sharding.",
    "mlflow_ssl.tasks.finetune.",
    "mlflow_ssl.tasks.ssl.",
    "mlflow_ssl.transforms.",
    "mlflow_ssl.views.",
    "pytorch_lightning.Trainer",
    "pytorch_lightning.trainer.trainer.",
    "pytorch_lightning.callbacks.",
    "pytorch_lightning.strategies.",
    "torch.nn.",
    "torch.optim.",
    "timm.optim.",
    "timm.scheduler.",
    "albumentations.",
)
"""Beginnings of the names that a config of unknown origin may build: none of them runs what it is given."""

SWEEP_FLAGS = ("-m", "--multirun")
"""Hydra's own words for a sweep."""

_RESERVED = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def config_folder() -> Path:
    """Return the folder of the shipped configs: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def search_folders() -> list[Path]:
    """Return where configs are looked for: the shipped ones first, then ``configs`` in the current folder."""
    own, shipped = Path("configs").resolve(), config_folder().resolve()
    return [shipped, own] if own.is_dir() and own != shipped else [shipped]


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose the config that Hydra overrides ask for.

    Raises:
        InputError: if an override cannot be parsed, or names a group option or a key that does not exist.
    """
    OmegaConf.register_new_resolver("peak_lr", _peak_lr, replace=True)
    OmegaConf.register_new_resolver("scaled", _scaled, replace=True)
    OmegaConf.register_new_resolver("registered", _registered, replace=True, use_cache=True)
    words = [_unalias(word) for word in overrides]
    shipped, *own = search_folders()
    search = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in own)}]"] if own else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(shipped), version_base="1.3"):
        try:
            composed = compose("config", overrides=[*words, *search])
        except OverrideParseException as error:
            raise InputError(f"cannot read the override {error.override!r}: {_first_line(error)}") from error
        except MissingConfigException as error:
            raise InputError(_unknown_option(error, words)) from error
        except ConfigCompositionException as error:
            several = next((word for word in words if read_swept(word)), None)
            raise InputError(_unknown_key(error, words) if several is None else _several_values(several)) from error
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise InputError(f"cannot compose the config: {_first_line(error)}") from error
    config = OmegaConf.create(modernize(OmegaConf.to_container(composed)))
    assert isinstance(config, DictConfig)
    if config.sweep.get("none"):  # one training, which knows nothing of sweeps
        config.pop("sweep")
    return config


def resolve(config: DictConfig) -> DictConfig:
    """Return a copy with every interpolation replaced by its value, and checked.

    Raises:
        InputError: if a mandatory value is missing, an interpolation leads nowhere, or an argument is unknown.
    """
    resolved = config.copy()
    try:
        # not by OmegaConf's own search, which resolves what depends on them
        key = min(_missing(OmegaConf.to_container(config)), default=None)
        if key is not None:
            short = next((name for name, full in ALIASES.items() if full == key), key)
            raise InputError(f"{key} must be given; add {short}=VALUE")
        OmegaConf.resolve(resolved)
    except (InterpolationResolutionError, MissingMandatoryValue) as error:
        if said := _said_before(error):
            raise said from error
        raise InputError(f"cannot resolve the config: {_first_line(error)}") from error
    check_resolved(resolved)
    return resolved


def _said_before(error: BaseException | None) -> InputError | None:
    """Return what a resolver of ours has raised; OmegaConf wraps it, and keeps it as a context alone."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def check_resolved(config: DictConfig) -> None:
    """Check the plain groups of a resolved config, and the arguments of every part.

    Raises:
        InputError: naming the first key that is wrong.
    """
    check_plain_groups(OmegaConf.to_container(config))  # type: ignore[arg-type]
    for path, node in _targets(config):
        _check_arguments(path, node)


def recorded_config(record: Any, *, source: str, trusted: bool) -> DictConfig:
    """Return a resolved config that a run left behind.

    Args:
        record: what its YAML file holds.
        source: where it is from, for messages.
        trusted: take it as it is. Otherwise it may build only what is of `KNOWN_PARTS`: what a config names is called,
            and anybody who can write to the tracking store can write there.

    Raises:
        InputError: if it is no resolved config, or not to be trusted.
    """
    if not isinstance(record, dict) or "core" not in record:
        raise InputError(f"{source} is not a config of mlflow_ssl")
    if "${" in yaml.safe_dump(record):
        raise InputError(f"{source} must be resolved, and holds an interpolation")
    config = OmegaConf.create(record)
    for path, node in _targets(config):
        target = str(node["_target_"])
        if not trusted and not _is_known(target):
            raise InputError(
                f"{source} builds {target} (at {path}), which is not of the packages that are known here; if you trust "
                "who made it, add trust_config=true"
            )
    return config


def _is_known(target: str) -> bool:
    """Return whether a part is of `KNOWN_PARTS`, and not what a module there has imported, such as ``os.system``."""
    if not target.startswith(KNOWN_PARTS):
        return False
    try:
        part = get_object(target)
    except (ImportError, AttributeError, ValueError):
        return True  # it cannot be built, as `check_resolved` says
    return f"{getattr(part, '__module__', '')}.".startswith(KNOWN_PARTS)


def parse_word(word: str) -> tuple[str, Any]:
    """Return key and value of an override.

    Example:
        >>> parse_word("trainer.max_epochs=5"), parse_word("~callbacks.progress")
        (('trainer.max_epochs', 5), ('callbacks.progress', None))

    Raises:
        InputError: if it cannot be read.
    """
    try:
        parsed = OverridesParser.create().parse_override(_unalias(word))
    except HydraException as error:
        raise InputError(f"cannot read the override {word!r}: {_first_line(error)}") from error
    return str(parsed.key_or_group), parsed.value()


def word_key(word: str) -> str:
    """Return the key of an override, without the signs of Hydra's grammar.

    Example:
        >>> word_key("+new.key=1"), word_key("-m")
        ('new.key', '-m')
    """
    return word.partition("=")[0].lstrip("+~")


def asks_for_sweep(overrides: Sequence[str]) -> bool:
    """Return whether words ask for a sweep, or say something of one."""
    said = [word for word in overrides if word in SWEEP_FLAGS or word_key(word).partition(".")[0] == "sweep"]
    return bool(said) and said != ["sweep=none"]


@dataclass(frozen=True)
class Swept:
    """A key, and what a sweep may give it: one of some values, or any between two.

    Attributes:
        key: as the user wrote it, such as ``optimizer.lr`` or ``+new.key``.
        choices: values as a word spells them; none for an interval.
        low: lower end of an interval.
        high: upper end.
        log: whether an interval is to be searched by ratios.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def name(self) -> str:
        """The key in the config that it leads to, by which two words are of the same."""
        plain = self.key.lstrip("+")
        return ALIASES.get(plain, plain)

    @property
    def extremes(self) -> tuple[str, ...]:
        """Values that stand for all: every choice, or both ends."""
        return self.choices or (str(self.low), str(self.high))


def read_swept(word: str) -> Swept | None:
    """Return what an override in Hydra's grammar of sweeps asks for; None if it gives one value.

    Example:
        >>> read_swept("optimizer.lr=0.1,0.2")
        Swept(key='optimizer.lr', choices=('0.1', '0.2'), low=0.0, high=0.0, log=False)
        >>> read_swept("optimizer.lr=tag(log, interval(1e-4, 1))")
        Swept(key='optimizer.lr', choices=(), low=0.0001, high=1.0, log=True)

    Raises:
        InputError: if it cannot be read, or leaves nothing to choose from.
    """
    try:
        parsed = OverridesParser.create().parse_override(word)
        if not parsed.is_sweep_override():
            return None
        key = parsed.get_key_element()
        value: Any = parsed.value()
        if isinstance(value, IntervalSweep):
            low, high, log = value.start or 0, value.end or 0, "log" in value.tags
            if not low < high or (log and low <= 0):
                ends = "ends in rising order" + (" above 0" if log else "")
                raise InputError(f"{key} must be swept between {ends}, got {word.partition('=')[2]}")
            return Swept(key, low=low, high=high, log=log)
        names = value.filter(sorted(set(options(key)))) if isinstance(value, Glob) else parsed.sweep_string_iterator()
        choices = tuple(names)
    except HydraException as error:
        raise InputError(f"cannot read the override {word!r}: {_first_line(error)}") from error
    if not choices:
        raise InputError(f"{key} must have values to choose from, got {word.partition('=')[2]}, which matches none")
    return Swept(key, choices)


def build(node: DictConfig, **arguments: Any) -> Any:
    """Build what a config node describes; parts get plain lists and dicts.

    Raises:
        InputError: if a part refuses what the user gave.
    """
    try:
        return instantiate(node, _convert_="all", **arguments)
    except HydraException as error:
        cause = error.__cause__
        while isinstance(cause, HydraException):
            cause = cause.__cause__
        if isinstance(cause, InputError):
            raise cause from error
        from lightning_fabric.utilities.exceptions import MisconfigurationException

        if isinstance(cause, ValueError | TypeError | MisconfigurationException):
            target = node.get("_target_", "config")
            raise InputError(f"{target} refuses its arguments: {' '.join(str(cause).split())}") from error
        raise


def write_resolved(resolved: DictConfig, folder: Path) -> None:
    """Write the resolved config, as YAML and as a tree, into ``folder``, without what looks like a credential."""
    shown = OmegaConf.create(redacted(OmegaConf.to_container(resolved)))
    OmegaConf.save(shown, folder / "config_resolved.yaml")
    (folder / "config_tree.txt").write_text(_tree_text(shown))


def write_composed(unresolved: DictConfig, overrides: Sequence[str], folder: Path) -> None:
    """Write the config before resolution, and the overrides, into ``folder``, likewise."""
    OmegaConf.save(OmegaConf.create(redacted(OmegaConf.to_container(unresolved))), folder / "config_unresolved.yaml")
    (folder / "overrides.yaml").write_text(yaml.safe_dump([redact(word) for word in overrides]))


def _tree_text(resolved: DictConfig) -> str:
    from rich.console import Console
    from rich.tree import Tree

    def grow(tree: Tree, node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if isinstance(value, dict | list) and value:
                grow(tree.add(str(key)), value)
            else:
                tree.add(f"{key}: {value}")

    tree = Tree("config")
    grow(tree, OmegaConf.to_container(resolved))
    console = Console(width=160, markup=False, highlight=False, color_system=None, emoji=False)
    with console.capture() as capture:
        console.print(tree)
    return capture.get()


def quote(value: str, *, swept: bool = False) -> str:
    """Return ``value`` as a word of an override: as it is where Hydra's grammar reads it, quoted elsewhere.

    Several values, as of a sweep, are a text unless ``swept``.

    Example:
        >>> quote("[x,y]"), quote("two words"), quote("a (1), b")
        ('[x,y]', 'two words', "'a (1), b'")
    """
    try:
        parsed = OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return quote_text(value)
    return quote_text(value) if parsed.is_sweep_override() and not swept else value


def quote_text(value: str) -> str:
    """Return ``value`` as a quoted string of Hydra's grammar, whatever it holds."""
    escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + "\\'", value)
    escaped = re.sub(r"(\\+)$", lambda m: m[1] * 2, escaped)
    return f"'{escaped}'"


def _unalias(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{ALIASES[key]}={value}" if equals and key in ALIASES else word


def _scaled(factor: Any, *sizes: int) -> int:
    """Return the largest size times a factor, such as ``4`` or ``8/7``."""
    return round(max(sizes) * Fraction(factor))


def _registered(model_uri: str, tracking_uri: str | None) -> DictConfig:
    """Return what is known of a registered network; the store is asked once for a config."""
    from mlflow_ssl.tracking.registered import find_registered

    return OmegaConf.create(asdict(find_registered(str(model_uri), tracking_uri=tracking_uri)))


def _peak_lr(init_lr: Any) -> Any:
    # the tutorial spells it as a list of one; schedules.peak_lr checks it
    return init_lr[0] if OmegaConf.is_list(init_lr) and len(init_lr) == 1 else init_lr


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _unknown_option(error: MissingConfigException, words: Sequence[str]) -> str:
    found = re.search(r"'([^']+)'", str(error))
    missing = str(error.missing_cfg_file or (found[1] if found else ""))
    group, _, option = missing.partition("/")
    known = sorted(options(group))
    close = difflib.get_close_matches(option, known, n=4) or known[:8]
    hint = "; any timm network: backbone=timm backbone.model_name=NAME" if group == "backbone" else ""
    if not known:
        return f"no config is named {missing!r}; groups are {', '.join(_groups())}"
    return f"{group} has no option {option!r}; close matches: {', '.join(close)}{hint}"


def options(group: str) -> Iterator[str]:
    """Yield the options of a config group, such as ``byol`` and ``base/ssl/byol`` of ``experiment``."""
    for folder in search_folders():
        for file in (folder / group).rglob("*.yaml"):
            yield file.relative_to(folder / group).with_suffix("").as_posix()


def _groups() -> list[str]:
    return sorted({folder.name for root in search_folders() for folder in root.iterdir() if folder.is_dir()})


def _several_values(word: str) -> str:
    return f"{word} gives several values; add -m to try each of them, or quote them to mean one text"


def _unknown_key(error: ConfigCompositionException, words: Sequence[str]) -> str:
    found = re.search(r"'([^']+)'", str(error))
    key = found[1] if found else ""
    # composed from the choices of groups alone, to know what there is
    chosen = [word for word in words if word.partition("=")[0] in _groups()]
    known = list(_keys(compose("config", overrides=chosen)))
    if not key or key in known:
        return f"cannot compose the config: {_first_line(error)}"
    close = ", ".join(difflib.get_close_matches(key, known, n=4, cutoff=0.5)) or "none"
    return f"no config key is named {key!r}; close matches: {close} (a new key is added with +{key}=VALUE)"


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_interpolation() and not child._is_none():
            yield from _keys(child, f"{prefix}{key}.")


def _missing(node: Any, path: str = "") -> Iterator[str]:
    """Yield the keys of a plain config whose values are still to be given."""
    if node == "???":
        yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from _missing(child, f"{path}.{key}" if path else f"{key}")


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig) and "_target_" in node:
        yield path, node
    children = ((str(key), child) for key, child in node.items()) if isinstance(node, DictConfig) else enumerate(node)
    for key, child in children:
        if OmegaConf.is_config(child):
            yield from _targets(child, f"{path}.{key}" if path else f"{key}")


def _check_arguments(path: str, node: DictConfig) -> None:
    try:
        known = _arguments(get_object(node["_target_"]))
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{path}._target_ must be an importable name, got {node['_target_']!r}") from error
    if known is None:
        return
    for key in map(str, node):
        if key not in known and key not in _RESERVED:
            close = ", ".join(difflib.get_close_matches(key, known, n=3)) or "none"
            raise InputError(f"{path}.{key} is not an argument of {node['_target_']}; close matches: {close}")
        words = _truth_words(known.get(key))
        if words and isinstance(node[key], str) and node[key] not in words:  # any text would count as true
            raise InputError(f"{path}.{key} must be {', '.join(words[:-1])} or {words[-1]}, got {node[key]!r}")


def _truth_words(annotation: Any) -> list[str]:
    """Return what a truth value may be written as, and the texts that stand beside it; nothing for another argument.

    Example:
        >>> _truth_words(bool), _truth_words(bool | Literal["auto"] | None), _truth_words(bool | str)
        (['true', 'false'], ['auto', 'true', 'false'], [])
    """
    parts = [annotation] if annotation is bool else list(get_args(annotation))
    texts = [text for part in parts if get_origin(part) is Literal for text in get_args(part)]
    others = [part for part in parts if part not in (bool, NoneType) and get_origin(part) is not Literal]
    return [*texts, "true", "false"] if bool in parts and not others else []


def _arguments(target: Any) -> dict[str, Any] | None:
    """Return what a callable takes, and hands to its base classes, with the annotations; None for anything."""
    known: dict[str, Any] = {}
    classes = target.__mro__ if inspect.isclass(target) else ()
    for callable_ in [vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls)] or [target]:
        parameters = inspect.signature(callable_).parameters.values()
        known = {parameter.name: parameter.annotation for parameter in parameters} | known
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return known
    return None

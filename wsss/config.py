"""Where configuration becomes objects: conf/ is found, composed, and what it names is instantiated.

Imports nothing heavy: `--help` and a mistyped key answer at once.
"""

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from wsss import InputError

PATH_KEYS = {
    "affinity",
    "checkpoint",
    "dino_weights",
    "dir",
    "folder",
    "images",
    "init_checkpoint",
    "labels",
    "masks",
    "out",
    "pseudo_masks",
    "pseudo_scores",
    "root",
    "sbd_md5",
    "sbd_url",
    "tars",
    "text",
    "train",
    "val",
    "voc_md5",
    "voc_url",
    "weights",
}
"""Last parts of the keys whose values are paths or names and reach Hydra quoted."""

MISSING = "???"
"""What Hydra's configurations hold for a value that has to be given."""


def config_dir() -> Path:
    """The directory of our configuration: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    for place in (package / "conf", package.parent / "conf"):
        if (place / "train.yaml").is_file():
            return place
    raise RuntimeError(f"the installation is damaged: neither {package / 'conf'} nor {package.parent / 'conf'} exists")


def quote(value: Any) -> str:
    """A plain value in Hydra's override grammar."""
    if isinstance(value, str):
        escaped = re.sub(r"(\\*)'", lambda m: m[1] * 2 + "\\'", value)
        if trailing := re.search(r"\\+$", escaped):
            escaped += trailing[0]
        return f"'{escaped}'"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{quote(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(quote, value)) + "]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def given_values(overrides: Iterable[str], key: str) -> list[str]:
    """The values given for `key` on an arranged command line: none, one, or those of a sweep."""
    parser = OverridesParser.create()
    for override in overrides:
        if override.partition("=")[0].lstrip("+") == key:
            parsed = parser.parse_override(override)
            choices = parsed.sweep_iterator() if parsed.is_sweep_override() else [parsed.value()]
            return [str(choice.text if isinstance(choice, QuotedString) else choice) for choice in choices]
    return []


def is_chosen(group: str) -> bool:
    """Whether the running command's line chooses an option of a group itself."""
    return bool(given_values(HydraConfig.get().overrides.task, group))


def plain_values(node: DictConfig, key: str) -> dict[str, Any]:
    """The values of a config node, interpolations resolved, as builtin containers; without `_target_`.

    Raises:
        InputError: the node is a plain value, `key` names it; or a mandatory value is missing.
    """
    return _complete(_container(node, key), key)


def stored_values(node: DictConfig, stored: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`plain_values` of a node in which values from a file stand for those that the command line does not give.

    What comes from the file is taken as it is: nothing in it is interpolated or read as a configuration.
    """
    values = _container(node, key)
    result = deepcopy({**values, **stored})
    for override in OverridesParser.create().parse_overrides(HydraConfig.get().overrides.task):
        name, found, inner = override.key_or_group.partition(".")
        if name == key and found:
            given = override.value()
            leaves = [f"{inner}.{leaf}" for leaf in flatten(given)] if isinstance(given, Mapping) and given else [inner]
            for leaf in leaves:
                _copy_leaf(values, result, leaf.split("."))
    return _complete(result, key)


def _container(node: DictConfig, key: str) -> dict[str, Any]:
    if not isinstance(node, DictConfig):
        raise InputError(f"{key} is {node!r}: expected several values, {key}.NAME=VALUE")
    values: Any = OmegaConf.to_container(node, resolve=True)
    return {name: value for name, value in values.items() if name != "_target_"}


def _complete(values: dict[str, Any], key: str) -> dict[str, Any]:
    """The values, if none of them is still to be given."""
    for path, value in flatten(values).items():
        if value == MISSING:
            raise InputError(f"{key}.{path} is not set: add {key}.{path}=... to the command")
    return values


def _copy_leaf(source: Any, target: dict[str, Any], path: Sequence[str]) -> None:
    """From one nested mapping to another the value at a path, or its absence."""
    *above, last = path
    for part in above:
        source = source.get(part) if isinstance(source, Mapping) else None
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    if isinstance(source, Mapping) and last in source:
        target[last] = source[last]
    else:
        target.pop(last, None)


def flatten(node: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, their keys joined by dots."""
    if not isinstance(node, Mapping) or not node:
        return {key: node}
    inner = ((f"{key}.{name}" if key else str(name), value) for name, value in node.items())
    return {k: v for path, value in inner for k, v in flatten(value, path).items()}


def group_options(group: str, directories: Sequence[str] = ()) -> list[str]:
    """Names of a group's options in conf/ and in further directories of configuration."""
    with composing(directories) as search_path:
        return GlobalHydra.instance().config_loader().get_group_options(group, overrides=search_path)


def method_option(name: str, directories: Sequence[str] = ()) -> DictConfig:
    """One of the group method.

    Raises:
        InputError: there is none of this name.
    """
    known = group_options("method", directories)
    if name not in known:
        raise InputError(f"method={name!r} does not exist: known are {', '.join(known)}")
    with composing(directories) as search_path:
        return hydra.compose(overrides=[f"+method={name}", *search_path]).method


@contextmanager
def composing(directories: Sequence[str]) -> Iterator[list[str]]:
    """Hydra, to compose from conf/ and further directories; gives the override that makes it look there."""
    search_path = "hydra.searchpath=[" + ",".join(quote(f"file://{directory}") for directory in directories) + "]"
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield [search_path] if directories else []


def extra_directories() -> list[str]:
    """The directories of configuration that the running command was given beside ours."""
    return _added(HydraConfig.get())


def given_directories(arguments: Sequence[str]) -> list[str]:
    """The directories of configuration that a command line adds to ours."""
    given = [arguments[i + 1] for i, argument in enumerate(arguments[:-1]) if argument in ("--config-dir", "-cd")]
    given += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config-dir=")]
    return [str(Path(directory).resolve()) for directory in given]


def absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """The same values with paths made absolute, so that they hold from any working directory.

    A name of something in `root`, or of a list without its suffix, stays a name, as the data sets look there first.
    """

    def is_path(key: str, value: Any) -> bool:
        if key not in PATH_KEYS or not isinstance(value, str) or not os.path.exists(os.path.expanduser(value)):
            return False
        if key in ("train", "val") and not value.endswith(".txt"):
            return False
        return key == "root" or not os.path.exists(os.path.join(os.path.expanduser(values.get("root") or ""), value))

    return {
        key: os.path.abspath(os.path.expanduser(value)) if is_path(key, value) else value
        for key, value in values.items()
    }


def build(node: DictConfig, key: str, **extra: Any) -> Any:
    """The object a config node describes: its `_target_`, called with the node's plain values and `extra`.

    Raises:
        InputError: a mandatory value is missing, an argument does not exist or has the wrong kind of value.
    """
    return instantiate(node._target_, plain_values(node, key), key, **extra)


def instantiate(target: str, values: Mapping[str, Any], key: str, **extra: Any) -> Any:
    """The object of a class by its name, which is one of conf/ and never one of a file or a command line."""
    return call_checked(class_named(target), values, key, **extra)


def class_named(target: str) -> Any:
    """The class that conf/ calls by this name.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        return hydra.utils.get_object(target)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{target} cannot be imported ({reason}): install its package, or add its folder to PYTHONPATH"
        ) from error


def call_checked(target: Callable[..., Any], values: Mapping[str, Any], key: str, **extra: Any) -> Any:
    """`target(**values, **extra)` once the user's values fit its signature, see `check_arguments`."""
    check_arguments(target, values, key, extra)
    return target(**values, **extra)


def check_arguments(target: Callable[..., Any], values: Mapping[str, Any], key: str, given: Iterable[str]) -> None:
    """Whether names and kinds of the user's values fit a signature of which `given` arguments come from elsewhere.

    Raises:
        InputError: they do not; the message calls an argument `<key>.<argument>`.
    """
    parameters = inspect.signature(target).parameters
    known = [name for name in parameters if name not in given]
    for name, value in values.items():
        if name not in known:
            raise InputError(f"{key} has no argument {name}: known are {', '.join(known)}")
        kind = parameters[name].annotation
        if not _fits(value, kind):
            shown = getattr(kind, "__name__", None) if not get_args(kind) else str(kind)
            expected = re.sub(r"\b[a-z_]+(\.[a-z_]+)*\.", "", str(shown))
            raise InputError(f"{key}.{name} is {value!r}: expected {expected}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of an annotated kind; kinds that no plain value has are left to the callee."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (Sequence, list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
    if origin in (Mapping, dict):
        return isinstance(value, Mapping) and all(_fits(item, inner[1]) for item in value.values())
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if kind in (str, bool, None, NoneType):
        return value is None if kind in (None, NoneType) else isinstance(value, kind)
    return True


class CallbackFailure(BaseException):
    """Carries an exception out of Hydra's callbacks, of which Hydra makes a mere warning; that is its cause."""


@contextmanager
def carrying() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise CallbackFailure from error


class SweepTable(Callback):
    """Hydra's callback: before `-m` the names of the jobs, after it tables over them and report.html."""

    @carrying()
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Find the jobs and their directory, which with `resume=auto` is that of an unfinished sweep of the same jobs.

        Everything that starts jobs is given this config later, so what is added to it here reaches them.
        """
        given: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
        for override in given:
            if override.startswith("hydra.sweep.subdir="):
                raise InputError(
                    f"{override}: a sweep's table finds its jobs by the directories that it names; leave this out, or "
                    "the table by ~hydra.callbacks.table"
                )
        swept, jobs = _jobs(config)
        named = any(override.startswith("hydra.sweep.dir=") for override in given)
        begin = hydra.utils.get_object("wsss.runs.begin_sweep")
        search = config.get("resume") == "auto" and not named
        folder = begin(Path(config.hydra.sweep.dir), swept, jobs, search)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.sweep.dir = str(folder)
            config.hydra.overrides.hydra += [
                f"hydra.sweep.dir={quote(str(folder))}",
                f"hydra.job.config.override_dirname.exclude_keys={quote(_fixed(config, swept))}",
            ]

    @carrying()
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Raises SystemExit where jobs have failed, in whatever process."""
        folder = Path(config.hydra.sweep.dir)
        read, show = (hydra.utils.get_object(f"wsss.report.sweep.{name}_sweep") for name in ("read", "show"))
        code: int = show(read(folder))
        directories = [option for place in _added(config.hydra) for option in ("--config-dir", place)]
        hydra.utils.get_object("wsss.report.afterwards.write_report")(folder, directories)
        if code:
            raise SystemExit(code)


def _jobs(config: DictConfig) -> tuple[list[str], dict[str, list[str]]]:
    """The keys that a sweep varies and, of Hydra's own sweeper, all jobs by name with their overrides."""
    sweeper = config.hydra.sweeper
    given = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*given, *config.hydra.overrides.task])
    last = {override.key_or_group: override for override in parsed}
    swept = [key for key, override in last.items() if override.is_sweep_override()]
    if sweeper._target_.rpartition(".")[2] != BasicSweeper.__name__:
        return swept, {}
    found = [job for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    return swept, {job_name(job, swept) or str(number): job for number, job in enumerate(found)}


def key_of(override: str) -> str:
    """The key or group of an override."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _fixed(config: DictConfig, swept: Sequence[str]) -> list[str]:
    """The keys of a sweep's command line and experiment that all its jobs share."""
    given = [*(config.hydra.sweeper.get("params") or {}), *config.hydra.overrides.task]
    return [key for key in map(key_of, given) if key not in swept]


def job_name(overrides: Sequence[str], swept: Sequence[str]) -> str:
    """A job by what distinguishes it, to name a directory: `ptc=null,seed=1`; empty where nothing is swept.

    Where that is no plain name, or leaves something out, a hash of all that distinguishes it stands at the end.
    """
    name = ",".join(part for part in job_parts(overrides, swept).values() if part)
    plain = re.sub(r"[^\w.=,+-]", "_", name, flags=re.ASCII)[:LONGEST_JOB]
    given = [override for override in overrides if key_of(override) in swept]
    if plain == name and not any("/" in override for override in given):
        return name
    return f"{plain}-{hashlib.sha256(','.join(given).encode()).hexdigest()[:8]}"


LONGEST_JOB = 120
"""Characters of the name of a job."""


def job_parts(overrides: Iterable[str], swept: Sequence[str]) -> dict[str, str]:
    """Of a job the swept keys, and for each of them `key=value` in short.

    The name of a group of keys is left out where a mapping is given for it: `method.losses={ptc:null}` is `ptc=null`,
    and `method.losses={}`, which changes nothing, is empty. Of a path there is the last part, of a checkpoint its run.
    """
    parser = OverridesParser.create()
    given = [o for o in parser.parse_overrides(list(overrides)) if o.key_or_group in swept]
    short = [_shorten_key(override.key_or_group) for override in given]
    return {
        override.key_or_group: _described(override, name if short.count(name) == 1 else override.key_or_group)
        for override, name in zip(given, short, strict=True)
    }


def _described(override: Override, name: str) -> str:
    value = _plain(override.value())
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_text(part)}" for key, part in flatten(value).items()) if value else ""
    if isinstance(value, str) and "/" in value:
        path = Path(value)
        value = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
    return f"{name}={_text(value)}"


def _shorten_key(key: str) -> str:
    return ".".join(key.split(".")[1:][-2:]) or key


def _plain(value: Any) -> Any:
    """A value of Hydra's grammar without its quotes."""
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.text if isinstance(value, QuotedString) else value


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _running_job() -> str:
    """The directory of the running job of a sweep within that of the sweep."""
    job = HydraConfig.get().job
    fixed = job.config.override_dirname.exclude_keys
    overrides = list(HydraConfig.get().overrides.task)
    return job_name(overrides, [key for key in map(key_of, overrides) if key not in fixed]) or str(job.num)


OmegaConf.register_new_resolver("wsss.job", _running_job, replace=True)


def _added(config: Any) -> list[str]:
    """The directories of configuration that Hydra's own node lists beside ours."""
    sources = config.runtime.config_sources
    return [source.path for source in sources if source.schema == "file" and source.provider != "main"]

"""Where configuration becomes objects, and a user's mistake becomes one sentence and exit code 2.

Finds conf/, arranges the command line, runs Hydra, and instantiates by name. Imports nothing heavy: `--help` and
a mistyped key answer at once.
"""

import errno
import inspect
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from wsss import InputError, RunError

PATH_KEYS = {
    "checkpoint",
    "dir",
    "images",
    "init_checkpoint",
    "labels",
    "masks",
    "out",
    "root",
    "sbd_md5",
    "sbd_url",
    "train",
    "val",
    "voc_md5",
    "voc_url",
    "weights",
}
"""Last parts of the keys whose values are paths or names and reach Hydra quoted."""

OPTIONAL_GROUPS = ("transform", "recipe")
"""Groups whose option is named after others and need not exist."""

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What the system says when a disk or a quota is full, or may not be written to."""

VALUE_OPTIONS = {
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--info",
    "-i",
}


def config_dir() -> Path:
    """The directory of our configuration: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    for place in (package / "conf", package.parent / "conf"):
        if (place / "train.yaml").is_file():
            return place
    raise RuntimeError(f"the installation is damaged: neither {package / 'conf'} nor {package.parent / 'conf'} exists")


def run_command(
    name: str,
    task: Callable[[DictConfig], Any],
    prepare: Callable[[list[str]], list[str]] = lambda overrides: overrides,
) -> None:
    """Run `task` under Hydra with conf/<last word of name>.yaml and this process's command line.

    `prepare` may replace the overrides once they are arranged. Exit codes: 0, 1 a failed run, 2 a user's mistake.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own account of an error and exits with 1
    failures: list[int] = []
    job = _job(name, task, failures)
    arguments = sys.argv[1:]
    try:
        arguments = arrange(arguments)
        if not {"--help", "-h", "--hydra-help", "--version", "--info", "-i"} & set(arguments):
            arguments = prepare(arguments)
        sys.argv[1:] = arguments
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name.split()[-1])(job)()
    except (InputError, HydraException, OmegaConfBaseException) as error:
        failures.append(_say(name, explain(error, name, arguments), 2))
    except KeyboardInterrupt:
        failures.append(_say(name, "interrupted", 130))
    except BrokenPipeError:  # the reader of our output has closed it, `wsss-train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if failures:
        sys.exit(max(failures))


def _say(name: str, sentence: str, code: int) -> int:
    print(f"wsss-{name}: {sentence}", file=sys.stderr)
    return code


def _job(name: str, task: Callable[[DictConfig], Any], failures: list[int]) -> Callable[[DictConfig], Any]:
    """`task`, whose failures are said and noted rather than raised: the other jobs of a sweep go on."""

    def job(cfg: DictConfig) -> Any:
        run = HydraConfig.get()
        out = Path(run.runtime.output_dir)
        alone = run.mode != RunMode.MULTIRUN  # the table of a sweep names its failed jobs by their directories
        ours = alone and out != Path.cwd() and not any(out.iterdir())  # made by Hydra a moment ago
        try:
            check_choices()
            return task(cfg)
        except (KeyboardInterrupt, SystemExit) as error:  # Lightning makes the one of the other; both end a sweep
            if ours and not any(out.rglob("*.ckpt")):
                _remove_run(out)
            terminated = type(error).__name__ == "SIGTERMException"
            goes_on = "; the same command with resume=auto goes on with it" if any(out.rglob("*.ckpt")) else ""
            said = "terminated" if terminated else "interrupted"
            sys.exit(_say(name, said + goes_on, 143 if terminated else 130))
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            where = error.filename or out
            sentence = f"cannot write {where} ({error.strerror}): what was complete is kept; make room, then run again"
            failures.append(_say(name, sentence, 1))
            return math.nan
        except (InputError, RunError, OmegaConfBaseException) as error:
            if ours and not isinstance(error, RunError) and not any(out.rglob("*.ckpt")):
                _remove_run(out)
            place = f"job {run.job.num} ({run.job.override_dirname}): " if not alone else ""
            failures.append(_say(name, place + explain(error, name, []), 1 if isinstance(error, RunError) else 2))
            return math.nan

    job.__name__ = task.__name__
    job.__module__ = task.__module__
    return job


def _remove_run(out: Path) -> None:
    """Take back a run directory that holds nothing of use, and what becomes empty above it."""
    shutil.rmtree(out)
    for parent in out.parents:
        if Path.cwd() not in parent.parents or any(parent.iterdir()):
            break
        parent.rmdir()


def arrange(arguments: list[str]) -> list[str]:
    """Options first, as Hydra's parser wants them, and the values of path-like keys quoted."""
    options, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument in VALUE_OPTIONS:
            options += [argument, *([value] if (value := next(rest, None)) is not None else [])]
        elif argument.startswith("-"):
            options.append(argument)
        elif argument.startswith("="):
            raise InputError(f"{argument!r} names no key: write KEY{argument}")
        else:
            overrides.append(argument)
    sweep = bool({"-m", "--multirun"} & set(options))
    return options + [_quote_override(o, sweep) for o in overrides]


def _quote_override(override: str, sweep: bool) -> str:
    key, found, value = override.partition("=")
    if key in OPTIONAL_GROUPS and value == "null":
        return f"~{key}"  # Hydra's own way to leave a group out
    if not found or key.rpartition(".")[2] not in PATH_KEYS:
        return override
    if value in ("", "null", "???") or "${" in value or (value[0] in "'\"" and value[0] == value[-1]):
        return override
    return f"{key}={','.join(map(quote, value.split(','))) if sweep else quote(value)}"


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


def values_of(overrides: Iterable[str], key: str) -> list[str]:
    """The values given for `key` on an arranged command line: none, one, or those of a sweep."""
    parser = OverridesParser.create()
    for override in overrides:
        if override.partition("=")[0].lstrip("+") == key:
            parsed = parser.parse_override(override)
            choices = parsed.sweep_iterator() if parsed.is_sweep_override() else [parsed.value()]
            return [str(choice.text if isinstance(choice, QuotedString) else choice) for choice in choices]
    return []


def check_choices() -> None:
    """Refuse a mistyped option of an optional group, and say when a pair of method and data set has no recipe.

    Raises:
        InputError: an optional group was given an option that does not exist, or a `_target_` was overridden.
    """
    choices, given = HydraConfig.get().runtime.choices, HydraConfig.get().overrides.task
    for override in given:
        if override.partition("=")[0].rpartition(".")[2] == "_target_":
            raise InputError(f"{override}: a class cannot be set on the command line, choose a group option instead")
    loader = GlobalHydra.instance().config_loader()
    for group in OPTIONAL_GROUPS:
        choice = choices.get(group)
        known = loader.get_group_options(group)
        if choice is None or choice in known:
            continue
        if values_of(given, group):
            raise InputError(f"{group}={choice} does not exist: known are {', '.join(known)}")
        if group == "recipe":
            print(
                f"no recipe for method={choices['method']} dataset={choices['dataset']}: the method's defaults are used"
            )


def plain(node: DictConfig, key: str = "") -> dict[str, Any]:
    """The values of a config node, interpolations resolved, as builtin containers; without `_target_`.

    Raises:
        InputError: the node is a plain value; `key` names it.
    """
    if not isinstance(node, DictConfig):
        raise InputError(f"{key} is {node!r}: expected several values, {key}.NAME=VALUE")
    values: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    return {key: value for key, value in values.items() if key != "_target_"}


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
    try:
        values = plain(node, key)
    except MissingMandatoryValue as error:
        missing = str(error.full_key or "").removeprefix(f"{key}.")
        raise InputError(f"{key}.{missing} is not set: add {key}.{missing}=... to the command") from error
    return call(hydra.utils.get_object(node._target_), values, key, **extra)


def call(target: Callable[..., Any], values: Mapping[str, Any], key: str, **extra: Any) -> Any:
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


def explain(error: Exception, name: str, arguments: list[str]) -> str:
    """One sentence about a configuration error, with what would have been possible."""
    text = str(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: add {error.full_key}=... to the command"
    if isinstance(error, InputError | RunError):
        # a loader's worker sends its traceback as the message
        return text.rpartition("wsss.InputError: ")[2].strip() if text.startswith("Caught InputError") else text
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option} does not exist: known are {', '.join(error.options) or 'none'}"
    if match := re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", text):
        full = re.search(r"full_key: (\S+)", text)  # names the part of a dict that does not exist
        key = full[1] if full else match[1].partition("@")[0].lstrip("+~")
        return f"unknown config key {key}: {_siblings(key, name, arguments)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: quote what holds one of (){{}}[]=,'\" like this: 'KEY=\"VALUE\"'"
    sentence = " ".join(text.split())
    return f"configuration error: {sentence}"


def _siblings(key: str, name: str, arguments: list[str]) -> str:
    """The known keys beside a mistyped one, the nearest first."""
    GlobalHydra.instance().clear()
    directories = [arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a in ("--config-dir", "-cd")]
    directories += [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    search = "hydra.searchpath=[" + ",".join(quote(f"file://{Path(d).resolve()}") for d in directories) + "]"
    # group options alone, as far as they are not what is wrong
    groups = [path.name for path in config_dir().iterdir() if path.is_dir()]
    chosen = [a for a in arguments if (m := re.fullmatch(r"(\w+)=[\w/]+", a)) and m[1] in groups and m[1] != key]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            node: Any = hydra.compose(name.split()[-1], overrides=[*chosen, *([search] if directories else [])])
        except (HydraException, OmegaConfBaseException):
            node = hydra.compose(name.split()[-1])
    path: list[str] = []
    for part in key.split(".")[:-1]:
        if not isinstance(node, DictConfig) or part not in node:
            key = ".".join([*path, part])
            break
        path.append(part)
        node = node[part]
    if not isinstance(node, DictConfig):
        return f"{'.'.join(path)} is a plain value"
    known = [str(k) for k in node if k != "_target_"]
    near = get_close_matches(key.rpartition(".")[2], known, n=3)
    where = f"in {'.'.join(path)} " if path else ""
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"known {where}are {', '.join(known)}"

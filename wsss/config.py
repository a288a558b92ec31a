"""Where configuration becomes objects, and a user's mistake becomes one sentence and exit code 2.

Finds conf/, arranges the command line, runs Hydra, and instantiates by name. Imports nothing heavy: `--help` and
a mistyped key answer at once.
"""

import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from wsss import InputError, RunError

PATH_KEYS = {"checkpoint", "dir", "images", "labels", "masks", "out", "root", "train", "val", "weights"}
"""Last parts of the keys whose values are paths or names and reach Hydra quoted."""

OPTIONAL_GROUPS = ("transform", "recipe")
"""Groups whose option is named after others and need not exist."""

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
    """Run `task` under Hydra with conf/<name>.yaml and this process's command line.

    `prepare` may replace the overrides once they are arranged. Exit codes: 0, 1 a failed run, 2 a user's mistake.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own account of an error and exits with 1
    arguments = arrange(sys.argv[1:])
    failures: list[int] = []
    job = _job(name, task, failures)
    main = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(job)
    try:
        if not {"--help", "-h", "--hydra-help", "--version", "--info", "-i"} & set(arguments):
            arguments = prepare(arguments)
        sys.argv[1:] = arguments
        main()
    except (InputError, HydraException, OmegaConfBaseException) as error:
        failures.append(_say(name, explain(error, name, arguments), 2))
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
        try:
            check_choices()
            return task(cfg)
        except (InputError, RunError, OmegaConfBaseException) as error:
            if out.is_dir() and not any(out.iterdir()):
                out.rmdir()  # Hydra made it before we could look
            place = f"job {run.job.num} ({run.job.override_dirname}): " if run.mode == RunMode.MULTIRUN else ""
            failures.append(_say(name, place + explain(error, name, []), 1 if isinstance(error, RunError) else 2))
            return math.nan

    job.__name__ = task.__name__
    job.__module__ = task.__module__
    return job


def arrange(arguments: list[str]) -> list[str]:
    """Options first, as Hydra's parser wants them, and the values of path-like keys quoted."""
    options, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument in VALUE_OPTIONS:
            options += [argument, *([value] if (value := next(rest, None)) is not None else [])]
        elif argument.startswith("-"):
            options.append(argument)
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


def plain(node: DictConfig) -> dict[str, Any]:
    """The values of a config node, interpolations resolved, as builtin containers; without `_target_`."""
    values: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    return {key: value for key, value in values.items() if key != "_target_"}


def absolute_paths(values: dict[str, Any]) -> dict[str, Any]:
    """The same values with existing paths made absolute, so that they hold from any working directory."""
    return {
        key: os.path.abspath(value) if key in PATH_KEYS and isinstance(value, str) and os.path.exists(value) else value
        for key, value in values.items()
    }


def build(node: DictConfig, key: str, **extra: Any) -> Any:
    """The object a config node describes: its `_target_`, called with the node's plain values and `extra`.

    Raises:
        InputError: a mandatory value is missing, or an argument does not exist; `key` names the node.
    """
    try:
        values = plain(node)
    except MissingMandatoryValue as error:
        missing = str(error.full_key or "").removeprefix(f"{key}.")
        raise InputError(f"{key}.{missing} is not set: add {key}.{missing}=... to the command") from error
    target = hydra.utils.get_object(node._target_)
    known = list(inspect.signature(target).parameters)
    unknown = [name for name in values if name not in known]
    if unknown:
        raise InputError(f"{key} has no argument {', '.join(unknown)}: known are {', '.join(known)}")
    return target(**values, **extra)


def explain(error: Exception, name: str, arguments: list[str]) -> str:
    """One sentence about a configuration error, with what would have been possible."""
    text = str(error)
    if isinstance(error, InputError | RunError):
        # a loader's worker sends its traceback as the message
        return text.rpartition("wsss.InputError: ")[2].strip() if text.startswith("Caught InputError") else text
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option} does not exist: known are {', '.join(error.options)}"
    if match := re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", text):
        full = re.search(r"full_key: (\S+)", text)  # names the part of a dict that does not exist
        key = full[1] if full else match[1].partition("@")[0].lstrip("+~")
        return f"unknown config key {key}: {_siblings(key, name, arguments)}"
    sentence = " ".join(text.split())
    return f"configuration error: {sentence}"


def _siblings(key: str, name: str, arguments: list[str]) -> str:
    """The known keys beside a mistyped one, the nearest first."""
    GlobalHydra.instance().clear()
    directories = [arguments[i + 1] for i, a in enumerate(arguments[:-1]) if a in ("--config-dir", "-cd")]
    directories += [a.partition("=")[2] for a in arguments if a.startswith("--config-dir=")]
    search = "hydra.searchpath=[" + ",".join(quote(f"file://{Path(d).resolve()}") for d in directories) + "]"
    groups = ("method=", "dataset=", "trainer=", "logger=", "protocol=")
    chosen = [a.partition(",")[0] for a in arguments if a.startswith(groups)]
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        node: Any = hydra.compose(name, overrides=[*chosen, *([search] if directories else [])])
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

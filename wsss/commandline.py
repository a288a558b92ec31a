"""How every command runs: its line is put in order for Hydra, a user's mistake becomes one sentence and exit code 2."""

import errno
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from wsss import InputError, RunError, printable
from wsss.config import PATH_KEYS, CallbackFailure, composing, config_dir, given_directories, given_values, quote

OPTIONAL_GROUPS = ("transform", "recipe", "pipeline/recipe")
"""Groups whose option is named after others and need not exist."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What the system says when a disk or a quota is full."""

VALUE_OPTIONS = {
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--cfg",
    "-c",
    "--experimental-rerun",
    "--info",
    "-i",
}


def run_command(
    name: str,
    task: Callable[[DictConfig], Any],
    prepare: Callable[[list[str]], list[str]] = lambda overrides: overrides,
) -> None:
    """Run `task` under Hydra with conf/<last word of name>.yaml and this process's command line.

    `prepare` may replace the overrides once they are arranged. Exit codes: 0, 1 a failed run, 2 a user's mistake.
    """
    if os.name != "posix":
        sys.exit(_say(name, "the commands run on Linux and macOS; on Windows use its subsystem for Linux", 2))
    for stream in (sys.stdout, sys.stderr):  # names of files may hold bytes that are no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its own account of an error and exits with 1
    failures: list[int] = []
    job = _job(name, task, failures)
    arguments = sys.argv[1:]
    sweep = bool({"-m", "--multirun"} & set(arguments))
    try:
        arguments = order_arguments(arguments)
        if {"--help", "-h"} & set(arguments):
            print_help(name, arguments)
            return
        if not {"--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc"} & set(arguments):
            arguments = prepare(arguments)
        sys.argv[1:] = arguments
        try:
            hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name.split()[-1])(job)()
        except CallbackFailure as failure:
            raise failure.__cause__ or failure from None
    except (InputError, HydraException, OmegaConfBaseException) as error:
        failures.append(_say(name, explain(error, name, arguments), 2))
    except KeyboardInterrupt:
        failures.append(_say(name, "interrupted", 130))
    except BrokenPipeError:  # the reader of our output has closed it, `wsss-train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # Hydra could not make the run directory
        failures.append(_say(name, explain_failure(error, Path.cwd()) or str(error), 1))
    except Exception as error:
        if not sweep:
            raise
        traceback.print_exc()  # of a launcher, whose processes may end as those of a job
        goes_on = ", and the same command with resume=auto goes on with the others" if name == "train" else ""
        said = f"the sweep has broken off ({type(error).__name__}): the jobs that have ended are kept{goes_on}"
        failures.append(_say(name, said, 1))
    if failures:
        sys.exit(max(failures))


def _say(name: str, sentence: str, code: int) -> int:
    print(f"wsss-{name}: {printable(sentence)}", file=sys.stderr)
    return code


def _job(name: str, task: Callable[[DictConfig], Any], failures: list[int]) -> Callable[[DictConfig], Any]:
    """`task`, whose failures are said and noted rather than raised: the other jobs of a sweep go on.

    A job of a sweep notes its failure in `failure.json` of its directory, for it may run in a process of its own.
    """

    def job(cfg: DictConfig) -> Any:
        run = HydraConfig.get()
        out = Path(run.runtime.output_dir)
        alone = run.mode != RunMode.MULTIRUN  # the table of a sweep names its failed jobs by their directories
        ours = alone and out != Path.cwd() and not any(out.iterdir())  # made by Hydra a moment ago
        if not alone:
            (out / "failure.json").unlink(missing_ok=True)
        try:
            check_choices()
            return task(cfg)
        except (KeyboardInterrupt, SystemExit) as error:  # Lightning makes the one of the other; both end a sweep
            if ours and not any(out.rglob("*.ckpt")):
                _remove_run(out)
            if isinstance(said := getattr(error, "code", None), str):  # a task that knows how it goes on
                sys.exit(_say(name, said, 143 if said.startswith("terminated") else 130))
            terminated = type(error).__name__ == "SIGTERMException"
            kept = any(out.rglob("*.ckpt")) or (not alone and "resume" in cfg)
            goes_on = "; the same command with resume=auto goes on with it" if kept else ""
            said = "terminated" if terminated else "interrupted"
            sys.exit(_say(name, said + goes_on, 143 if terminated else 130))
        except (InputError, RunError, OmegaConfBaseException) as error:
            if ours and not isinstance(error, RunError) and not any(out.rglob("*.ckpt")):
                _remove_run(out)
            sentence, code = explain(error, name, []), 1 if isinstance(error, RunError) else 2
        except Exception as error:
            found = explain_failure(error, out)
            if found is None and alone:
                raise
            if found is None:  # the others go on
                traceback.print_exc()
            sentence, code = found or f"{type(error).__name__}: {' '.join(str(error).split())}", 1
        place = "" if alone else f"job {run.job.num} ({run.job.override_dirname}): "
        failures.append(_say(name, place + sentence, code))
        if not alone:  # `failures` may be a copy, in a process of a launcher
            content = {"code": code, "sentence": printable(sentence)}
            (out / ".failure.json").write_text(json.dumps(content), encoding="utf-8")
            (out / ".failure.json").replace(out / "failure.json")  # whole or not at all
        return math.nan

    job.__name__ = task.__name__
    job.__module__ = task.__module__
    return job


def _remove_run(out: Path) -> None:
    """Take back a run directory that holds nothing of use, and what becomes empty above it."""
    with suppress(FileNotFoundError):  # another process of a training on several devices may be at it
        shutil.rmtree(out)
        for parent in out.parents:
            if Path.cwd() not in parent.parents or any(parent.iterdir()):
                break
            parent.rmdir()


def order_arguments(arguments: list[str]) -> list[str]:
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
    values = split_paths(value) if sweep and not key.startswith("hydra.") else [value]
    return f"{key}={','.join(map(quote, values))}"


def split_paths(value: str) -> list[str]:
    """The values of a sweep over paths: split at commas, but for those in a path that exists, the longest one first."""
    pieces, values = value.split(","), []
    while pieces:
        lengths = range(len(pieces), 1, -1)
        length = next((n for n in lengths if os.path.exists(os.path.expanduser(",".join(pieces[:n])))), 1)
        values.append(",".join(pieces[:length]))
        pieces = pieces[length:]
    return values


def explain_failure(error: Exception, out: Path) -> str | None:
    """One sentence about what the machine refused to a run in `out`; None for what is an error of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        where, reason = error.filename or out, error.strerror or text
        if error.errno in FULL:
            return f"cannot write {where} ({reason}): what was complete is kept; make room, then run again"
        return f"{where} cannot be used ({reason}): what was complete is kept; mend this, or name another place"
    if isinstance(error, MemoryError) or re.search("out of memory|not enough memory|can't allocate memory", text):
        return (
            f"there is not enough memory ({text[:200] or 'MemoryError'}): what was complete is kept; make "
            "data.batch_size, transform.crop_size or protocol.max_side smaller, then run again"
        )
    if "DataLoader worker" in text:
        return (
            f"a loader process has died ({text[:200]}), as they do where memory or shared memory ends: what was "
            "complete is kept; run again with data.num_workers=0"
        )
    return None


def message_of(error: Exception) -> str:
    """What an InputError says, also one from a loader's process, which sends its traceback as the message."""
    text = str(error)
    return text.rpartition("wsss.InputError: ")[2].strip() if text.startswith("Caught InputError") else text


def explain(error: Exception, name: str, arguments: list[str]) -> str:
    """One sentence about a configuration error, with what would have been possible."""
    text = str(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: add {error.full_key}=... to the command"
    if isinstance(error, InputError | RunError):
        return message_of(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option} does not exist: known are {', '.join(error.options) or 'none'}"
    if match := re.search(r"Could not (?:override|append|delete)[^']*'([^']+)'", text):
        full = re.search(
            r"full_key: (\S+)", f"{text} {error.__cause__}"
        )  # names the part of a dict that does not exist
        key = full[1] if full else match[1].partition("@")[0].lstrip("+~")
        return f"unknown config key {key}: {_siblings(key, name, arguments)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: quote what holds one of (){{}}[]=,'\" like this: 'KEY=\"VALUE\"'"
    sentence = " ".join(text.split())
    return f"configuration error: {sentence}"


def _siblings(key: str, name: str, arguments: list[str]) -> str:
    """The known keys beside a mistyped one, the nearest first."""
    # group options alone, as far as they are not what is wrong
    groups = [path.name for path in config_dir().iterdir() if path.is_dir()]
    chosen = [a for a in arguments if (m := re.fullmatch(r"(\w+)=[\w/]+", a)) and m[1] in groups and m[1] != key]
    with composing(given_directories(arguments)) as search_path:
        try:
            node: Any = hydra.compose(name.split()[-1], overrides=[*chosen, *search_path])
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
    return (f"did you mean {' or '.join(near)}? " if near else "") + f"known {where}are {', '.join(known) or 'none'}"


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
        if given_values(given, group):
            raise InputError(f"{group}={choice} does not exist: known are {', '.join(known)}")
        if group == "recipe":
            print(
                f"no recipe for method={choices['method']} dataset={choices['dataset']}: the method's defaults are used"
            )


def print_help(name: str, arguments: list[str]) -> None:
    """What a command does, examples, the groups it chooses from and all that can be set: from its file in conf/."""
    config = name.split()[-1]
    lines = (config_dir() / f"{config}.yaml").read_text(encoding="utf-8").splitlines()
    for line in itertools.takewhile(lambda line: line.startswith("#"), lines):
        print(line.removeprefix("#").removeprefix(" "))
    with composing(given_directories(arguments)) as search_path:
        overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
        composed = hydra.compose(config, overrides=[*overrides, *search_path], return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        groups = sorted(group for group in composed.hydra.runtime.choices if not group.startswith("hydra/"))
        options = {group: loader.get_group_options(group, overrides=search_path) for group in groups}
    if groups:
        print("\nChoose")
    for group, known in options.items():
        if known:
            print(f"  {group}={composed.hydra.runtime.choices[group]}  of {', '.join(known)}")
    if settable := [str(k) for k in composed if k != "hydra"]:
        print("\nSet any of these, KEY.KEY=VALUE; the values are those that hold now:\n")
        print(OmegaConf.to_yaml(OmegaConf.masked_copy(composed, settable)).rstrip())
        print("\n-m sweeps over values given as a,b,c; --config-dir DIR adds options of your own")

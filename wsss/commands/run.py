"""`wsss-run`: a pipeline of commands, from image labels to a segmentation model, that goes on where it ended."""

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wsss import InputError, RunError
from wsss.commandline import explain, order_arguments, run_command
from wsss.config import absolute_paths, composing, extra_directories, flatten, plain_values, quote
from wsss.pipeline import (
    MODULES,
    OUTPUTS,
    REFERENCE,
    Stage,
    data_fingerprint,
    end_leftover,
    leftovers,
    place,
    run_stages,
)

BASELINE = "baseline"
"""The stage that tells what CLIP finds without any training."""

QUICK = "quick"
"""The pipeline for own photographs, where none is given."""


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run the stages that are not finished; returns the records of all, by name."""
    from wsss.report.afterwards import write_report
    from wsss.report.tables import print_pipeline
    from wsss.runs import lock

    described = check_settings(cfg)
    out = Path(cfg.out).expanduser().resolve()
    values = absolute_paths(plain_values(cfg.dataset, "dataset"))
    stages = resolve(cfg, described, dataset_overrides(values))
    place(stages, out, data_fingerprint(values, out))
    out.mkdir(parents=True, exist_ok=True)
    if not lock(out):
        raise RunError(f"{out} is in use by another wsss-run: wait for its end, or give another out")
    if cfg.clean:
        clean(stages, out, delete=cfg.clean == "delete")
        return {}
    names = [stage.name for stage in stages]
    last = names.index(cfg.stop_after) if cfg.stop_after else len(names) - 1
    first = names.index(cfg.start_from) if cfg.start_from else 0
    directories = [option for place in extra_directories() for option in ("--config-dir", place)]
    records = run_stages(
        stages[: last + 1], out, directories, lambda records: print_pipeline(str(out), records), start=first
    )
    trained = [stage for stage in stages[: last + 1] if stage.command == "train"]
    if trained:
        checkpoint = shlex.quote(str(trained[-1].folder / OUTPUTS["train"]["checkpoint"]))
        print(f"masks of other photographs: wsss-predict checkpoint={checkpoint} images=FOLDER out=MASKS")
    if not (out / "report.html").exists() or any(record["status"] == "ran" for record in records.values()):
        write_report(out, directories)
    return records


def check_settings(cfg: DictConfig) -> dict[str, Any]:
    """The stages that the pipeline lists.

    Raises:
        InputError: a name of none of them, an order that cannot be, or a value of another kind.
    """
    chosen = HydraConfig.get().runtime.choices["pipeline"]
    described = plain_values(cfg.pipeline, "pipeline").get("stages")
    if isinstance(described, dict):
        described = {name: stage for name, stage in described.items() if stage is not None}  # a recipe leaves one out
    if not isinstance(described, dict) or not all(isinstance(stage, dict) for stage in described.values()):
        raise InputError(
            f"pipeline={chosen} lists no stages: expected NAME with command, overrides and needs in stages"
        )
    known = f"pipeline={chosen} has the stages {', '.join(described)}"
    if cfg.baseline.text is not None:
        described = with_baseline(cfg, described)
    given = {"stop_after": cfg.stop_after, "start_from": cfg.start_from} | {f"stages.{n}": n for n in cfg.stages}
    for key, name in given.items():
        if name is not None and name not in described:
            raise InputError(f"{key if key.startswith('stages') else f'{key}={name}'} is no stage: {known}")
    if cfg.stop_after and cfg.start_from and [*described].index(cfg.stop_after) < [*described].index(cfg.start_from):
        raise InputError(f"stop_after={cfg.stop_after} comes before start_from={cfg.start_from}: {known}")
    if cfg.clean not in (True, False, "delete"):
        raise InputError(f"clean is {cfg.clean!r}: expected true, which lists, delete, or false")
    earlier: list[str] = []
    for name, stage in described.items():
        where = f"stage {name} of pipeline={chosen}"
        if stage.get("command") not in MODULES:
            raise InputError(f"{where} has the command {stage.get('command')!r}: known are {', '.join(MODULES)}")
        if not set(stage.get("needs", [])) <= set(earlier):
            raise InputError(f"{where} needs {', '.join(stage['needs'])}: expected names of stages before it")
        earlier.append(name)
    return described


def with_baseline(cfg: DictConfig, described: Mapping[str, Any]) -> dict[str, Any]:
    """The stages behind one that evaluates CLIP-ES under the protocol of the last evaluation, or of the last training.

    Raises:
        InputError: the pipeline has a stage of that name.
    """
    if BASELINE in described:
        raise InputError(f"the pipeline has a stage {BASELINE} of its own: leave baseline.text out")
    evaluations = [name for name, stage in described.items() if stage.get("command") == "eval"]
    last = (evaluations or [name for name, stage in described.items() if stage.get("command") == "train"])[-1:]
    given = [o for name in last for o in [*described[name].get("overrides", []), *(cfg.stages.get(name) or [])]]
    protocol = [o for o in given if re.match(r"\+*protocol[.=]", o)]
    if evaluations and not any(o.startswith("protocol=") for o in protocol):
        protocol.insert(0, "protocol=honest")  # that of wsss-eval
    chosen = [f"method.weights={quote(cfg.baseline.weights)}", f"method.text={quote(cfg.baseline.text)}"]
    stage = {"command": "train", "overrides": ["method=clip_es", "monitor=null", *protocol, *chosen]}
    return {BASELINE: stage, **described}


def resolve(cfg: DictConfig, described: Mapping[str, Any], dataset: Sequence[str]) -> list[Stage]:
    """The stages with all their settings, as their commands will compose them.

    Raises:
        InputError: a setting that a command does not know, or an output that no stage needed leaves.
    """
    choice = HydraConfig.get().runtime.choices["dataset"]
    stages: list[Stage] = []
    methods: dict[str, str] = {}
    for name, stage in described.items():
        own, needs = list(cfg.stages.get(name) or []), stage.get("needs", [])
        chosen = {o.partition("=")[0] for o in own}  # with another option of a group go the old one's values
        given = [o for o in stage.get("overrides", []) if not {re.split("[.=]", o)[0]} & chosen]
        overrides = [f"dataset={choice}", *dataset, *given, *own]
        overrides[:0] = [f"features.folder={quote(cfg.features.folder)}", f"features.limit_gb={cfg.features.limit_gb}"]
        if stage["command"] != "label":
            overrides.insert(0, f"seed={cfg.seed}")
        for found in (found for override in overrides for found in REFERENCE.finditer(override)):
            if found[1] not in needs or found[2] not in OUTPUTS[described[found[1]]["command"]]:
                raise InputError(f"{found[0]} of stage {name} names nothing that a stage in its needs leaves")
        loaded = (re.fullmatch(rf"checkpoint={REFERENCE.pattern}", override) for override in overrides)
        overrides[:0] = [f"method={methods[found[1]]}" for found in loaded if found]
        try:
            with composing(extra_directories()) as search_path:
                arguments = [*order_arguments(overrides), *search_path]
                composed = hydra.compose(stage["command"], arguments, return_hydra_config=True)
            methods[name] = composed.hydra.runtime.choices["method"]
            plain = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            settings = flatten(OmegaConf.to_container(plain, resolve=True))
        except (InputError, HydraException, OmegaConfBaseException) as error:
            raise InputError(f"stage {name}: {explain(error, stage['command'], overrides)}") from error
        stages.append(Stage(name, stage["command"], overrides, needs, settings))
    return stages


def dataset_overrides(values: Mapping[str, Any]) -> list[str]:
    """What the command line says of the data set, paths made absolute."""
    given = [o for o in HydraConfig.get().overrides.task if o.lstrip("+~").startswith("dataset.")]
    keys = {o: o.partition("=")[0].removeprefix("dataset.") for o in given}
    return [f"dataset.{key}={quote(values[key])}" if isinstance(values.get(key), str) else o for o, key in keys.items()]


def clean(stages: Sequence[Stage], out: Path, delete: bool) -> None:
    """List, or remove, the folders of stages that are none of these."""
    found = leftovers(stages, out)
    for folder in found:
        if delete:
            end_leftover(folder)
            shutil.rmtree(folder)
        print(f"{folder}{' removed' if delete else ''}")
    advice = "" if delete or not found else ", clean=delete removes them"
    print(f"{len(found)} folders in {out / 'stages'} do not belong to this command{advice}")


def prepare(arguments: list[str]) -> list[str]:
    """Settings of single stages, which Hydra could not place, as one list of overrides for each stage."""
    kept: list[str] = []
    own: dict[str, list[str]] = {}
    for argument in arguments:
        found = re.fullmatch(r"\+*stages\.(\w+)(?:\.([^=]+))?=(.*)", argument, re.DOTALL)
        if found is None:
            kept.append(argument)
        else:
            own.setdefault(found[1], []).extend([f"{found[2]}={found[3]}"] if found[2] else split(found[3]))
    if "dataset=folder" in kept and not any(argument.startswith("pipeline=") for argument in kept):
        print(f"pipeline={QUICK}, which needs no GPU; with one pipeline=toco is worth its time")
        kept.append(f"pipeline={QUICK}")
    return [*kept, *(f"+stages.{name}={quote(given)}" for name, given in own.items())]


def split(listed: str) -> list[str]:
    """The overrides of `[KEY=VALUE,KEY=VALUE]`, whose values may be lists themselves.

    Raises:
        InputError: it is no list of settings.
    """
    inner = listed.strip()[1:-1]
    # a comma that is followed by the next KEY=
    overrides = [
        part.strip().strip("'\"") for part in re.split(r",(?=\s*['\"]?[+~]{0,2}[\w.]+=)", inner) if part.strip()
    ]
    if not (listed.strip().startswith("[") and listed.strip().endswith("]")) or any("=" not in o for o in overrides):
        raise InputError(f"settings of a stage are {listed}: expected stages.NAME.KEY=VALUE or [KEY=VALUE,...]")
    return overrides


def main() -> None:
    run_command("run", run, prepare)

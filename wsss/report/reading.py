"""What runs have left in their directories, read for a report."""

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from wsss import InputError, writing
from wsss.config import flatten
from wsss.evaluation.protocol import Measured
from wsss.runs import NO_MATTER

PROTOCOL = "protocol/"
"""What the names of the sentences begin with that stand beside figures in metrics.json, for runs without tags.json."""

VERSIONS = ("wsss", "python", "torch", "pytorch_lightning", "timm", "machine")
"""What run.json says of where a run was made."""

LONGEST_NAME = 60
"""Characters of a name made of settings; runs that would need more are called by their folders."""


@dataclass
class Run:
    """A training, an evaluation or a folder of pseudo masks.

    Attributes:
        folder: its directory.
        command: `train`, `eval` or `label`.
        name: what it is called in a report.
        method: option of the group method, or its class.
        figures: numbers by name.
        notes: by the name of a figure how it was measured, in parts of a sentence.
        tables: what is more than a number, by metric, see `wsss.evaluation.metrics.tables_of`.
        log: (step, value) by column of log/metrics.csv.
        settings: all that the result depends on, flat; those of a seed apart.
        seed: of the training, None where nothing was drawn.
        versions: by name.
        seconds: it took; None where nobody has measured it, as with `memory`, MiB.
        checkpoint: the file of the network that it trained, measured or used; it need not be there any more.
        finished: whether it has ended.
    """

    folder: Path
    command: str
    name: str
    method: str
    figures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    log: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    memory: float | None = None
    checkpoint: Path | None = None
    finished: bool = True

    @property
    def per_image(self) -> Path | None:
        """The counts of each image, where they were asked for."""
        path = self.folder / "per_image.csv"
        return path if path.is_file() else None


def read_all(paths: Sequence[Path]) -> list[Run]:
    """The runs of directories, each of a run, a pipeline or a sweep, under names that tell them apart.

    Raises:
        InputError: one is none of these, or damaged.
    """
    groups = [_read(path.expanduser().resolve()) for path in paths]
    runs = [run for group in groups for run in group]
    stages = [is_pipeline(path) for path in paths]
    if any(stages):  # their runs have the names of stages
        for path, group, is_staged in zip(paths, groups, stages, strict=True):
            for run in group if len(paths) > 1 else []:
                run.name = f"{path.resolve().name}: {run.name}" if is_staged else path.resolve().name
    else:
        _name(runs)
    return runs


def is_pipeline(path: Path) -> bool:
    return (path / "pipeline.json").is_file()


def _read(path: Path) -> list[Run]:
    if is_pipeline(path):
        return _stages(path)
    if any((path / name).is_file() for name in ("run.json", "manifest.json")):
        return [_run(path)]
    runs = {file.parent for name in ("run.json", "manifest.json") for file in path.glob(f"*/{name}")}
    if runs:
        listed = list(read_object(path / "sweep.json").get("jobs", ())) if (path / "sweep.json").is_file() else []
        place = {name: number for number, name in enumerate(listed)}
        return [_run(run) for run in sorted(runs, key=lambda run: (place.get(run.name, -1), len(run.name), run.name))]
    staged = sorted(path.glob("*/pipeline.json"))
    if staged:
        return [run for file in staged for run in _prefixed(file.parent)]
    raise InputError(
        f"{path} holds no run: expected the directory of a training, an evaluation, pseudo masks (with run.json or "
        "manifest.json), a pipeline (with pipeline.json), or a sweep of these"
    )


def _prefixed(path: Path) -> list[Run]:
    runs = _read(path)
    for run in runs:
        run.name = f"{path.name}: {run.name}"
    return runs


def _stages(pipeline: Path) -> list[Run]:
    """Those of a pipeline that have begun."""
    path = pipeline / "pipeline.json"
    records = read_object(path).get("stages", {})
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise damaged(path)
    begun = {name: record for name, record in records.items() if "stage" in record}
    wanted = {"stage": str, "folder": str, "seconds": int | float, "settings": dict}
    if any(not isinstance(record.get(key), kind) for record in begun.values() for key, kind in wanted.items()):
        raise damaged(path)
    return [_stage(pipeline, name, record) for name, record in begun.items()]


def _stage(pipeline: Path, name: str, record: Mapping[str, Any]) -> Run:
    """A stage of a pipeline, which may have been moved since."""
    moved = pipeline / "stages" / record["stage"]
    run = _run(moved if moved.is_dir() else Path(record["folder"]))
    run.name, run.seconds, run.memory = name, record["seconds"], record.get("peak_memory_mb")
    run.settings = _settings(record["settings"])
    run.versions = {**record.get("versions", {}), **run.versions}
    return run


def _run(folder: Path) -> Run:
    """What there is of a run; one that has not ended has no figures yet."""
    record = read_object(folder / "run.json") if (folder / "run.json").is_file() else {}
    values = read_object(folder / "metrics.json") if (folder / "metrics.json").is_file() else {}
    labels = read_object(folder / "settings.json") if (folder / "settings.json").is_file() else {}
    config = _yaml(folder / "config.yaml")
    command = "label" if labels else "train" if config else "eval"
    overrides = dict(given.partition("=")[::2] for given in record.get("overrides", []))
    target = str(config.get("method._target_", "method"))
    method = overrides.get("method") or labels.get("settings", {}).get("method") or target.rpartition(".")[2].lower()
    run = Run(folder, command, folder.name, str(method), overrides=overrides, finished=bool(values or labels))
    run.notes = {key.removeprefix(PROTOCOL): [str(v)] for key, v in values.items() if key.startswith(PROTOCOL)}
    run.notes |= _tags(folder / "tags.json")
    run.figures = {key: float(value) for key, value in values.items() if _is_number(value)}
    run.seconds, run.memory = run.figures.pop("seconds", None), run.figures.pop("peak_memory_mb", None)
    run.tables = read_object(folder / "tables.json") if (folder / "tables.json").is_file() else {}
    run.log = _log(folder / "log" / "metrics.csv")
    run.seed = record.get("seed")
    run.versions = {key: str(record[key]) for key in VERSIONS if key in record}
    run.versions |= {"wsss": labels["version"]} if "version" in labels else {}
    own = folder / "checkpoints" / "last.ckpt"
    given = labels.get("checkpoint") or values.get("checkpoint")
    run.checkpoint = own if own.is_file() else Path(given) if isinstance(given, str) else None
    if command == "eval" and run.checkpoint is not None:  # what was trained, and how it was measured
        config = _yaml(run.checkpoint.parent.parent / "config.yaml") | overrides
    run.settings = _settings(config or labels.get("settings", {}))
    return run


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a result depends on, the seed and files of other runs apart."""
    files = ("seed", "checkpoint", "pseudo_masks", "pseudo_scores", "method.init_checkpoint", "refine.affinity_sha256")
    kept = {key: value for key, value in values.items() if not NO_MATTER.fullmatch(key) and key not in files}
    if values.get("worse.seed") == values.get("seed"):  # which it follows
        kept.pop("worse.seed", None)
    return kept


def _name(runs: Sequence[Run]) -> None:
    """Call runs by their methods, if these differ, else also by the settings that do, else by their folders too."""
    if len({run.method for run in runs}) == len(runs):
        for run in runs:
            run.name = run.method
        return
    varied = [
        key
        for key in dict.fromkeys(key for run in runs for key in run.overrides)
        if len({run.overrides.get(key) for run in runs}) > 1 and not NO_MATTER.fullmatch(key)
        if key not in ("method", "checkpoint")
    ]
    for run in runs:
        parts = [f"{key.rpartition('.')[2]}={run.overrides[key]}" for key in varied if key in run.overrides]
        if (run.folder.parent / "sweep.json").is_file():  # which has named it by what varies
            parts = run.folder.name.split(",")
        name = ", ".join([run.method, *parts])
        run.name = name if len(name) <= LONGEST_NAME else f"{run.method}, {run.folder.name}"
    taken = [run.name for run in runs]
    for run in runs:
        if taken.count(run.name) > 1:
            run.name = f"{run.name} ({run.folder.name})"


def same_but_seed(runs: Iterable[Run]) -> list[list[Run]]:
    """Groups of runs that differ in their seeds alone, in order; those whose settings are not known stand alone."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.command, run.method, run.settings], sort_keys=True, default=str)
        groups.setdefault(key if run.settings else str(run.folder), []).append(run)
    return list(groups.values())


def read_object(path: Path) -> dict[str, Any]:
    """Raises InputError for what is no JSON object."""
    return writing.read_object(path, ADVICE)


def damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged: put it back, or {ADVICE}")


ADVICE = "leave its run out of the report"


def _yaml(path: Path) -> dict[str, Any]:
    """A configuration, flat; empty where there is none."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise damaged(path)
    return flatten(content)


def _tags(path: Path) -> dict[str, list[str]]:
    """How figures were measured; nothing where a run is from before they were kept."""
    tags = read_object(path) if path.is_file() else {}
    try:
        notes = {key: Measured(**fields) for key, fields in tags.items()}
        return {key: note.parts() for key, note in notes.items() if str(note)}  # which holds text alone
    except (TypeError, ValueError, AttributeError) as error:
        raise damaged(path) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _log(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Columns of a log, without the cells that are empty or no finite number."""
    columns: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return columns
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(line for line in file if "\0" not in line):
            step = _number(row.get("step"))
            for key, text in row.items():
                value = _number(text)
                if step is not None and value is not None and key not in (None, "step"):
                    columns.setdefault(key, []).append((step, value))
    return columns


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None

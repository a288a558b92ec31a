"""What a sweep has come to: its jobs, the mean over seeds of each variant, and how far it is from the first one."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wsss import InputError, printable
from wsss.config import job_parts, key_of
from wsss.evaluation.comparison import ImageCounts, NoCountsError, bootstrap_pairs, paired_t, read_counts
from wsss.report.reading import read_all, read_object, same_but_seed
from wsss.report.tables import SUMMARY, cell
from wsss.writing import write_json, write_whole

RECORD = "sweep.json"
"""Of the jobs of a sweep, in its directory."""

ELSEWHERE = "elsewhere.json"
"""In the directory of a job of `wsss-label` whose `out` is another one: which."""

FIGURES = (
    "val/miou",
    "val/multiscale_miou",
    "val/crf_miou",
    "val/cam_miou",
    "val/cam_best_miou",
    "val/aux_cam_miou",
    "val/map",
    "val/mask_miou",
    "train/mask_miou",
    "train/cam_miou",
    "train/cam_best_miou",
)
"""Those that are summed up, as far as they were measured."""

FIRST = "as configured"
"""What a variant is called that sets nothing."""


@dataclass
class Job:
    """One of a sweep.

    Attributes:
        name: of its directory.
        settings: what the sweep sets for it, by key.
        variant: what tells it from others, seeds apart.
        repeat: what tells it from others of its variant.
        state: `finished`, `failed`, `unfinished` or `not run`.
        said: why it has failed.
        code: the exit code of that.
        figures: numbers by name.
    """

    name: str
    settings: dict[str, str]
    variant: str
    repeat: str
    state: str
    said: str = ""
    code: int = 0
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Row:
    """A figure of a variant: mean and standard deviation (of the sample), and its difference from the first variant.

    Attributes:
        count: how many jobs have it.
        pairs: how many of them have a counterpart in the first variant; the difference is the mean over these.
        seeds: 95 % interval of the difference as far as seeds go, see `paired_t`; NaN with fewer than two pairs.
        images: likewise as far as the choice of images goes, see `bootstrap_pairs`; NaN without counts of each image.
    """

    figure: str
    variant: str
    count: int
    mean: float
    deviation: float
    pairs: int = 0
    difference: float = math.nan
    seeds: tuple[float, float] = (math.nan, math.nan)
    images: tuple[float, float] = (math.nan, math.nan)


@dataclass
class Sweep:
    """A directory of jobs, summed up; `baseline` is the variant of the first one."""

    folder: Path
    jobs: list[Job]
    rows: list[Row]
    baseline: str

    @property
    def missing(self) -> list[str]:
        """A sentence about each job that has no figures, and each variant that cannot be compared."""
        lacking = [job for job in self.jobs if job.state != "finished"]
        jobs = [f"{job.name}: {job.state}{f', {job.said}' if job.said else ''}" for job in lacking]
        compared = any(job.state == "finished" and job.variant == self.baseline for job in self.jobs)
        return jobs if compared else [*jobs, f"nothing of {self.baseline}, so that there are no differences from it"]

    @property
    def is_summary(self) -> bool:
        """Whether there is more to say than the figures of each job."""
        return any(row.count > 1 or not math.isnan(row.images[0]) for row in self.rows)

    def values(self) -> dict[str, dict[str, dict[str, float]]]:
        """By figure, variant and repetition."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for row in self.rows:
            jobs = [job for job in self.jobs if job.variant == row.variant and row.figure in job.figures]
            found.setdefault(row.figure, {})[row.variant] = {job.repeat: job.figures[row.figure] for job in jobs}
        return found


def read_sweep(folder: Path) -> Sweep:
    """The sweep in a directory; one without a record of its jobs consists of those that have begun.

    Raises:
        InputError: a file is damaged.
    """
    record = read_object(folder / RECORD) if (folder / RECORD).is_file() else {}
    listed = dict(record.get("jobs", {}))
    if not listed:  # without a record, or of a sweeper that says only when it has run what it will run
        runs = sorted(folder.glob("*/run.json"), key=lambda path: (len(path.parent.name), path.parent.name))
        listed = {path.parent.name: list(read_object(path).get("overrides", [])) for path in runs}
    given = [{key_of(override): override for override in overrides} for overrides in listed.values()]
    keys = dict.fromkeys(key for one in given for key in one)
    swept = record.get("swept") or [key for key in keys if len({one.get(key) for one in given}) > 1]
    repeated = ["seed", *(["checkpoint"] if _differ_in_seed(listed.values()) else [])]
    repeated = [key for key in repeated if key in swept]
    jobs = [_job(folder, name, overrides, swept, repeated) for name, overrides in listed.items()]
    baseline = jobs[0].variant if jobs else FIRST
    return Sweep(folder, jobs, _rows(folder, jobs, baseline), baseline)


def _differ_in_seed(jobs: Any) -> bool:
    """Whether the checkpoints of jobs are of trainings that differ in their seeds alone."""
    given = {
        override.partition("=")[2].strip("'\"")
        for job in jobs
        for override in job
        if override.startswith("checkpoint=")
    }
    try:
        runs = read_all([Path(checkpoint).parent.parent for checkpoint in given])
    except InputError:
        return False
    return bool(runs) and all(run.settings for run in runs) and len(same_but_seed(runs)) == 1


def _job(folder: Path, name: str, overrides: Sequence[str], swept: Sequence[str], repeated: Sequence[str]) -> Job:
    parts = job_parts(overrides, swept)
    variant = ", ".join(part for key, part in parts.items() if key not in repeated and part) or FIRST
    repeat = ", ".join(part for key, part in parts.items() if key in repeated)
    job = Job(name, parts, variant, repeat, "not run")
    own, pointer = folder / name, folder / name / ELSEWHERE
    out = Path(str(read_object(pointer).get("out"))) if pointer.is_file() else own
    if (out / "metrics.json").is_file():
        job.state = "finished"
        values = read_object(out / "metrics.json")
        job.figures = {key: value for key, value in values.items() if isinstance(value, int | float)}
    elif (out / "manifest.json").is_file():
        job.state = "finished"
    elif (own / "failure.json").is_file():
        failure = read_object(own / "failure.json")
        job.state, job.said, job.code = "failed", str(failure.get("sentence", "")), int(failure.get("code", 1))
    elif any((out / name).is_file() for name in ("run.json", "settings.json")):
        job.state, job.code = "unfinished", 1
    else:
        job.code = 1
    return job


def _rows(folder: Path, jobs: Sequence[Job], baseline: str) -> list[Row]:
    variants: dict[str, list[Job]] = {}
    for job in jobs:
        variants.setdefault(job.variant, []).append(job)
    counts: dict[tuple[str, str], ImageCounts | None] = {}

    def counted(job: Job, figure: str) -> ImageCounts | None:
        """None where there are none of this figure."""
        if (job.name, figure) not in counts:
            path, counts[job.name, figure] = folder / job.name / "per_image.csv", None
            with suppress(NoCountsError):
                if path.is_file():
                    counts[job.name, figure] = read_counts(path, figure.partition("/")[2])
        return counts[job.name, figure]

    rows = []
    for figure in FIGURES:
        first = {job.repeat: job for job in variants.get(baseline, []) if figure in job.figures}
        for variant, members in variants.items():
            having = [job for job in members if figure in job.figures]
            if not having:
                continue
            values = [job.figures[figure] for job in having]
            row = Row(figure, variant, len(values), *_moments(values))
            rows.append(row)
            pairs = [(first[job.repeat], job) for job in having if job.repeat in first]
            if variant == baseline or not pairs:
                continue
            row.pairs = len(pairs)
            row.difference, *by_seed = paired_t([job.figures[figure] - other.figures[figure] for other, job in pairs])
            row.seeds = (by_seed[0], by_seed[1])
            detailed = [(a, b) for a, b in ((counted(x, figure), counted(y, figure)) for x, y in pairs) if a and b]
            if len(detailed) == len(pairs):
                with suppress(InputError):  # other images: no such interval
                    row.images = bootstrap_pairs(detailed)[1:]
    return rows


def _moments(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def show_sweep(sweep: Sweep) -> int:
    """Print a table of the jobs and of the variants, leave the latter in summary.csv and summary.json.

    Returns:
        The exit code: 0 where all jobs have ended well, else the largest of their failures.
    """
    Console().print(_table_of_jobs(sweep))
    if sweep.is_summary:
        Console().print(_table_of_variants(sweep))
    for sentence in sweep.missing:
        print(printable(f"missing: {sentence}"))
    write_summary(sweep)
    return max((job.code for job in sweep.jobs), default=0)


def write_summary(sweep: Sweep) -> None:
    """summary.csv and summary.json of a sweep, in its directory."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for row in sweep.rows:
        numbers = (row.mean, row.deviation, row.pairs, row.difference, *row.seeds, *row.images)
        table.writerow([row.figure, row.variant, row.count, *("" if math.isnan(n) else n for n in numbers)])
    with write_whole(sweep.folder / "summary.csv") as file:
        file.write(text.getvalue().encode())
    content = {
        "baseline": sweep.baseline,
        "missing": sweep.missing,
        "jobs": [asdict(job) for job in sweep.jobs],
        "rows": [asdict(row) for row in sweep.rows],
    }
    write_json(sweep.folder / "summary.json", json.loads(json.dumps(content), parse_constant=lambda _: None))


COLUMNS = (
    "figure",
    "variant",
    "jobs",
    "mean",
    "deviation",
    "pairs",
    "difference",
    "seeds_low",
    "seeds_high",
    "images_low",
    "images_high",
)
"""Of summary.csv."""

HEADINGS = ("figure", "variant", "jobs", "mean ± sd", "less the first", "95 % over seeds", "95 % over images")
"""Of the table of variants."""


def cells(row: Row) -> list[str]:
    """A row of the table of variants."""
    mean = f"{row.mean:.4f}" + ("" if math.isnan(row.deviation) else f" ± {row.deviation:.4f}")
    difference = "" if math.isnan(row.difference) else f"{row.difference:+.4f}"
    intervals = ["" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}" for low, high in (row.seeds, row.images)]
    return [row.figure, row.variant, str(row.count), mean, difference, *intervals]


def _table_of_variants(sweep: Sweep) -> Table:
    title = f"variants of {sweep.folder}, the first is: {sweep.baseline}"
    table = Table(title=escape(title), title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right", overflow="fold")
    before = ""
    for row in sweep.rows:
        if before and row.figure != before:
            table.add_section()
        figure, *others = cells(row)
        table.add_row("" if row.figure == before else figure.removeprefix("val/"), *map(escape, others))
        before = row.figure
    return table


def _table_of_jobs(sweep: Sweep) -> Table:
    listed = (*SUMMARY, "val/mask_miou", "train/mask_miou", "train/cam_miou")
    keys = [key for key in listed if any(key in job.figures for job in sweep.jobs)]
    swept = list(dict.fromkeys(key for job in sweep.jobs for key in job.settings))
    table = Table(title=escape(f"sweep {sweep.folder}"), title_justify="left")
    for key in (*swept, *keys):  # short names: eight columns have to fit a terminal
        table.add_column(".".join(key.removeprefix("val/").split(".")[-2:]), justify="right", overflow="fold")
    for job in sweep.jobs:
        settings = (_value_of(job.settings, key) for key in swept)
        shown = [cell(job.figures.get(key)) if job.state == "finished" else job.state for key in keys]
        table.add_row(*map(escape, settings), *shown)
    return table


def _value_of(settings: Mapping[str, str], key: str) -> str:
    """What was given for a key, without the key itself."""
    part = settings.get(key, "")
    name, _, value = part.partition("=")
    return value if key == name or key.endswith(f".{name}") else part

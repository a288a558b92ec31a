"""Tables and progress bars in the terminal."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from wsss.evaluation.protocol import TRUE_LABELS, Measured

T = TypeVar("T")
STEPS = {"multiscale_": "+ scales", "crf_": "+ CRF"}
"""What the names of figures begin with that a protocol's extras give, and their column in a table."""

SUMMARY = ("val/map", "val/cam_miou", "val/cam_best_miou", "val/aux_cam_miou", "val/miou", "seconds", "peak_memory_mb")
"""The figures of a run that stand in tables over runs."""


def print_figures(figures: Mapping[str, float], notes: Mapping[str, Measured], title: str) -> None:
    """A table of figures, each with the protocol it was measured under.

    Beside what was reached with a threshold stands what the masks' choice would have added, and beside a segmentation
    of one scale what several scales and then a CRF make of it. What all figures share of their protocol stands below.
    True image labels are red: they took part in the test.
    """
    gaps = {key.removesuffix("gap") + "miou": f"+{v:.4f}" for key, v in figures.items() if key.endswith("gap")}
    columns = {"to best": gaps} | {
        heading: {key.replace(word, "", 1): f"{v:.4f}" for key, v in figures.items() if key.startswith(f"val/{word}")}
        for word, heading in STEPS.items()
    }
    columns = {heading: cells for heading, cells in columns.items() if cells}
    beside = tuple(f"val/{word}" for word in STEPS)
    rows = [key for key in figures if not key.endswith("gap") and not key.startswith(beside)]
    parts = {key: notes[key].parts() for key in rows if key in notes}
    shared = [p for p in next(iter(parts.values()), []) if all(p in others for others in parts.values())]
    shared = shared if len(parts) > 1 else []
    table = Table(title=escape(title), title_justify="left", caption_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for heading in columns:
        table.add_column(heading, justify="right")
    table.add_column("measured on")
    above = ""
    for key in rows:
        value = figures[key]
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        said = ", ".join(part for part in parts.get(key, ()) if part not in shared)
        again = above and f"{said}, ".startswith(f"{above}, ")
        note = Text(f"as above{said[len(above) :]}" if again else said)
        if TRUE_LABELS in said:
            note.highlight_words([TRUE_LABELS, "as above"], "bold red")
        above = above if again else said
        table.add_row(escape(key), shown, *(cells.get(key, "") for cells in columns.values()), note)
    below = [f"all on {', '.join(shared)}"] if shared else []
    for word, heading in STEPS.items():
        if note_of_step := notes.get(f"val/{word}miou") if heading in columns else None:
            below.append(f"{heading}: {', '.join(part for part in note_of_step.parts() if part not in shared)}")
    table.caption = Text("\n".join(below))
    table.caption.highlight_words([TRUE_LABELS], "bold red")  # where all figures have them
    Console().print(table)


def print_pipeline(title: str, records: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of the stages of a pipeline: time and memory of each, its figures and what they were measured on."""
    known = {
        "map": "mAP",
        "cam_miou": "CAM",
        "cam_best_miou": "CAM, threshold chosen by masks",
        "mask_miou": "pseudo masks",
        "miou": "segmentation",
        "masks": "masks made",
    }
    table = Table(title=escape(title), title_justify="left")
    for heading in ("stage", "seconds", "MB", "figure", "value", "measured on"):
        table.add_column(heading, justify="right" if heading in ("seconds", "MB", "value") else "left")
    for name, record in records.items():
        figures = record["figures"]
        measured = [key for key in figures if not key.startswith("protocol/") and "iou/" not in key]
        shown = [key for last in known for key in measured if key.rpartition("/")[2] == last]
        cells = [f"{name}, {record['status']}", f"{record['seconds']:.0f}", cell(record.get("peak_memory_mb"))]
        for row, key in enumerate(shown or [""]):
            figure, value = known.get(key.rpartition("/")[2], ""), cell(figures.get(key))
            said = Text(figures.get(f"protocol/{key}", ""))
            said.highlight_words([TRUE_LABELS], "bold red")
            table.add_row(*(map(escape, (*(cells if row == 0 else ("", "", "")), figure, value))), said)
        table.add_section()
    Console().print(table)


def print_classes(
    title: str,
    classes: Sequence[str],
    labelled: Sequence[int],
    shown: Sequence[int],
    pixels: Sequence[float],
    undecided: Sequence[float],
    ignored: float,
) -> None:
    """A table of what masks show of each class, the background first; see `wsss.outputs.labels.ClassTable`."""
    without = f", {labelled[0]} images without a class" if labelled[0] else ""
    said = f"{title}: {100 * ignored:.1f} % of all pixels undecided{without}"
    table = Table(title=escape(said), title_justify="left")
    table.add_column("class")
    for heading in ("images labelled", "masks with it", "% of pixels", "% undecided in its images"):
        table.add_column(heading, justify="right")
    for row, name in enumerate(("background", *classes)):
        shares = (f"{100 * share[row]:.1f}" for share in (pixels, undecided))
        table.add_row(escape(name), str(labelled[row]) if row else "", str(shown[row]), *shares)
    Console().print(table)


def cell(value: Any) -> str:
    """A number in a table over runs."""
    return f"{value:.4f}" if isinstance(value, float) and value < 10 else "" if value is None else f"{value:.0f}"


class Meter:
    """Progress of one task: on a terminal a bar with rate and time left in one line, elsewhere a plain line at times.

    Args:
        what: the task, for people.
        total: how many items there are.
        unit: what is counted.
        start: how many are done already.
    """

    def __init__(self, what: str, total: int, unit: str = "", start: int = 0) -> None:
        self.what, self.total, self.unit, self.start = what, total, unit, start
        self.began = self.said = time.perf_counter()
        self.bar: Progress | None = None
        if Console().is_terminal:
            note = TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
            columns = (TextColumn(what), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), note)
            self.bar = Progress(*columns, expand=True)
            self.bar.start()
            self.task = self.bar.add_task(what, total=total, completed=start, note="")

    def update(self, done: int, note: str = "") -> None:
        """So many items are done; `note` follows on the same line."""
        seconds = time.perf_counter() - self.began
        rate = (done - self.start) / max(seconds, 1e-9)
        shown = f"{rate:.1f}{f' {self.unit}' if self.unit else ''}/s{f'  {note}' if note else ''}"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=shown)
        elif seconds + self.began - self.said >= PLAIN_SECONDS:
            self.said = time.perf_counter()
            left = f"{(self.total - done) / rate / 60:.0f} min left" if rate else ""
            print(f"{self.what}: {done}/{self.total}, {shown}, {left}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


PLAIN_SECONDS = 30.0
"""Between the lines of a task where standard output is no terminal."""


def progress(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """The items, under a meter."""
    meter = Meter(description, total)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            meter.update(done)
    finally:
        meter.close()

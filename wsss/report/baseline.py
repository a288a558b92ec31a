"""What CLIP knows by the names of classes alone, without any training, beside what training has reached."""

from collections.abc import Sequence
from typing import NamedTuple

from wsss.evaluation.protocol import TRUE_LABELS
from wsss.report.reading import Run

METHOD = "clip_es"
"""The method that learns nothing."""

FIGURES = ("val/miou", "val/cam_miou")
"""What a run is compared by, the first one that it has."""


class Compared(NamedTuple):
    """A run beside the baseline.

    Attributes:
        run: the run.
        figure: of `FIGURES`.
        more: than the baseline measured on the same split, both with true image labels and thresholds that masks have
            chosen, or both without; None where there is no such baseline, and for the baseline itself.
    """

    run: Run
    figure: str
    more: float | None


def compare_with_baseline(runs: Sequence[Run]) -> list[Compared]:
    """Baselines and then all other runs with a figure; empty where one of the two is missing."""
    found = ((run, [figure for figure in FIGURES if figure in run.figures]) for run in runs)
    measured = [(run, figures[0]) for run, figures in found if figures]
    bases = [(run, figure) for run, figure in measured if run.method == METHOD]
    others = [(run, figure) for run, figure in measured if run.method != METHOD]
    if not bases or not others:
        return []
    rows = [Compared(run, figure, None) for run, figure in bases]
    for run, figure in others:
        alike = [base.figures[own] for base, own in bases if _kind(base, own) == _kind(run, figure) is not None]
        rows.append(Compared(run, figure, run.figures[figure] - alike[-1] if alike else None))
    return rows


def _kind(run: Run, figure: str) -> tuple[str, bool, bool] | None:
    """What has to be the same of two figures that are compared; None where it is not known."""
    note = run.notes.get(figure)
    if not note:
        return None
    said = ", ".join(note)
    split = said.partition(", extra supervision")[0].partition(", no extra supervision")[0]
    return split, TRUE_LABELS in said, "chosen with these masks" in said


def how_to_add(runs: Sequence[Run]) -> str | None:
    """A sentence for reports without the baseline; None where nothing is measured that it could stand beside."""
    if not any(figure in run.figures for run in runs for figure in FIGURES) or compare_with_baseline(runs):
        return None
    if all(run.method == METHOD for run in runs):
        return None
    data = next((run.overrides["dataset"] for run in runs if "dataset" in run.overrides), "NAME")
    return (
        "Whether training is worth it is not in this report: where CLIP knows the names of the classes, CLIP-ES tells "
        f"what it finds without any: wsss-train method={METHOD} dataset={data} protocol=honest method.weights=TOWER "
        "method.text=TEXT.npz, whose directory wsss-report takes beside these; of a pipeline wsss-run with "
        "baseline.weights=TOWER baseline.text=TEXT.npz."
    )

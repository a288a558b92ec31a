"""Comparing runs: the difference of two over the same images, and the mean of several with other seeds."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wsss import InputError

COLUMNS = ("image", "figure", "id", "hits", "predicted", "true")
"""Of per_image.csv: pixels of an id in an image, predicted rightly, predicted, and true; 0 is the background."""


class ImageCounts(NamedTuple):
    """The counts of one figure.

    Attributes:
        images: names of the N images.
        rows: (R, 2) long: number of the image, and id.
        counts: (R, 3) long: predicted rightly, predicted, true.
    """

    images: list[str]
    rows: np.ndarray
    counts: np.ndarray


class Difference(NamedTuple):
    """Mean IoU of a second run less that of a first, and the interval that a share of the resamples falls into."""

    difference: float
    low: float
    high: float


def read_counts(path: Path, figure: str) -> ImageCounts:
    """The counts of a figure, `miou` or `cam_miou`, from a per_image.csv of `wsss-eval detail=true`.

    Raises:
        InputError: the file is not there or something else, or has nothing of this figure.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: wsss-eval writes it with detail=true")
    numbers: dict[str, int] = {}
    rows, counts = [], []
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.reader(file)
        if tuple(next(table, ())) != COLUMNS:
            raise InputError(f"{path} is no table of counts: expected the columns {', '.join(COLUMNS)}")
        for line, row in enumerate(table, start=2):
            if len(row) != len(COLUMNS) or not all(number.isdecimal() for number in row[2:]):
                raise InputError(f"{path} is damaged in line {line}: expected an image, a figure and four numbers")
            if row[1] == figure:
                rows.append((numbers.setdefault(row[0], len(numbers)), int(row[2])))
                counts.append([int(number) for number in row[3:]])
    if not rows:
        raise InputError(f"{path} has no counts of {figure}: give a figure that the evaluation made of masks")
    return ImageCounts(list(numbers), np.array(rows), np.array(counts))


def weighted_miou(counts: ImageCounts, weights: np.ndarray, num_ids: int) -> float:
    """Mean IoU over the ids that occur in the targets, each image taken `weights` (N,) times."""
    number = weights[counts.rows[:, 0]]
    totals = (np.bincount(counts.rows[:, 1], number * part, num_ids) for part in counts.counts.T)
    hits, predicted, true = totals
    occurs = true > 0
    return float((hits[occurs] / (predicted + true - hits)[occurs]).mean()) if occurs.any() else float("nan")


def paired_bootstrap(
    first: ImageCounts, second: ImageCounts, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> Difference:
    """How certain a difference of two runs is, as far as the choice of the images goes.

    Both are measured on the same resamples of the images, drawn with replacement (Efron and Tibshirani, "An
    Introduction to the Bootstrap", 1993, chapter 13: percentile interval). What other seeds would change is not in it.

    Args:
        first, second: counts of the same images.
        samples: how many resamples.
        level: share of them inside the interval.
        seed: of the resampling.

    Raises:
        InputError: the images differ.
    """
    if set(first.images) != set(second.images):
        both = len(set(first.images) & set(second.images))
        raise InputError(
            f"the runs were measured on {len(first.images)} and {len(second.images)} images, of which {both} are the "
            "same: a paired comparison needs the same images"
        )
    ids = 1 + int(max(first.rows[:, 1].max(), second.rows[:, 1].max()))
    place = {name: number for number, name in enumerate(first.images)}
    order = np.array([place[name] for name in second.images])
    rng, number = np.random.default_rng(seed), len(first.images)

    def difference(weights: np.ndarray) -> float:
        return weighted_miou(second, weights[order], ids) - weighted_miou(first, weights, ids)

    drawn = (np.bincount(rng.integers(number, size=number), minlength=number) for _ in range(samples))
    values = [difference(weights) for weights in drawn]
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Difference(difference(np.ones(number, np.int64)), float(low), float(high))


def over_seeds(paths: Sequence[Path]) -> dict[str, tuple[float, float, int]]:
    """Of each figure in several metrics.json mean, standard deviation (of the sample: n - 1) and how many have it.

    The deviation is NaN for one, and NaN are left out as if they were missing.

    Raises:
        InputError: a file is missing or damaged.
    """
    values: dict[str, list[float]] = {}
    for path in paths:
        try:
            figures = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): give the metrics.json of a run") from error
        except ValueError as error:
            raise InputError(f"{path} is damaged: give the metrics.json of a run") from error
        if not isinstance(figures, dict):
            raise InputError(f"{path} is no metrics.json: expected figures by name")
        for key, value in figures.items():
            if isinstance(value, float | int) and not isinstance(value, bool) and not np.isnan(value):
                values.setdefault(key, []).append(float(value))
    return {
        key: (float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else float("nan"), len(found))
        for key, found in values.items()
    }

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


class NoCountsError(InputError):
    """A table of counts has none of a figure."""


class Difference(NamedTuple):
    """Mean IoU of a second run less that of a first, and the interval that a share of the resamples falls into."""

    difference: float
    low: float
    high: float


def read_counts(path: Path, figure: str) -> ImageCounts:
    """The counts of a figure, `miou` or `cam_miou`, from a per_image.csv of `wsss-eval detail=true`.

    Raises:
        NoCountsError: the file has nothing of this figure.
        InputError: it is not there, or something else.
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
        raise NoCountsError(f"{path} has no counts of {figure}: give a figure that the evaluation made of masks")
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
    return bootstrap_pairs([(first, second)], samples, level, seed)


def bootstrap_pairs(
    pairs: Sequence[tuple[ImageCounts, ImageCounts]], samples: int = 1000, level: float = 0.95, seed: int = 0
) -> Difference:
    """`paired_bootstrap` of the mean difference over several pairs of runs, each of two runs with one seed.

    A resample of the images is the same for all of the runs.

    Raises:
        InputError: the images differ, or there is no pair.
    """
    if not pairs:
        raise InputError("there is no pair of runs to compare: give at least one")
    images = pairs[0][0].images
    for counts in (counts for pair in pairs for counts in pair):
        if set(counts.images) != set(images):
            both = len(set(counts.images) & set(images))
            raise InputError(
                f"the runs were measured on {len(images)} and {len(counts.images)} images, of which {both} are the "
                "same: a paired comparison needs the same images"
            )
    ids = 1 + int(max(counts.rows[:, 1].max() for pair in pairs for counts in pair))
    place = {name: number for number, name in enumerate(images)}
    ordered = [[(counts, np.array([place[name] for name in counts.images])) for counts in pair] for pair in pairs]
    rng, number = np.random.default_rng(seed), len(images)

    def difference(weights: np.ndarray) -> float:
        values = [[weighted_miou(counts, weights[order], ids) for counts, order in pair] for pair in ordered]
        return float(np.mean([second - first for first, second in values]))

    drawn = (np.bincount(rng.integers(number, size=number), minlength=number) for _ in range(samples))
    values = [difference(weights) for weights in drawn]
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Difference(difference(np.ones(number, np.int64)), float(low), float(high))


def paired_t(differences: Sequence[float], level: float = 0.95) -> Difference:
    """The mean of differences of pairs of runs with one seed each, and Student's interval for it.

    It tells how certain the difference is as far as seeds go, if such differences are spread like a normal
    distribution. With one pair there is no interval: NaN.
    """
    from scipy.stats import t

    mean, count = float(np.mean(differences)), len(differences)
    if count < 2:
        return Difference(mean, float("nan"), float("nan"))
    half = float(t.ppf((1 + level) / 2, count - 1)) * float(np.std(differences, ddof=1)) / count**0.5
    return Difference(mean, mean - half, mean + half)


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

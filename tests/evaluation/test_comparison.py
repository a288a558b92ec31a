"""Differences of two runs over the same images, and means over seeds."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from wsss import InputError
from wsss.evaluation.comparison import (
    COLUMNS,
    ImageCounts,
    bootstrap_pairs,
    over_seeds,
    paired_bootstrap,
    paired_t,
    read_counts,
    weighted_miou,
)


def draw(seed: int, images: int = 12) -> list[list[str | int]]:
    """Rows of three ids, some of which an image lacks."""
    rng, rows = np.random.default_rng(seed), []
    areas = np.random.default_rng(0).integers(1, 40, (images, 3))
    for image in range(images):
        for number in (0, *([1] if image % 2 else [2])):
            true = int(areas[image, number])
            hits = int(rng.integers(true + 1))
            rows.append([f"image {image}, öä", "miou", number, hits, hits + int(rng.integers(20)), true])
    return rows


def write(path: Path, rows: list[list[str | int]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(COLUMNS), *rows])
    return path


def by_hand(rows: list[list[str | int]], drawn: list[str]) -> float:
    """Mean IoU over images, each as often as it is drawn."""
    ious = []
    for number in range(3):
        hits, predicted, true = (
            sum(int(row[column]) for name in drawn for row in rows if row[0] == name and row[2] == number)
            for column in (3, 4, 5)
        )
        if true:
            ious.append(hits / (predicted + true - hits))
    return float(np.mean(ious))


def test_bootstrap(tmp_path: Path) -> None:
    rows = draw(1), draw(2)
    first = read_counts(write(tmp_path / "a.csv", rows[0]), "miou")
    second = read_counts(write(tmp_path / "b.csv", rows[1][::-1]), "miou")  # in another order
    assert weighted_miou(first, np.ones(12, int), 3) == pytest.approx(by_hand(rows[0], first.images), abs=1e-12)
    found = paired_bootstrap(first, second, samples=200, level=0.9, seed=3)
    rng, values = np.random.default_rng(3), []
    for _ in range(200):
        drawn = [first.images[i] for i in rng.integers(12, size=12)]
        values.append(by_hand(rows[1], drawn) - by_hand(rows[0], drawn))
    whole = by_hand(rows[1], first.images) - by_hand(rows[0], first.images)
    assert found == pytest.approx((whole, *np.quantile(values, [0.05, 0.95])), abs=1e-12)
    assert paired_bootstrap(first, first, samples=20) == (0, 0, 0)


def test_bootstrap_of_pairs(tmp_path: Path) -> None:
    """The mean of the pairs' differences, all on one resample."""
    rows = [draw(seed) for seed in range(1, 5)]
    counts = [
        read_counts(write(tmp_path / f"{n}.csv", part[:: -1 if n % 2 else 1]), "miou") for n, part in enumerate(rows)
    ]
    found = bootstrap_pairs([(counts[0], counts[1]), (counts[2], counts[3])], samples=100, seed=5)
    rng, values = np.random.default_rng(5), []
    images = counts[0].images
    draws = [[images[i] for i in rng.integers(12, size=12)] for _ in range(100)]
    for drawn in [images, *draws]:
        ious = [by_hand(part, drawn) for part in rows]
        values.append((ious[1] - ious[0] + ious[3] - ious[2]) / 2)
    assert found == pytest.approx((values[0], *np.quantile(values[1:], [0.025, 0.975])), abs=1e-12)
    with pytest.raises(InputError, match="no pair"):
        bootstrap_pairs([])


def test_interval_over_seeds() -> None:
    """Against the table of Student's distribution: 4.303 at 2 degrees of freedom, 12.706 at 1."""
    values = [0.1, 0.2, 0.6]
    half = 4.303 * np.std(values, ddof=1) / np.sqrt(3)
    assert paired_t(values) == pytest.approx((0.3, 0.3 - half, 0.3 + half), rel=1e-3)
    assert paired_t([0.0, 2.0]) == pytest.approx((1.0, 1 - 12.706, 1 + 12.706), rel=1e-3)
    assert np.isnan(paired_t([0.5])[1:]).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n", "no table of counts"),
        (",".join(COLUMNS) + "\nx,miou,0,1,2\n", "damaged in line 2"),
        (",".join(COLUMNS) + "\nx,miou,0,1,2,-3\n", "damaged in line 2"),
        (",".join(COLUMNS) + "\nx,cam_miou,0,1,2,3\n", "no counts of miou"),
    ],
)
def test_refused_counts(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        read_counts(tmp_path / "x.csv", "miou")


def test_other_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist: wsss-eval writes it with detail=true"):
        read_counts(tmp_path / "x.csv", "miou")
    row, counts = np.array([[0, 1]]), np.array([[1, 2, 3]])
    with pytest.raises(InputError, match="1 and 1 images, of which 0 are the same"):
        paired_bootstrap(ImageCounts(["a"], row, counts), ImageCounts(["b"], row, counts))


def test_over_seeds(tmp_path: Path) -> None:
    runs = [{"val/miou": 0.5, "val/map": 0.9, "x": "said"}, {"val/miou": 0.7, "val/map": None}, {"val/miou": 0.6}]
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, run in zip(paths, runs, strict=True):
        path.write_text(json.dumps(run))
    found = over_seeds(paths)
    assert found.keys() == {"val/miou", "val/map"}
    assert found["val/miou"] == pytest.approx((0.6, 0.1, 3), abs=1e-12)
    assert found["val/map"][0] == 0.9
    assert np.isnan(found["val/map"][1])
    for content, said in (("{", "is damaged"), ("[1]", "is no metrics.json")):
        paths[0].write_text(content)
        with pytest.raises(InputError, match=said):
            over_seeds(paths)
    with pytest.raises(InputError, match="cannot be read"):
        over_seeds([tmp_path / "none.json"])

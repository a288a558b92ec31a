"""Shapes draws what its docstring promises: the weak labels, the shared bodies, the small parts."""

from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from wsss import InputError
from wsss.data.shapes import Shapes


def extent(mask: np.ndarray) -> int:
    return max(int(np.ptp(axis)) + 1 for axis in np.nonzero(mask))


def class_colour(shapes: Shapes, c: int, part: bool) -> np.ndarray:
    """Mean colour of the parts, or of the bodies without the parts, of a class in one-object images."""
    colours = []
    for index in range(len(shapes)):
        items, _ = shapes._place(shapes._rng(index))
        if items[0].c == c:
            pixels = items[0].part if part else np.setdiff1d(items[0].body, items[0].part)
            colours.append(shapes[index]["image"].reshape(-1, 3)[pixels].mean(0))
    return np.mean(colours, 0)


def test_item() -> None:
    item = Shapes("val", size=48, num_classes=5)[12]
    assert set(item) == {"image", "label", "id", "mask"}
    assert item["image"].shape == (48, 48, 3)
    assert item["image"].dtype == np.uint8
    assert item["label"].shape == (5,)
    assert item["label"].dtype == np.float32
    assert item["mask"].shape == (48, 48)
    assert item["mask"].dtype == np.uint8
    assert item["id"] == "val-000012"


def test_training_item_has_no_mask() -> None:
    shapes = Shapes("train", train_size=5)
    assert all(set(shapes[i]) == {"image", "label", "id"} for i in range(len(shapes)))
    assert shapes.mask(0).shape == (64, 64)


def test_length_and_index() -> None:
    assert len(Shapes("train", train_size=7, val_size=3)) == 7
    assert len(Shapes("val", train_size=7, val_size=3)) == 3
    assert len(list(Shapes("val", val_size=3))) == 3
    for index in (-1, 3):
        with pytest.raises(IndexError, match="out of range for 3"):
            Shapes("val", val_size=3)[index]


def test_an_item_depends_on_seed_split_and_index_alone() -> None:
    first, second = Shapes(seed=3), Shapes(seed=3, train_size=10)
    second[2]
    assert np.array_equal(first[5]["image"], second[5]["image"])
    images = [first[5], first[6], Shapes("val", seed=3)[5], Shapes(seed=4)[5]]
    assert len({item["image"].tobytes() for item in images}) == 4


def test_a_worker_draws_the_same() -> None:
    shapes = Shapes("val", val_size=4)
    for here, there in zip(shapes, DataLoader(shapes, batch_size=None, num_workers=1), strict=True):
        assert np.array_equal(here["image"], there["image"])
        assert np.array_equal(here["mask"], there["mask"])


@pytest.mark.parametrize("num_classes", [1, 2, 7, 40, 254])
def test_label_is_what_the_mask_shows(num_classes: int) -> None:
    shapes = Shapes("val", num_classes=num_classes, val_size=30)
    assert len(set(shapes.classes)) == num_classes
    for item in shapes:
        assert np.array_equal(np.flatnonzero(item["label"]) + 1, np.setdiff1d(item["mask"], 0))
        assert item["label"].any()


def test_label_holds_however_crowded() -> None:
    for item in Shapes("val", val_size=20, objects=(6, 9), num_classes=20):
        assert np.array_equal(np.flatnonzero(item["label"]) + 1, np.setdiff1d(item["mask"], 0))


def test_every_object_stays_recognisable() -> None:
    shapes = Shapes("val", objects=(3, 5))
    for index in range(50):
        items, owner = shapes._place(shapes._rng(index))
        for number, item in enumerate(items, 1):
            assert (owner[item.body] == number).mean() >= 0.35
            assert (owner[item.part] == number).mean() >= 0.5


def test_images_may_be_empty_when_asked() -> None:
    labels = np.stack([item["label"] for item in Shapes("val", val_size=60, objects=(0, 1))])
    empty = (labels.sum(1) == 0).mean()
    assert 0.3 < empty < 0.7


def test_background_is_three_quarters() -> None:
    shapes = Shapes()
    assert 0.7 < np.mean([shapes.mask(i) == 0 for i in range(200)]) < 0.8


def test_classes_are_balanced() -> None:
    shapes = Shapes()
    counts = sum(np.bincount(np.unique(shapes.mask(i)), minlength=9)[1:] for i in range(300))
    assert counts.min() > 0.6 * counts.max()


@pytest.mark.parametrize(("size", "scale"), [(64, (0.35, 0.7)), (32, (0.3, 0.3)), (200, (0.9, 1.0)), (8, (1, 1))])
def test_object_extent(size: int, scale: tuple[float, float]) -> None:
    shapes = Shapes("val", size=size, object_scale=scale, objects=(1, 1))
    extents = [extent(shapes.mask(i)) for i in range(60)]
    assert size * scale[0] - 1 <= min(extents)
    assert max(extents) <= size * scale[1] + 1
    assert max(extents) - min(extents) >= 0.7 * size * (scale[1] - scale[0])


def test_part_share() -> None:
    shapes = Shapes()
    items = [item for index in range(100) for item in shapes._place(shapes._rng(index))[0]]
    assert all(np.isin(item.part, item.body).all() for item in items)
    assert 0.14 < np.mean([len(item.part) / len(item.body) for item in items]) < 0.16


def test_a_pair_differs_in_the_part_alone() -> None:
    shapes = Shapes(train_size=80, num_classes=4, size=48, objects=(1, 1))
    body = [class_colour(shapes, c, part=False) for c in range(4)]
    part = [class_colour(shapes, c, part=True) for c in range(4)]
    within = max(np.abs(body[0] - body[1]).max(), np.abs(body[2] - body[3]).max())
    between = min(np.abs(body[a] - body[b]).max() for a in (0, 1) for b in (2, 3))
    assert 2 * within < between
    assert min(np.abs(part[a] - part[b]).max() for a in range(4) for b in range(a)) > 60


def changed_backgrounds(p: float) -> tuple[float, float]:
    """How often images with and without class 0 have another background than at cooccurrence 0."""
    plain, biased = Shapes(num_classes=3, size=24), Shapes(num_classes=3, size=24, cooccurrence=p)
    changed: dict[bool, list[bool]] = {True: [], False: []}
    for index in range(120):
        before, after = plain[index], biased[index]
        assert np.array_equal(before["label"], after["label"])
        has_class_0 = bool(before["label"][0])
        changed[has_class_0].append(not np.array_equal(before["image"], after["image"]))
    return float(np.mean(changed[True])), float(np.mean(changed[False]))


@pytest.mark.parametrize("p", [0.0, 0.7, 1.0])
def test_cooccurrence(p: float) -> None:
    with_class_0, without = changed_backgrounds(p)
    assert with_class_0 == pytest.approx(p, abs=0.12 if 0 < p < 1 else 0)
    assert without == pytest.approx(0.1 * (1 - p) if p else 0, abs=0.06 if 0 < p < 1 else 0)


def test_characteristic_background_is_blue() -> None:
    shapes = Shapes(num_classes=1, cooccurrence=1.0)
    background = [shapes[i]["image"][shapes.mask(i) == 0].mean(0) for i in range(30)]
    assert all(blue > red + 10 for red, _, blue in background)


def test_largest_size_and_most_classes() -> None:
    item = Shapes("val", size=512, num_classes=40)[0]
    assert item["image"].shape == (512, 512, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("split", "test"),
        ("train_size", 0),
        ("val_size", -1),
        ("size", 7),
        ("size", 64.5),
        ("num_classes", 0),
        ("num_classes", 255),
        ("objects", (3, 1)),
        ("objects", (0, 0)),
        ("objects", 3),
        ("objects", (1, 2, 3)),
        ("object_scale", (0.7, 0.3)),
        ("object_scale", (0.5, 1.2)),
        ("object_scale", (0.05, 0.5)),
        ("cooccurrence", 1.5),
        ("cooccurrence", float("nan")),
        ("seed", -1),
    ],
)
def test_bad_argument_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{name}: expected .*, found "):
        Shapes(**{name: value})

"""Training images and labels made worse: how many, which, and that nothing else changes."""

from typing import Any

import numpy as np
import pytest

from wsss import InputError
from wsss.data.shapes import Shapes
from wsss.data.worse import Worse

SOURCE = Shapes("train", train_size=60, size=32, num_classes=8)
LABELS = np.stack([SOURCE.label(index) for index in range(60)])


def labels_of(**values: Any) -> np.ndarray:
    labels = Worse(SOURCE, **values).labels
    assert labels is not None
    return labels


def test_share_of_images() -> None:
    few, more = Worse(SOURCE, kept=0.1, seed=3), Worse(SOURCE, kept=0.5, seed=3)
    assert (len(few), len(more), len(Worse(SOURCE, kept=1e-9))) == (6, 30, 1)
    assert set(few.ids) < set(more.ids)
    item, same = few[2], SOURCE[few.indices[2]]
    assert item["id"] == same["id"]
    assert np.array_equal(item["image"], same["image"])
    assert np.array_equal(item["label"], same["label"])
    assert set(Worse(SOURCE, kept=0.1, seed=4).ids) != set(few.ids)


def test_missing_labels() -> None:
    few, many = labels_of(missing=0.2), labels_of(missing=0.5)
    total = LABELS.sum()
    assert (few <= LABELS).all()
    assert (few.sum(), many.sum()) == (total - round(0.2 * total), total - round(0.5 * total))
    assert (many <= few).all()  # what was missing is missing still
    assert not labels_of(missing=1.0).any()
    assert not Worse(SOURCE, missing=1.0).has_labels


def test_without_masks_labels_stay_worse() -> None:
    source = Shapes("val", val_size=6, size=32, num_classes=8)
    worse = Worse(source, kept=0.5, wrong=1.0)
    plain = worse.without_masks()
    assert not plain.has_masks
    assert "mask" not in plain[0]
    assert np.array_equal(plain.label(0), worse.label(0))
    assert not np.array_equal(plain.label(0), source.label(worse.indices[0]))


def test_wrong_labels() -> None:
    """As many labels of each image as there were, a share of them where the image shows nothing."""
    few, many = labels_of(wrong=0.2), labels_of(wrong=0.4)
    count = LABELS.sum()
    assert np.array_equal(many.sum(1), LABELS.sum(1))
    assert ((few > LABELS).sum(), (many > LABELS).sum()) == (round(0.2 * count), round(0.4 * count))
    assert ((many > LABELS) >= (few > LABELS)).all()
    both = labels_of(wrong=0.3, missing=0.2)
    assert (both > LABELS).sum() == round(0.3 * count)
    assert both.sum() == count - round(0.2 * count)


def test_no_label_is_both_missing_and_wrong() -> None:
    """Also where both halves of an odd number are rounded up."""
    counts = set()
    for size in range(1, 12):
        source = Shapes("train", train_size=size, size=32, num_classes=8)
        worse = Worse(source, missing=0.5, wrong=0.5)
        assert worse.labels is not None
        shown = np.stack([source.label(index) for index in range(size)])
        count = int(shown.sum())
        counts.add(count % 4)
        assert worse.labels.sum() == count - round(count / 2)
        assert (worse.labels * shown).sum() == max(0, count - 2 * round(count / 2))
    assert 3 in counts  # of which half is rounded up


def test_an_image_that_shows_all_classes_has_no_wrong_one() -> None:
    source = Shapes("train", train_size=8, size=32, num_classes=1, objects=[1, 1])
    worse = Worse(source, wrong=1.0)
    assert np.array_equal(worse.label(0), source.label(0))


def test_what_it_is() -> None:
    """Items hold no mask, labels are copies, and the fingerprint tells all from one another."""
    worse = Worse(SOURCE, wrong=0.2)
    assert set(worse[0]) == {"image", "label", "id"}
    worse.label(0)[:] = 7
    worse[0]["label"][:] = 7
    assert worse.label(0).max() == 1
    values: list[dict[str, Any]] = [{}, {"kept": 0.5}, {"missing": 0.1}, {"wrong": 0.1}, {"wrong": 0.1, "seed": 1}]
    assert len({SOURCE.fingerprint, *(Worse(SOURCE, **value).fingerprint for value in values)}) == 6
    assert Worse(SOURCE, wrong=0.2).fingerprint == worse.fingerprint


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kept": 0.0}, "worse.kept is 0.0"),
        ({"kept": 1.5}, "above 0 and up to 1"),
        ({"missing": -0.1}, "together at most 1"),
        ({"missing": 0.6, "wrong": 0.6}, "worse.wrong=0.6"),
        ({"missing": float("nan")}, "worse.missing=nan"),
        ({"seed": -1}, "worse.seed is -1"),
    ],
)
def test_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Worse(SOURCE, **values)

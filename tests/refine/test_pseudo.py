"""Rules that make pseudo masks of the CAMs of an image, against plain loops over pixels in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from wsss import InputError
from wsss.cam import resize
from wsss.refine.crf import dense_crf
from wsss.refine.par import PAR
from wsss.refine.pseudo import crf, label_crf, par, plain
from wsss.refine.thresholds import agreement, background_scores, power_background

N, H, W = 3, 12, 16
RULES: list[dict[str, Any]] = [
    {"rule": "constant", "value": 0.4},
    {"rule": "constant", "value": -1.0},
    {"rule": "alpha", "value": 3},
    {"rule": "pair", "low": 0.3, "high": 0.6},
    {"rule": "otsu"},
    {"rule": "area_prior", "value": 0.3},
]


@pytest.fixture
def maps() -> torch.Tensor:
    """(N, H, W) in [0, 1] with ties, and values exactly at thresholds."""
    values = torch.from_numpy(np.random.default_rng(0).random((N, H, W)))
    values[:, 0] = 0.4
    values[1, 1], values[2, 2], values[0, 3] = 0.3, 0.6, 1.0
    return values


@pytest.fixture
def image() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, H, W))).double()


def scores_by_hand(cam: np.ndarray, rule: str, value: float = 0, low: float = 0, high: float = 0) -> list[np.ndarray]:
    if rule == "pair":
        return [np.full(cam.shape[1:], low), np.full(cam.shape[1:], high)]
    if rule == "area_prior":
        shares = np.array([(cam.max(0) > threshold).mean() for threshold in np.arange(100) / 100])
        return [np.full(cam.shape[1:], np.abs(shares - value).round(12).argmin() / 100)]
    if rule == "otsu":
        of_class = [otsu_by_hand(cam.max(0)[cam.argmax(0) == k]) for k in range(len(cam))]
        return [np.array(of_class)[cam.argmax(0)]]
    return [np.full(cam.shape[1:], value) if rule == "constant" else (1 - cam.max(0)) ** value]


def otsu_by_hand(values: np.ndarray) -> float:
    """The first of the thresholds 0, 0.01, ... with the largest variance between the values up to it and above it."""
    rounded = np.where(values > 0, np.ceil((values * 100).round(9)) / 100 - 0.005, 0)
    best, chosen = 0.0, 0.0
    for threshold in np.arange(100) / 100:
        low, high = rounded[values <= threshold], rounded[values > threshold]
        if len(low) and len(high):
            between = len(low) * len(high) / len(values) ** 2 * (low.mean() - high.mean()) ** 2
            if between > best * (1 + 1e-9):
                best, chosen = between, threshold
    return chosen


def best(background: float, classes: np.ndarray) -> int:
    """0 where no class exceeds the background, else the first of the largest, from 1."""
    place, largest = 0, background
    for c, value in enumerate(classes, start=1):
        if value > largest:
            place, largest = c, value
    return place


def join(weak: int, strong: int) -> int:
    """Of the labels under a weak and a strong background."""
    if weak == 0:
        return 0
    return strong if strong != 0 else 255


@pytest.mark.parametrize("background", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
def test_plain(background: dict[str, Any], maps: torch.Tensor, image: torch.Tensor) -> None:
    cam, found = maps.numpy(), plain(image, maps, background).mask
    scores = scores_by_hand(cam, **background)
    torch.testing.assert_close(
        torch.stack(background_scores(maps[None], **background))[:, 0], torch.tensor(np.array(scores))
    )
    for y in range(H):
        for x in range(W):
            labels = [best(score[y, x], cam[:, y, x]) for score in scores]
            assert found[y, x] == join(labels[0], labels[-1]), (y, x)


@pytest.mark.parametrize("background", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
def test_par(background: dict[str, Any], maps: torch.Tensor, image: torch.Tensor) -> None:
    maps, image = maps.float(), image.float()
    found = par(image, maps, background, dilations=[1, 2], iterations=2).mask
    small, refined = [H // 2, W // 2], []
    module = PAR([1, 2], 2)
    for score in background_scores(maps[None], **background):
        stack = resize(torch.cat([score[None], maps[None]], dim=1), small).softmax(1)
        refined.append(resize(module(resize(image[None] / 255, small), stack), (H, W))[0].argmax(0))
    low, high = refined[0], refined[-1]
    expected = [[int(high[y, x]) or (0 if low[y, x] == 0 else 255) for x in range(W)] for y in range(H)]
    assert found.tolist() == expected
    assert (255 in found) == (background["rule"] == "pair")
    if background.get("value") == -1.0:
        assert found.min() > 0


def test_crf(maps: torch.Tensor, image: torch.Tensor) -> None:
    labels = {}
    for alpha in (4, 24):
        stack = torch.cat([(1 - maps.amax(0, keepdim=True)) ** alpha, maps])[None]
        q = dense_crf(image[None], stack, 10, (3, 3), (80, 13, 10))[0]
        labels[alpha] = q.argmax(0)
        single = crf(image, maps, alpha=alpha)
        torch.testing.assert_close(single.scores[0], q)
        assert torch.equal(single.mask, labels[alpha])
    both = crf(image, maps, alpha=[4, 24])
    assert [len(score) for score in both.scores] == [1 + N, 1 + N]
    pairs = zip(labels[24].ravel().tolist(), labels[4].ravel().tolist(), strict=True)
    assert both.mask.ravel().tolist() == [join(weak, strong) for weak, strong in pairs]
    strong, weak = crf(image, maps.clamp(max=0.35), alpha=1), crf(image, maps.clamp(max=0.35), alpha=32)
    assert (strong.mask == 0).all()
    assert (weak.mask != 0).all()


def test_agreement() -> None:
    low, high = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 1, 0])
    assert agreement(low, high).tolist() == [0, 255, 1, 2, 0]


def test_power_background_of_maps_beyond_one() -> None:
    """SEAM's normalisation leaves large negative values where a map has no scale."""
    cam = torch.tensor([[[[-1e6, 1.5, 0.5]]]])
    assert power_background(cam, 32.0).tolist() == [[[1.0, 0.0, 0.5**32]]]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda image, maps: plain(image, maps, {"rule": "none"}), "background.rule is 'none'"),
        (lambda image, maps: plain(image, maps, {"rule": "alpha"}), "background.value is not set"),
        (lambda image, maps: plain(image, maps, {"rule": "alpha", "value": 0}), "an alpha above 0"),
        (lambda image, maps: plain(image, maps, {"rule": "pair", "low": 0.1}), "background.high is not set"),
        (lambda image, maps: plain(image, maps, {"rule": "pair", "low": 0.5, "high": 0.2}), "low <= high"),
        (lambda image, maps: par(image, maps, RULES[0], scale=0), "scale is 0"),
        (lambda image, maps: crf(image, maps, alpha=[4, 4]), "alpha is"),
        (lambda image, maps: crf(image, maps, alpha=[1, 2, 3]), "alpha is"),
        (lambda image, maps: crf(image, maps, alpha=0), "alpha is"),
    ],
)
def test_refused(call: Callable[..., Any], said: str, maps: torch.Tensor, image: torch.Tensor) -> None:
    with pytest.raises(InputError, match=said):
        call(image, maps)


def test_crf_of_labels(maps: torch.Tensor, image: torch.Tensor) -> None:
    """A class where the labels of the strong background say so, background where both do, else undecided."""
    ids = []
    for background in (0.3, 0.6):
        probability = np.full((N + 1, H, W), 0.3 / N)
        for y in range(H):
            for x in range(W):
                probability[best(background, maps[:, y, x].numpy()), y, x] = 0.7
        q = dense_crf(image[None], torch.from_numpy(probability)[None], 4, (2.0, 3.0), (20.0, 9.0, 5.0))
        ids.append(q[0].argmax(0).numpy())
    found = label_crf(image, maps, (0.3, 0.6), 0.7, 4, (2.0, 3.0), (20.0, 9.0, 5.0)).mask.numpy()
    seen = set()
    for y in range(H):
        for x in range(W):
            low, high = int(ids[0][y, x]), int(ids[1][y, x])
            expected = high if high else (255 if low else 0)
            assert found[y, x] == expected
            seen.add(min(expected, 1) if expected != 255 else 255)
    assert seen == {0, 1, 255}


@pytest.mark.parametrize(("background", "certainty"), [((0.6, 0.3), 0.7), ((0.3,), 0.7), ((0.1, 0.3), 1.0)])
def test_crf_of_labels_refuses(
    maps: torch.Tensor, image: torch.Tensor, background: tuple[float, ...], certainty: float
) -> None:
    with pytest.raises(InputError, match="expected two scores, the low one first, and a probability between 0 and 1"):
        label_crf(image, maps, background, certainty)


def test_crf_over_another_background_and_at_another_size(image: torch.Tensor, maps: torch.Tensor) -> None:
    """A rule instead of an alpha, a smaller image, and what the CRF is not sure of."""
    how: dict[str, Any] = {"iterations": 3, "gaussian": (1.0, 2.0), "bilateral": (4.0, 30.0, 1.0)}
    image, maps = (resize(x[None], (4 * H, 4 * W))[0] for x in (image, maps))
    small = torch.nn.functional.interpolate(image[None], size=(36, 48), mode="bilinear", antialias=True)
    scores = torch.cat([torch.full((1, 4 * H, 4 * W), 0.4), maps])[None]
    refined = resize(dense_crf(small, resize(scores, (36, 48)), **how), (4 * H, 4 * W))[0]
    rule, sure = {"rule": "constant", "value": 0.4}, refined.amax(0).median().item()
    got = crf(image, maps, alpha=None, background=rule, max_side=48, confidence=sure, **how)
    expected = torch.where(refined.amax(0) < sure, 255, refined.argmax(0))
    assert 0 < (expected == 255).float().mean() < 1
    assert torch.equal(got.mask, expected)
    assert got.scores == ()
    pair = crf(image, maps, alpha=None, background={"rule": "pair", "low": 0.3, "high": 0.6}, **how).mask
    weak, strong = (
        crf(image, maps, alpha=None, background={"rule": "constant", "value": value}, **how).mask
        for value in (0.3, 0.6)
    )
    assert torch.equal(pair, torch.where(weak == 0, 0, torch.where(strong == 0, 255, strong)))
    for wrong in ({"alpha": 4.0, "background": rule}, {"alpha": None}, {"confidence": 1.5}):
        with pytest.raises(InputError, match=r"refine has alpha|refine.confidence is 1.5"):
            crf(image, maps, **wrong)

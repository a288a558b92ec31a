"""PAR and the refinement of CAMs against their formulas, written out in float64, and what follows from these."""

import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.refine.par import PAR, refine_cam

INTERPRETED = """
import torch
from wsss.refine import kernels
from wsss.refine.par import PAR

torch.manual_seed(0)
par = PAR(dilations=(1, 2, 24), iterations=3)
image, found = torch.rand(2, 3, 19, 23), torch.rand(2, 5, 19, 23)
image[0, :, :9] = 0.5  # without any differences
expected = PAR(dilations=(1, 2, 24), iterations=3).double()(image.double(), found.double())
weights = kernels.weigh(image, par.offsets, par.position, par.w1)
for _ in range(3):
    found = kernels.mix(found, weights, par.offsets)
torch.testing.assert_close(found.double(), expected, atol=5e-6, rtol=0)
"""
THRESHOLDS = (0.25, 0.7)  # background scores, low and high


def softmax(values: np.ndarray, axis: int = 0) -> np.ndarray:
    powers = np.exp(values - values.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def written_out(
    image: Tensor, masks: Tensor, dilations: Sequence[int], iterations: int, w1: float = 0.3, w2: float = 0.01
) -> Tensor:
    """PAR of one image (3, h, w) and its masks (K, h, w), offset by offset; the border repeats outside."""
    shifts = [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    rows, columns = (np.arange(side) for side in image.shape[1:])

    def around(maps: np.ndarray) -> np.ndarray:
        inside = [
            (np.clip(rows + dy, 0, len(rows) - 1), np.clip(columns + dx, 0, len(columns) - 1)) for dy, dx in shifts
        ]
        return np.stack([maps[:, y[:, None], x[None]] for y, x in inside])  # (N, ., h, w)

    colours, result = image.double().numpy(), masks.double().numpy()
    neighbours = around(colours)
    colour = -((np.abs(neighbours - colours) / (neighbours.std(axis=0, ddof=1) + 1e-8) / w1) ** 2)
    distance = np.array([np.hypot(dy, dx) for dy, dx in shifts])
    position = -((distance / (distance.std(ddof=1) + 1e-8) / w1) ** 2)
    weights = softmax(colour.mean(axis=1)) + w2 * softmax(position)[:, None, None]  # (N, h, w)
    for _ in range(iterations):
        result = (weights[:, None] * around(result)).sum(axis=0)
    return torch.from_numpy(result)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def picture(batch: int = 1, height: int = 14, width: int = 18) -> Tensor:
    """Images with a patch of one colour, where the local deviation is 0."""
    image = noise(batch, 3, height, width, seed=1)
    image[:, :, : height // 2, : width // 2] = 0.4
    return image


# --- PAR --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dilations", "iterations", "w1", "w2"),
    [((1,), 1, 0.3, 0.01), ((1, 2, 5), 3, 0.3, 0.01), ((1, 2, 4, 8, 12, 24), 10, 0.3, 0.01), ((2, 3), 2, 0.8, 0.2)],
)
def test_par_is_the_formula(dilations: tuple[int, ...], iterations: int, w1: float, w2: float) -> None:
    image, masks = picture(2), noise(2, 3, 14, 18)
    expected = torch.stack(
        [written_out(i, m, dilations, iterations, w1, w2) for i, m in zip(image, masks, strict=True)]
    )
    found = PAR(dilations, iterations, w1, w2)(image, masks)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_par_has_the_papers_numbers() -> None:
    expected = written_out(picture()[0], noise(3, 14, 18), (1, 2, 4, 8, 12, 24), 10)
    torch.testing.assert_close(PAR()(picture(), noise(1, 3, 14, 18))[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("w2", [0.0, 0.01, 0.5])
def test_weights_sum_to_one_and_the_position_share(w2: float) -> None:
    weights = PAR((1, 3), w2=w2).weights(picture(2))
    assert weights.shape == (2, 16, 14, 18)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.full((2, 14, 18), 1 + w2))


@pytest.mark.parametrize("iterations", [0, 1, 7])
def test_a_constant_mask_only_grows(iterations: int) -> None:
    levels = torch.tensor([0.2, 1.0, 3.0]).view(1, 3, 1, 1)
    found = PAR((1, 2), iterations, w2=0.02)(picture(), levels.expand(-1, -1, 14, 18))
    torch.testing.assert_close(found, (levels * 1.02**iterations).expand_as(found))


def test_masks_follow_the_colours() -> None:
    """A seed on one half of an image of two colours fills this half and does not cross to the other."""
    image = torch.zeros(1, 3, 12, 24)
    image[..., 12:] = 1.0
    mask = (noise(1, 1, 12, 24) < 0.5).float()
    mask[..., 12:] = 0
    found = PAR((1, 2), iterations=10, w2=0.0)(image, mask)
    assert found[..., :12].min() > 0.2
    assert found[..., 12:].max() < 1e-3


def test_smaller_masks_are_resized_corner_to_corner() -> None:
    def ramps(height: int, width: int) -> Tensor:
        down, across = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 2, width)[None]
        return torch.stack([down + 0 * across, 0 * down + across, down * across])[None]

    par = PAR((1, 2), iterations=3)
    for height, width in ((5, 7), (20, 33)):
        torch.testing.assert_close(par(picture(), ramps(height, width)), par(picture(), ramps(14, 18)))


def test_images_of_a_batch_do_not_meet() -> None:
    par, image, masks = PAR((1, 4), iterations=3), noise(3, 3, 10, 12), noise(3, 2, 10, 12, seed=2)
    alone = torch.cat([par(image[i : i + 1], masks[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(par(image, masks), alone)


def test_masks_do_not_meet_and_keep_their_order() -> None:
    par, masks, order = PAR((1, 4), iterations=3), noise(1, 4, 14, 18), [2, 0, 3, 1]
    torch.testing.assert_close(par(picture(), masks[:, order]), par(picture(), masks)[:, order])
    torch.testing.assert_close(par(picture(), masks[:, 1:2]), par(picture(), masks)[:, 1:2])


# --- refinement of CAMs -----------------------------------------------------------------------------------------------


def bilinear(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps[None], size=tuple(size), mode="bilinear", align_corners=False)[0]


def refined_by_hand(
    image: Tensor, cam: Tensor, present: list[int], thresholds: tuple[float, float], scale: float
) -> Tensor:
    """Pseudo labels (H, W) of one image, on its own classes alone."""
    size, small = image.shape[1:], [int(scale * side) for side in image.shape[1:]]
    image, cam = bilinear(image.double(), small), bilinear(cam.double(), small)
    ids = torch.tensor([0, *(c + 1 for c in present)])
    labels = []
    for background in thresholds:
        scores = torch.stack([torch.full_like(cam[0], background), *cam[present]]).softmax(0)
        labels.append(ids[bilinear(written_out(image, scores, (1, 2, 4), iterations=4), size).argmax(0)])
    low, high = labels
    result = high.clone()
    result[high == 0] = 255
    result[high + low == 0] = 0
    return result


PRESENT = [[1, 4], [], [5], [0, 2, 3]]
EVERYWHERE = torch.ones(4, 24, 32, dtype=torch.bool)


@pytest.fixture
def par() -> PAR:
    return PAR((1, 2, 4), iterations=4)


@pytest.fixture
def label() -> Tensor:
    return torch.stack([F.one_hot(torch.tensor(classes, dtype=torch.long), 6).sum(0).float() for classes in PRESENT])


@pytest.fixture
def cam() -> Tensor:
    """Smooth maps of 6 classes for 4 images."""
    return F.interpolate(noise(4, 6, 5, 6, seed=3), size=(24, 32), mode="bicubic", align_corners=False).clamp(0, 1)


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("thresholds", [THRESHOLDS, (0.4, 0.5)])
def test_refinement_is_the_recipe(
    par: PAR, cam: Tensor, label: Tensor, thresholds: tuple[float, float], scale: float
) -> None:
    image = picture(4, 24, 32)
    found = refine_cam(par, image, cam, label, thresholds, EVERYWHERE, max_labels=3, scale=scale)
    expected = torch.stack([refined_by_hand(image[i], cam[i], PRESENT[i], thresholds, scale) for i in range(4)])
    assert (found != expected).double().mean() <= 1e-3  # rounding may turn near ties
    assert {0, 2, 5, 6, 255} < set(found.unique().tolist())
    assert found.dtype == torch.long


def test_room_for_labels_does_not_matter(par: PAR, cam: Tensor, label: Tensor) -> None:
    results = [
        refine_cam(par, picture(4, 24, 32), cam, label, THRESHOLDS, EVERYWHERE, max_labels=room) for room in (3, 4, 6)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_an_image_without_labels_is_background(par: PAR, cam: Tensor) -> None:
    for room in (1, 6):
        found = refine_cam(par, picture(4, 24, 32), cam, torch.zeros(4, 6), THRESHOLDS, EVERYWHERE, max_labels=room)
        assert not found.any()


def test_invalid_pixels_are_ignored_and_change_nothing_else(par: PAR, cam: Tensor, label: Tensor) -> None:
    image, valid = picture(4, 24, 32), torch.zeros_like(EVERYWHERE)
    for i in range(4):
        valid[i, i : 20 - i, 3 * i : 30] = True
    found = refine_cam(par, image, cam, label, THRESHOLDS, valid, max_labels=3, ignore_index=200)
    everywhere = refine_cam(par, image, cam, label, THRESHOLDS, EVERYWHERE, max_labels=3, ignore_index=200)
    assert (found[~valid] == 200).all()
    assert torch.equal(found[valid], everywhere[valid])
    assert 255 not in found


def test_ids_of_present_classes_that_are_not_neighbours(par: PAR) -> None:
    cam = torch.full((1, 6, 24, 32), 0.99)  # absent classes are the loudest
    cam[:, [1, 4]] = 0.0
    cam[:, 1, :, :16] = 0.9
    cam[:, 4, :, 16:] = 0.9
    label = torch.tensor([[0.0, 1, 0, 0, 1, 0]])
    found = refine_cam(par, torch.full((1, 3, 24, 32), 0.5), cam, label, (0.1, 0.3), EVERYWHERE[:1], max_labels=2)
    assert set(found.unique().tolist()) == {2, 5}
    assert (found[..., :10] == 2).all()
    assert (found[..., -10:] == 5).all()


@pytest.mark.parametrize(("value", "expected"), [(0.05, 0), (0.29, 0), (0.31, 255), (0.59, 255), (0.61, 3), (0.95, 3)])
def test_between_the_background_scores_pixels_are_ignored(par: PAR, value: float, expected: int) -> None:
    cam, label = torch.full((1, 4, 24, 32), value), torch.tensor([[0.0, 0, 1, 0]])
    found = refine_cam(par, picture(1, 24, 32), cam, label, (0.3, 0.6), EVERYWHERE[:1], max_labels=1)
    assert (found == expected).all()


def test_the_class_is_that_of_the_high_background_score() -> None:
    """All pairs of refined labels: a class stands where the high score leaves one, background where both find it."""
    low, high = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2]])
    refined = torch.cat([F.one_hot(channel, 3).T.float() for channel in (low, high)])[None, :, None]  # (1, 6, 1, 9)

    def par(image: Tensor, scores: Tensor) -> Tensor:
        assert scores.shape == refined.shape
        return refined

    label, valid = torch.tensor([[0.0, 1, 0, 0, 1]]), torch.ones(1, 1, 9, dtype=torch.bool)
    found = refine_cam(par, noise(1, 3, 1, 9), noise(1, 5, 1, 9), label, THRESHOLDS, valid, max_labels=2, scale=1.0)
    assert found[0, 0].tolist() == [0, 255, 255, 2, 2, 2, 5, 5, 5]


def test_order_of_classes_does_not_matter(par: PAR, cam: Tensor, label: Tensor) -> None:
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    image = picture(4, 24, 32)
    plain = refine_cam(par, image, cam, label, THRESHOLDS, EVERYWHERE, max_labels=3)
    turned = refine_cam(par, image, cam[:, order], label[:, order], THRESHOLDS, EVERYWHERE, max_labels=3)
    names = torch.arange(256)
    names[1:7] = order + 1
    assert torch.equal(names[turned], plain)


def test_kernels_of_a_gpu() -> None:
    """By triton's interpreter, which runs them on the host; tests/test_gpu.py has them on a device."""
    pytest.importorskip("triton", reason="triton, with which the kernels are written, is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Transforms: what they draw, and from which generator; exact padding; what they refuse."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from wsss import InputError
from wsss.data.datamodule import Normalise
from wsss.data.transforms import LongSideCrop, RandAugmentCrop, ToCoViews

PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
TRANSFORMS = {
    "toco": ToCoViews(crop_size=48),
    "randaugment": RandAugmentCrop(crop_size=48),
    "long_side": LongSideCrop(crop_size=48, long_side=(40, 80)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_given_generator_decides_alone(name: str) -> None:
    transform = TRANSFORMS[name]
    first = transform(PHOTOGRAPH, np.random.default_rng(3))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    again, other = (transform(PHOTOGRAPH, np.random.default_rng(seed)) for seed in (3, 4))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert first.keys() == again.keys()
    assert all((first[key] == again[key]).all() for key in first)
    assert (first["image"] != other["image"]).any()
    assert first["image"].shape == (48, 48, 3)


def pixels(**arguments: Any) -> list[dict[str, np.ndarray]]:
    """Many crops of a photograph of 60 x 90 without any change of colour."""
    transform = LongSideCrop(jitter=(0, 0, 0, 0), **arguments)
    rng = np.random.default_rng(7)
    return [transform(PHOTOGRAPH, rng) for _ in range(400)]


def test_long_side_is_uniform_and_keeps_the_aspect() -> None:
    boxes = np.array([views["image_box"] for views in pixels(crop_size=100, long_side=(45, 90))])
    heights, widths = boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    assert widths.min() >= 45
    assert widths.max() <= 90
    assert abs(widths.mean() - 67.5) < 3 * 13.3 / 20  # three standard errors of a uniform draw
    assert abs(np.quantile(widths, 0.25) - 56) < 4
    assert (np.abs(heights - widths * 60 / 90) <= 0.5).all()
    # a small image lies anywhere in the container
    place = boxes[:, 2] / (100 - widths)
    assert abs(place.mean() - 0.5) < 0.06
    assert place.min() < 0.05
    assert place.max() > 0.95


def test_padding_is_zero_once_normalised() -> None:
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for views in pixels(crop_size=100, long_side=(45, 90))[:20]:
        image, (top, bottom, left, right) = normalise(views["image"]), views["image_box"]
        inside = torch.zeros(100, 100, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert image[:, ~inside].abs().max() < 1e-6
        assert image[:, inside].abs().min(dim=0).values.median() > 0.01


def test_half_of_the_images_are_mirrored_and_crops_are_inside() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 90).astype(np.uint8)[None, :, None], (60, 90, 3)).copy()
    transform, rng = LongSideCrop(crop_size=40, long_side=(90, 90), jitter=(0, 0, 0, 0)), np.random.default_rng(1)
    crops = [transform(ramp, rng) for _ in range(400)]
    assert all((views["image_box"] == [0, 40, 0, 40]).all() for views in crops)
    rising = np.mean([views["image"][0, -1, 0] > views["image"][0, 0, 0] for views in crops])
    assert abs(rising - 0.5) < 0.075


def test_jitter_within_its_strength() -> None:
    grey = np.full((40, 40, 3), 100, np.uint8)
    transform = LongSideCrop(crop_size=40, long_side=(40, 40), jitter=(0.3, 0, 0, 0))
    rng = np.random.default_rng(2)
    means = np.array([transform(grey, rng)["image"].mean() for _ in range(400)])
    assert means.min() >= 69
    assert means.max() <= 131
    assert abs(means.mean() - 100) < 3
    assert abs(means.std() - 60 / 12**0.5) < 2
    never = LongSideCrop(crop_size=40, long_side=(40, 40), jitter_probability=0.0)
    assert (never(grey, rng)["image"] == 100).all()
    always_grey = LongSideCrop(crop_size=40, long_side=(40, 80), jitter_probability=0.0, grey=1.0)
    image = always_grey(PHOTOGRAPH[:40, :40], rng)["image"]
    assert (image[..., 0] == image[..., 1]).all()


def test_randaugment_without_policy_is_a_resized_crop() -> None:
    plain = RandAugmentCrop(crop_size=60, scale=(1.0, 1.0), auto_augment=None, erasing=0.0)
    square = np.ascontiguousarray(PHOTOGRAPH[:, :60])
    rng = np.random.default_rng(0)
    views = [plain(square, rng)["image"].round().astype(np.uint8) for _ in range(200)]
    upright, mirrored = (
        np.mean([(view == other).all() for view in views]) for other in (square, square[:, ::-1])
    )  # aspects other than 1 do not fit into the whole area, and timm then takes all of it
    assert abs(upright - 0.5) < 0.11
    assert upright + mirrored == 1


def test_erased_rectangles_hold_normal_noise() -> None:
    erase = RandAugmentCrop(crop_size=64, scale=(1.0, 1.0), auto_augment=None, erasing=1.0)
    black = np.zeros((64, 64, 3), np.uint8)
    rng = np.random.default_rng(0)
    shares, noise = [], []
    for _ in range(60):
        view = erase(black, rng)["image"]
        changed = np.abs(view).max(-1) > 1e-3
        shares.append(changed.mean())
        noise.append(((view[changed] / 255) - erase.mean) / erase.std)
    assert min(shares) > 0.015
    assert max(shares) < 0.35
    values = np.concatenate(noise)
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1) < 0.03


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: RandAugmentCrop(auto_augment="nothing"), "transform.auto_augment is 'nothing'"),
        (lambda: RandAugmentCrop(crop_size=0), "transform.crop_size is 0"),
        (lambda: LongSideCrop(long_side=(10, 5)), r"transform.long_side is \[10, 5\]"),
        (lambda: LongSideCrop(jitter=(0.1, 0.1, 0.1, 0.7)), "transform.jitter"),
        (lambda: LongSideCrop(jitter=(0.1,)), "transform.jitter"),
    ],
)
def test_refusals(build: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build()

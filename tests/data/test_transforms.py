"""Transforms: what they draw, and from which generator; exact padding; what they refuse."""

import colorsys
import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as vision
from PIL import Image, ImageEnhance, ImageFilter

from wsss import InputError
from wsss.data import pixels
from wsss.data.pixels import Normalise, Views
from wsss.data.transforms import (
    OPERATIONS,
    Blur,
    CoSAViews,
    Jitter,
    JitterCrop,
    LongSideCrop,
    RandAugmentCrop,
    ResizedCrop,
    ScaleCrop,
    ToCoViews,
    distort,
    mirror,
    posterize,
    random_crop,
    scale_image,
)

PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
TRANSFORMS = {
    "toco": ToCoViews(crop_size=48),
    "cosa": CoSAViews(crop_size=48),
    "randaugment": RandAugmentCrop(crop_size=48),
    "jitter": JitterCrop(crop_size=48),
    "long_side": LongSideCrop(crop_size=48, long_side=(40, 80)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_given_generator_decides_alone(name: str) -> None:
    transform = TRANSFORMS[name]
    first = transform({"image": PHOTOGRAPH}, np.random.default_rng(3))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    again, other = (transform({"image": PHOTOGRAPH}, np.random.default_rng(seed)) for seed in (3, 4))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert first.keys() == again.keys()
    assert all((first[key] == again[key]).all() for key in first)
    assert (first["image"] != other["image"]).any()
    assert first["image"].shape == (48, 48, 3)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (2, 3, 1, 0)])
@pytest.mark.parametrize("factors", [(0.6, 1.4, 0.8, -0.1), (1.3, 0.7, 1.2, 0.07), (1.01, 0.99, 1.0, 0.003)])
def test_jitter_is_torchvisions(order: tuple[int, ...], factors: tuple[float, ...]) -> None:
    operations = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation, vision.adjust_hue)
    expected = Image.fromarray(PHOTOGRAPH)
    for index in order:
        expected = operations[index](expected, factors[index])
    assert (Jitter().apply(PHOTOGRAPH, *factors, order) == np.asarray(expected)).all()


def test_blur_and_resized_crop_are_pils_and_torchvisions() -> None:
    image = Image.fromarray(PHOTOGRAPH)
    for radius in (0.1, 0.4, 1.0, 2.0):
        expected = image.filter(ImageFilter.GaussianBlur(radius))
        assert (Blur().apply(PHOTOGRAPH, radius) == np.asarray(expected)).all()
    for top, left, height, width in ((5, 11, 50, 60), (0, 0, 60, 90), (40, 70, 20, 20)):  # smaller and larger than 40
        expected = vision.resized_crop(image, top, left, height, width, (40, 40), T.InterpolationMode.BICUBIC)
        found = ResizedCrop((40, 40)).apply(PHOTOGRAPH, (left, top, left + width, top + height))
        assert (found == np.asarray(expected)).all()


@pytest.mark.parametrize("steps", [-25, 0, 1, 25])
def test_hues_turn_as_in_pil(steps: int) -> None:
    some = np.random.default_rng(1).integers(0, 256, (1000, 500, 3), np.uint8)
    some[:500] >>= 5  # two or three channels are often the same, and none is far from black
    hue, *rest = Image.fromarray(some).convert("HSV").split()
    hue = hue.point([(value + steps) % 256 for value in range(256)])
    assert (pixels.turn_hue(some, steps) == np.asarray(Image.merge("HSV", (hue, *rest)).convert("RGB"))).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (150, 1), (61, 113)])
def test_pixels_of_all_sizes_are_pils(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (*shape, 3), np.uint8)
    picture = Image.fromarray(image)
    for factor in (0.0, 0.31, 1.0, 1.77):
        assert (pixels.brightness(image, factor) == np.asarray(ImageEnhance.Brightness(picture).enhance(factor))).all()
        assert (pixels.contrast(image, factor) == np.asarray(ImageEnhance.Contrast(picture).enhance(factor))).all()
    for radius in (0.1, 1.4, 1.5, 2.3, 5.0):
        assert (pixels.blur(image, radius) == np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)))).all()
    for _ in range(30):
        height, width = (side + int(rng.integers(2 * side)) for side in shape)
        (top, bottom), (left, right) = (sorted(rng.choice(side + 1, 2, replace=False)) for side in (height, width))
        whole = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
        part = pixels.enlarge_part(image, (height, width), slice(top, bottom), slice(left, right))
        assert (part == whole[top:bottom, left:right]).all()


def test_views_of_cosa_show_the_same_pixels() -> None:
    """Both are the scaled window that ToCo cuts; the strong one went through one operation, in both of its views."""
    views, seen = CoSAViews(crop_size=70, blur=0.0), set()
    for seed in range(60):
        found, rng = views({"image": PHOTOGRAPH}, np.random.default_rng(seed)), np.random.default_rng(seed)
        scaled = scale_image(PHOTOGRAPH, rng.uniform(0.5, 2.0))
        cut = random_crop({"image": mirror(scaled) if rng.random() < 0.5 else scaled}, 70, rng)
        assert (found["image"] == cut["image"]).all()
        assert (found["image_box"] == cut["image_box"]).all()
        rng.random()
        name = list(OPERATIONS)[rng.integers(9)]
        expected = OPERATIONS[name](Image.fromarray(found["image"]), int(rng.integers(1, 10)))
        assert (found["strong_view"] == np.asarray(expected)).all()
        seen.add(name)
    assert seen == set(OPERATIONS)
    blurred = CoSAViews(crop_size=70, blur=1.0)({"image": PHOTOGRAPH}, np.random.default_rng(0))
    assert (blurred["image"] != views({"image": PHOTOGRAPH}, np.random.default_rng(0))["image"]).any()
    with pytest.raises(InputError, match=r"transform\.blur is 2"):
        CoSAViews(blur=2.0)


def test_toco_cuts_its_window_from_the_whole_scaled_image() -> None:
    views = ToCoViews(crop_size=70, scale=(0.5, 2.0))
    for transform in (*views.main, *views.local):
        transform.p = 0.0
    for seed in range(40):
        found, rng = views({"image": PHOTOGRAPH}, np.random.default_rng(seed)), np.random.default_rng(seed)
        scaled = scale_image(PHOTOGRAPH, rng.uniform(0.5, 2.0))
        cut = random_crop({"image": mirror(scaled) if rng.random() < 0.5 else scaled}, 70, rng)
        expected, box = cut["image"], cut["image_box"]
        if rng.random() < 0.5:  # the flip that the views share
            expected, box = mirror(expected), np.array([box[0], box[1], 70 - box[3], 70 - box[2]])
        assert (found["image"] == expected).all()
        assert (found["local_source"] == expected).all()
        assert (found["image_box"] == box).all()


def test_normalise_gives_the_formula_for_whole_numbers_and_floats() -> None:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalise = Normalise(mean.tolist(), std.tolist())
    untouchable = PHOTOGRAPH[:, ::-1]
    untouchable.flags.writeable = False
    for image in (PHOTOGRAPH, untouchable, PHOTOGRAPH.astype(np.float32), untouchable.astype(np.float32) * 1.3):
        before = image.copy()
        found = normalise(image)
        expected = (torch.tensor(before).float() / 255 - mean) / std
        assert torch.equal(found, expected.permute(2, 0, 1))
        assert found.is_contiguous()
        assert (image == before).all()


def uniform(values: Sequence[float] | np.ndarray, low: float, high: float) -> None:
    """Values lie between the bounds; their mean and quartiles are those of a uniform draw, within four deviations."""
    count, shares = len(values), (np.array(values) - low) / (high - low)
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert abs(shares.mean() - 1 / 2) < 4 * (1 / 12 / count) ** 0.5
    for quartile in (0.25, 0.5, 0.75):
        assert abs((shares < quartile).mean() - quartile) < 4 * (quartile * (1 - quartile) / count) ** 0.5


def share(happened: Sequence[bool] | np.ndarray, expected: float) -> None:
    assert abs(np.mean(happened) - expected) <= 4 * (expected * (1 - expected) / len(happened)) ** 0.5


@pytest.fixture(scope="module")
def toco_draws() -> dict[str, list[dict[str, Any]]]:
    """What 800 calls drew: for each view and change of colour its parameters, empty where it was left out."""
    views, rng = ToCoViews(crop_size=8), np.random.default_rng(0)
    image = np.ascontiguousarray(PHOTOGRAPH[:48, :64])
    draws: dict[str, list[dict[str, Any]]] = {}
    for _ in range(800):
        views({"image": image}, rng)
        for name, compose in (("image", views.main), ("local_source", views.local), ("global_view", views.global_)):
            for transform in compose.transforms:
                draws.setdefault(f"{name} {type(transform).__name__}", []).append(transform.params)
    return draws


@pytest.mark.parametrize(
    ("view", "blurred", "solarised"), [("image", 1.0, 0.0), ("local_source", 0.5, 0.0), ("global_view", 0.1, 0.2)]
)
def test_toco_draws_colours(
    toco_draws: dict[str, list[dict[str, Any]]], view: str, blurred: float, solarised: float
) -> None:
    jitter, blur = toco_draws[f"{view} Jitter"], toco_draws[f"{view} Blur"]
    for draws, expected in (
        (jitter, 0.8),
        (toco_draws[f"{view} Grey"], 0.2),
        (blur, blurred),
        (toco_draws[f"{view} Solarize"], solarised),
    ):
        share([bool(parameters) for parameters in draws], expected)
    drawn = [parameters for parameters in jitter if parameters]
    for name, strength in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
        uniform([parameters[name] for parameters in drawn], 1 - strength, 1 + strength)
    uniform([parameters["hue"] for parameters in drawn], -0.1, 0.1)
    for place in range(4):
        for operation in range(4):
            share([parameters["order"][place] == operation for parameters in drawn], 1 / 4)
    uniform([parameters["radius"] for parameters in blur if parameters], 0.1, 2.0)


def test_toco_global_view_is_a_random_resized_crop(toco_draws: dict[str, list[dict[str, Any]]]) -> None:
    ours = np.array([parameters["crop_coords"] for parameters in toco_draws["global_view ResizedCrop"]])
    torch.manual_seed(0)
    image = Image.fromarray(PHOTOGRAPH[:48, :64])
    top, left, height, width = np.array(
        [T.RandomResizedCrop.get_params(image, (0.4, 1.0), (3 / 4, 4 / 3)) for _ in range(800)]
    ).T
    theirs = np.stack([left, top, left + width, top + height], axis=1)
    for found, expected in ((sizes(ours), sizes(theirs)), (ours, theirs)):
        error = (found.var(0) / len(found) + expected.var(0) / len(expected)) ** 0.5
        assert (np.abs(found.mean(0) - expected.mean(0)) < 4 * error).all()
        assert (np.abs(found.std(0) / expected.std(0) - 1) < 0.15).all()
    areas = sizes(ours)[:, 0] / (48 * 64)
    assert 0.37 < areas.min() < 0.43  # sides are rounded
    assert areas.max() <= 1


def sizes(boxes: np.ndarray) -> np.ndarray:
    """(N, 2) area and logarithm of the aspect of boxes (N, 4) left, top, right, bottom."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return np.stack([width * height, np.log(width / height)], axis=1)


def test_toco_scale_and_place() -> None:
    image, rng = np.full((120, 90, 3), 255, np.uint8), np.random.default_rng(0)
    views = ToCoViews(crop_size=240)
    for transform in (*views.main, *views.local, *views.global_):
        transform.p = 0.0
    boxes = np.array([views({"image": image}, rng)["image_box"] for _ in range(400)])
    top, left, height, width = boxes[:, 0], boxes[:, 2], boxes[:, 1] - boxes[:, 0], boxes[:, 3] - boxes[:, 2]
    uniform(height / 120, 0.5, 2.0)
    assert (np.abs(height * 90 / 120 - width) < 1).all()  # sides are floored
    uniform((top + 0.5) / (240 - height + 1), 0.0, 1.0)
    uniform((left + 0.5) / (240 - width + 1), 0.0, 1.0)


def test_crops_of_a_larger_image_lie_anywhere() -> None:
    rows, columns = np.mgrid[:50, :70]
    image, rng = np.stack([rows, columns, rows], axis=-1).astype(np.uint8), np.random.default_rng(0)
    corners = np.array([random_crop({"image": image}, 40, rng)["image"][0, 0, :2] for _ in range(1000)])
    for axis, places in ((0, 11), (1, 31)):
        for place in range(places):
            share(corners[:, axis] == place, 1 / places)


def uncoloured(**arguments: Any) -> list[dict[str, np.ndarray]]:
    """Many crops of a photograph of 60 x 90 without any change of colour."""
    transform = LongSideCrop(jitter=(0, 0, 0, 0), **arguments)
    rng = np.random.default_rng(7)
    return [transform({"image": PHOTOGRAPH}, rng) for _ in range(400)]


def test_long_side_is_uniform_and_keeps_the_aspect() -> None:
    boxes = np.array([views["image_box"] for views in uncoloured(crop_size=100, long_side=(45, 90))])
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
    for views in uncoloured(crop_size=100, long_side=(45, 90))[:20]:
        image, (top, bottom, left, right) = normalise(views["image"]), views["image_box"]
        inside = torch.zeros(100, 100, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert image[:, ~inside].abs().max() < 1e-6
        assert image[:, inside].abs().min(dim=0).values.median() > 0.01


def test_half_of_the_images_are_mirrored_and_crops_are_inside() -> None:
    ramp = np.broadcast_to(np.linspace(0, 255, 90).astype(np.uint8)[None, :, None], (60, 90, 3)).copy()
    transform, rng = LongSideCrop(crop_size=40, long_side=(90, 90), jitter=(0, 0, 0, 0)), np.random.default_rng(1)
    crops = [transform({"image": ramp}, rng) for _ in range(400)]
    assert all((views["image_box"] == [0, 40, 0, 40]).all() for views in crops)
    rising = np.mean([views["image"][0, -1, 0] > views["image"][0, 0, 0] for views in crops])
    assert abs(rising - 0.5) < 0.075


def test_jitter_within_its_strength() -> None:
    grey = np.full((40, 40, 3), 100, np.uint8)
    transform = LongSideCrop(crop_size=40, long_side=(40, 40), jitter=(0.3, 0, 0, 0))
    rng = np.random.default_rng(2)
    means = np.array([transform({"image": grey}, rng)["image"].mean() for _ in range(400)])
    assert means.min() >= 69
    assert means.max() <= 131
    assert abs(means.mean() - 100) < 3
    assert abs(means.std() - 60 / 12**0.5) < 2
    never = LongSideCrop(crop_size=40, long_side=(40, 40), jitter_probability=0.0)
    assert (never({"image": grey}, rng)["image"] == 100).all()
    always_grey = LongSideCrop(crop_size=40, long_side=(40, 80), jitter_probability=0.0, grey=1.0)
    image = always_grey({"image": PHOTOGRAPH[:40, :40]}, rng)["image"]
    assert (image[..., 0] == image[..., 1]).all()


def test_randaugment_without_policy_is_a_resized_crop() -> None:
    plain = RandAugmentCrop(crop_size=60, scale=(1.0, 1.0), auto_augment=None, erasing=0.0)
    square = np.ascontiguousarray(PHOTOGRAPH[:, :60])
    rng = np.random.default_rng(0)
    views = [plain({"image": square}, rng)["image"].round().astype(np.uint8) for _ in range(200)]
    upright, mirrored = (
        np.mean([(view == other).all() for view in views]) for other in (square, square[:, ::-1])
    )  # aspects other than 1 do not fit into the whole area, and timm then takes all of it
    assert abs(upright - 0.5) < 0.11
    assert upright + mirrored == 1


def test_posterize_to_no_bits_is_black() -> None:
    image = Image.fromarray(PHOTOGRAPH)
    assert not np.asarray(posterize(image, 0)).any()
    assert (np.asarray(posterize(image, 3)) == PHOTOGRAPH & 0b11100000).all()
    strongest = RandAugmentCrop(crop_size=8, auto_augment="rand-m10-inc1")
    for seed in range(150):  # one in fifteen posterizes, to no bits
        strongest({"image": PHOTOGRAPH}, np.random.default_rng(seed))


def test_erased_rectangles_hold_normal_noise() -> None:
    erase = RandAugmentCrop(crop_size=64, scale=(1.0, 1.0), auto_augment=None, erasing=1.0)
    black = np.zeros((64, 64, 3), np.uint8)
    rng = np.random.default_rng(0)
    shares, noise = [], []
    for _ in range(60):
        view = erase({"image": black}, rng)["image"]
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


class Draws:
    """A generator whose numbers are given: of `random` in order, of `uniform` and `integers` as shares of the range."""

    def __init__(self, random: Sequence[float], share: float) -> None:
        self.left, self.share = list(random), share

    def random(self) -> float:
        return self.left.pop(0)

    def uniform(self, low: float, high: float) -> float:
        return low + self.share * (high - low)

    def integers(self, low: int, high: int) -> int:
        return int(self.uniform(low, high - 1))


@pytest.mark.parametrize(("share", "last", "which"), [*product((0.0, 0.25, 1.0), (False, True), range(16))])
def test_distortion_against_the_standard_library(share: float, last: bool, which: int) -> None:
    """Every choice of changes, on single colours, with Python's own HSV; whole numbers round a little."""
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    chosen = [bool(which >> bit & 1) for bit in range(4)]
    draws = Draws([*(0.0 if one else 0.9 for one in chosen), 0.0 if last else 0.9], share)
    found = distort(image, draws)  # type: ignore[arg-type]
    assert (found.dtype, found.shape) == (np.uint8, image.shape)
    added, factor, saturation, turn = (
        value if one else still
        for one, value, still in zip(chosen, (-32 + 64 * share, 0.5 + share, 0.5 + share, int(-18 + 36 * share)),
                                     (0, 1, 1, 0), strict=True)
    )  # fmt: skip
    for colour, own in zip(image.reshape(-1, 3).tolist(), found.reshape(-1, 3), strict=True):
        values = [min(max(c + added, 0), 255) for c in colour]
        values = values if last else [min(c * factor, 255) for c in values]
        h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in values))
        values = [255 * c for c in colorsys.hsv_to_rgb((h + turn / 180) % 1, min(1, s * saturation), v)]
        values = [min(c * factor, 255) for c in values] if last else values
        assert np.abs(own - np.array(values)).max() <= 9  # OpenCV knows 180 hues
    if which == 0:
        assert np.array_equal(found, image)


def test_distortion_of_a_transform() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    views: Views = {"image": image, "pseudo_mask": np.arange(1600, dtype=np.uint8).reshape(40, 40) % 3}
    plain, changed = (ScaleCrop(32, (1.0, 1.0), distortion=d) for d in (False, True))
    seen = [changed(dict(views), np.random.default_rng(seed))["image"] for seed in range(8)]
    assert len({one.tobytes() for one in seen}) == 8
    assert np.array_equal(seen[3], changed(dict(views), np.random.default_rng(3))["image"])
    assert np.array_equal(views["image"], image)
    assert plain(dict(views), np.random.default_rng(0))["pseudo_mask"].max() == 2

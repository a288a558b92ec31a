"""ToCo's transforms against recordings of the original code.

The recordings were drawn from Python's, numpy's and torch's generators. Here the draws are repeated in their order,
torchvision and PIL confirm that they are the recorded ones, and ours, on albumentations, is given the same parameters.
"""

import random
from collections.abc import Callable
from typing import Any

import albumentations as A
import albumentations.augmentations.pixel.functional as colour
import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as vision
from PIL import Image, ImageFilter, ImageOps

from wsss.data.datamodule import Normalise
from wsss.data.transforms import mirror, random_crop, scale_image

FILE = "toco/transforms"

SETTINGS: dict[str, Any] = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_seed": 5,
    "scale_seed": 6,
    "flip_seeds": (1, 2),
    "blur_seed": 9,
    "scale": (0.5, 2.0),
    "radius": (0.1, 2.0),
    "area": (0.4, 1.0),
    "jitter": ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)),
    "blur": {"input": 1.0, "local": 0.5, "global2": 0.1},
    "solarize": {"input": None, "local": None, "global2": 0.2},
}

EXCEPTED = ((FILE, "image item_image valitem_gt valitem_cls crop_*_size scale_ratio_seed6 blur_radius_seed9", "input"),)


class Draws:
    """Stands for a numpy generator that draws given whole numbers."""

    def __init__(self, *values: int) -> None:
        self.values = iter(values)

    def integers(self, high: int) -> int:
        value = next(self.values)
        assert 0 <= value < high
        return value


def crop(image: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Our crop, at the place that the original draws."""
    height, width = (max(size, side) for side in image.shape[:2])
    y, x = np.random.randint(height - image.shape[0] + 1), np.random.randint(width - image.shape[1] + 1)
    top, left = random.randrange(height - size + 1), random.randrange(width - size + 1)
    generator: Any = Draws(y, x, top, left)
    return random_crop(image, size, generator)


def photometric(blur: float, solarize: float | None) -> dict[str, Any]:
    """What the original draws for one view, in its order."""
    drawn: dict[str, Any] = {"flip": bool(torch.rand(1) < 0.5), "jitter": None, "radius": None}
    if not torch.rand(1) > 0.8:
        drawn["jitter"] = T.ColorJitter.get_params(*SETTINGS["jitter"])
    drawn["grey"] = bool(torch.rand(1) < 0.2)
    if random.random() <= blur:
        drawn["radius"] = random.uniform(*SETTINGS["radius"])
    drawn["solarize"] = solarize is not None and random.random() < solarize
    return drawn


def jitter(image: Any, parameters: Any, *operations: Callable[..., Any]) -> Any:
    """The four changes of colour in the drawn order."""
    order, *factors = parameters
    for index in order.tolist():
        image = operations[index](image, factors[index])
    return image


def reference(view: np.ndarray, drawn: dict[str, Any]) -> np.ndarray:
    image = Image.fromarray(view)
    if drawn["flip"]:
        image = vision.hflip(image)
    if drawn["jitter"] is not None:
        image = jitter(
            image,
            drawn["jitter"],
            vision.adjust_brightness,
            vision.adjust_contrast,
            vision.adjust_saturation,
            vision.adjust_hue,
        )
    if drawn["grey"]:
        image = vision.rgb_to_grayscale(image, 3)
    if drawn["radius"] is not None:
        image = image.filter(ImageFilter.GaussianBlur(drawn["radius"]))
    return np.asarray(ImageOps.solarize(image) if drawn["solarize"] else image)


def ours(view: np.ndarray, drawn: dict[str, Any]) -> np.ndarray:
    if drawn["flip"]:
        view = np.ascontiguousarray(mirror(view))
    if drawn["jitter"] is not None:
        view = jitter(
            view,
            drawn["jitter"],
            colour.adjust_brightness_torchvision,
            colour.adjust_contrast_torchvision,
            colour.adjust_saturation_torchvision,
            colour.adjust_hue_torchvision,
        )
    steps = []
    if drawn["grey"]:
        steps.append(A.ToGray(p=1))
    if drawn["radius"] is not None:
        steps.append(A.GaussianBlur(blur_limit=0, sigma_limit=(drawn["radius"],) * 2, p=1))
    if drawn["solarize"]:
        steps.append(A.Solarize(threshold_range=(128 / 255, 128 / 255), p=1))
    return A.Compose(steps)(image=view)["image"]


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def normalise(image: np.ndarray) -> torch.Tensor:
    return Normalise(SETTINGS["mean"], SETTINGS["std"])(image)


def test_crops(recordings: Any, match: Any) -> None:
    arrays = recordings(FILE)
    for key in [key.removesuffix("_size") for key in arrays if key.endswith("_size")]:
        seed(SETTINGS["crop_seed"])
        window, box = crop(arrays["image"].numpy(), int(arrays[f"{key}_size"]))
        match(FILE, key, window)
        match(FILE, f"{key}_box", box)


def test_scale_and_mirror(recordings: Any, match: Any) -> None:
    image = recordings(FILE)["image"].numpy()
    seed(SETTINGS["scale_seed"])
    ratio = random.uniform(*SETTINGS["scale"])
    assert ratio == recordings(FILE)["scale_ratio_seed6"]
    match(FILE, "scaled_seed6", scale_image(image, ratio).copy())
    for value in SETTINGS["flip_seeds"]:
        seed(value)
        match(FILE, f"flip_seed{value}", (mirror(image) if random.random() > 0.5 else image).copy())


def test_colours(recordings: Any, match: Any) -> None:
    image = recordings(FILE)["image"].numpy()
    match(FILE, "normalize_img", normalise(image).permute(1, 2, 0), atol=1e-6)
    threshold = (128 / 255, 128 / 255)
    match(FILE, "solarized", A.Solarize(threshold_range=threshold, p=1)(image=image)["image"])
    seed(SETTINGS["blur_seed"])
    random.random()
    radius = random.uniform(*SETTINGS["radius"])
    assert radius == recordings(FILE)["blur_radius_seed9"]
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    match(FILE, "blur_p1_seed9", blurred.copy())
    gaussian = cv2.GaussianBlur(image, (0, 0), radius)
    assert np.abs(gaussian.astype(int) - blurred).mean() < 1  # PIL approximates by box filters


@pytest.mark.parametrize("item", [0, 1, 2])
def test_views(recordings: Any, match: Any, item: int) -> None:
    arrays = recordings(FILE)
    image = arrays["item_image"].numpy()
    size = arrays[f"item{item}_input"].shape[-1]
    seed(item)
    scaled = scale_image(image, random.uniform(*SETTINGS["scale"]))
    if random.random() > 0.5:
        scaled = mirror(scaled)
    window, box = crop(scaled, size)
    match(FILE, f"item{item}_box", box)
    drawn = {
        "local": photometric(SETTINGS["blur"]["local"], None),
        "input": photometric(SETTINGS["blur"]["input"], None),
    }
    place = T.RandomResizedCrop.get_params(Image.fromarray(image), SETTINGS["area"], (3 / 4, 4 / 3))
    drawn["global2"] = photometric(SETTINGS["blur"]["global2"], SETTINGS["solarize"]["global2"])
    top, left, height, width = place
    cut = vision.resized_crop(Image.fromarray(image), *place, (size, size), T.InterpolationMode.BICUBIC)
    part = image[top : top + height, left : left + width]
    views = {"local": (window, window), "input": (window, window)}
    views["global2"] = np.asarray(cut), cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC)
    for name, (theirs, own) in views.items():
        confirmed = normalise(reference(theirs, drawn[name]))
        match(FILE, f"item{item}_{name}", confirmed, atol=1e-2)
        # albumentations rounds hues to 180 steps and blurs exactly, where PIL approximates
        difference = (normalise(ours(own, drawn[name])) - confirmed).abs()
        assert difference.mean() < 0.03
        assert (difference > 0.1).double().mean() < 0.03


def test_evaluation_item(recordings: Any, match: Any) -> None:
    match(FILE, "valitem_image", normalise(recordings(FILE)["item_image"].numpy()), atol=1e-6)
    match(FILE, "valitem_label", recordings(FILE)["valitem_gt"])

"""ToCo's transforms against recordings of the original code.

The recordings were drawn from Python's, numpy's and torch's generators. Here the draws are repeated in their order and
given to our own transforms, the very objects that training calls: what these paint has to be what was recorded.
"""

import random
from collections.abc import Sequence
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from wsss.data import pixels
from wsss.data.pixels import Normalise
from wsss.data.transforms import ToCoViews, mirror, random_crop, scale_image

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

# Ours are the recorded numbers, to the last bit: views are bytes, normalised by the original's formula in float32.


class Draws:
    """Stands for a numpy generator that draws what the original drew, and zeros for seeds."""

    def __init__(
        self, places: Sequence[int], ratio: float = 1.0, mirrored: bool = False, flips: Sequence[bool] = ()
    ) -> None:
        self.places, self.ratio, self.mirrored, self.flips = iter(places), ratio, mirrored, np.array(flips)

    def integers(self, high: int) -> int:
        value = next(self.places, 0)
        assert 0 <= value < high
        return value

    def uniform(self, low: float, high: float) -> float:
        assert low <= self.ratio <= high
        return self.ratio

    def random(self, size: int | None = None) -> Any:
        """Below one half, which ours take as a yes, where the original mirrored."""
        return 0.9 - 0.8 * (self.mirrored if size is None else self.flips)


def place(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Row and column where the original puts an image on its canvas, and those of the window."""
    y, x = np.random.randint(max(size, height) - height + 1), np.random.randint(max(size, width) - width + 1)
    return y, x, random.randrange(max(size, height) - size + 1), random.randrange(max(size, width) - size + 1)


def photometric(view: str) -> dict[str, Any]:
    """What the original draws for one view, in its order; None or False where it leaves out a change."""
    solarize = SETTINGS["solarize"][view]
    drawn: dict[str, Any] = {"flip": bool(torch.rand(1) < 0.5), "jitter": None, "radius": None}
    if not torch.rand(1) > 0.8:
        drawn["jitter"] = T.ColorJitter.get_params(*SETTINGS["jitter"])
    drawn["grey"] = bool(torch.rand(1) < 0.2)
    if random.random() <= SETTINGS["blur"][view]:
        drawn["radius"] = random.uniform(*SETTINGS["radius"])
    drawn["solarize"] = solarize is not None and random.random() < solarize
    return drawn


# Found by the classes of albumentations that ours extend: theirs paint otherwise, and have to fail.
TRANSFORMS = {
    "area": A.RandomResizedCrop,
    "jitter": A.ColorJitter,
    "grey": A.ToGray,
    "radius": A.GaussianBlur,
    "solarize": A.Solarize,
}


def give(compose: A.Compose, drawn: dict[str, Any]) -> A.Compose:
    """Lets the transforms of one of our views draw what the original drew, and leaves out the others."""
    found = {name: t for t in compose.transforms for name, kind in TRANSFORMS.items() if isinstance(t, kind)}
    assert len(found) == len(compose.transforms)
    assert {name for name, value in drawn.items() if value} <= found.keys() | {"flip"}
    for name, transform in found.items():
        transform.p = float(bool(drawn.get(name)))
    if drawn.get("area"):
        found["area"].get_params_dependent_on_data = lambda params, data: {"crop_coords": drawn["area"]}
    if drawn.get("jitter"):
        order, *factors = drawn["jitter"]
        for name, factor in zip(("brightness", "contrast", "saturation", "hue"), factors, strict=True):
            narrow(found["jitter"], name, factor)
        draw = found["jitter"].get_params
        found["jitter"].get_params = lambda: draw() | {"order": order.tolist()}
    if drawn.get("radius"):
        narrow(found["radius"], "sigma_limit", drawn["radius"])
    return compose


def narrow(transform: Any, name: str, value: float) -> None:
    """Leaves one value of a range that a transform draws from."""
    low, high = getattr(transform, name)
    assert low <= value <= high
    setattr(transform, name, (value, value))


def paint(image: np.ndarray, **drawn: Any) -> np.ndarray:
    """A photograph after single changes of the global view."""
    return give(ToCoViews(8).global_, drawn)(image=image)["image"]


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def normalise(image: np.ndarray) -> torch.Tensor:
    return Normalise(SETTINGS["mean"], SETTINGS["std"])(image)


def test_crops(recordings: Any, match: Any) -> None:
    arrays = recordings(FILE)
    image = arrays["image"].numpy()
    for key in [key.removesuffix("_size") for key in arrays if key.endswith("_size")]:
        size = int(arrays[f"{key}_size"])
        seed(SETTINGS["crop_seed"])
        generator: Any = Draws(place(*image.shape[:2], size))
        cut = random_crop({"image": image}, size, generator)
        window, box = cut["image"], cut["image_box"]
        match(FILE, key, window)
        match(FILE, f"{key}_box", box)


def test_scale_and_mirror(recordings: Any, match: Any) -> None:
    image = recordings(FILE)["image"].numpy()
    seed(SETTINGS["scale_seed"])
    ratio = random.uniform(*SETTINGS["scale"])
    assert ratio == recordings(FILE)["scale_ratio_seed6"]
    match(FILE, "scaled_seed6", scale_image(image, ratio).copy())
    if ratio > 1:  # then the views scale only what their window shows
        height, width = (int(ratio * side) for side in image.shape[:2])
        whole = pixels.enlarge_part(image, (height, width), slice(height), slice(width))
        match(FILE, "scaled_seed6", whole)
    for value in SETTINGS["flip_seeds"]:
        seed(value)
        match(FILE, f"flip_seed{value}", (mirror(image) if random.random() > 0.5 else image).copy())


def test_colours(recordings: Any, match: Any) -> None:
    image = recordings(FILE)["image"].numpy()
    match(FILE, "normalize_img", normalise(image).permute(1, 2, 0), atol=1e-6)
    match(FILE, "solarized", paint(image, solarize=True))
    seed(SETTINGS["blur_seed"])
    random.random()
    radius = random.uniform(*SETTINGS["radius"])
    assert radius == recordings(FILE)["blur_radius_seed9"]
    match(FILE, "blur_p1_seed9", paint(image, radius=radius))


@pytest.mark.parametrize("item", [0, 1, 2])
def test_views(recordings: Any, match: Any, item: int) -> None:
    """One whole training item: what `ToCoViews` returns when it draws what the original drew."""
    arrays = recordings(FILE)
    image = arrays["item_image"].numpy()
    size = arrays[f"item{item}_input"].shape[-1]
    views = ToCoViews(size, SETTINGS["scale"], released_behaviour=True)
    seed(item)
    ratio, mirrored = random.uniform(*SETTINGS["scale"]), random.random() > 0.5
    places = place(*(int(ratio * side) for side in image.shape[:2]), size)
    local, main = photometric("local"), photometric("input")
    top, left, height, width = T.RandomResizedCrop.get_params(Image.fromarray(image), SETTINGS["area"], (3 / 4, 4 / 3))
    global_ = photometric("global2")
    if global_["flip"]:  # before the cut in ours, after it in the original
        left = image.shape[1] - left - width
    global_["area"] = left, top, left + width, top + height
    for compose, drawn in ((views.main, main), (views.local, local), (views.global_, global_)):
        give(compose, drawn)
    generator: Any = Draws(places, ratio, mirrored, [drawn["flip"] for drawn in (main, local, global_)])
    found = views({"image": image}, generator)
    match(FILE, f"item{item}_box", found["image_box"])
    for key, view in (
        ("input", "image"),
        ("local", "local_source"),
        ("global2", "global_view"),
    ):
        match(FILE, f"item{item}_{key}", normalise(found[view]))


def test_evaluation_item(recordings: Any, match: Any) -> None:
    match(FILE, "valitem_image", normalise(recordings(FILE)["item_image"].numpy()), atol=1e-6)
    match(FILE, "valitem_label", recordings(FILE)["valitem_gt"])

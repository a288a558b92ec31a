"""Training transforms: what is cut and mirrored together in, the views a method trains on out.

A transform is called with a dict of arrays of one height and width and a numpy generator that alone decides what is
drawn. `image` uint8 (H, W, 3) is the photograph; where a stage learns from pixels there are also ids, integers (H, W),
or scores, floats (H, W, K), which follow the main view. It returns a dict of arrays: of shape (h, w, 3) those are views
in colours 0..255, which the DataModule normalises; `image` is the main one and `image_box` (4,) its rows [b0, b1) and
columns [b2, b3) that hold photograph rather than padding.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from wsss import InputError
from wsss.data import pixels
from wsss.data.pixels import UNDECIDED, Views, resize_all

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version

import albumentations as A
from timm.data import create_transform

BLACK = np.zeros(3, np.uint8)


def scaled_size(image: np.ndarray, ratio: float) -> tuple[int, int]:
    """Height and width of an image resized by a factor."""
    h, w = image.shape[:2]
    return max(1, int(ratio * h)), max(1, int(ratio * w))


def scale_image(image: np.ndarray, ratio: float) -> np.ndarray:
    """Resize by a factor, bilinear with PIL's antialiasing."""
    return np.asarray(Image.fromarray(image).resize(scaled_size(image, ratio)[::-1], Image.Resampling.BILINEAR))


def place_window(height: int, width: int, size: int, rng: np.random.Generator) -> tuple[slice, slice, np.ndarray]:
    """A square window of a canvas that holds an image at a random place: rows, columns and box of what it shows."""
    canvas_height, canvas_width = max(size, height), max(size, width)
    y, x = rng.integers(canvas_height - height + 1), rng.integers(canvas_width - width + 1)  # of the image
    top, left = rng.integers(canvas_height - size + 1), rng.integers(canvas_width - size + 1)  # of the window
    box = np.clip(np.array([y - top, y + height - top, x - left, x + width - left], np.int64), 0, size)
    return slice(box[0] + top - y, box[1] + top - y), slice(box[2] + left - x, box[3] + left - x), box


def pad(part: np.ndarray, box: np.ndarray, size: int, fill: np.ndarray) -> np.ndarray:
    """The window of which the box shows a part of an image and the rest one colour, whose kind of number it has."""
    top, bottom, left, right = box
    window = np.empty((size, size, *part.shape[2:]), fill.dtype)
    if part.shape != window.shape:
        window[:] = np.tile(fill, (size, 1)) if fill.ndim else fill
    window[top:bottom, left:right] = part
    return window


def random_crop(views: Views, size: int, rng: np.random.Generator, fill: np.ndarray = BLACK) -> Views:
    """One square window of a canvas that holds the views at a random place, and `image_box`, the image's box in it.

    The canvas is of one colour `fill` around a photograph, 255 around ids and 0 around scores.
    """
    height, width = views["image"].shape[:2]
    rows, columns, box = place_window(height, width, size, rng)
    cut = {name: pad(view[rows, columns], box, size, _around(view, fill)) for name, view in views.items()}
    return cut | {"image_box": box}


def mirror(view: np.ndarray) -> np.ndarray:
    return cv2.flip(view, 1).reshape(view.shape)  # it drops a last axis of one


def mirror_all(views: Views) -> Views:
    return {name: mirror(view) for name, view in views.items()}


def _around(view: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """What surrounds a view where it does not reach."""
    if view.ndim == 2:
        return np.asarray(UNDECIDED)
    return fill if view.dtype == np.uint8 else np.zeros((), view.dtype)


def mirror_box(box: np.ndarray, width: int) -> np.ndarray:
    return np.array([box[0], box[1], width - box[3], width - box[2]])


def draw_window(
    image: np.ndarray, scale: tuple[float, float], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A square window of a scaled photograph that may be mirrored, black where it does not reach, and the box of it."""
    ratio, mirrored = rng.uniform(*scale), rng.random() < 0.5
    height, width = scaled_size(image, ratio)
    rows, columns, box = place_window(height, width, size, rng)
    if mirrored:
        columns = slice(width - columns.stop, width - columns.start)
    if ratio > 1:
        part = pixels.enlarge_part(image, (height, width), rows, columns)
    else:
        part = scale_image(image, ratio)[rows, columns]
    return pad(mirror(part) if mirrored else part, box, size, BLACK), box


def _check(crop_size: int, scale: Sequence[float]) -> tuple[int, tuple[float, float]]:
    if crop_size < 1:
        raise InputError(f"transform.crop_size is {crop_size}: expected at least 1")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise InputError(f"transform.scale is {list(scale)}: expected two factors, 0 < smallest <= largest")
    return crop_size, (float(scale[0]), float(scale[1]))


def _ranges(jitter: Sequence[float]) -> list[tuple[float, float]]:
    """Smallest and largest factor of brightness, contrast and saturation, and turn of hue, by their strengths."""
    if len(jitter) != 4 or not all(0 <= strength <= (0.5 if i == 3 else 1) for i, strength in enumerate(jitter)):
        raise InputError(f"transform.jitter is {list(jitter)}: expected three strengths in 0..1 and hue in 0..0.5")
    return [(around - strength, around + strength) for around, strength in zip((1, 1, 1, 0), jitter, strict=True)]


def _refuse_pixels(views: Views, name: str) -> None:
    if pixels_given := views.keys() - {"image"}:
        raise InputError(
            f"transform {name} cuts and turns the image alone, and {', '.join(sorted(pixels_given))} could not follow: "
            "choose transform=cam or null for a stage that trains on pixels"
        )


class FlipCrop:
    """The default of a method without a transform of its own: random scale, mirror image, crop.

    Args:
        crop_size: side of the square window; black where the image does not reach.
        scale: smallest and largest factor of the image size.
    """

    def __init__(self, crop_size: int = 448, scale: Sequence[float] = (0.5, 2.0)) -> None:
        self.crop_size, self.scale = _check(crop_size, scale)

    def __call__(self, views: Views, rng: np.random.Generator) -> Views:
        size = scaled_size(views["image"], rng.uniform(*self.scale))
        views = resize_all(views, size, Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            views = mirror_all(views)
        return random_crop(views, self.crop_size, rng)


# Drawn by albumentations, painted as by PIL in the papers' code: OpenCV knows 180 hues, extends borders in another way,
# and its bicubic filter is another one that aliases.


class Jitter(A.ColorJitter):
    """The changes of colour of torchvision on PIL images, in the drawn order."""

    def apply(
        self,
        img: np.ndarray,
        brightness: float,
        contrast: float,
        saturation: float,
        hue: float,
        order: Sequence[int],
        **params: Any,
    ) -> np.ndarray:
        for index in order:
            if index == 0:
                img = pixels.brightness(img, brightness)
            elif index == 1:
                img = pixels.contrast(img, contrast)
            elif index == 2:
                img = np.asarray(ImageEnhance.Color(Image.fromarray(img)).enhance(saturation))
            else:
                img = pixels.turn_hue(img, int(255 * hue))
        return img


class Grey(A.ToGray):
    """PIL's brightness, which differs from OpenCV's by a level here and there."""

    def apply(self, img: np.ndarray, **params: Any) -> np.ndarray:
        return cv2.merge([pixels.grey(img)] * 3)


class Blur(A.GaussianBlur):
    """PIL's Gaussian blur, which repeats box filters."""

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        return {"radius": self.py_random.uniform(*self.sigma_limit)}

    def apply(self, img: np.ndarray, radius: float, **params: Any) -> np.ndarray:
        return pixels.blur(img, radius)


class ResizedCrop(A.RandomResizedCrop):
    """Resized by PIL's antialiased bicubic filter."""

    def apply(self, img: np.ndarray, crop_coords: tuple[int, int, int, int], **params: Any) -> np.ndarray:
        left, top, right, bottom = crop_coords
        part = Image.fromarray(img[top:bottom, left:right])
        return np.asarray(part.resize(self.size[::-1], Image.Resampling.BICUBIC))


class ToCoViews:
    """ToCo's three views: `image`, `global_view` and `local_source` (the view local crops are cut from).

    Main view and crop source show one window of the scaled image under independent photometric changes, the
    global view a random resized crop of the whole image. Photometric changes are DINO's: colour jitter
    (.4, .4, .2, .1) with probability .8, grey with .2, blur (sigma .1 to 2), solarisation of the global view
    with .2.

    Args:
        crop_size: side of all views.
        scale: smallest and largest factor of the image size before the window is cut.
        blur: probabilities of blur of `image`, `global_view` and `local_source`.
        jitter: factor on the strength of the colour jitter, 1 as published.
        released_behaviour: mirror main view and crop source independently, and leave the box unmirrored.
    """

    def __init__(
        self,
        crop_size: int = 448,
        scale: Sequence[float] = (0.5, 2.0),
        blur: Sequence[float] = (1.0, 0.1, 0.5),
        jitter: float = 1.0,
        released_behaviour: bool = False,
    ) -> None:
        if len(blur) != 3:
            raise InputError(f"transform.blur is {list(blur)}: expected three probabilities")
        self.crop_size, self.scale = _check(crop_size, scale)
        self.released_behaviour = released_behaviour
        self.main, self.local = (self._photometric(jitter, p, solarize=0.0) for p in (blur[0], blur[2]))
        self.view = ResizedCrop((crop_size, crop_size), scale=(0.4, 1.0))
        self.global_ = self._photometric(jitter, blur[1], solarize=0.2, first=[self.view])

    @staticmethod
    def _photometric(jitter: float, blur: float, solarize: float, first: Sequence[Any] = ()) -> A.Compose:
        colours = {
            name: (1 - jitter * strength, 1 + jitter * strength)
            for name, strength in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2))
        }
        return A.Compose(
            [
                *first,
                Jitter(**colours, hue=(-0.1 * jitter, 0.1 * jitter), p=0.8),
                Grey(p=0.2),
                Blur(sigma_limit=(0.1, 2.0), p=blur),
                A.Solarize(threshold_range=(128 / 255, 128 / 255), p=solarize),
            ]
        )

    def __call__(self, views: Views, rng: np.random.Generator) -> Views:
        _refuse_pixels(views, type(self).__name__)
        image = views["image"]
        window, box = draw_window(image, self.scale, self.crop_size, rng)
        flips = rng.random(3) < 0.5
        if not self.released_behaviour:
            flips[1] = flips[0]
            if flips[0]:
                box = mirror_box(box, self.crop_size)
        sources = {
            "image": (self.main, window),
            "local_source": (self.local, window),
            "global_view": (self.global_, image),
        }
        result = {"image_box": box}
        for (name, (compose, source)), flip in zip(sources.items(), flips, strict=True):
            compose.set_random_seed(int(rng.integers(2**31)))  # albumentations ignores every other seed
            result[name] = compose(image=mirror(source) if flip else source)["image"]
        return result


OPERATIONS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "identity": lambda picture, magnitude: picture,
    "autocontrast": lambda picture, magnitude: ImageOps.autocontrast(picture),
    "equalize": lambda picture, magnitude: ImageOps.equalize(picture),
    "solarize": lambda picture, magnitude: ImageOps.solarize(picture, min(255, int(256 * magnitude / 10))),
    "color": lambda picture, magnitude: ImageEnhance.Color(picture).enhance(1.8 * magnitude / 10 + 0.1),
    "contrast": lambda picture, magnitude: ImageEnhance.Contrast(picture).enhance(1.8 * magnitude / 10 + 0.1),
    "brightness": lambda picture, magnitude: ImageEnhance.Brightness(picture).enhance(1.8 * magnitude / 10 + 0.1),
    "sharpness": lambda picture, magnitude: ImageEnhance.Sharpness(picture).enhance(1.8 * magnitude / 10 + 0.1),
    "posterize": lambda picture, magnitude: ImageOps.posterize(picture, 4 - int(4 * magnitude / 10)),
}
"""What the strong view of CoSA may have gone through, by magnitudes 1 to 9."""


class CoSAViews:
    """CoSA's two views: `image`, the weak one, and `strong_view`, the same pixels after one change of their colours.

    A window of the scaled photograph, mirrored in half of the cases and blurred (radius 0.1 to 2), is the weak view;
    one of nine `OPERATIONS` with a magnitude of 1 to 9 makes the strong one of it.

    Args:
        crop_size: side of both views.
        scale: smallest and largest factor of the image size before the window is cut.
        blur: probability of the blur.
    """

    def __init__(self, crop_size: int = 448, scale: Sequence[float] = (0.5, 2.0), blur: float = 0.5) -> None:
        if not 0 <= blur <= 1:
            raise InputError(f"transform.blur is {blur}: expected a probability from 0 to 1")
        self.crop_size, self.scale = _check(crop_size, scale)
        self.blur = blur

    def __call__(self, views: Views, rng: np.random.Generator) -> Views:
        _refuse_pixels(views, type(self).__name__)
        weak, box = draw_window(views["image"], self.scale, self.crop_size, rng)
        if rng.random() < self.blur:
            weak = pixels.blur(weak, rng.uniform(0.1, 2.0))
        operation = list(OPERATIONS.values())[rng.integers(len(OPERATIONS))]
        strong = np.asarray(operation(Image.fromarray(weak), int(rng.integers(1, 10))))
        return {"image": weak, "strong_view": strong, "image_box": box}


class LongSideCrop:
    """The training transform of PSA, SEAM, PPC and KAIST's networks: random size, mirror image, jitter, crop.

    Where the image does not reach, the crop shows the mean colour, 0 once it is normalised.

    Args:
        crop_size: side of the square view.
        long_side: smallest and largest length of the longer side in pixels, bicubic.
        jitter: strengths of brightness, contrast, saturation and hue.
        jitter_probability: of any change of colour.
        grey: probability of a grey image.
    """

    mean = (0.485, 0.456, 0.406)

    def __init__(
        self,
        crop_size: int = 448,
        long_side: Sequence[int] = (256, 512),
        jitter: Sequence[float] = (0.3, 0.3, 0.3, 0.1),
        jitter_probability: float = 1.0,
        grey: float = 0.0,
    ) -> None:
        if len(long_side) != 2 or not 1 <= long_side[0] <= long_side[1]:
            raise InputError(
                f"transform.long_side is {list(long_side)}: expected two lengths, 1 <= smallest <= largest"
            )
        self.crop_size, _ = _check(crop_size, (1.0, 1.0))
        self.long_side = long_side
        self.colour = A.Compose([A.ColorJitter(*_ranges(jitter), p=jitter_probability), A.ToGray(p=grey)])

    def __call__(self, views: Views, rng: np.random.Generator) -> Views:
        h, w = views["image"].shape[:2]
        factor = rng.integers(self.long_side[0], self.long_side[1] + 1) / max(h, w)
        size = (max(1, round(h * factor)), max(1, round(w * factor)))
        views = resize_all(views, size, Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            views = mirror_all(views)
        self.colour.set_random_seed(int(rng.integers(2**31)))
        views["image"] = self.colour(image=views["image"])["image"]
        return random_crop(views, self.crop_size, rng, np.array(self.mean, np.float32) * 255)


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion (Liu et al., SSD, ECCV 2016, arXiv 1512.02325), each change in half of the cases.

    Up to 32 levels are added, contrast and saturation multiplied by 0.5 to 1.5, hues turned by up to 36 degrees; the
    contrast comes before the saturation or behind the hue. Levels that leave 0..255 are cut after each change.
    """
    levels = np.arange(256, dtype=np.float32)
    added = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    factor = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    turn = int(rng.integers(-18, 19)) if rng.random() < 0.5 else 0  # OpenCV's hues are halves of degrees
    contrast = np.rint(np.clip(factor * levels, 0, 255)).astype(np.uint8)
    last = rng.random() < 0.5
    image = cv2.LUT(image, np.rint(np.clip(levels + added, 0, 255)).astype(np.uint8))
    image = image if last else cv2.LUT(image, contrast)
    if saturation != 1 or turn:
        hue, chroma, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
        hue = cv2.LUT(hue, ((levels + turn) % 180).astype(np.uint8))
        chroma = cv2.LUT(chroma, np.rint(np.clip(saturation * levels, 0, 255)).astype(np.uint8))
        image = cv2.cvtColor(cv2.merge([hue, chroma, value]), cv2.COLOR_HSV2RGB)
    return cv2.LUT(image, contrast) if last else image


class ScaleCrop:
    """The training transform of DeepLab as PSA's followers train it: random scale, mirror image, crop.

    OpenCV's bilinear filter on floats, ids by the nearest. Where the image ends at the right and below, the crop shows
    the mean colour, 0 once it is normalised. The released code draws one scale for a batch, this one for an image.

    Args:
        crop_size: side of the square view.
        scale: smallest and largest factor of the image size.
        padding: id of the mask's pixels where the image ends: 255 leaves them out, 0, the released code's, makes
            background of them.
        distortion: change the colours by `distort`, as WeakTr does.
    """

    mean = (0.485, 0.456, 0.406)

    def __init__(
        self,
        crop_size: int = 321,
        scale: Sequence[float] = (0.7, 1.3),
        padding: int = 255,
        distortion: bool = False,
    ) -> None:
        if padding not in (0, 255):
            raise InputError(f"transform.padding is {padding}: expected 255 (left out) or 0 (background)")
        self.crop_size, self.scale = _check(crop_size, scale)
        self.padding, self.distortion = np.uint8(padding), distortion

    def __call__(self, views: Views, rng: np.random.Generator) -> Views:
        if self.distortion:
            views = views | {"image": distort(views["image"], rng)}
        size, (height, width) = self.crop_size, scaled_size(views["image"], rng.uniform(*self.scale))
        views = {name: self.resize(view, (width, height)) for name, view in views.items()}
        if rng.random() > 0.5:
            views = mirror_all(views)
        top, left = (int(rng.random() * (side - size)) if side > size else 0 for side in (height, width))
        box = np.array([0, min(size, height - top), 0, min(size, width - left)], np.int64)
        cut = {
            name: pad(view[top : top + size, left : left + size], box, size, self.around(name, view))
            for name, view in views.items()
        }
        return cut | {"image_box": box}

    @staticmethod
    def resize(view: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if view.ndim == 2:
            return cv2.resize(view, size, interpolation=cv2.INTER_NEAREST)
        return cv2.resize(view.astype(np.float32), size, interpolation=cv2.INTER_LINEAR).reshape(*size[::-1], -1)

    def around(self, name: str, view: np.ndarray) -> np.ndarray:
        if view.ndim == 2:
            return np.asarray(self.padding)
        return np.array(self.mean, np.float32) * 255 if name == "image" else np.zeros((), np.float32)


class JitterCrop:
    """The training transform of PSA's affinity network: jitter, crop, mirror image, at the photograph's own size.

    Where the image does not reach, the crop is black.

    Args:
        crop_size: side of the square view.
        jitter: strengths of brightness, contrast, saturation and hue.
    """

    def __init__(self, crop_size: int = 448, jitter: Sequence[float] = (0.3, 0.3, 0.3, 0.1)) -> None:
        self.crop_size, _ = _check(crop_size, (1.0, 1.0))
        self.colour = A.Compose([Jitter(*_ranges(jitter), p=1.0)])

    def __call__(self, views: Views, rng: np.random.Generator) -> Views:
        self.colour.set_random_seed(int(rng.integers(2**31)))
        views = random_crop(views | {"image": self.colour(image=views["image"])["image"]}, self.crop_size, rng)
        if rng.random() < 0.5:
            box = mirror_box(views.pop("image_box"), self.crop_size)
            return mirror_all(views) | {"image_box": box}
        return views


class RandAugmentCrop:
    """The training transform of DeiT and MCTformer, timm's: random resized crop, mirror image, RandAugment, erasing.

    Args:
        crop_size: side of the square view.
        scale: smallest and largest area of the crop as a fraction of the image's.
        auto_augment: timm's name of a policy; null for none.
        erasing: probability that a rectangle is replaced by normal noise.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # grey of new pixels and the noise's scale

    def __init__(
        self,
        crop_size: int = 224,
        scale: Sequence[float] = (0.08, 1.0),
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        erasing: float = 0.25,
    ) -> None:
        self.crop_size, area = _check(crop_size, scale)
        try:
            self.apply = create_transform(
                crop_size,
                is_training=True,
                scale=area,
                interpolation="bicubic",
                color_jitter=0.0,
                auto_augment=auto_augment,
                re_prob=erasing,
                re_mode="pixel",
                mean=self.mean,
                std=self.std,
            )
        except (AssertionError, ValueError, KeyError) as error:
            raise InputError(
                f"transform.auto_augment is {auto_augment!r}: expected one of timm's policies, such as "
                "rand-m9-mstd0.5-inc1, or null"
            ) from error
        for step in self.apply.transforms:
            for operation in [*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))]:
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = posterize

    def __call__(self, views: Views, rng: np.random.Generator) -> Views:
        _refuse_pixels(views, type(self).__name__)
        with global_seed(int(rng.integers(2**31))):
            view = self.apply(Image.fromarray(views["image"]))  # (3, h, w)
        # back to colours, floats because the noise leaves 0..255: the DataModule normalises
        for plane, mean, std in zip(view, self.mean, self.std, strict=True):
            plane.mul_(std).add_(mean).mul_(255)
        return {"image": view.permute(1, 2, 0).numpy()}


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's, which may keep 0 bits: black, which newer versions of PIL refuse."""
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seeds the global generators, which torchvision and timm draw from, and puts their states back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])

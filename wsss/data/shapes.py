"""Shapes: textured objects drawn on the fly, so that a method can be tried without downloading anything.

Every class has a small discriminative part (own hue, own pattern) on a body whose texture it shares with one
other class: 2k and 2k + 1 differ in the part alone. A plain CAM therefore finds the part and misses the body,
the failure that weakly supervised segmentation is about.
"""

import cmath
import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from wsss import InputError
from wsss.data.base import Images

Array = NDArray[Any]
Range = tuple[float, float]

SPLITS = ("train", "val")
WHEEL = "red orange yellow lime green mint cyan azure blue violet magenta rose"  # one every 30 degrees
COLOURS = WHEEL.split()
PATTERNS: dict[str, Callable[[Array, Array], Array]] = {  # phases in radians -> [-1, 1]
    "stripes": lambda u, v: np.sin(u),
    "checks": lambda u, v: np.sign(np.sin(u) * np.sin(v)),
    "dots": lambda u, v: np.clip(2 * (np.cos(u) + np.cos(v)) - 1, -1, 1),
    "rings": lambda u, v: np.sin(np.hypot(u, v)),
    "waves": lambda u, v: np.sin(u + 1.5 * np.sin(0.7 * v)),
}
GOLDEN = (5**0.5 - 1) / 2  # steps of this fraction of the hue circle never repeat and stay well spread
CIRCLE = np.linspace(0, 2 * np.pi, 48, endpoint=False)
COS, SIN = np.cos(CIRCLE), np.sin(CIRCLE)
BUMPS = np.array([2, 3, 5])  # to a turn of the outline
BUMP_WAVES = np.exp(1j * np.outer(BUMPS, CIRCLE))
PART_SHARE = (0.13, 0.17)  # of the object's area
MIN_EXTENT = 8  # pixels; a smaller object has no room for a recognisable part
MIN_BODY_VISIBLE, MIN_PART_VISIBLE = 0.35, 0.5
ATTEMPTS = 10  # placements tried before an object is dropped


@dataclass
class Texture:
    """A surface: hue in [0, 1), (low, high) of saturation, value and, in image sides, wavelength."""

    hue: float
    pattern: str
    saturation: Range
    value: Range
    wavelength: Range
    contrast: float

    def draw(self, rng: np.random.Generator, x: Array, y: Array, angle: float, light: Array | float) -> Array:
        """Jittered colours (N, 3), roughly in [0, 1], at points (N,) in image sides under light (N,)."""
        hue = (self.hue + rng.normal(0, 0.025)) % 1
        colour = colorsys.hsv_to_rgb(hue, rng.uniform(*self.saturation), rng.uniform(*self.value))
        phase = cmath.rect(2 * math.pi / rng.uniform(*self.wavelength), angle)
        pattern = PATTERNS[self.pattern](phase.real * x + phase.imag * y, phase.real * y - phase.imag * x)
        return np.outer(light * (1 + self.contrast * pattern), np.array(colour, np.float32))


def part_texture(c: int) -> Texture:
    """The surface that only class c has."""
    pattern = list(PATTERNS)[c % len(PATTERNS)]
    return Texture(c * GOLDEN % 1, pattern, (0.85, 1), (0.8, 1), (0.07, 0.09), 0.35)


def body_texture(c: int) -> Texture:
    """The surface that classes 2k and 2k + 1 share; hue and pattern differ from those of both their parts."""
    first = c - c % 2
    pattern = list(PATTERNS)[(first + 3) % len(PATTERNS)]
    return Texture((first + 0.5) * GOLDEN % 1, pattern, (0.4, 0.65), (0.45, 0.85), (0.09, 0.13), 0.25)


def class_names(num_classes: int) -> tuple[str, ...]:
    """The part's colour and pattern, such as "red-stripes"; a name already taken gets a number."""
    names: list[str] = []
    for c in range(num_classes):
        part = part_texture(c)
        name = f"{COLOURS[round(part.hue * len(COLOURS)) % len(COLOURS)]}-{part.pattern}"
        names.append(name if name not in names else f"{name}-{c}")
    return tuple(names)


@dataclass
class Placed:
    """One object before others cover it: flat pixel indices and middle (x, y) of body and part in it."""

    c: int
    angle: float
    body: Array
    part: Array
    centre: Array
    anchor: Array

    def recognisable(self, shown: Array) -> bool:
        """Whether enough of body and part is left where shown, a flat bool image, holds."""
        body, part = (np.count_nonzero(shown[pixels]) / len(pixels) for pixels in (self.body, self.part))
        return bool(body >= MIN_BODY_VISIBLE and part >= MIN_PART_VISIBLE)


def place(rng: np.random.Generator, c: int, size: int, scale: Range) -> Placed:
    """An object of class c wholly inside the image; its longer side is within scale times size pixels.

    Ellipses, rounded boxes and blobs are one family for every class, so that no outline tells the class.
    """
    power = rng.uniform(1.2, 4)
    radius = (abs(COS) ** power + abs(SIN) ** power) ** (-1 / power)
    bumps = rng.uniform(0, 0.3 / BUMPS) * np.exp(1j * rng.uniform(0, 2 * np.pi, len(BUMPS)))
    radius *= 1 + (bumps @ BUMP_WAVES).real
    angle = rng.uniform(0, 2 * np.pi)
    turned = radius * (COS + 1j * rng.uniform(0.4, 0.95) * SIN) * cmath.rect(1, angle)
    outline = np.stack([turned.real, turned.imag], 1)
    outline -= outline.min(0)
    extent = round(size * scale[0] * (scale[1] / scale[0]) ** rng.random())  # log-uniform
    outline *= (extent - 1) / outline.max()
    points = np.rint(16 * outline).astype(np.int32)  # 16ths of a pixel, which is what shift=4 means
    room = size - 1 - (points.max(0) + 15) // 16
    points += 16 * rng.integers(0, room, dtype=np.int32, endpoint=True)
    body = np.flatnonzero(cv2.fillPoly(np.zeros((size, size), np.uint8), [points], 1, shift=4))

    # The part is the given share of the body's pixels nearest to an anchor, which always fits the outline.
    rim, centre = points[rng.integers(len(points))] / 16, points.mean(0) / 16
    anchor = centre + rng.uniform(0.5, 1) * (rim - centre)
    distance = (body % size - anchor[0]) ** 2 + (body // size - anchor[1]) ** 2
    count = round(len(body) * rng.uniform(*PART_SHARE))
    part = body[distance < np.partition(distance, count)[count]]
    return Placed(c, angle, body, part, centre, anchor)


def draw_background(rng: np.random.Generator, size: int, characteristic: bool) -> Array:
    """A muted, uneven, patterned surface (H, W, 3) float; the characteristic one has fine blue waves."""
    angle, pattern = rng.uniform(0, 2 * np.pi), list(PATTERNS)[rng.integers(len(PATTERNS))]
    texture = Texture(rng.random(), pattern, (0.05, 0.35), (0.3, 0.8), (0.06, 0.5), rng.uniform(0, 0.15))
    if characteristic:
        angle, texture = np.pi / 2, Texture(0.58, "waves", (0.3, 0.4), (0.5, 0.7), (0.1, 0.12), 0.2)
    y, x = np.indices((size, size), np.float32).reshape(2, -1) / size
    cells = rng.integers(3, 8)
    coarse = rng.uniform(-0.08, 0.08, (cells, cells, 3)) + rng.uniform(-0.2, 0.2, (cells, cells, 1))
    clouds = cv2.resize(coarse.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    return texture.draw(rng, x, y, angle, 1.0).reshape(size, size, 3) + clouds


def paint(rng: np.random.Generator, image: Array, shown: Array, item: Placed) -> None:
    """Paint what a flat bool image shows of an object into image (H, W, 3), lit from a random side."""
    size, surface = len(image), image.reshape(-1, 3)
    brightness, slope = rng.uniform(0.8, 1.15), cmath.rect(0.6, rng.uniform(0, 2 * np.pi))
    body = item.body, item.centre, body_texture(item.c)
    part = item.part, item.anchor, part_texture(item.c)
    for region, middle, texture in (body, part):
        pixels = region[shown[region]]
        u, v = (pixels % size - middle[0]) / size, (pixels // size - middle[1]) / size
        surface[pixels] = texture.draw(rng, u, v, item.angle, brightness + slope.real * u + slope.imag * v)


def expect(holds: bool, name: str, expected: str, found: object) -> None:
    """Refuse an argument with one sentence."""
    if not holds:
        raise InputError(f"{name}: expected {expected}, found {found!r}.")


def is_range(values: Any, kind: type, low: float, high: float) -> bool:
    """Whether values are two numbers of the kind with low <= first <= second <= high."""
    pair = isinstance(values, Sequence) and len(values) == 2 and all(isinstance(v, kind) for v in values)
    return pair and low <= values[0] <= values[1] <= high


class Shapes(Images):
    """Pictures of textured objects with image-level labels; an item depends on (seed, split, index) alone.

    Args:
        split: "train" or "val"; a training item never holds the mask.
        train_size: number of training images.
        val_size: number of validation images.
        size: side of the square image in pixels, at least 8.
        num_classes: foreground classes, 1 to 254; beyond about 40 they become hard to tell apart.
        objects: (fewest, most) objects to place in an image. One that finds no place without hiding another
            is left out, never the first; with 0 fewest, some images are empty and their label is all zero.
        object_scale: (smallest, largest) longer side of an object as a fraction of the image side.
        cooccurrence: probability p with which an image of class 0 shows one characteristic background; other
            images show it with probability 0.1 * (1 - p). At 0 no image does.
        seed: of every random choice, from 0 on.

    """

    def __init__(
        self,
        split: str = "train",
        train_size: int = 4000,
        val_size: int = 200,
        size: int = 64,
        num_classes: int = 8,
        objects: Sequence[int] = (1, 3),
        object_scale: Sequence[float] = (0.35, 0.7),
        cooccurrence: float = 0.0,
        seed: int = 0,
    ) -> None:
        expect(split in SPLITS, "split", "train or val", split)
        counts = {"train_size": (train_size, 1), "val_size": (val_size, 1), "num_classes": (num_classes, 1)}
        for name, (value, low) in (counts | {"size": (size, MIN_EXTENT), "seed": (seed, 0)}).items():
            expect(isinstance(value, Integral) and value >= low, name, f"a whole number from {low} on", value)
        expect(num_classes <= 254, "num_classes", "at most 254, which is what a mask can hold", num_classes)
        fewest_most = is_range(objects, Integral, 0, 254) and objects[1] >= 1
        expect(fewest_most, "objects", "two whole numbers, 0 <= fewest <= most, 1 <= most <= 254", objects)
        smallest = MIN_EXTENT / size
        fractions = f"two fractions from {smallest:.3g} ({MIN_EXTENT} pixels) to 1, the smaller first"
        expect(is_range(object_scale, Real, smallest, 1), "object_scale", fractions, object_scale)
        expect(
            isinstance(cooccurrence, Real) and 0 <= cooccurrence <= 1,
            "cooccurrence",
            "a probability from 0 to 1",
            cooccurrence,
        )
        self.split, self.size, self.cooccurrence, self.seed = split, size, cooccurrence, seed
        self.length = train_size if split == "train" else val_size
        self.objects, self.object_scale = objects, (object_scale[0], object_scale[1])
        self.classes, self.has_masks = class_names(num_classes), split != "train"

    def __len__(self) -> int:
        return self.length

    @property
    def ids(self) -> list[str]:
        return [f"{self.split}-{index:06d}" for index in range(len(self))]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image` uint8 (H, W, 3), `label` float32 (C,) multi-hot, `id` and, but for train, `mask`."""
        rng = self._rng(index)
        items, owner = self._place(rng)
        label = np.zeros(len(self.classes), np.float32)
        label[[item.c for item in items]] = 1
        sample = {"image": self._draw(rng, items, owner), "label": label, "id": f"{self.split}-{index:06d}"}
        return sample if self.split == "train" else sample | {"mask": self.mask(index)}

    def truth(self, index: int, image: Array) -> Array:
        return self.mask(index)

    def mask(self, index: int) -> Array:
        """The true mask uint8 (H, W) of any item, training ones too: 0 background, c + 1 for class c."""
        items, owner = self._place(self._rng(index))
        return np.array([0] + [item.c + 1 for item in items], np.uint8)[owner].reshape(self.size, self.size)

    def _rng(self, index: int) -> np.random.Generator:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return np.random.default_rng([self.seed, SPLITS.index(self.split), index])

    def _place(self, rng: np.random.Generator) -> tuple[list[Placed], Array]:
        """Objects and, for every pixel (H * W,), which one it shows: 0 background, 1 the first object."""
        items: list[Placed] = []
        owner = np.zeros(self.size**2, np.uint8)
        for _ in range(rng.integers(self.objects[0], self.objects[1] + 1)):
            c = int(rng.integers(len(self.classes)))
            for _ in range(ATTEMPTS):
                new, covered = place(rng, c, self.size, self.object_scale), owner.copy()
                covered[new.body] = len(items) + 1
                if all(item.recognisable(covered == number) for number, item in enumerate(items, 1)):
                    items, owner = [*items, new], covered
                    break
        return items, owner

    def _draw(self, rng: np.random.Generator, items: list[Placed], owner: Array) -> Array:
        p = self.cooccurrence
        chance = p if any(item.c == 0 for item in items) else 0.1 * (1 - p) * (p > 0)
        image = draw_background(rng, self.size, rng.random() < chance)
        for number, item in enumerate(items, 1):
            paint(rng, image, owner == number, item)
        grain = 0.1 * rng.random((self.size, self.size, 1), np.float32) - 0.05
        image = cv2.GaussianBlur(image, (3, 3), 0.5) + grain  # the blur softens the cut-out edges
        return (image.clip(0, 1) * 255).astype(np.uint8)

"""Photographs, uint8 (H, W, 3): what PIL makes of them, digit by digit, in a fifth to a half of its time; as tensors.

The papers' code paints with PIL. OpenCV's own functions give other pictures: they know 180 hues, and blur by another
filter. So numpy and OpenCV repeat PIL's arithmetic on whole numbers here.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import permutations

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wsss.cam import reduce

Views = dict[str, np.ndarray]
Transform = Callable[[Views, np.random.Generator], Views]
UNDECIDED = np.uint8(255)


def grey(image: np.ndarray) -> np.ndarray:
    """The brightness of every pixel, (H, W)."""
    return np.asarray(Image.fromarray(image).convert("L"))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """ImageEnhance.Brightness."""
    return _away_from(0, image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """ImageEnhance.Contrast."""
    greys = grey(image)
    return _away_from(int(cv2.sumElems(greys)[0] / greys.size + 0.5), image, factor)


def _away_from(value: int, image: np.ndarray, factor: float) -> np.ndarray:
    colours = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    return cv2.LUT(image, np.asarray(Image.blend(Image.new("L", colours.size, value), colours, factor)))


def turn_hue(image: np.ndarray, steps: int) -> np.ndarray:
    """Adds to the hue of the image's HSV of whole numbers, of which 256 are a turn."""
    hues, falls = _hsv()
    red, green, blue = cv2.split(image)
    high, low = cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue)
    middle, chroma = red + green + blue - high - low, high - low  # bytes wrap around, and back
    hue = np.take(hues, _join(chroma, high - middle, _order(red, green, blue), np.zeros_like(high)))
    fall = np.take(falls, _join(chroma, high))
    place = (np.arange(256) + steps) % 256 * 6  # a sixth of a turn is 255
    shares = np.clip(np.abs(place - np.array([[765], [510], [1020]])) - 255, 0, 255)  # from cyan, green, blue
    shares[0] = 255 - shares[0]
    planes = []
    for share in (shares / 255**2).astype(np.float32):
        lower = cv2.LUT(hue, share)
        lower *= fall
        planes.append(high - np.rint(lower, out=lower).astype(np.uint8))  # never half way: 255**2 is odd
    return cv2.merge(planes)


@cache
def _hsv() -> tuple[np.ndarray, np.ndarray]:
    """PIL's HSV: hue by order, highest - middle channel and chroma; saturation x value by highest channel and chroma.

    Both tables are flat, chroma runs fastest: it is the highest channel - the lowest.
    """
    rows, chroma = np.mgrid[:256, :256].astype(np.uint8)
    highest_first = np.stack([np.full_like(rows, 255), 255 - rows, 255 - chroma])
    hues = np.zeros((8, 256, 256), np.uint8)
    for ranks in permutations(range(3)):
        planes = highest_first[list(ranks)]
        hues[_order(*planes)[1, 2]] = np.asarray(Image.fromarray(planes.transpose(1, 2, 0)).convert("HSV"))[..., 0]
    low = np.maximum(rows, chroma) - chroma
    saturation = np.asarray(Image.fromarray(cv2.merge([rows, low, low])).convert("HSV"))[..., 1]
    return hues.ravel(), (saturation * rows.astype(np.float32)).ravel()


def _order(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """A number below 8 for every order of the channels."""
    order = (red > green).view(np.uint8)
    for pair in (green > blue, blue > red):
        order = order + order + pair
    return order


def _join(*planes: np.ndarray) -> np.ndarray:
    """2 or 4 planes of bytes, lowest first, as one of whole numbers."""
    return cv2.merge(planes).view(f"<u{len(planes)}")[..., 0]


def blur(image: np.ndarray, radius: float) -> np.ndarray:
    """ImageFilter.GaussianBlur: thrice a box whose outermost pixels count in part, along rows, then along columns."""
    single = np.float32  # as PIL computes it
    variance = single(radius) * single(radius) / single(3)
    reach = int((float(single(np.sqrt(12 * float(variance) + 1))) - 1) / 2)
    part = single(2 * reach + 1) * (single(reach * (reach + 1)) - single(3) * variance)
    part /= single(6) * (variance - single((reach + 1) ** 2))
    inner = int(single(2**24) / ((single(reach) + part) * single(2) + single(1)))  # weights in 2**-24
    outer = (2**24 - (2 * reach + 1) * inner) // 2
    for _ in range(2):
        turned = cv2.transpose(image)
        image = _box_blur(turned.reshape(len(turned), -1), reach, inner, outer).reshape(turned.shape)
    return image


def _box_blur(image: np.ndarray, reach: int, inner: int, outer: int) -> np.ndarray:
    """Mixes each row (N, M) with `reach` rows on both sides and, weighted `outer`, the next ones; three times over."""
    count, border = len(image), reach + 1
    weights = [*[np.uint32(inner)] * border, np.uint32(outer)]  # by distance
    result = np.empty_like(image)
    space = np.empty((3 * count + 2 * border, 112), np.uint32)
    for columns in _strips(image.shape[1], space.shape[1]):
        strip = image[:, columns]
        padded, total, pair = np.split(space[:, : strip.shape[1]], [-2 * count, -count])
        rows = padded[border:-border]
        rows[:] = strip
        for _ in range(3):
            padded[:border], padded[-border:] = rows[0], rows[-1]
            np.multiply(rows, weights[0], out=total)
            for distance in range(1, border + 1):
                before, after = border - distance, border + distance
                np.add(padded[before : before + count], padded[after : after + count], out=pair)
                pair *= weights[distance]
                total += pair
            total += np.uint32(2**23)
            np.right_shift(total, np.uint32(24), out=rows)
        result[:, columns] = rows
    return result


def _strips(length: int, step: int) -> Iterator[slice]:
    """Parts small enough for their numbers to stay in the processor's cache."""
    return (slice(start, start + step) for start in range(0, length, step))


def enlarge_part(image: np.ndarray, size: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    """Some rows and columns of what Image.resize, bilinear, makes of the image; `size` (H, W) is at least its own.

    PIL would make all the others too. For smaller sizes its order of the two directions depends on its version.
    """
    down, down_weights = _neighbours(image.shape[0], size[0], rows)
    across, across_weights = _neighbours(image.shape[1], size[1], columns)
    turned = cv2.transpose(image[down.min() : down.max() + 1])
    return _mix(cv2.transpose(_mix(turned, across, across_weights)), down - down.min(), down_weights)


def _neighbours(length: int, enlarged: int, wanted: slice) -> tuple[np.ndarray, np.ndarray]:
    """The two pixels of a side, and their weights in 2**-22, between which the wanted ones lie: both (2, N)."""
    centre = (np.arange(enlarged)[wanted] + 0.5) * (length / enlarged)
    places = np.maximum(centre - 0.5, 0).astype(int) + np.array([[0], [1]])
    weights = np.maximum(1 - np.abs(places - centre + 0.5), 0) * (places < length)
    weights /= weights.sum(axis=0)
    return np.minimum(places, length - 1), (weights * 2**22 + 0.5).astype(np.int32)


def _mix(image: np.ndarray, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rows (N, W, 3) of which each is the weighted mean of two of the image's."""
    flat = image.reshape(len(image), -1)
    result = np.empty((places.shape[1], flat.shape[1]), np.uint8)
    for columns in _strips(flat.shape[1], 448):
        strip = flat[:, columns].astype(np.int32)
        total, second = (strip[place] for place in places)
        total *= weights[0][:, None]
        second *= weights[1][:, None]
        total += second
        total += 2**21
        result[:, columns] = total >> 22
    return result.reshape(-1, *image.shape[1:])


def reduced(image: np.ndarray, max_side: int) -> np.ndarray:
    """What `wsss.cam.reduce` makes of a photograph."""
    if max(image.shape[:2]) <= max_side:
        return image
    image = np.require(image, requirements=["C", "W"])  # as torch wants its arrays
    return reduce(torch.from_numpy(image).permute(2, 0, 1)[None], max_side)[0].permute(1, 2, 0).numpy()


class Normalise:
    """Colours 0..255 (H, W, 3) -> float (3, H, W), (x / 255 - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (np.array(values, np.float32) for values in (mean, std))
        self.tables = (np.arange(256, dtype=np.float32) / 255 - self.mean[:, None]) / self.std[:, None]  # (3, 256)

    def __call__(self, image: np.ndarray) -> Tensor:
        result = np.empty((3, *image.shape[:2]), np.float32)
        planes = cv2.split(image) if image.dtype == np.uint8 else image.transpose(2, 0, 1)
        for plane, out, table, mean, std in zip(planes, result, self.tables, self.mean, self.std, strict=True):
            if plane.dtype == np.uint8:
                cv2.LUT(plane, table, dst=out)
            else:
                np.divide(plane, 255, out=out)
                np.subtract(out, mean, out=out)
                np.divide(out, std, out=out)
        return torch.from_numpy(result)


def resize_all(views: Views, size: tuple[int, int], resample: Image.Resampling) -> Views:
    """To height and width `size`: photographs by a filter of PIL, ids by the nearest, scores bilinearly."""

    def resize(view: np.ndarray) -> np.ndarray:
        if view.ndim == 2:
            return cv2.resize(view, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        if view.dtype != np.uint8:
            return cv2.resize(view, size[::-1], interpolation=cv2.INTER_LINEAR).reshape(*size, -1)
        return np.asarray(Image.fromarray(view).resize(size[::-1], resample))

    return {name: resize(view) for name, view in views.items()}

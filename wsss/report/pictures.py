"""Pictures of masks and maps."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from wsss.writing import palette, write_whole

Array = np.ndarray


def paint(mask: Array) -> Array:
    """(H, W) ids -> (H, W, 3) uint8 in VOC's colours, 255 (ignore) in white."""
    return np.where((mask == 255)[:, :, None], 255, palette()[mask.astype(np.uint8)]).astype(np.uint8)


def heat(image: Array, cam: Array, colours: int = cv2.COLORMAP_JET) -> Array:
    """(H, W, 3) uint8 image under a heat map of (H, W) values in [0, 1], in one of OpenCV's colour maps."""
    coloured = cv2.applyColorMap((255 * cam.clip(0, 1)).astype(np.uint8), colours)[:, :, ::-1]
    return (0.5 * image + 0.5 * coloured).astype(np.uint8)


def overlay(image: Array, mask: Array, opacity: float = 0.5) -> Array:
    """(H, W, 3) uint8 image with the foreground of ids, of any size, tinted in VOC's colours."""
    if mask.shape != image.shape[:2]:
        mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    tinted = (1 - opacity) * image + opacity * paint(mask)
    return np.where((mask > 0)[:, :, None], tinted, image).astype(np.uint8)


def save_examples(folder: Path, items: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """`<name>.png` in a folder for each of `example_grids`."""
    for name, grid in example_grids(items).items():
        with write_whole(folder / f"{name}.png") as file:
            Image.fromarray(grid).save(file, format="PNG")


def example_grids(items: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Array]:
    """By name a picture (H, W, 3) uint8: a grid, a row an image, of what a method's `illustrate` gives."""
    grids: dict[str, Array] = {}
    for name in dict.fromkeys(name for item in items for name in item):
        shown = [item[name] for item in items if name in item]
        titles = list(dict.fromkeys(title for row in shown for title in row))
        blank = np.full((1, 1, 3), 255, np.uint8)
        rows = [[coloured(row["image"], row[title]) if title in row else blank for title in titles] for row in shown]
        grids[name] = grid_of(rows, titles)
    return grids


def coloured(image: Any, value: Any) -> Array:
    """(H, W, 3) uint8 of what `Stage.illustrate` gives: colours, heat upon the image, or ids in VOC's colours."""
    array = value.cpu().numpy()
    if array.ndim == 3:
        return array
    return heat(image.cpu().numpy(), array) if array.dtype.kind == "f" else paint(array)


def grid_of(rows: Sequence[Sequence[Array]], titles: Sequence[str], side: int = 160) -> Array:
    """Pictures (H, W, 3) uint8 in rows under column titles, each fitted into a square of `side` pixels, as one."""
    gap, head = 4, 18
    sheet = Image.new("RGB", (len(titles) * (side + gap) + gap, len(rows) * (side + gap) + gap + head), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((gap + x * (side + gap), 3), title, fill="black")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile = Image.fromarray(np.ascontiguousarray(picture))
            factor = side / max(tile.size)
            tile = tile.resize([max(1, round(length * factor)) for length in tile.size], Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + x * (side + gap), head + gap + y * (side + gap)))
    return np.asarray(sheet)


def thumbnail(value: Array, image: Array, longest: int = 320) -> tuple[bytes, tuple[int, int]]:
    """A WebP file of what `Stage.illustrate` gives, and its width and height: small, and clear without colours.

    Heat is drawn in viridis, which rises in brightness. In masks the number of each class stands in its largest part,
    and what is undecided is hatched. Small images are enlarged, so that numbers fit.

    Args:
        value: bytes (H, W, 3), floats (H, W) in [0, 1], or ids (H, W).
        image: uint8 (H, W, 3), which heat is drawn upon.
        longest: side in pixels.
    """
    height, width = value.shape[:2]
    factor = longest / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    smooth = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST
    if value.ndim == 3:
        picture = cv2.resize(value.astype(np.uint8), size, interpolation=smooth)
    elif value.dtype.kind == "f":
        below = cv2.resize(image.astype(np.uint8), size, interpolation=smooth)
        picture = heat(below, cv2.resize(value.astype(np.float32), size), cv2.COLORMAP_VIRIDIS)
    else:
        picture = numbered(cv2.resize(value.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT))
    with io.BytesIO() as file:
        Image.fromarray(np.ascontiguousarray(picture)).save(file, format="WEBP", quality=80, method=4)
        return file.getvalue(), size


def numbered(mask: Array) -> Array:
    """`paint`, with the number of each class upon its largest part, and hatches where nothing is decided."""
    picture = paint(mask)
    rows, columns = np.indices(mask.shape)
    picture[(mask == UNDECIDED) & ((rows + columns) % 8 < 2)] = 120
    for number in np.unique(mask[(mask > 0) & (mask != UNDECIDED)]).tolist():
        _, parts, statistics, _ = cv2.connectedComponentsWithStats((mask == number).astype(np.uint8))
        part = 1 + int(statistics[1:, cv2.CC_STAT_AREA].argmax())
        depth = cv2.distanceTransform(np.pad((parts == part).astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
        _, deepest, _, (x, y) = cv2.minMaxLoc(depth)
        if deepest < LEAST_DEPTH:
            continue
        text, font = str(number), cv2.FONT_HERSHEY_SIMPLEX
        (wide, high), _ = cv2.getTextSize(text, font, 0.6, 2)
        place = (int(x - wide / 2), int(y + high / 2))
        cv2.putText(picture, text, place, font, 0.6, (0, 0, 0), 4, cv2.LINE_AA)
        cv2.putText(picture, text, place, font, 0.6, (255, 255, 255), 2, cv2.LINE_AA)
    return picture


UNDECIDED = 255
LEAST_DEPTH = 7
"""Pixels from a part's border to where its number stands; in smaller ones there is no room for it."""

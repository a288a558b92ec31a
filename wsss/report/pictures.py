"""Pictures of masks and maps."""

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


def heat(image: Array, cam: Array) -> Array:
    """(H, W, 3) uint8 image under a heat map of (H, W) values in [0, 1]."""
    coloured = cv2.applyColorMap((255 * cam.clip(0, 1)).astype(np.uint8), cv2.COLORMAP_JET)[:, :, ::-1]
    return (0.5 * image + 0.5 * coloured).astype(np.uint8)


def overlay(image: Array, mask: Array, opacity: float = 0.5) -> Array:
    """(H, W, 3) uint8 image with the foreground of ids, of any size, tinted in VOC's colours."""
    if mask.shape != image.shape[:2]:
        mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    tinted = (1 - opacity) * image + opacity * paint(mask)
    return np.where((mask > 0)[:, :, None], tinted, image).astype(np.uint8)


def save_examples(folder: Path, items: Sequence[Mapping[str, Mapping[str, Any]]]) -> None:
    """`<name>.png` in a folder for each name: a grid, a row an image, of what a method's `illustrate` gives."""
    for name in dict.fromkeys(name for item in items for name in item):
        shown = [item[name] for item in items if name in item]
        titles = list(dict.fromkeys(title for row in shown for title in row))
        blank = np.full((1, 1, 3), 255, np.uint8)
        grid = [[_picture(row["image"], row[title]) if title in row else blank for title in titles] for row in shown]
        save_grid(folder / f"{name}.png", grid, titles)


def _picture(image: Any, value: Any) -> Array:
    """(H, W, 3) uint8 of colours, of heat upon the image, or of ids."""
    array = value.cpu().numpy()
    if array.ndim == 3:
        return array
    return heat(image.cpu().numpy(), array) if array.dtype.kind == "f" else paint(array)


def save_grid(path: Path, rows: Sequence[Sequence[Array]], titles: Sequence[str], side: int = 160) -> None:
    """A PNG of pictures (H, W, 3) uint8 in rows under column titles, each fitted into a square of `side` pixels."""
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
    with write_whole(path) as file:
        sheet.save(file, format="PNG")

"""What of a mask the formats of annotation tools hold: regions of classes, as runs or as polygons."""

from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np


class Labelled(NamedTuple):
    """The mask of an image.

    Attributes:
        name: of the mask, a relative path without suffix.
        file: of the image, a relative path.
        mask: ids, uint8 (H, W).
    """

    name: str
    file: str
    mask: np.ndarray


def regions(mask: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each class c of ids (H, W), from 0 on, with its pixels, bool (H, W)."""
    for value in np.unique(mask):
        if value not in (0, 255):
            yield int(value) - 1, mask == value


def runs(values: np.ndarray) -> np.ndarray:
    """Lengths of the runs of bool (N,), beginning with that of False, which may be 0."""
    ends = np.flatnonzero(np.diff(values)) + 1
    lengths = np.diff(np.concatenate([[0], ends, [values.size]]))
    return np.concatenate([[0], lengths]) if values[0] else lengths


def pieces(region: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
    """A region, bool (H, W), in connected pieces without holes: bool (h, w), and the row and column it begins at.

    A piece with a hole is cut in two along the left side of the hole, until none has one.
    """
    left = [(region.astype(np.uint8), 0, 0)]
    while left:
        part, top, begin = left.pop()
        count, numbers, boxes, _ = cv2.connectedComponentsWithStats(part, connectivity=4)
        for number in range(1, count):
            x, y, w, h = boxes[number, :4]
            piece = numbers[y : y + h, x : x + w] == number
            around = np.pad(~piece, 1, constant_values=True).astype(np.uint8)
            outside, _, holes, _ = cv2.connectedComponentsWithStats(around, connectivity=4)
            if outside == 2:
                yield piece, top + y, begin + x
                continue
            # number 1 is what surrounds the piece, as labels are given from the first row on
            cut = holes[2, cv2.CC_STAT_LEFT] - 1
            for columns in (slice(0, cut), slice(cut, w)):
                left.append((piece[:, columns].astype(np.uint8), top + y, begin + x + columns.start))


def outline(piece: np.ndarray) -> np.ndarray:
    """Corners (N, 2), x and y, along the sides of the pixels of a connected piece without holes, bool (h, w)."""
    inside = np.pad(piece, 1)
    sides = (  # direction east, south, west, north with the piece on the right, and where such a side begins
        (inside & ~np.roll(inside, 1, 0), 0, 0),
        (inside & ~np.roll(inside, -1, 1), 1, 0),
        (inside & ~np.roll(inside, -1, 0), 1, 1),
        (inside & ~np.roll(inside, 1, 1), 0, 1),
    )
    leaving: dict[tuple[int, int], set[int]] = {}
    for direction, (pixels, right, down) in enumerate(sides):
        for y, x in zip(*(axis.tolist() for axis in np.nonzero(pixels)), strict=True):
            leaving.setdefault((x - 1 + right, y - 1 + down), set()).add(direction)
    begin = min(leaving, key=lambda corner: corner[::-1])  # the top left corner, which a side leaves to the east
    place, direction, corners = begin, 0, [begin]
    steps = ((1, 0), (0, 1), (-1, 0), (0, -1))
    while True:
        place = (place[0] + steps[direction][0], place[1] + steps[direction][1])
        if place == begin:
            return np.array(corners)
        turned = (direction + 1) % 4  # to the right where pixels touch by a corner alone: each has a side of its own
        following = turned if turned in leaving[place] else min(leaving[place])
        if following != direction:
            corners.append(place)
        direction = following


def polygons(region: np.ndarray) -> list[np.ndarray]:
    """Outlines (N, 2) of the pieces of a region, bool (H, W), in pixels: together they fill it exactly."""
    return [outline(piece) + np.array([column, row]) for piece, row, column in pieces(region)]


def colour(number: int, colours: np.ndarray) -> str:
    """That of a class, as tools write it."""
    return "#{:02x}{:02x}{:02x}".format(*colours[number + 1])


def has_holes(mask: np.ndarray) -> bool:
    """Whether a region of ids (H, W) surrounds pixels that are not of it."""
    return any(
        cv2.connectedComponents(np.pad(~region, 1, constant_values=True).astype(np.uint8), connectivity=4)[0] > 2
        for _, region in regions(mask)
    )

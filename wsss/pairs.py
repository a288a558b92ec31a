"""Pairs of nearby cells of a map, and the labels of cells that PSA's affinity network learns pairs from.

PSA: Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision", CVPR 2018, arXiv 1803.10464.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

CELL = 8
"""Pixels along a cell's side."""


def pair_offsets(radius: int) -> list[tuple[int, int]]:
    """(dy, dx) of the pairs of a cell in PSA's order: nearer than `radius`, one direction of every two.

    First (0, 1), (0, 2), ..., then the rows below from left to right: K = 12 of radius 3, 34 of radius 5.
    """
    below = ((dy, dx) for dy in range(1, radius) for dx in range(1 - radius, radius))
    return [(0, dx) for dx in range(1, radius)] + [(dy, dx) for dy, dx in below if dy**2 + dx**2 < radius**2]


def source_size(size: Sequence[int], radius: int) -> tuple[int, int]:
    """Height and width of the block of cells that pairs start from: those whose pairs all lie in a map of `size`.

    Rows 0 to h - radius and columns radius - 1 to w - radius; 0 where the map is too small for any pair.
    """
    reach = max(radius - 1, 0)
    rows, columns = size[0] - reach, size[1] - 2 * reach
    return (rows, columns) if min(rows, columns) > 0 else (0, 0)


def pair_views(maps: Tensor, radius: int) -> tuple[Tensor, list[Tensor]]:
    """Maps (..., h, w) at the start of all pairs and at their K ends: views of `source_size`, row by row the pairs."""
    rows, columns = source_size(maps.shape[-2:], radius)

    def shifted(dy: int, dx: int) -> Tensor:
        left = max(radius - 1, 0) + dx
        return maps[..., dy : dy + rows, left : left + columns]

    return shifted(0, 0), [shifted(dy, dx) for dy, dx in pair_offsets(radius)]


def fitting_radius(size: Sequence[int], radius: int) -> int:
    """`radius`, or where no pair of it fits into a map of `size` SEAM's for small ones: (smallest side - 1) // 2.

    At least 1, of which there is no pair.
    """
    return radius if source_size(size, radius)[0] else max(1, (min(size) - 1) // 2)


def affinity_labels(low: Tensor, high: Tensor, ignore_index: int = 255) -> Tensor:
    """What two strengths of background agree on, a label for each cell of 8 x 8 pixels (PSA, section 3.2).

    Scores are averaged over the cells, those at the right and lower border being filled up with 0. A cell is a class
    where that wins against a weak background (`low`), background where this wins even when strong (`high`), and ignored
    otherwise, as are cells without scores, e.g. around a crop.

    Args:
        low: (B, 1 + n, H, W) scores, the background first, for the low alpha of (1 - max cam) ** alpha.
        high: likewise for the high alpha.
        ignore_index: label of undecided cells.

    Returns:
        (B, h, w) long, indices of channels, h x w being ceil(H / 8) x ceil(W / 8).
    """
    height, width = low.shape[-2:]
    around = (0, -width % CELL, 0, -height % CELL)
    low, high = (F.avg_pool2d(F.pad(scores, around), CELL) for scores in (low, high))
    first, second = low.argmax(dim=1), high.argmax(dim=1)
    label = first.masked_fill(first == 0, ignore_index).masked_fill(second == 0, 0)
    return label.masked_fill((low.amax(dim=1) < 1e-5) & (high.amax(dim=1) < 1e-5), ignore_index)

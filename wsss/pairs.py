"""Pairs of nearby cells of a map, the paths between them, and the labels of cells that PSA's network learns pairs from.

PSA: Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision", CVPR 2018, arXiv 1803.10464.
IRN: Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019,
arXiv 1904.05044.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 8
"""Pixels along a cell's side."""
EDGE_CELL = 4
"""Likewise of the cells of IRN."""


def cells_of(size: Sequence[int], cell: int) -> tuple[int, int]:
    """Height and width in cells of an image of height and width `size`; those at its border may reach beyond it."""
    return -(-size[0] // cell), -(-size[1] // cell)


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


def shifted(maps: Tensor, radius: int, offset: tuple[int, int]) -> Tensor:
    """Maps (..., h, w) at (dy, dx) from the start of all pairs: a view of `source_size`."""
    rows, columns = source_size(maps.shape[-2:], radius)
    top, left = offset[0], max(radius - 1, 0) + offset[1]
    return maps[..., top : top + rows, left : left + columns]


def pair_views(maps: Tensor, radius: int) -> tuple[Tensor, list[Tensor]]:
    """Maps (..., h, w) at the start of all pairs and at their K ends: views of `source_size`, row by row the pairs."""
    return shifted(maps, radius, (0, 0)), [shifted(maps, radius, offset) for offset in pair_offsets(radius)]


@cache
def pair_paths(radius: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """For each of `pair_offsets` the cells (dy, dx) of the straight path from its end to its start (IRN).

    Those of the rectangle between both that are less than one cell away from the line through them.
    """

    def path(dy: int, dx: int) -> tuple[tuple[int, int], ...]:
        cells = [(y, x) for y in range(dy + 1) for x in range(min(0, dx), max(0, dx) + 1)]
        near = [(y, x) for y, x in cells if (x * dy - y * dx) ** 2 < dy**2 + dx**2]
        return tuple(sorted(near, key=lambda cell: -abs(cell[0]) - abs(cell[1])))

    return tuple(path(dy, dx) for dy, dx in pair_offsets(radius))


def path_affinity(edge: Tensor, radius: int) -> Tensor:
    """How likely no boundary lies between the cells of a pair: 1 - max of `edge` along `pair_paths` (IRN, equation 3).

    Args:
        edge: (B, 1, h, w) in [0, 1].
        radius: of the pairs, in cells.

    Returns:
        (B, K, n), of the pairs of `pair_views`. The gradient reaches one cell of each path.
    """
    edge = edge[:, 0]
    if not pair_offsets(radius):
        return edge.new_zeros(len(edge), 0, edge[0].numel())
    # one path at a time: all of them side by side would be as many times the map as they have cells
    highest = [torch.stack([shifted(edge, radius, c) for c in path]).max(0).values for path in pair_paths(radius)]
    return 1 - torch.stack(highest, dim=1).flatten(2)


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

"""Objects of one class told apart by where their cells point to (IRN).

Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019,
arXiv 1904.05044, section 4.2, as its code does it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

CHUNK = 16
"""Maps that are walked at a time, which bounds the memory whatever the number of clusters."""


class Instances(NamedTuple):
    """
    Attributes:
        numbers: (H, W) long: 0 where no instance is, else its number, from 1 on by falling score.
        classes: of each instance, k for the k-th of the maps.
        scores: of each instance, in [0, 1].
    """

    numbers: Tensor
    classes: list[int]
    scores: list[float]


def find_centroids(displacement: Tensor, steps: int = 300) -> Tensor:
    """Where each cell gets to that follows the displacements, interpolated bilinearly, without leaving the map.

    Args:
        displacement: (2, h, w), dy and dx in cells.
        steps: how often.

    Returns:
        (2, h, w) long, row and column.
    """
    h, w = displacement.shape[-2:]
    rows, columns = (torch.arange(side, device=displacement.device, dtype=torch.float32) for side in (h, w))
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    field, last = displacement.flatten(1), torch.tensor([h - 1, w - 1], device=displacement.device)[:, None, None]
    for _ in range(steps):
        low, high = place.floor().long(), place.ceil().long()
        share = place.double() - low  # of the higher neighbour
        moved = torch.zeros_like(share)
        for y, row_share in ((low[0], 1 - share[0]), (high[0], share[0])):
            for x, column_share in ((low[1], 1 - share[1]), (high[1], share[1])):
                moved += field[:, y * w + x] * (row_share * column_share)
        place = (place + moved).clamp(min=torch.zeros_like(last)).minimum(last).float()
    return place.round().long()


def cluster(centroids: Tensor, displacement: Tensor, threshold: float = 2.5) -> Tensor:
    """(h, w) long: which centre a cell belongs to, 0 for all that get to none.

    A centre is a 4-connected group of cells whose displacement is shorter than `threshold` cells.
    """
    weak = (displacement.norm(dim=0) < threshold).byte().cpu().numpy()
    centres = torch.from_numpy(cv2.connectedComponents(weak, connectivity=4)[1]).to(centroids)
    return centres[centroids[0], centroids[1]]


def separate(
    cam: Tensor,
    clusters: Tensor,
    walk: Callable[[Tensor], Tensor],
    size: Sequence[int],
    background: float = 0.25,
    smallest: float = 0.01,
) -> Instances:
    """The instances of an image: the maps of its classes, cut to each cluster, walk, and each pixel goes to the best.

    What becomes of one class and cluster is an instance for each of its 4-connected fragments; its score is the largest
    there. Fragments below a share of the image are none (the released code gives them the score 0).

    Args:
        cam: (n, h, w) maps of the classes, not negative.
        clusters: (h, w) of `cluster`; the cells of no centre are one of them.
        walk: maps (1, k, h, w) -> scores (1, k, *size), none of them above the largest of its map.
        size: of the image.
        background: what a score, divided by the largest of the image, has to exceed.
        smallest: see above.
    """
    flat, count = clusters.flatten(), int(clusters.max()) + 1
    peaks = cam.new_zeros(len(cam), count).scatter_reduce(1, flat.expand(len(cam), -1), cam.flatten(1), "amax")
    peaks, order = peaks.flatten().sort(descending=True)
    best, owner = cam.new_zeros(tuple(size)), clusters.new_zeros(tuple(size))  # owner: 1 + place in `order`
    for start in range(0, len(order), CHUNK):
        # no score is above the peak of its map, and those that follow are lower
        chunk = order[start : start + CHUNK][peaks[start : start + CHUNK] > background * best.max()]
        if not len(chunk):
            break
        maps = cam[chunk // count] * (clusters == (chunk % count)[:, None, None])
        score, index = walk(maps[None])[0].max(dim=0)
        owner = torch.where(score > best, index + start + 1, owner)
        best = torch.maximum(score, best)
    best = best / best.max().clamp(min=torch.finfo(best.dtype).tiny)
    owners, scores = (owner * (best > background)).cpu().numpy(), best.cpu().numpy()
    found: list[tuple[float, int, np.ndarray]] = []
    for number in np.unique(owners[owners > 0]):
        mine = (owners == number).astype(np.uint8)
        _, parts, statistics, _ = cv2.connectedComponentsWithStats(mine, connectivity=4)
        for part in 1 + np.flatnonzero(statistics[1:, cv2.CC_STAT_AREA] >= smallest * parts.size):
            fragment = parts == part
            found.append((float(scores[fragment].max()), int(order[number - 1]) // count, fragment))
    found.sort(key=lambda one: -one[0])
    numbers = np.zeros(owners.shape, np.int64)
    for number, (_, _, fragment) in enumerate(found, 1):
        numbers[fragment] = number
    return Instances(torch.from_numpy(numbers), [k for _, k, _ in found], [score for score, _, _ in found])

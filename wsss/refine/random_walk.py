"""The random walk of PSA and IRN: activation maps that spread to where affinities of neighbouring cells lead them.

PSA: Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision", CVPR 2018, arXiv 1803.10464;
IRN: Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019,
arXiv 1904.05044; as their code does it. A map of h x w cells has N = h w of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.cam import resize
from wsss.pairs import CELL, pair_offsets, pair_views, path_affinity, source_size

DENSE_CELLS = {"cpu": 512, "cuda": 4096}
"""Up to so many cells of a map the dense form is the faster one, by device."""


def check_affinity(affinity: Tensor, size: tuple[int, int], radius: int) -> None:
    """Raises ValueError where affinities are not those of the pairs of a map."""
    rows, columns = source_size(size, radius)
    expected = (len(pair_offsets(radius)), rows * columns)
    if affinity.shape[-2:] != expected:
        raise ValueError(f"affinities of a {size[0]} x {size[1]} map and radius {radius} are {expected} an image")


def dense_affinity(affinity: Tensor, size: tuple[int, int], radius: int) -> Tensor:
    """The affinities of pairs (B, K, n) as a symmetric matrix (B, N, N): 1 on the diagonal, 0 between the others."""
    check_affinity(affinity, size, radius)
    cells = torch.arange(size[0] * size[1], device=affinity.device)
    start, ends = pair_views(cells.view(size), radius)
    matrix = torch.eye(len(cells), device=affinity.device, dtype=affinity.dtype).repeat(len(affinity), 1, 1)
    for end, values in zip(ends, affinity.unbind(1), strict=True):
        matrix[:, start.flatten(), end.flatten()] = values
        matrix[:, end.flatten(), start.flatten()] = values
    return matrix


def transition(matrix: Tensor, beta: float) -> Tensor:
    """(B, N, N) affinities, each raised to `beta`, then every column divided by its sum."""
    matrix = matrix**beta
    return matrix / matrix.sum(dim=-2, keepdim=True)


@torch.no_grad()
def random_walk(
    affinity: Tensor, maps: Tensor, radius: int = 5, beta: float = 8.0, logt: int = 8, dense: bool | None = None
) -> Tensor:
    """Maps after 2 ** logt steps of the walk: maps T^(2 ** logt), T being `transition` of `dense_affinity`.

    The dense form squares T in memory of O(B N^2). The sparse one multiplies the maps by T once for each step, in twice
    the memory of the affinities and some times that of the maps; nothing in its loop waits for a GPU. They differ by
    rounding alone.

    Args:
        affinity: (B, K, n) in [0, 1], of the pairs of `wsss.pairs.pair_views` for `radius`.
        maps: (B, C, h, w).
        radius: of the pairs; 1 or less has none, and the maps stay as they are.
        beta: exponent of the affinities.
        logt: binary logarithm of the number of steps.
        dense: which form; None takes the faster one.

    Returns:
        (B, C, h, w) float32, or float64 where both inputs are.

    Raises:
        ValueError: `affinity` is not of such pairs.
    """
    h, w = maps.shape[-2:]
    check_affinity(affinity, (h, w), radius)
    if dense is None:
        dense = h * w <= DENSE_CELLS.get(maps.device.type, 0)
    double = affinity.dtype == maps.dtype == torch.double
    affinity, maps = (x if double else x.float() for x in (affinity, maps))
    with torch.autocast(maps.device.type, enabled=False):
        if dense:
            matrix = transition(dense_affinity(affinity, (h, w), radius), beta)
            for _ in range(logt):
                matrix = transition(matrix @ matrix, 1)  # the sums stay 1, but for what rounding adds at each step
            return (maps.flatten(2) @ matrix).view_as(maps)
        return _sparse_walk(affinity**beta, maps, radius, 2**logt)


def _sparse_walk(weight: Tensor, maps: Tensor, radius: int, steps: int) -> Tensor:
    """Steps of maps (B, C, h, w) with the affinities (B, K, n) as they weigh.

    A step adds to every cell the mean difference of its neighbours, so that rounding is that of the differences: a sum
    of the neighbours themselves would be off in one direction, step after step.
    """
    size = source_size(maps.shape[-2:], radius)
    weights = weight.unflatten(2, size)[:, :, None].unbind(1)  # K of (B, 1, rows, columns)
    total = torch.ones_like(maps[:, :1])
    start, ends = pair_views(total, radius)
    for values, end in zip(weights, ends, strict=True):
        start += values
        end += values
    maps, change = maps.clone(), torch.empty_like(maps)
    (start, ends), (to_start, to_ends) = pair_views(maps, radius), pair_views(change, radius)
    difference = torch.empty_like(start, memory_format=torch.contiguous_format)
    for _ in range(steps):
        change.zero_()
        for values, end, to_end in zip(weights, ends, to_ends, strict=True):
            torch.sub(end, start, out=difference).mul_(values)
            to_start += difference
            to_end -= difference
        maps.addcdiv_(change, total)
    return maps


def edge_walk(
    edge: Tensor, maps: Tensor, radius: int = 5, beta: float = 10.0, logt: int = 8, dense: bool | None = None
) -> Tensor:
    """`random_walk` of maps that fade where class boundaries are, and do not cross them (IRN).

    Unlike with PSA every cell has all pairs of the radius: around the map everything is boundary.

    Args:
        edge: (B, 1, h, w) in [0, 1].
        maps: (B, C, h, w).
        radius, beta, logt, dense: see `random_walk`.
    """
    (h, w), reach = maps.shape[-2:], max(radius - 1, 0)
    around = (reach, reach, 0, reach)
    affinity = path_affinity(F.pad(edge, around, value=1.0), radius)
    walked = random_walk(affinity, F.pad(maps * (1 - edge), around), radius, beta, logt, dense)
    return walked[..., :h, reach : reach + w]


def with_background_score(cam: Tensor, background: float | None = None, alpha: float = 16.0) -> Tensor:
    """(B, C, H, W) in [0, 1] -> (B, 1 + C, H, W): first a constant `background`, or where None (1 - max) ** alpha."""
    strongest = cam.amax(dim=1, keepdim=True)
    first = (1 - strongest).clamp(min=0) ** alpha if background is None else torch.full_like(strongest, background)
    return torch.cat([first, cam], dim=1)


def pad_to_cells(maps: Tensor) -> Tensor:
    """(B, C, H, W) with 0 at the right and lower border, up to multiples of 8 pixels."""
    height, width = maps.shape[-2:]
    return F.pad(maps, (0, -width % CELL, 0, -height % CELL))


def refine_scores(
    affinity: Tensor, scores: Tensor, radius: int = 5, beta: float = 8.0, logt: int = 8, dense: bool | None = None
) -> Tensor:
    """Scores (B, K, H, W) of pixels after a walk over the cells of 8 x 8 pixels of the padded image.

    Averaged over the cells, walked as `random_walk` says, resized to the padded image (bilinear), and cut to it.
    """
    padded = pad_to_cells(scores)
    walked = random_walk(affinity, F.avg_pool2d(padded, CELL), radius, beta, logt, dense)
    height, width = scores.shape[-2:]
    return resize(walked, padded.shape[-2:])[..., :height, :width]

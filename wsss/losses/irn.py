"""The displacement loss of IRN: vectors that point to the centre of an object's cells."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from wsss.losses.affinity import pair_labels
from wsss.losses.registry import register
from wsss.pairs import pair_offsets, pair_views


def pair_displacement(displacement: Tensor, radius: int) -> Tensor:
    """D(start) - D(end) of all pairs of `wsss.pairs.pair_views`: (B, 2, h, w) -> (B, 2, K, n)."""
    start, ends = pair_views(displacement, radius)
    if not ends:
        return displacement.new_zeros(*displacement.shape[:2], 0, start[0, 0].numel())
    return torch.stack([start - end for end in ends], dim=2).flatten(3)


@lru_cache
def _offsets(radius: int, device: torch.device) -> Tensor:
    """(1, 2, K, 1) from the start to the end of all pairs; copied to a device once, since a copy waits for it."""
    return torch.tensor(pair_offsets(radius), dtype=torch.float32, device=device).view(-1, 2).mT[None, :, :, None]


def displacement_terms(displacement: Tensor, label: Tensor, radius: int, ignore_index: int = 255) -> Tensor:
    """The two terms of `DisplacementLoss`, (2,): of pairs of one foreground class, and of background."""
    displacement = displacement.double() if displacement.dtype == torch.double else displacement.float()
    background, foreground, _ = pair_labels(label, radius, ignore_index)
    found = pair_displacement(displacement, radius)
    offsets = _offsets(radius, found.device)
    kinds = ((foreground.to(found), (found - offsets).abs()), (background.to(found), found.abs()))
    return torch.stack([(cost * mask[:, None]).sum() / (2 * mask.sum() + 1e-5) for mask, cost in kinds])


@register("displacement")
class DisplacementLoss(nn.Module):
    """Pairs of nearby cells of one class are to point to one centre.

    Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019,
    arXiv 1904.05044, equations 4 and 5 as its code has them. With D(i) the displacement of cell i, x_i its place, P_fg
    the pairs (i, j) of one foreground class and P_bg those of background:

        loss = (L_fg + L_bg) / 2
        L_fg = sum_{P_fg} |D(i) - D(j) - (x_j - x_i)|_1 / (2 |P_fg| + 1e-5)
        L_bg = sum_{P_bg} |D(i) - D(j)|_1 / (2 |P_bg| + 1e-5)

    Sums and counts are those of the whole batch. A kind without any pair contributes 0 and a gradient of 0.

    Args:
        radius: of the pairs, in cells; a pair is nearer than that.
        ignore_index: label of the undecided cells, whose pairs do not count.

    Examples:
        >>> y, x = torch.meshgrid(torch.arange(5.0), torch.arange(9.0), indexing="ij")
        >>> centre = torch.stack([2 - y, 4 - x])[None]  # every cell points to row 2, column 4
        >>> build("displacement", radius=5)(centre, torch.ones(1, 5, 9, dtype=torch.long))
        tensor(0.)
        >>> build("displacement", radius=5)(0 * centre, torch.zeros(1, 5, 9, dtype=torch.long))
        tensor(0.)
    """

    over_batch = 2

    def __init__(self, radius: int = 10, ignore_index: int = 255) -> None:
        super().__init__()
        self.radius, self.ignore_index = radius, ignore_index

    def forward(self, displacement: Tensor, label: Tensor) -> Tensor:
        """Returns the scalar loss.

        Args:
            displacement: (B, 2, h, w), dy and dx in cells.
            label: (B, h, w) integers, 0 background.
        """
        return displacement_terms(displacement, label, self.radius, self.ignore_index).mean()

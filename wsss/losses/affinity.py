"""The pair loss of PSA: cells of one class are to be alike, cells of different ones not."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wsss.losses.registry import register
from wsss.pairs import pair_views


def pair_labels(label: Tensor, radius: int, ignore_index: int = 255) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs of cells are both background, both of one foreground class, and of different classes.

    Pairs with an ignored cell are none of them.

    Args:
        label: (B, h, w), 0 background.
        radius: of the pairs, at least 2.

    Returns:
        three bool masks (B, K, n).
    """
    start, ends = pair_views(label, radius)
    first, end = start.flatten(1)[:, None], torch.stack([end.flatten(1) for end in ends], dim=1)
    known, equal = (first != ignore_index) & (end != ignore_index), first == end
    return equal & (first == 0), equal & known & (first != 0), ~equal & known


def pair_loss(affinity: Tensor, masks: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """The three terms of `AffinityLoss`, (3,), of affinities and `pair_labels`, all (B, K, n)."""
    affinity = affinity.double() if affinity.dtype == torch.double else affinity.float()
    alike, apart = -(affinity + eps).log(), -(1 + eps - affinity).log()
    pairs = zip((mask.to(affinity) for mask in masks), (alike, alike, apart), strict=True)
    sums = [(mask * cost).sum() / (mask.sum() + eps) for mask, cost in pairs]
    return torch.stack(sums)


@register("affinity")
class AffinityLoss(nn.Module):
    """Cross-entropy of the affinities of nearby cells, balanced between three kinds of pairs.

    Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision", CVPR 2018, arXiv 1803.10464.
    With a the affinity of a pair, P+ the pairs of one label (background, foreground) and P- those of two:

        loss = L_bg / 4 + L_fg / 4 + L_neg / 2
        L_bg, L_fg = -sum_{P+} log(a + 1e-5) / (|P+| + 1e-5)
        L_neg = -sum_{P-} log(1 + 1e-5 - a) / (|P-| + 1e-5)

    Sums and counts are those of the whole batch. A kind without any pair contributes 0 and a gradient of 0.

    Args:
        radius: of the pairs, in cells; a pair is nearer than that.
        ignore_index: label of the undecided cells, whose pairs do not count.

    Examples:
        >>> label = torch.zeros(1, 5, 9, dtype=torch.long)  # one source, of which all 34 pairs are background
        >>> build("affinity")(torch.full((1, 34, 1), 0.5), label)
        tensor(0.1733)
        >>> build("affinity")(torch.full((1, 34, 1), 0.5), label + 255)
        tensor(0.)
    """

    over_batch = 2

    def __init__(self, radius: int = 5, ignore_index: int = 255) -> None:
        super().__init__()
        self.radius, self.ignore_index = radius, ignore_index

    def forward(self, affinity: Tensor, label: Tensor) -> Tensor:
        """Returns the scalar loss.

        Args:
            affinity: (B, K, n) in [0, 1], of the pairs of `wsss.pairs.pair_views` for `radius`.
            label: (B, h, w) integers, 0 background.
        """
        background, foreground, different = pair_loss(affinity, pair_labels(label, self.radius, self.ignore_index))
        return background / 4 + foreground / 4 + different / 2

"""WeCLIP (Zhang et al., CVPR 2024) and WeCLIP+ (TPAMI 2025): affinity of the features, Dice, agreement of branches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.cam import resize
from wsss.losses.cross_entropy import BalancedCrossEntropyLoss
from wsss.losses.registry import register


def near_pairs(height: int, width: int, radius: int, device: torch.device | None = None) -> Tensor:
    """Bool (N, N): pairs of cells, a cell with itself among them, that no axis parts by more than `radius`."""
    rows, columns = (torch.arange(n, device=device) for n in (height, width))
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1)  # (N, 2)
    return (place[:, None] - place[None]).abs().amax(-1) <= radius


def pair_relations(label: Tensor, radius: int, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Pairs of one label and pairs of two, each bool (B, N, N), of cells (B, h, w) that lie near to each other."""
    height, width = label.shape[-2:]
    near = near_pairs(height, width, radius, label.device)
    flat = label.flatten(1)
    known = flat != ignore_index
    counted = near & known[:, :, None] & known[:, None, :]
    same = flat[:, :, None] == flat[:, None, :]
    return counted & same, counted & ~same


@register("aff")
class FeatureAffinityLoss(nn.Module):
    """Affinities of cells towards whether a pseudo label makes them one class (WeCLIP, section 3.4), as released.

    With a_ij in [0, 1], P the ordered pairs of equal label, N those of different ones, of the whole batch:

        0.5 * sum_P (1 - a) / (|P| + 1) + 0.5 * sum_N a / (|N| + 1)

    Pairs further apart than `radius` rows or columns, or with an undecided cell, do not count; without any it is 0.

    Args:
        radius: in cells.
        ignore_index: label of undecided cells.

    Examples:
        >>> label = torch.tensor([[[0, 0, 1, 255]]])
        >>> build("aff", radius=1)(torch.full((1, 4, 4), 0.5), label)  # 5 and 2 pairs
        tensor(0.3750)
    """

    over_batch = 2

    def __init__(self, radius: int = 8, ignore_index: int = 255) -> None:
        super().__init__()
        self.radius, self.ignore_index = radius, ignore_index

    def forward(self, affinity: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            affinity: (B, N, N) in [0, 1].
            label: (B, h, w) with h*w == N, 0 background, c + 1 for class c.
        """
        same, different = pair_relations(label, self.radius, self.ignore_index)
        attract = ((1 - affinity) * same).sum() / (same.sum() + 1)
        repel = (affinity * different).sum() / (different.sum() + 1)
        return 0.5 * attract + 0.5 * repel


@register("dice")
class DiceLoss(nn.Module):
    """Overlap of probabilities and labels (WeCLIP+): with p their softmax and t the labels, one-hot, of K classes

        1 - mean_k  2 sum p t / (sum (p + t) + 1e-7)

    with sums over the batch and all pixels that are not ignored. A class that the batch does not show counts with 0.

    Examples:
        >>> label = torch.tensor([[[0, 0]]])  # of two classes one
        >>> build("dice")(torch.zeros(1, 2, 1, 2), label)
        tensor(0.6667)
    """

    over_batch = 2

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            logits: (B, K, h, w), resized bilinearly to the label where the sizes differ; background is one of K.
            label: (B, H, W) long.
        """
        logits = logits if logits.shape[-2:] == label.shape[-2:] else resize(logits, label.shape[-2:])
        counted = label != self.ignore_index
        truth = F.one_hot(label.where(counted, 0), logits.shape[1]).movedim(-1, 1) * counted[:, None]
        probability = logits.softmax(1) * counted[:, None]
        both, either = (probability * truth).sum((0, 2, 3)), (probability + truth).sum((0, 2, 3))
        return 1 - (2 * both / (either + 1e-7)).mean()


@register("cross")
class BranchAgreementLoss(nn.Module):
    """Two branches learn from each other (WeCLIP+): `seg` of each with the other's most probable classes.

    The sum of both `BalancedCrossEntropyLoss`; the classes are hard, and no gradient passes them.

    Examples:
        >>> scores = torch.zeros(1, 2, 1, 1)  # the first of equal ones is most probable, background
        >>> build("cross")(scores, scores, (1, 1))
        tensor(0.6931)
    """

    def __init__(self) -> None:
        super().__init__()
        self.seg = BalancedCrossEntropyLoss()

    def forward(self, first: Tensor, second: Tensor, size: tuple[int, int]) -> Tensor:
        """first, second: (B, K, h, w); both are resized bilinearly to `size`."""
        first, second = resize(first, size), resize(second, size)
        loss: Tensor = self.seg(first, second.argmax(1)) + self.seg(second, first.argmax(1))
        return loss

"""Pixel losses on pseudo labels."""

import torch.nn.functional as F
from torch import Tensor, nn

from wsss.losses.registry import register


@register("seg")
class BalancedCrossEntropyLoss(nn.Module):
    """Half the mean cross-entropy of the background pixels plus half that of the foreground pixels.

    Means are over the batch, so background cannot drown the objects. Where a batch has no background or no
    foreground pixel, that mean is 0 and has no gradient (the released ToCo code logs NaN there, with the same
    gradient).
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            logits: (B, 1 + C, h, w), resized bilinearly to the label where the sizes differ.
            label: (B, H, W) long: 0 background, c + 1 for class c, `ignore_index` takes no part.
        """
        if logits.shape[-2:] != label.shape[-2:]:
            logits = F.interpolate(logits, size=label.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, label, ignore_index=self.ignore_index, reduction="none")
        background = label == 0
        foreground = (label != 0) & (label != self.ignore_index)
        halves = [(loss * part).sum() / part.sum().clamp(min=1) for part in (background, foreground)]
        return 0.5 * halves[0] + 0.5 * halves[1]

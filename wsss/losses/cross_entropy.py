"""Cross-entropies: of image labels, and of pixels under a pseudo label."""

import torch.nn.functional as F
from torch import Tensor, nn

from wsss.losses.registry import register


@register("cls", "aux_cls", "patch_cls")
class ClassificationLoss(nn.Module):
    """Multi-label soft-margin loss, the mean over images and classes of binary cross-entropy with logits.

    `aux_cls` is the same loss on the logits of an intermediate layer, `patch_cls` on those of the patch tokens.

    Examples:
        >>> label = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])  # the second image shows nothing
        >>> build("cls")(torch.zeros(2, 3), label)
        tensor(0.6931)
    """

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            logits: (B, C) class scores.
            label: (B, C) multi-hot float; a row of zeros is an image without any class.
        """
        return F.multilabel_soft_margin_loss(logits, label)


@register("seg")
class BalancedCrossEntropyLoss(nn.Module):
    """Half the mean cross-entropy of the background pixels plus half that of the foreground pixels.

    Means are over the batch, so background cannot drown the objects. Where a batch has no background or no
    foreground pixel, that mean is 0 and has no gradient (the released ToCo code logs NaN there, with the same
    gradient).

    Examples:
        >>> label = torch.tensor([[[0, 0, 1, 255]]])  # two of background, one of class 0, one undecided
        >>> build("seg")(torch.zeros(1, 2, 1, 4), label)
        tensor(0.6931)
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

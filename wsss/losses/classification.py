"""Image-level classification."""

import torch.nn.functional as F
from torch import Tensor, nn

from wsss.losses.registry import register


@register("cls", "aux_cls", "patch_cls")
class ClassificationLoss(nn.Module):
    """Multi-label soft-margin loss, the mean over images and classes of binary cross-entropy with logits.

    `aux_cls` is the same loss on the logits of an intermediate layer, `patch_cls` on those of the patch tokens.
    """

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            logits: (B, C) class scores.
            label: (B, C) multi-hot float; a row of zeros is an image without any class.
        """
        return F.multilabel_soft_margin_loss(logits, label)

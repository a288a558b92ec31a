"""Cross-entropies: of image labels, and of pixels under a pseudo label."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import ROWS_SCORES, by_rows, resize
from wsss.losses.registry import register


@register("cls", "aux_cls", "patch_cls", "fine_cls")
class ClassificationLoss(nn.Module):
    """Multi-label soft-margin loss, the mean over images and classes of binary cross-entropy with logits.

    `aux_cls` is the same loss on the logits of an intermediate layer, `patch_cls` on those of the patch tokens,
    `fine_cls` on the means of maps that attention has refined (WeakTr).

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


def pixel_cross_entropy(logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
    """(B, H, W), 0 where ignored, from (B, 1 + C, h, w), resized bilinearly to the label where the sizes differ."""
    if logits.shape[1] * label.numel() <= ROWS_SCORES:
        logits = logits if logits.shape[-2:] == label.shape[-2:] else resize(logits, label.shape[-2:])
        return F.cross_entropy(logits, label, ignore_index=ignore_index, reduction="none")

    def of_rows(scores: Tensor, ids: Tensor) -> Tensor:
        loss = F.cross_entropy(scores.flatten(0, 2), ids.flatten(), ignore_index=ignore_index, reduction="none")
        return loss.view_as(ids)

    return by_rows(of_rows, logits, label.shape[-2:], label)


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

    over_batch = 2

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            logits: (B, 1 + C, h, w), resized bilinearly to the label where the sizes differ.
            label: (B, H, W) long: 0 background, c + 1 for class c, `ignore_index` takes no part.
        """
        loss = pixel_cross_entropy(logits, label, self.ignore_index)
        background = label == 0
        foreground = (label != 0) & (label != self.ignore_index)
        halves = [(loss * part).sum() / part.sum().clamp(min=1) for part in (background, foreground)]
        return 0.5 * halves[0] + 0.5 * halves[1]


@register("ce")
class CrossEntropyLoss(nn.Module):
    """Mean cross-entropy of the pixels whose label is not `ignore_index`; 0 where all are ignored.

    Examples:
        >>> label = torch.tensor([[[0, 0, 1, 255]]])  # the last pixel is undecided
        >>> build("ce")(torch.zeros(1, 2, 1, 4), label)
        tensor(0.6931)
    """

    over_batch = 2

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            logits: (B, 1 + C, h, w), resized bilinearly to the label where the sizes differ.
            label: (B, H, W) long: 0 background, c + 1 for class c, `ignore_index` takes no part.
        """
        loss = pixel_cross_entropy(logits, label, self.ignore_index)
        return loss.sum() / (label != self.ignore_index).sum().clamp(min=1)


@register("clipped_ce")
class ClippedCrossEntropyLoss(nn.Module):
    """Cross-entropy that stops learning from the hardest pixels of noisy masks (WeakTr, arXiv 2304.01184).

    With l (B, H, W) the cross-entropy of the pixels, 0 where ignored, and m its mean over all of them:

        loss = m where m > start, else mean(min(l, t)),   t = max(mean over the batch and over a patch of l, m)

    Images are tiled into patches, of which each has a t; a pixel above it has no gradient, and t has none either.
    Ignored pixels count in all means, so that a batch without any other has loss 0. The released code needs sides
    that `patch` divides; here the patches at the right and lower border are smaller.

    Args:
        start: mean cross-entropy below which pixels are left out.
        patch: side of a patch in pixels.

    Raises:
        InputError: a patch without pixels.

    Examples:
        >>> logits, label = torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 0, 0, 1]]])
        >>> logits[0, 0, 0, 3] = 4  # of the last pixel, which is probably mislabelled
        >>> build("ce")(logits, label), build("clipped_ce", start=3.0)(logits, label)
        (tensor(1.5244), tensor(0.9010))
    """

    over_batch = 2

    def __init__(self, start: float = 1.2, patch: int = 120, ignore_index: int = 255) -> None:
        super().__init__()
        if patch < 1:
            raise InputError(f"patch of the loss clipped_ce is {patch}: expected at least 1 pixel")
        self.start, self.patch, self.ignore_index = start, patch, ignore_index

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            logits: (B, 1 + C, h, w), resized bilinearly to the label where the sizes differ.
            label: (B, H, W) long: 0 background, c + 1 for class c, `ignore_index` counts as 0.
        """
        return self.pixels(logits, label).mean()

    def pixels(self, logits: Tensor, label: Tensor) -> Tensor:
        """(B, H, W): what every pixel contributes to the mean."""
        loss = pixel_cross_entropy(logits, label, self.ignore_index)
        limit = self.limit(loss.detach())
        return torch.where((loss.mean() > self.start) | (loss <= limit), loss, limit)

    def limit(self, loss: Tensor) -> Tensor:
        """(H, W): t of the patch of every pixel, from (B, H, W)."""
        height, width = loss.shape[-2:]
        mean = F.avg_pool2d(loss.mean(0)[None], self.patch, ceil_mode=True)[0]  # a smaller patch by its own pixels
        rows, columns = (torch.arange(n, device=loss.device) // self.patch for n in (height, width))
        return mean.maximum(loss.mean())[rows[:, None], columns]

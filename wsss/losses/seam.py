"""SEAM (Wang et al., CVPR 2020, arXiv 2004.04581): agreement of the maps of two views."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import max_norm, with_background
from wsss.losses.registry import register


def max_onehot(cam: Tensor) -> Tensor:
    """(B, 1 + C, H, W): per pixel only the largest class, or several equal ones, keeps its value; so does channel 0."""
    foreground = cam[:, 1:]
    strongest = foreground == foreground.amax(dim=1, keepdim=True)
    return torch.cat([cam[:, :1], torch.where(strongest, foreground, 0)], dim=1)


def view_cam(cam: Tensor, label: Tensor, size: Sequence[int]) -> Tensor:
    """What SEAM compares between views: `max_norm`, then resized with aligned corners, absent classes 0.

    Args:
        cam: (B, 1 + C, H, W), background first.
        label: (B, C) multi-hot float.
        size: h and w of the result, those of the smaller view.
    """
    cam = F.interpolate(max_norm(cam), size=tuple(size), mode="bilinear", align_corners=True)
    return cam * with_background(label)[:, :, None, None]


@register("er")
class EquivarianceLoss(nn.Module):
    """Equivariance regularisation, SEAM (Wang et al., CVPR 2020, arXiv 2004.04581, section 3.4), as released.

    The mean over images, foreground classes and pixels of `|first - second|`. An image without labels adds 0.

    Examples:
        >>> first, second = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
        >>> build("er")(first, second)
        tensor(1.)
    """

    def forward(self, first: Tensor, second: Tensor, num_classes: int | None = None) -> Tensor:
        """
        Args:
            first, second: (B, 1 + C, h, w), the CAMs of the two views after `view_cam`; both get the gradient.
            num_classes: of how many classes, where those that no image shows, whose maps are 0, are left out.
        """
        share = 1.0 if num_classes is None else (first.shape[1] - 1) / num_classes
        return share * (first[:, 1:] - second[:, 1:]).abs().mean()


@register("ecr")
class EquivariantCrossLoss(nn.Module):
    """Equivariant cross regularisation, SEAM (Wang et al., CVPR 2020, arXiv 2004.04581, section 3.4), as released.

    One direction: the revised CAM of a view should look like the CAM of the other. With target `max_onehot` of the
    CAM whose background is 1 - the largest class, the mean of the largest fifth of `|target - revised|` over all
    channels and pixels of an image, averaged over images. An image without labels is background everywhere.

    Args:
        fraction: of the differences that count, the hardest.

    Examples:
        >>> revised, cam = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
        >>> build("ecr")(revised, cam)  # no class anywhere: the target is background, here it is missing
        tensor(1.)
    """

    def __init__(self, fraction: float = 0.2) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise InputError(f"losses.ecr.fraction is {fraction}: expected more than 0, up to 1")
        self.fraction = fraction

    def forward(self, revised: Tensor, cam: Tensor, num_classes: int | None = None) -> Tensor:
        """
        Args:
            revised: (B, 1 + C, h, w), the revised CAM of a view after `view_cam`.
            cam: (B, 1 + C, h, w), the CAM of the other view after `view_cam`; no gradient.
            num_classes: of how many classes, where those that no image shows, whose maps are 0, are left out.
        """
        foreground = cam.detach()[:, 1:]
        target = max_onehot(torch.cat([1 - foreground.amax(dim=1, keepdim=True), foreground], dim=1))
        difference = (target - revised).abs().flatten(1)
        channels = cam.shape[1] if num_classes is None else 1 + num_classes
        hardest = max(1, int(cam[0, 0].numel() * channels * self.fraction))
        largest = difference.topk(min(hardest, difference.shape[1]), dim=1, sorted=False).values
        return largest.sum(dim=1).mean() / hardest  # the differences of what was left out are 0


@register("rvmin")
class MinPoolingLoss(nn.Module):
    """Min pooling of the revised CAM, in SEAM's released code only (Wang et al., CVPR 2020, arXiv 2004.04581).

    The quarter of an image's pixels with the smallest best score should have none: with m the maximum over the
    classes, the mean over images of the mean of `relu(m)` over the `H*W // 4` smallest m. 0 without labels.

    Examples:
        >>> revised = torch.full((1, 3, 4, 4), 0.5)
        >>> build("rvmin")(revised, torch.tensor([[1.0, 0.0]]))
        tensor(0.5000)
    """

    def forward(self, revised: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            revised: (B, 1 + C, H, W), the revised CAM as it is; channel 0, the background, takes no part.
            label: (B, C) multi-hot float; absent classes count as 0.
        """
        best = (revised[:, 1:] * label[:, :, None, None]).amax(dim=1).flatten(1)  # (B, H*W)
        darkest = best.topk(max(1, best.shape[1] // 4), dim=1, largest=False, sorted=False).values
        return F.relu(darkest).mean()

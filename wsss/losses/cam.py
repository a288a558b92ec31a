"""Losses on class activation maps: agreement of the maps of two views (SEAM) or of two networks (RCM-MAM)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.losses.registry import register


def with_background(label: Tensor) -> Tensor:
    """(B, C) labels -> (B, 1 + C): the background, channel 0, is in every image."""
    return F.pad(label, (1, 0), value=1.0)


def max_norm(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """SEAM's normalisation in training: each map, where positive, brought to [0, 1) by its minimum and maximum."""
    cam = F.relu(cam)
    low, high = cam.amin(dim=(-2, -1), keepdim=True), cam.amax(dim=(-2, -1), keepdim=True)
    return F.relu(cam - low - eps) / (high - low + eps)


def inference_norm(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """SEAM's normalisation of seeds: as `max_norm`, but values at a map's minimum end a little below 0.

    They are set to 0 before the minimum is taken off; the lowest they become is about -min / (max - min). A map
    whose positive values are all equal has no scale, and its values are large and negative.
    """
    cam = F.relu(cam)
    low, high = cam.amin(dim=(-2, -1), keepdim=True), cam.amax(dim=(-2, -1), keepdim=True)
    return (torch.where(cam < low + eps, 0, cam) - low - eps) / (high - low + eps)


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
    """

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """
        Args:
            first, second: (B, 1 + C, h, w), the CAMs of the two views after `view_cam`; both get the gradient.
        """
        return (first[:, 1:] - second[:, 1:]).abs().mean()


@register("ecr")
class EquivariantCrossLoss(nn.Module):
    """Equivariant cross regularisation, SEAM (Wang et al., CVPR 2020, arXiv 2004.04581, section 3.4), as released.

    One direction: the revised CAM of a view should look like the CAM of the other. With target `max_onehot` of the
    CAM whose background is 1 - the largest class, the mean of the largest fifth of `|target - revised|` over all
    channels and pixels of an image, averaged over images. An image without labels is background everywhere.

    Args:
        fraction: of the differences that count, the hardest.
    """

    def __init__(self, fraction: float = 0.2) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise InputError(f"losses.ecr.fraction is {fraction}: expected more than 0, up to 1")
        self.fraction = fraction

    def forward(self, revised: Tensor, cam: Tensor) -> Tensor:
        """
        Args:
            revised: (B, 1 + C, h, w), the revised CAM of a view after `view_cam`.
            cam: (B, 1 + C, h, w), the CAM of the other view after `view_cam`; no gradient.
        """
        foreground = cam.detach()[:, 1:]
        target = max_onehot(torch.cat([1 - foreground.amax(dim=1, keepdim=True), foreground], dim=1))
        difference = (target - revised).abs().flatten(1)
        hardest = max(1, int(difference.shape[1] * self.fraction))
        return difference.topk(hardest, dim=1, sorted=False).values.mean()


@register("rvmin")
class MinPoolingLoss(nn.Module):
    """Min pooling of the revised CAM, in SEAM's released code only (Wang et al., CVPR 2020, arXiv 2004.04581).

    The quarter of an image's pixels with the smallest best score should have none: with m the maximum over the
    classes, the mean over images of the mean of `relu(m)` over the `H*W // 4` smallest m. 0 without labels.
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


@torch.no_grad()
def attention_weights(main: Tensor, support: Tensor) -> Tensor:
    """2 - cosine of every main map (M, B, C, H, W) and support map (S, B, C, H, W): (M, S, B, C), in [1, 2].

    The less two maps of a class are alike, the larger the weight; 2 where one of them is all zero.
    """
    main, support = (F.normalize(maps.flatten(3), dim=-1, eps=1e-8) for maps in (main, support))
    return 2 - torch.einsum("mbkp,sbkp->msbk", main, support)


@register("mam")
class MultiscaleAttentiveLoss(nn.Module):
    """Multi-scale attentive module, RCM-MAM (Yoon et al., arXiv 2112.05351, section on MAM).

    The CAM of the main network at each scale m should look like those of the support network at all scales s,
    the less similar ones more so:

        target_m = 1/S * sum_s w_ms * support_s,  w_ms = 2 - cos(main_m, support_s) per image and class
        loss = sum_m mean |target_m - main_m| over images, classes and pixels

    Only the main network gets the gradient. Absent classes and images without labels are zero in both maps and
    add 0; a batch without images gives 0. There is no released code: formula and defaults follow early public
    scripts of the authors' group.

    Args:
        attention: False sets all weights to 1, so that the target is the plain mean.
    """

    def __init__(self, attention: bool = True) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, main: Tensor, support: Tensor) -> Tensor:
        """
        Args:
            main: (M, B, C, H, W), CAMs of the main network at M scales, all resized to H x W, at least 0, absent
                classes 0, not normalised.
            support: (S, B, C, H, W), the same of the support network.
        """
        return (self.target(main, support) - main).abs().sum() / max(1, main[0].numel())

    @torch.no_grad()
    def target(self, main: Tensor, support: Tensor) -> Tensor:
        """(M, B, C, H, W)."""
        if not self.attention:
            return support.mean(dim=0).expand_as(main)
        return torch.einsum("msbk,sbkhw->mbkhw", attention_weights(main, support), support) / len(support)

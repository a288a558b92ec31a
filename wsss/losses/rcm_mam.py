"""RCM-MAM (Yoon et al., arXiv 2112.05351): pixels against class prototypes, maps of two networks at several scales.

Classes are counted as in label maps: 1 + C of them, 0 the background and c + 1 class c.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.losses.registry import register


def _resize(features: Tensor, region: Tensor) -> Tensor:
    return F.interpolate(features, size=region.shape[-2:], mode="bilinear", align_corners=False)


def pixel_features(features: Tensor, region: Tensor) -> Tensor:
    """(B, D, h, w) resized bilinearly to a region map (B, H, W), each pixel brought to length 1."""
    return F.normalize(_resize(features, region), dim=1, eps=1e-8)


@torch.no_grad()
def image_prototypes(features: Tensor, region: Tensor, num_classes: int, classes: Tensor | None = None) -> Tensor:
    """What each image shows of each class: the direction of the mean of its `pixel_features` (RCM).

    Args:
        features: (B, D, h, w) of the support network.
        region: (B, H, W) class ids, e.g. of `cam_to_label`.
        num_classes: C, foreground classes only.
        classes: (B, n) those that an image may have, 0 to C - 1, each once (`wsss.cam.present_classes`); None: all.

    Returns:
        (B, 1 + C, D), of length 1, or 0 where the image has no pixel of a class.
    """
    features = pixel_features(features, region)
    if classes is None:
        classes = torch.arange(num_classes, device=region.device).expand(len(region), -1)
    ids = F.pad(classes + 1, (1, 0))
    masks = (region[:, None] == ids[:, :, None, None]).to(features.dtype)  # 255 or any other that is no class: in none
    prototypes = F.normalize(torch.einsum("bdhw,bkhw->bkd", features, masks), dim=-1)
    result = prototypes.new_zeros(len(region), 1 + num_classes, prototypes.shape[-1])
    return result.scatter_(1, ids[..., None].expand_as(prototypes), prototypes)


@torch.no_grad()
def mean_prototypes(prototypes: Tensor) -> Tensor:
    """`image_prototypes` (B, K, D) -> one for the batch, (K, D): the direction of their mean, 0 for absent classes."""
    return F.normalize(prototypes.sum(dim=0), dim=-1)


@torch.no_grad()
def leave_one_out_prototypes(prototypes: Tensor) -> Tensor:
    """`image_prototypes` (B, K, D) -> for every image those of the others, (B, K, D).

    A class that no other image shows has 0. A single image has no others and keeps its own.
    """
    if len(prototypes) == 1:
        return prototypes
    # summing the others, not subtracting from a common sum: a class of one image alone has to give exactly 0
    others = 1 - torch.eye(len(prototypes), dtype=prototypes.dtype, device=prototypes.device)
    return F.normalize(torch.einsum("ij,jkd->ikd", others, prototypes), dim=-1)


class PrototypeMemory(nn.Module):
    """The last few image prototypes of every class, first in, first out; a checkpoint holds them.

    Called with `image_prototypes` (B, 1 + C, D) it first stores those of the classes that an image shows, in the
    order of the images, and returns (1 + C, D): the direction of the mean of what is stored, 0 for a class never
    seen.

    Args:
        num_classes: C, foreground classes only.
        dim: D.
        length: how many each class keeps.
    """

    over_batch = 1
    vectors: Tensor

    def __init__(self, num_classes: int, dim: int, length: int = 5) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(1 + num_classes, length, dim))  # newest last, 0: still empty

    @torch.no_grad()
    def forward(self, prototypes: Tensor) -> Tensor:
        known = torch.cat([self.vectors, prototypes.transpose(0, 1).to(self.vectors)], dim=1)  # (K, length + B, D)
        filled = known.norm(dim=-1) > 0.5  # lengths are 0 or 1
        newest = filled.byte().argsort(dim=1, stable=True)[:, -self.vectors.shape[1] :]
        self.vectors.copy_(known.gather(1, newest[..., None].expand(-1, -1, known.shape[-1])))
        return F.normalize(self.vectors.sum(dim=1), dim=-1)


@register("rcm")
class RegionalContrastLoss(nn.Module):
    """Regional contrastive module, RCM-MAM (Yoon et al., arXiv 2112.05351, section on RCM).

    With g(p) the feature of a pixel, brought to length 1, P_k the prototypes and L(p) the region of a pixel, the
    mean over the pixels of all images of

        -log( exp(T <g(p), P_L(p)>) / sum_k exp(T <g(p), P_k>) )

    Prototypes of classes that the batch does not show are 0 and stay in the sum. The gradient goes through the
    features alone. Pixels whose region is no class (255) take no part; without any pixel left the loss is 0. There
    is no released code: formula and defaults follow early public scripts of the authors' group.

    Args:
        temperature: T, which multiplies the cosine.
        use_background: False leaves out background pixels and the background's prototype.

    Examples:
        >>> features, region = torch.zeros(1, 8, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
        >>> build("rcm")(features, region, torch.eye(8)[:3])  # three prototypes, none nearer than another
        tensor(1.0986)
    """

    over_batch = 2

    def __init__(self, temperature: float = 2.0, use_background: bool = True) -> None:
        super().__init__()
        self.temperature = temperature
        self.first = 0 if use_background else 1

    def forward(self, features: Tensor, region: Tensor, prototypes: Tensor) -> Tensor:
        """
        Args:
            features: (B, D, h, w) of the main network, resized bilinearly to the region map.
            region: (B, H, W) class ids.
            prototypes: (1 + C, D), or (B, 1 + C, D) where each image has its own.
        """
        prototypes = prototypes.detach()[..., self.first :, :].expand(len(features), -1, -1)
        features = _resize(features, region)
        # divided after the product, K maps instead of D: four times faster than pixel_features
        length = features.norm(dim=1, keepdim=True).clamp(min=1e-8)
        logits = self.temperature * torch.einsum("bdhw,bkd->bkhw", features, prototypes) / length
        known = (region >= self.first) & (region < self.first + logits.shape[1])
        target = torch.where(known, region - self.first, -100)
        return F.cross_entropy(logits, target, reduction="sum") / known.sum().clamp(min=1)


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

    Examples:
        >>> main, support = torch.zeros(2, 1, 3, 4, 4), torch.ones(2, 1, 3, 4, 4)
        >>> build("mam")(main, support)  # two scales, each with weight 2 on a distance of 1
        tensor(4.)
    """

    def __init__(self, attention: bool = True) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, main: Tensor, support: Tensor, num_classes: int | None = None) -> Tensor:
        """
        Args:
            main: (M, B, C, H, W), CAMs of the main network at M scales, all resized to H x W, at least 0, absent
                classes 0, not normalised.
            support: (S, B, C, H, W), the same of the support network.
            num_classes: of how many classes, where those that no image shows, whose maps are 0, are left out.
        """
        entries = main[0, :, 0].numel() * (num_classes or main.shape[2])
        return (self.target(main, support) - main).abs().sum() / max(1, entries)

    @torch.no_grad()
    def target(self, main: Tensor, support: Tensor) -> Tensor:
        """(M, B, C, H, W)."""
        if not self.attention:
            return support.mean(dim=0).expand_as(main)
        return torch.einsum("msbk,sbkhw->mbkhw", attention_weights(main, support), support) / len(support)

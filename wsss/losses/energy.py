"""The dense energy ("dense CRF") loss: neighbours of like colour should carry like labels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.cam import box_mask, by_rows
from wsss.lattice import PermutohedralLattice
from wsss.losses.registry import register

CLASSES = 64
"""How many classes are filtered at once: of more the rows of the lattice no longer fit the cache."""


@register("dense_energy")
class DenseEnergyLoss(nn.Module):
    """Relaxed dense-CRF regulariser with ToCo's gate.

    Tang et al., "On Regularized Losses for Weakly-supervised CNN Segmentation", ECCV 2018; with the gate as
    in ToCo, "Token Contrast for Weakly-Supervised Semantic Segmentation", CVPR 2023.

        loss = -strength / B * sum_k S_k . A_k,    A_k = G * K S_k,    S_k = R * P_k

    P: class probabilities; R: 1 inside the image box, 0 in the padding; K: bilateral Gaussian kernel over
    (x, y, r, g, b), un-normalised, with its diagonal (`PermutohedralLattice`); G = max(0, R - max_k P_k):
    confident pixels ask for nothing, but G = 1 where the label is undecided. All of it at `scale` of the
    image's size. The gate is a constant and K taken as symmetric: d loss / d P_k = -2 strength / B * R * A_k.

    Args:
        sigma_rgb: standard deviation of the kernel in colour, in grey levels of 0..255.
        sigma_xy: standard deviation of the kernel in space, in pixels of the full-size image.
        scale: the energy is computed at this fraction of the image's height and width.
        strength: factor on the energy, which is a sum over all pairs of pixels and therefore huge.
        ignore_index: label of the undecided pixels.

    Computed in float32 whatever the inputs' type and with or without autocast. Half-precision logits receive
    a half-precision gradient; at the default strength it is below float16's range unless the loss is scaled.
    An image without any pixel in its box contributes 0, and a gradient of 0.

    Examples:
        >>> image, seg_logits = torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 4, 4)
        >>> label = torch.zeros(1, 8, 8, dtype=torch.long)
        >>> bool(build("dense_energy")(image, seg_logits, label) < 0)  # an energy to be lowered
        True
    """

    def __init__(
        self,
        sigma_rgb: float = 15.0,
        sigma_xy: float = 100.0,
        scale: float = 0.5,
        strength: float = 1e-7,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.sigma_rgb = sigma_rgb
        self.sigma_xy = sigma_xy
        self.scale = scale
        self.strength = strength
        self.ignore_index = ignore_index

    def forward(self, image: Tensor, seg_logits: Tensor, label: Tensor, image_box: Tensor | None = None) -> Tensor:
        """Returns the scalar loss.

        Args:
            image: (B, 3, H, W) colours, 0..255, not normalised.
            seg_logits: (B, K, h, w) scores before softmax, resized to (H, W) where the size differs.
            label: (B, H, W) pseudo label; only where it is `ignore_index` matters.
            image_box: (B, 4) rows [b0, b1) and columns [b2, b3) that the image fills; None: all of it.
        """
        size = image.shape[-2:]
        step = round(1 / self.scale)  # rows that one row of the energy is made of, if these are whole
        step = step if step * self.scale == 1 and size[0] % step == 0 else size[0]
        probs = by_rows(self._probabilities, seg_logits.float(), size, step=step)  # (B, h, w, K)
        inside = torch.ones_like(image[:, :1])
        if image_box is not None:
            inside = box_mask(image_box.to(image.device, non_blocking=True), size)[:, None].to(image.dtype)
        undecided = (label == self.ignore_index)[:, None].float()
        small_image, small_inside, small_undecided = (
            F.interpolate(x.float(), scale_factor=self.scale, mode="nearest") for x in (image, inside, undecided)
        )
        masks = (mask.movedim(1, -1) for mask in (small_inside, small_undecided))
        response = self._response(small_image, probs.detach(), *masks)
        # The gradient of a quadratic form is twice its matrix times the vector, but only `probs` is
        # differentiated here, not the response: the doubled term carries the gradient, the detached one
        # restores the value.
        energy = (probs * response).sum()
        return -self.strength / len(image) * (2 * energy - energy.detach())

    def _probabilities(self, scores: Tensor) -> Tensor:
        """(B, r, W, K) scores -> probabilities at the energy's scale, the classes last."""
        probs = scores.softmax(-1)
        if self.scale == 0.5 and scores.shape[1] % 2 == scores.shape[2] % 2 == 0:
            # the mean of 2 x 2, which bilinear is here; sums of views are several times faster than either
            upper, lower = probs.unflatten(1, (-1, 2)).unbind(2)
            left, right = (upper + lower).unflatten(2, (-1, 2)).unbind(3)
            return (left + right) / 4
        probs = F.interpolate(
            probs.permute(0, 3, 1, 2),
            scale_factor=self.scale,
            mode="bilinear",
            align_corners=False,
            recompute_scale_factor=True,
        )
        return probs.permute(0, 2, 3, 1)

    @torch.no_grad()
    def _response(self, image: Tensor, probs: Tensor, inside: Tensor, undecided: Tensor) -> Tensor:
        """R * G * K (R * P), (B, h, w, K), all inputs at the energy's scale: (B, 3, h, w), then (B, h, w, .)."""
        height, width = image.shape[-2:]
        y = torch.arange(height, device=image.device, dtype=image.dtype) / (self.sigma_xy * self.scale)
        x = torch.arange(width, device=image.device, dtype=image.dtype) / (self.sigma_xy * self.scale)
        position = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
        position = position.expand(len(image), -1, -1, -1)
        features = torch.cat([position, image / self.sigma_rgb], 1).flatten(2).mT  # (B, h*w, 5)
        lattice = PermutohedralLattice(features, compact=features.device.type == "cpu")
        filtered = torch.empty_like(probs)
        for part, result in zip(probs.split(CLASSES, -1), filtered.split(CLASSES, -1), strict=True):
            result.copy_(lattice((part * inside).flatten(1, 2)).view_as(part))
        gate = (inside - probs.amax(-1, keepdim=True)).clamp(min=0)
        gate = torch.where(undecided > 0, 1.0, gate)
        return filtered.mul_(inside * gate)

"""Thresholds that make labels of class activation maps.

Class ids of label maps: 0 background, c + 1 for class c, 255 ignore.
"""

import torch
from torch import Tensor


def cam_to_label(
    cam: Tensor,
    label: Tensor,
    background_threshold: float,
    thresholds: tuple[float, float] | None = None,
    valid: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """The class with the largest CAM among an image's labels, background where that is not above a threshold.

    Args:
        cam: (B, C, H, W) in [0, 1].
        label: (B, C) 0 or 1. An image without labels is background everywhere.
        background_threshold: values up to it are background; below 0 only images without labels have any.
        thresholds: (low, high): then values up to `low` are background and those up to `high` are ignored,
            so that `background_threshold` has no effect.
        valid: (B, H, W) bool; everything else is ignored.

    Returns:
        (B, H, W) long.
    """
    value, index = cam.masked_fill(label[:, :, None, None] == 0, -torch.inf).max(dim=1)
    result = torch.where(value <= background_threshold, 0, index + 1)
    if thresholds is not None:
        low, high = thresholds
        result = torch.where(value <= high, ignore_index, result)
        result = torch.where(value <= low, 0, result)
    if valid is not None:
        result = torch.where(valid, result, ignore_index)
    return result


def region_map(cam: Tensor, label: Tensor, low_threshold: float, high_threshold: float) -> Tensor:
    """Where the present classes are: 0 background (<= low), 1 uncertain, 2 foreground (>= high); (B, H, W)."""
    value = (cam * label[:, :, None, None]).amax(dim=1)
    return (value > low_threshold).short() + (value >= high_threshold).short()

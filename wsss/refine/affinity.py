"""Class-aware attention affinity: maps spread by the attention of a transformer, inside of boxes round themselves.

Lin et al., "CLIP is Also an Efficient Segmenter" (CLIP-ES), CVPR 2023, arXiv 2212.09506, section 3.3, as released.
"""

import cv2
import numpy as np
import torch
from torch import Tensor


def transition(attention: Tensor) -> Tensor:
    """Attention (..., N, N), not negative, as a transition between cells of the same shape.

    Three times columns and then rows are made to sum to 1; what results is symmetrised and squared.
    """
    for _ in range(3):
        attention = attention / attention.sum(-2, keepdim=True)
        attention = attention / attention.sum(-1, keepdim=True)
    attention = (attention + attention.mT) / 2
    return attention @ attention


def boxes(cam: Tensor, threshold: float) -> np.ndarray:
    """Boxes (K, 4), x0 y0 x1 y1 with exclusive ends, round the 8-connected parts of a map (h, w) in [0, 1].

    A part is where the map, in 255 steps, exceeds `threshold` of its maximum, which is rounded down. As in the released
    code a box that reaches the last column or row ends before it; a map without any part has none.
    """
    values = (cam.detach().cpu().numpy() * 255).astype(np.uint8)
    above = (values > int(threshold * values.max())).astype(np.uint8)
    stats = cv2.connectedComponentsWithStats(above, connectivity=8)[2][1:]  # without the background
    x, y, width, height = stats[:, :4].T
    last_row, last_column = (side - 1 for side in above.shape)
    return np.stack([x, y, np.minimum(x + width, last_column), np.minimum(y + height, last_row)], axis=1)


def box_masks(cams: Tensor, threshold: float) -> Tensor:
    """1 inside of any of a map's `boxes`, else 0: (P, h, w) -> (P, h, w)."""
    masks = np.zeros(cams.shape, np.float32)
    for mask, cam in zip(masks, cams, strict=True):
        for x0, y0, x1, y1 in boxes(cam, threshold):
            mask[y0:y1, x0:x1] = 1
    return torch.from_numpy(masks).to(cams)


def spread(cams: Tensor, matrix: Tensor, box_threshold: float | None) -> Tensor:
    """Maps (P, h, w) in [0, 1] after one step of their `transition` (P, N, N) from inside of their boxes, (P, h, w).

    Args:
        box_threshold: see `boxes`; None spreads from everywhere.
    """
    inside = cams if box_threshold is None else cams * box_masks(cams, box_threshold)
    return (matrix @ inside.flatten(1)[..., None]).view_as(cams)


def agreeing_layers(attention: Tensor, affinity: Tensor) -> tuple[Tensor, Tensor]:
    """WeCLIP's choice of layers (refinement module): those whose attention is nearest to a learnt affinity or above it.

    Zhang et al., "Frozen CLIP: A Strong Backbone for Weakly Supervised Semantic Segmentation", CVPR 2024, section 3.3.

    Args:
        attention: (L, B, N, N) of the layers.
        affinity: (B, N, N).

    Returns:
        The signed distances (B, L), sums of affinity - attention, and which layers are kept, bool (B, L): those with no
        more than the mean distance of the image.
    """
    distance = (affinity - attention).sum((-2, -1)).T
    return distance, distance <= distance.mean(1, keepdim=True)


def refined_attention(attention: Tensor, affinity: Tensor) -> Tensor:
    """(B, N, N): the mean attention of the `agreeing_layers`, times the learnt affinity; arguments as there."""
    kept = agreeing_layers(attention, affinity)[1].to(attention)
    mean = torch.einsum("lbij,bl->bij", attention, kept) / kept.sum(1)[:, None, None]
    return mean * affinity

"""From the CAMs of one image to its pseudo mask: what `refine=` of wsss-label chooses from.

Each takes the colours of the image (3, H, W), 0..255, and the maps (n, H, W) of the n >= 1 classes that it shows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsss import InputError
from wsss.refine.crf import dense_crf
from wsss.refine.par import PAR, refine_cam
from wsss.refine.thresholds import agreement, background_scores, cam_to_label, power_background


class Refined(NamedTuple):
    """
    Attributes:
        mask: (H, W) long: 0 background, k + 1 for the k-th of the n maps, 255 undecided.
        scores: the scores (1 + n, H, W) behind it, background first: of the low and of the high alpha. Only CRFs give
            them.
    """

    mask: Tensor
    scores: tuple[Tensor, ...] = ()


def plain(image: Tensor, cam: Tensor, background: Mapping[str, Any]) -> Refined:
    """The maps as they are, see `background_scores` for the rules of the background."""
    label = torch.ones_like(cam[None, :, 0, 0])
    labels = [cam_to_label(cam[None], label, score)[0] for score in background_scores(cam[None], **background)]
    return Refined(agreement(labels[-1], labels[0]))


def par(
    image: Tensor,
    cam: Tensor,
    background: Mapping[str, Any],
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    w1: float = 0.3,
    w2: float = 0.01,
    scale: float = 0.5,
) -> Refined:
    """Pixel-adaptive refinement of background and maps, as ToCo makes its pseudo masks; see `refine_cam`."""
    if not 0 < scale <= 1:
        raise InputError(f"refine.scale is {scale}: expected a number above 0 and up to 1")
    module = PAR(dilations, iterations, w1, w2).to(cam.device)
    scores, label = background_scores(cam[None], **background), torch.ones_like(cam[None, :, 0, 0])
    everywhere = torch.ones_like(cam[:1], dtype=torch.bool)
    return Refined(refine_cam(module, image[None] / 255, cam[None], label, scores, everywhere, len(cam), scale)[0])


def crf(
    image: Tensor,
    cam: Tensor,
    alpha: float | Sequence[float] = 4.0,
    iterations: int = 10,
    gaussian: Sequence[float] = (3.0, 3.0),
    bilateral: Sequence[float] = (80.0, 13.0, 10.0),
    backend: str = "torch",
) -> Refined:
    """The dense CRF of PSA over the background (1 - max)^alpha and the maps; of a pair of alphas what both agree on.

    Args:
        alpha: one, or a low and a high one, see `agreement`.
        iterations, gaussian, bilateral, backend: see `dense_crf`.
    """
    alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha]
    if min(alphas, default=0) <= 0 or len(alphas) > 2 or alphas != sorted(set(alphas)):
        raise InputError(f"refine.alpha is {alpha}: expected a number above 0, or two of them, the low one first")
    maps = [torch.cat([power_background(cam[None], a), cam])[None] for a in alphas]
    scores = tuple(dense_crf(image[None], m, iterations, gaussian, bilateral, backend)[0] for m in maps)
    labels = [score.argmax(dim=0) for score in scores]
    return Refined(agreement(labels[0], labels[-1]), scores)

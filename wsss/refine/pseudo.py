"""From the CAMs of one image to its pseudo mask: what `refine=` of wsss-label chooses from.

Each takes the colours of the image (3, H, W), 0..255, and the maps (n, H, W) of the n >= 1 classes that it shows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss import InputError
from wsss.cam import reduce, resize
from wsss.refine.crf import dense_crf
from wsss.refine.instances import Instances
from wsss.refine.par import PAR, refine_cam
from wsss.refine.thresholds import agreement, background_scores, cam_to_label, power_background


class Refined(NamedTuple):
    """
    Attributes:
        mask: (H, W) long: 0 background, k + 1 for the k-th of the n maps, 255 undecided.
        scores: the scores (1 + n, H, W) behind it, background first: of the low and of the high alpha. Only CRFs give
            them.
        instances: where they were asked for. Only IRN gives them.
    """

    mask: Tensor
    scores: tuple[Tensor, ...] = ()
    instances: Instances | None = None


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
    alpha: float | Sequence[float] | None = 4.0,
    background: Mapping[str, Any] | None = None,
    iterations: int = 10,
    gaussian: Sequence[float] = (3.0, 3.0),
    bilateral: Sequence[float] = (80.0, 13.0, 10.0),
    max_side: int | None = None,
    confidence: float = 0.0,
    backend: str = "torch",
) -> Refined:
    """The dense CRF of PSA over the background (1 - max)^alpha and the maps; of a pair of alphas what both agree on.

    Args:
        alpha: one, or a low and a high one, see `agreement`; None where `background` gives its score.
        background: another rule of its score, see `background_scores`.
        iterations, gaussian, bilateral, backend: see `dense_crf`.
        max_side: a larger image is reduced to it for the CRF, whose scores are enlarged again; None reduces nothing.
        confidence: pixels whose largest probability is below it are undecided.
    """
    if (alpha is None) == (background is None):
        raise InputError(f"refine has alpha={alpha} and background={background}: expected one of them, the other null")
    if not 0 <= confidence < 1:
        raise InputError(f"refine.confidence is {confidence}: expected a number from 0 up to 1")
    if alpha is None:
        behind = background_scores(cam[None], **(background or {}))
    else:
        alphas = list(alpha) if isinstance(alpha, Sequence) else [alpha]
        if min(alphas, default=0) <= 0 or len(alphas) > 2 or alphas != sorted(set(alphas)):
            raise InputError(f"refine.alpha is {alpha}: expected a number above 0, or two of them, the low one first")
        behind = tuple(power_background(cam[None], a) for a in alphas)
    small = reduce(image[None], max_side)
    maps = [resize(torch.cat([score, cam])[None], small.shape[-2:]) for score in behind]
    refined = (dense_crf(small, m, iterations, gaussian, bilateral, backend) for m in maps)
    scores = tuple(resize(score, image.shape[-2:])[0] for score in refined)
    labels = [score.argmax(dim=0) for score in scores]
    if confidence > 0:
        labels = [torch.where(s.amax(0) < confidence, 255, x) for s, x in zip(scores, labels, strict=True)]
    # of a rule's two thresholds, unlike of two alphas, the low one is the weak background
    low, high = (labels[0], labels[-1]) if background is None else (labels[-1], labels[0])
    return Refined(agreement(low, high), scores if background is None else ())


def label_crf(
    image: Tensor,
    cam: Tensor,
    background: Sequence[float] = (0.05, 0.3),
    certainty: float = 0.7,
    iterations: int = 10,
    gaussian: Sequence[float] = (3.0, 3.0),
    bilateral: Sequence[float] = (50.0, 5.0, 10.0),
    backend: str = "torch",
) -> Refined:
    """IRN's labels: a dense CRF on the labels, not the scores, of a low and a high background.

    A pixel is a class where the labels of the high one say so, background where both do, and undecided elsewhere.

    Args:
        background: the low and the high score of the background.
        certainty: the probability that a label is right; all others share the rest.
        iterations, gaussian, bilateral, backend: see `dense_crf`.
    """
    if len(background) != 2 or not 0 <= background[0] <= background[1] or not 0 < certainty < 1:
        raise InputError(
            f"refine has background={list(background)} and certainty={certainty}: expected two scores, the low one "
            "first, and a probability between 0 and 1"
        )
    ones, labels = torch.ones_like(cam[None, :, 0, 0]), []
    for score in background:
        label = F.one_hot(cam_to_label(cam[None], ones, score), 1 + len(cam)).permute(0, 3, 1, 2)
        probability = torch.where(label > 0, certainty, (1 - certainty) / len(cam))
        labels.append(dense_crf(image[None], probability, iterations, gaussian, bilateral, backend)[0].argmax(dim=0))
    low, high = labels
    return Refined(torch.where((high == 0) & (low > 0), 255, high))

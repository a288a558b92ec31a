"""PPC (Du et al., CVPR 2022, arXiv 2110.07110): contrast between pixels and class prototypes.

Classes are counted as in label maps: K = 1 + C of them, 0 the background and c + 1 class c.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import inference_norm, with_background
from wsss.losses.registry import register


class View(NamedTuple):
    """Pixels of all images of one view, N = B * h * w in the order image, row, column."""

    pixels: Tensor  # (N, D) of length 1
    label: Tensor  # (N,) pseudo labels, 0..C
    prototypes: Tensor  # (K, D) of length 1, without gradient


def score_maps(revised_cam: Tensor, background_score: float) -> Tensor:
    """Revised CAM (B, 1 + C, h, w) -> scores of the classes, those of the background (channel 0) constant."""
    scores = inference_norm(revised_cam[:, 1:])
    return torch.cat([torch.full_like(scores[:, :1], background_score), scores], dim=1)


def rank_within(label: Tensor, key: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Each entry's rank by key, ascending from 0, among those of its label, and the number of each label's entries.

    (N,) integers 0..num_labels - 1 and (N,) numbers -> (N,) and (num_labels,).
    """
    order = key.argsort(stable=True)
    order = order[label[order].argsort(stable=True)]
    count = torch.zeros(num_labels, dtype=torch.long, device=label.device).scatter_add_(
        0, label, torch.ones_like(label)
    )
    start = count.cumsum(0) - count
    rank = torch.empty_like(label)
    rank[order] = torch.arange(len(label), device=label.device) - start[label[order]]
    return rank, count


@register("ppc")
class PixelPrototypeContrastLoss(nn.Module):
    """Pixel-to-prototype contrast, PPC (Du et al., CVPR 2022, arXiv 2110.07110, section 3), as released.

    Two views of the same images on one grid, a pixel of one being that of the other. Each view has pixel features
    q of length 1, pseudo labels l (the largest score among the image's labels, the background's score being
    constant) and a prototype P_k of every class: the mean of the projections, weighted by score, of the pixels of
    the batch that score highest, brought to length 1. Image labels play no part there, so that absent classes have
    prototypes too. With s_k = <q, P_k> / temperature and NCE(q, P, l) the mean of `-s_l + log sum_k exp s_k`:

        cross_prototype = (NCE(q1, P2, l1) + NCE(q2, P1, l2)) / 2
        cross_label = (NCE(q1, P1, l2) + NCE(q2, P2, l1)) / 2
        intra = (intra(view 1) + intra(view 2)) / 2

    The intra-view loss of a pixel has its own view's P_l as the positive and, as semi-hard negatives, the
    `negatives` prototypes that follow the 3 most similar: `-log(e^s_l / (e^s_l + sum_negatives e^s_k))`. The
    positive is usually among these 3, else it counts twice. Where there are fewer than `negatives + 3` prototypes
    fewer than 3 are skipped, and none is with up to `negatives`: then all are in the sum. The pixels of a class
    are sampled: of n, n // 2 at random and n // 2 among the hard ones, the least similar to the positive from
    rank `0.6 n - n // 2` to `0.6 n`. The loss of a view is the mean over the classes among its pseudo labels of
    the mean over the class's sample; a class of one pixel adds 0.

    The sum is weighted. The gradient goes through the pixel features alone. With no image labels at all every
    pixel is background, and all terms are defined.

    Args:
        temperature: divides the cosine.
        prototype_pixels: how many pixels make a prototype, or all where the batch has fewer.
        background_score: score of the background.
        negatives: number of negatives of the intra-view contrast.
        cross_prototype: weight of the term of this name.
        cross_label: weight of the term of this name.
        intra: weight of the term of this name.

    Examples:
        >>> projections = (torch.rand(2, 8, 4, 4), torch.rand(2, 8, 4, 4))
        >>> revised_cams = (torch.rand(2, 4, 4, 4), torch.rand(2, 4, 4, 4))
        >>> build("ppc")(projections, revised_cams, torch.eye(3)[:2]).shape
        torch.Size([])
    """

    over_batch = 3

    def __init__(
        self,
        temperature: float = 0.1,
        prototype_pixels: int = 32,
        background_score: float = 0.2,
        negatives: int = 10,
        cross_prototype: float = 0.1,
        cross_label: float = 0.1,
        intra: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in (("prototype_pixels", prototype_pixels), ("negatives", negatives)):
            if value < 1:
                raise InputError(f"losses.ppc.{name} is {value}: expected at least 1")
        self.temperature, self.background_score = temperature, background_score
        self.prototype_pixels, self.negatives = prototype_pixels, negatives
        self.weights = {"cross_prototype": cross_prototype, "cross_label": cross_label, "intra": intra}

    def forward(
        self,
        projections: tuple[Tensor, Tensor],
        revised_cams: tuple[Tensor, Tensor],
        label: Tensor,
    ) -> Tensor:
        """
        Args:
            projections: (B, D, h, w) of both views; the first view's are resized to the second's.
            revised_cams: (B, 1 + C, h, w) of both views, the same; no gradient.
            label: (B, C) multi-hot float.
        """
        return torch.stack(list(self.terms(projections, revised_cams, label).values())).sum()

    def terms(
        self, projections: tuple[Tensor, Tensor], revised_cams: tuple[Tensor, Tensor], label: Tensor
    ) -> dict[str, Tensor]:
        """The weighted terms, whose sum `forward` is."""
        size = projections[1].shape[-2:]
        one, two = (self.view(p, cam, label, size) for p, cam in zip(projections, revised_cams, strict=True))
        means = {
            "cross_prototype": (self.nce(one, two.prototypes, one.label) + self.nce(two, one.prototypes, two.label))
            / 2,
            "cross_label": (self.nce(one, one.prototypes, two.label) + self.nce(two, two.prototypes, one.label)) / 2,
            "intra": (self.intra_view(one) + self.intra_view(two)) / 2,
        }
        return {name: self.weights[name] * mean for name, mean in means.items()}

    def view(self, projection: Tensor, revised_cam: Tensor, label: Tensor, size: torch.Size) -> View:
        """Features, pseudo labels and prototypes of a view on a grid of the given size."""
        projection, revised_cam = (
            F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
            for maps in (projection, revised_cam.detach())
        )
        scores = score_maps(revised_cam, self.background_score)
        pseudo_label = (scores * with_background(label)[:, :, None, None]).argmax(dim=1).flatten()
        features = projection.permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
        prototypes = self.prototypes(scores.transpose(0, 1).flatten(1), features)
        return View(F.normalize(features, dim=1, eps=1e-8), pseudo_label, prototypes)

    @torch.no_grad()
    def prototypes(self, scores: Tensor, features: Tensor) -> Tensor:
        """Scores (K, N) and features (N, D) of the pixels of a batch -> (K, D)."""
        pixels = self.top_pixels(scores)  # (K, n)
        weights = scores.gather(1, pixels)
        # scores at a map's minimum are negative: of the division by their sum only its sign is left after this
        weights = weights * weights.sum(dim=1, keepdim=True).sign()
        return F.normalize(torch.einsum("kn,knd->kd", weights, features[pixels]), dim=1)

    def top_pixels(self, scores: Tensor) -> Tensor:
        """Indices (K, n) of the highest of (K, N) scores; the background's are all equal, so its are arbitrary."""
        return scores.topk(min(self.prototype_pixels, scores.shape[1]), dim=1).indices

    def nce(self, view: View, prototypes: Tensor, label: Tensor) -> Tensor:
        """Mean cross-entropy of a view's pixels against prototypes (K, D) and labels (N,)."""
        return F.cross_entropy(view.pixels @ prototypes.T / self.temperature, label)

    def intra_view(self, view: View) -> Tensor:
        """Contrast within a view: semi-hard negatives, hard pixels."""
        similarity = view.pixels @ view.prototypes.T / self.temperature  # (N, K)
        positive = similarity.gather(1, view.label[:, None])
        classes = similarity.shape[1]
        skipped = min(3, max(0, classes - self.negatives))
        negatives = similarity.topk(min(skipped + self.negatives, classes), dim=1).values[:, skipped:]
        losses = torch.cat([positive, negatives], dim=1).logsumexp(dim=1) - positive[:, 0]

        # a pixel counts once for each of the two samples it is in
        drawn, count = rank_within(view.label, self.draw(view.label), classes)
        hard, _ = rank_within(view.label, positive.detach()[:, 0], classes)
        half, last = count // 2, count * 3 // 5
        half_of, last_of = half[view.label], last[view.label]
        weight = (drawn < half_of).to(losses.dtype) + ((hard >= last_of - half_of) & (hard < last_of)).to(losses.dtype)
        per_pixel = losses * weight / (2 * half_of).clamp(min=1)
        return per_pixel.sum() / (count > 0).sum()

    def draw(self, label: Tensor) -> Tensor:
        """Random numbers (N,), one for each pixel: the smallest of a class are its random sample."""
        return torch.rand(label.shape, device=label.device)

"""Contrast between the tokens of a vision transformer."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.losses.registry import register


@register("ptc")
class PatchTokenContrastLoss(nn.Module):
    """Patch token contrast, ToCo (Ru et al., CVPR 2023, arXiv 2303.01267, section 3.3), as released.

    With `s_ij = |cos(F_i, F_j)|`, P the ordered pairs of different tokens of one image with equal labels
    (background with background included) and N those with different labels, both over the whole batch:

        0.5 * (1 - sum_P s / (|P| + 1)) + 0.5 * sum_N s / (|N| + 1)

    A batch in which every token is ignored gives 0.5 with zero gradient.
    """

    def __init__(self, ignore_index: int = 255) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, patch_tokens: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            patch_tokens: (B, N, D).
            label: (B, N) or (B, h, w) with h*w == N: integer token labels, `ignore_index` takes no part.
        """
        label = label.flatten(1)
        tokens = F.normalize(patch_tokens, dim=-1, eps=1e-8)
        similarity = (tokens @ tokens.transpose(1, 2)).abs()  # (B, N, N)
        valid = label != self.ignore_index
        pair = valid[:, :, None] & valid[:, None, :]
        pair &= ~torch.eye(label.shape[1], dtype=torch.bool, device=label.device)
        same = label[:, :, None] == label[:, None, :]
        positive, negative = pair & same, pair & ~same
        attract = 1 - (similarity * positive).sum() / (positive.sum() + 1)
        repel = (similarity * negative).sum() / (negative.sum() + 1)
        return 0.5 * attract + 0.5 * repel


@register("ctc")
class ClassTokenContrastLoss(nn.Module):
    """Class token contrast, ToCo (Ru et al., CVPR 2023, arXiv 2303.01267, section 3.4), as released.

    With teacher T_v of global view v, student S_k of crop k, `e_vk = exp(<T_v, S_k> / temperature)`, positives
    K+ and `n_v` the sum of e_vk over the negatives, one image gives

        mean over v of [sum_{k in K+} -log(e_vk / (e_vk + n_v + 1e-4)) - log(1 / (1 + n_v + 1e-4))] / (|K+| + 1e-4)

    and the batch its mean. The last logarithm is not in the paper: it repels the negatives once more, and the
    division is by |K+|, not by |K+| + 1. Computed with log-sum-exp, so it does not overflow. An image without
    negatives contributes about 1e-4. The teacher is detached.
    """

    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, positive: Tensor) -> Tensor:
        """
        Args:
            student: (K, B, D) projected class tokens of all crops, the global views among them.
            teacher: (V, B, D) projected class tokens of the global views.
            positive: (B, K) 1 or True where the crop is a positive, else a negative.
        """
        positive = positive.bool()
        score = torch.einsum("vbd,kbd->bvk", teacher.detach(), student) / self.temperature
        positives = positive[:, None, :]  # (B, 1, K), the same for every view
        negative = score.masked_fill(positives, -math.inf).logsumexp(dim=-1)  # (B, V) log n_v
        negative = torch.logaddexp(negative, torch.full_like(negative, math.log(1e-4)))
        pull = (F.softplus(negative[..., None] - score) * positives).sum(-1)
        push = F.softplus(negative)
        per_image = (pull + push).mean(-1) / (positive.sum(-1).to(score.dtype) + 1e-4)
        return per_image.mean()


@register("cct")
class ClassTokenSeparationLoss(nn.Module):
    """Contrast between the class tokens of one image, MCTformer+ (Xu et al., TPAMI 2024, arXiv 2308.03005).

    With G the cosine matrix of the C class tokens after a block, class j costs `-G_jj + log sum_i exp G_ij`: its
    token should differ from those of the other classes. The costs of an image's classes are summed, averaged
    over blocks, divided by the number of its classes (plus 1e-8) and averaged over the batch. An image without
    any class contributes 0.

    Args:
        layers: number of last blocks that take part; all of them where there are fewer.
    """

    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        if layers < 1:
            raise InputError(f"losses.cct.layers is {layers}: expected at least 1")
        self.layers = layers

    def forward(self, class_tokens: Tensor, label: Tensor) -> Tensor:
        """
        Args:
            class_tokens: (L, B, C, D) outputs of all blocks, the last one last.
            label: (B, C) multi-hot float.
        """
        tokens = F.normalize(class_tokens[-self.layers :], dim=-1)
        similarity = tokens @ tokens.mT  # (L, B, C, C), symmetric
        cost = similarity.logsumexp(dim=-1) - similarity.diagonal(dim1=-2, dim2=-1)  # (L, B, C)
        per_image = (cost * label).sum(-1).mean(0) / (label.sum(-1) + 1e-8)
        return per_image.mean()

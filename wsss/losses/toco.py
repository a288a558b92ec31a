"""ToCo (Ru et al., CVPR 2023, arXiv 2303.01267): contrast between patch tokens and between class tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.losses.registry import register


@register("ptc")
class PatchTokenContrastLoss(nn.Module):
    """Patch token contrast, ToCo (Ru et al., CVPR 2023, arXiv 2303.01267, section 3.3), as released.

    With `s_ij = |cos(F_i, F_j)|`, P the ordered pairs of different tokens of one image with equal labels
    (background with background included) and N those with different labels, both over the whole batch:

        0.5 * (1 - sum_P s / (|P| + 1)) + 0.5 * sum_N s / (|N| + 1)

    A batch in which every token is ignored gives 0.5 with zero gradient.

    Examples:
        >>> patch_tokens, label = torch.eye(4)[None], torch.tensor([[0, 0, 1, 255]])
        >>> build("ptc")(patch_tokens, label)  # nothing is alike: positives cost all, negatives nothing
        tensor(0.5000)
    """

    over_batch = 2

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

    Examples:
        >>> student, teacher = torch.zeros(3, 1, 8), torch.zeros(2, 1, 8)  # two global views and a crop
        >>> build("ctc")(student, teacher, torch.tensor([[True, True, False]]))
        tensor(1.0397)
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

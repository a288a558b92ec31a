"""MCTformer+ (Xu et al., TPAMI 2024, arXiv 2308.03005): contrast between the class tokens of an image."""

import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.losses.registry import register


@register("cct")
class ClassTokenSeparationLoss(nn.Module):
    """Contrast between the class tokens of one image, MCTformer+ (Xu et al., TPAMI 2024, arXiv 2308.03005).

    With G the cosine matrix of the C class tokens after a block, class j costs `-G_jj + log sum_i exp G_ij`: its
    token should differ from those of the other classes. The costs of an image's classes are summed, averaged
    over blocks, divided by the number of its classes (plus 1e-8) and averaged over the batch. An image without
    any class contributes 0.

    Args:
        layers: number of last blocks that take part; all of them where there are fewer.

    Examples:
        >>> class_tokens = torch.ones(2, 1, 4, 8)  # of two blocks; all four classes alike
        >>> build("cct")(class_tokens, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))  # log 4
        tensor(1.3863)
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

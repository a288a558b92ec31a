"""CoSA (Yang et al., ECCV 2024, arXiv 2402.17891): the segmentation of a teacher teaches the CAM of the student."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import resize
from wsss.losses.cross_entropy import BalancedCrossEntropyLoss
from wsss.losses.registry import register


@register("swap_cam")
class SwapCAMLoss(nn.Module):
    """Soft segmentation of a teacher as the target of a CAM, which keeps its gradient (CoSA, arXiv 2402.17891).

    `relu`, the form that the released runs have, is the multi-label soft-margin loss of every cell and class,

        -mean [T log s(c) + (1 - T) log s(-c)],    s the sigmoid, c = max(CAM, 0),

    with T resized to the CAM, so that a cell without a class costs log 2 at least and has no gradient below 0. The
    released code has two others: `min_max` brings c to [0, 1] by its own minimum and maximum; `ids` is the balanced
    cross-entropy (`seg`) of these maps behind a background of 1 - max, against the id with the largest probability
    where that is above `certainty`.

    Args:
        form: `relu`, `min_max` or `ids`.
        certainty: of `ids`: pixels up to it are ignored.

    Raises:
        InputError: no such form.

    Examples:
        >>> cam, target = torch.tensor([[[[2.0, -1.0]]]]), torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]])
        >>> build("swap_cam")(cam, target)
        tensor(0.4100)
    """

    def __init__(self, form: str = "relu", certainty: float = 0.25) -> None:
        super().__init__()
        if form not in ("relu", "min_max", "ids"):
            raise InputError(f"losses.swap_cam.form is {form!r}: expected relu, min_max or ids")
        self.form, self.certainty = form, certainty
        self.balanced = BalancedCrossEntropyLoss()

    def forward(self, cam: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            cam: (B, C, h, w) raw.
            target: (B, 1 + C, H, W) probabilities, background first.
        """
        cam, size = cam.relu(), cam.shape[-2:]
        if self.form == "relu":
            return F.binary_cross_entropy_with_logits(cam, resize(target[:, 1:], size))
        low = cam.amin(dim=(-2, -1), keepdim=True)
        high = (cam - low).amax(dim=(-2, -1), keepdim=True)
        cam = (cam - low) / (high + 1e-4)
        if self.form == "min_max":
            return F.binary_cross_entropy_with_logits(cam, resize(target[:, 1:], size))
        probability, ids = target.max(dim=1)
        ids = ids.masked_fill(probability <= self.certainty, self.balanced.ignore_index)
        return self.balanced(torch.cat([1 - cam.amax(dim=1, keepdim=True), cam], dim=1), ids)

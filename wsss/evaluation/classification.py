"""What is measured of classifications: average precision and F1."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from wsss.evaluation.measure import Measure
from wsss.evaluation.protocol import Protocol


def average_precision(scores: Tensor, target: Tensor) -> Tensor:
    """Sum over distinct scores of recall step times precision, of each column; NaN for one without a positive.

    Args:
        scores: (N, K), N >= 1.
        target: (N, K) 0 or 1.

    Returns:
        (K,) float64.
    """
    scores, order = scores.sort(dim=0, descending=True)
    target = target.gather(0, order).double()
    place = torch.arange(len(scores), device=scores.device)[:, None]
    precision = target.cumsum(0) / (place + 1)
    # equal scores are one step: all of them take the precision of the last
    last = torch.ones_like(target, dtype=torch.bool)
    last[:-1] = scores[:-1] != scores[1:]
    end = torch.where(last, place, len(scores)).flip(0).cummin(0).values.flip(0)
    return (target * precision.gather(0, end)).sum(0) / target.sum(0)


class ClassificationMAP(Measure):
    """Mean over the classes of average precision, from class scores; classes without a positive image are left out.

    Exact, and so the one metric that grows: 5 bytes for each class of each image.
    """

    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("logits", "labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """logits: (B, C); label: (B, C) 0 or 1."""
        self.logits.append(logits)
        self.labels.append(label.bool())

    def compute(self) -> Tensor:
        """NaN when no image has a label."""
        return average_precision(dim_zero_cat(self.logits), dim_zero_cat(self.labels)).nanmean()

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Tensor]:
        return {key: ClassificationMAP.compute(self)}


class ImageMAP(Measure):
    """Mean over the images of the average precision of each image's own classes among all classes.

    This is what the released MCTformer code logs as mAP. Images without a label are left out.
    """

    total: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.count("total", dtype=torch.double)
        self.count("images")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """logits: (B, C); label: (B, C) 0 or 1."""
        values = average_precision(logits.T, label.T)  # images take the place of classes
        self.total += values.nansum()
        self.images += (label.sum(1) > 0).sum()

    def compute(self) -> Tensor:
        """NaN when no image has a label."""
        return self.total / self.images

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Tensor]:
        return {key: ImageMAP.compute(self)}


class ClassificationF1(Measure):
    """F1 of the classes with a probability above one half: of each class over all images, and of each image.

    Their mean over the classes that occur is `f1`; that over the images, 0 for one without a label and a prediction, is
    `image_f1`, which the released ToCo code logs.
    """

    counts: Tensor
    total: Tensor
    images: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.count("counts", 3, num_classes)  # rightly predicted, predicted, true
        self.count("total", dtype=torch.double)
        self.count("images")

    def update(self, logits: Tensor, label: Tensor) -> None:
        """logits: (B, C); label: (B, C) 0 or 1."""
        predicted, true = logits > 0, label > 0
        cells = torch.stack([predicted & true, predicted, true])  # (3, B, C)
        self.counts += cells.sum(1)
        hits, *both = cells.sum(2)
        self.total += (2 * hits.double() / sum(both).clamp(min=1)).sum()
        self.images += len(label)

    def compute(self) -> Tensor:
        """Mean over the classes that occur; NaN when no image has a label."""
        hits, predicted, true = self.counts
        return (2 * hits.double() / (predicted + true))[true > 0].mean()

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Tensor]:
        return {key: ClassificationF1.compute(self), f"image_{key}": self.total / self.images}

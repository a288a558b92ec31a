"""Evaluation: what is measured, and under which protocol."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.utilities import dim_zero_cat

from wsss import InputError


@dataclass(frozen=True)
class Protocol:
    """How predictions are made before they are compared with the masks.

    Args:
        size: the image is resized to a square of this side (its aspect is lost); None leaves it as it is.
            Predictions are always resized to the mask.
        scales: factors of that size at which the segmentation is computed.
        flip: how its scores of the image and the mirror image are fused: `none` (image alone), `sum` or `max`.
        fusion: how its scales are fused: `max` or `sum`.
        crf: arguments of `wsss.refine.crf.dense_crf` for the segmentation; None for no CRF.
        image_labels: `true`: CAMs are cut to the labels of the image, as the field does; `predicted`: to the
            classes with a probability above one half.
    """

    size: int | None = None
    scales: Sequence[float] = (1.0,)
    flip: str = "none"
    fusion: str = "max"
    crf: Mapping[str, Any] | None = None
    image_labels: str = "true"

    def __post_init__(self) -> None:
        for name, known in (
            ("image_labels", ("true", "predicted")),
            ("flip", ("none", "sum", "max")),
            ("fusion", ("max", "sum")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"protocol.{name} is {getattr(self, name)!r}: expected {' or '.join(known)}")
        if self.size is not None and self.size < 1:
            raise InputError(f"protocol.size is {self.size}: expected a positive number of pixels or null")
        if not self.scales or min(self.scales) <= 0:
            raise InputError(f"protocol.scales is {list(self.scales)}: expected one or more positive factors")

    def describe(self, split: str, cam_scales: Sequence[float], background_threshold: float) -> dict[str, str]:
        """For each kind of figure the sentence that has to stand beside it."""
        size = "image size" if self.size is None else f"resized to {self.size}x{self.size}"
        cam = f"{split}, scales {_listed(cam_scales)} with flip, {size}, threshold {background_threshold:g}"
        cam += f", {self.image_labels} image labels, no CRF"
        seg = "single scale" if tuple(self.scales) == (1.0,) else f"scales {_listed(self.scales)} ({self.fusion})"
        seg += "" if self.flip == "none" else f" with flip ({self.flip})"
        crf = "no CRF" if self.crf is None else "CRF " + ", ".join(f"{k} {v}" for k, v in self.crf.items())
        return {
            "miou": f"{split}, {seg}, {size}, no image labels, {crf}",
            "cam_miou": cam,
            "aux_cam_miou": cam,
            "map": f"{split}, single scale, {size}, macro average over the classes that occur",
        }


def _listed(scales: Sequence[float]) -> str:
    return ", ".join(f"{scale:g}" for scale in scales)


class SegmentationIoU(Metric):
    """Intersection over union from one confusion matrix over all pixels of all images (VOC's mIoU).

    Pixels whose target is `ignore_index` do not count; a prediction of `ignore_index` counts for no class but
    remains in the union, as a miss.

    Args:
        num_ids: number of ids, background included (C + 1).
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self, num_ids: int, ignore_index: int = 255) -> None:
        super().__init__()
        self.num_ids, self.ignore_index = num_ids, ignore_index
        # the last column holds predictions of no class
        self.add_state("confusion", torch.zeros(num_ids, num_ids + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Both of one integer shape: ids 0..C or `ignore_index`."""
        counted = target != self.ignore_index
        rows = target[counted].long()
        columns = prediction[counted].long().clamp(max=self.num_ids)
        counts = torch.bincount(rows * (self.num_ids + 1) + columns, minlength=self.confusion.numel())
        self.confusion += counts.view_as(self.confusion)

    def iou(self) -> Tensor:
        """(C + 1,) IoU per id; NaN for an id that occurs neither in a target nor in a prediction."""
        hits = self.confusion.diagonal().double()
        union = self.confusion.sum(1) + self.confusion[:, : self.num_ids].sum(0) - hits
        return hits / union

    def compute(self) -> Tensor:
        """Mean IoU over the ids that occur in the targets; NaN before any target was seen."""
        return self.iou()[self.confusion.sum(1) > 0].mean()


class ClassificationMAP(MultilabelAveragePrecision):
    """Mean over the classes of average precision, from class scores; classes without a positive image are left out.

    (torchmetrics' own macro average counts such classes as 0.)
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none", validate_args=False)

    def update(self, logits: Tensor, label: Tensor) -> None:
        """logits: (B, C); label: (B, C) 0 or 1."""
        super().update(logits.double().sigmoid(), label.long())  # float32 ties all above 17

    def compute(self) -> Tensor:  # type: ignore[override]  # torchmetrics inherits it from a curve
        """NaN when no image has a label."""
        occurs = dim_zero_cat(self.target).sum(0) > 0
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No positive samples")
            return super().compute()[occurs].mean()


def flatten_iou(iou: Tensor, classes: Sequence[str]) -> Mapping[str, float]:
    """`iou/<class>` for background and every class that has a value."""
    names = ("background", *classes)
    return {f"iou/{name}": value for name, value in zip(names, iou.tolist(), strict=True) if value == value}

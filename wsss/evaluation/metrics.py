"""What is measured: metrics of segmentations, of CAMs and of classifications."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MultilabelAveragePrecision
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat

from wsss.cam import resize_ids


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
        return hits / (self.confusion.sum(1) + self.confusion[:, :-1].sum(0) - hits)

    def compute(self) -> Tensor:
        """Mean IoU over the ids that occur in the targets; NaN before any target was seen."""
        return self.iou()[self.confusion.sum(1) > 0].mean()


class CamIoU(Metric):
    """Mean IoU of CAMs at a fixed background threshold, and of the whole sweep 0, 0.01, ..., 0.99, in one pass.

    Pixels take the class with the largest value among the image's labels, or background where that is not above the
    threshold; one below 0 means that there is no background. Only histograms are kept: memory does not grow with the
    images, and with the number of classes no faster than it.
    """

    full_state_update = False
    hits: Tensor
    found: Tensor
    targets: Tensor
    thresholds: Tensor

    def __init__(self, num_classes: int, background_threshold: float, ignore_index: int = 255) -> None:
        super().__init__()
        self.background_threshold, self.ignore_index, self.num_ids = background_threshold, ignore_index, num_classes + 1
        sweep = {*(step / 100 for step in range(100)), background_threshold}
        self.register_buffer("thresholds", torch.tensor(sorted(sweep)), persistent=False)
        # [number of thresholds below the value, id]: pixels whose largest value is that of their true class, with
        # those of true background under id 0; and all pixels by the class of their largest value
        for name, shape in {"hits": (len(sweep) + 1,), "found": (len(sweep) + 1,), "targets": ()}.items():
            zeros = torch.zeros(*shape, self.num_ids, dtype=torch.long)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, cam: Tensor, label: Tensor, target: Tensor) -> None:
        """cam: (B, C, h, w) in [0, 1]; label: (B, C) 0 or 1, the classes that may appear; target: (B, H, W) ids."""
        largest = cam.float().masked_fill(label[:, :, None, None] == 0, -torch.inf).max(dim=1)
        value, index = (resize_ids(maps, target.shape[-2:]) for maps in largest)
        counted = target != self.ignore_index
        truth, best = target[counted].long(), index[counted] + 1
        below = torch.bucketize(value[counted], self.thresholds) * self.num_ids
        right = (truth == best) | (truth == 0)
        for state, place in ((self.hits, (below + truth)[right]), (self.found, below + best), (self.targets, truth)):
            state += torch.bincount(place, minlength=state.numel()).view_as(state)

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels of each id, (T, C + 1) by threshold: predicted rightly, predicted, and true."""
        # foreground at threshold t: more than t thresholds below the value
        hits, predicted = (counts.flip(0).cumsum(0).flip(0)[1:] for counts in (self.hits, self.found))
        hits[:, 0] = self.targets[0] - hits[:, 0]
        predicted[:, 0] = self.targets.sum() - predicted.sum(1)
        return hits, predicted, self.targets.expand_as(hits)

    def curve(self) -> Tensor:
        """(T,) mean IoU by threshold, over the ids that occur in the targets."""
        hits, predicted, true = self.counts()
        return (hits / (predicted + true - hits).double())[:, self.targets > 0].mean(1)

    def at_threshold(self) -> Tensor:
        """Mean IoU at `background_threshold`."""
        return self.curve()[(self.thresholds - self.background_threshold).abs().argmin()]

    def compute(self) -> Tensor:
        return self.at_threshold()

    def best(self) -> tuple[Tensor, Tensor]:
        """The largest mean IoU of the sweep, and its threshold. The masks have chosen it."""
        curve = self.curve()
        return curve.max(), self.thresholds[curve.argmax()]


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


class ImageMAP(MeanMetric):
    """Mean over the images of the average precision of each image's own classes among all classes.

    This is what the released MCTformer code logs as mAP. Images without a label are left out.
    """

    def update(self, logits: Tensor, label: Tensor) -> None:  # type: ignore[override]
        """logits: (B, C); label: (B, C) 0 or 1."""
        labelled = label.sum(1) > 0
        # images take the place of labels: one curve for each
        scores, target = logits[labelled].double().sigmoid().T, label[labelled].long().T
        if scores.numel():
            super().update(multilabel_average_precision(scores, target, scores.shape[1], "none", validate_args=False))


def evaluation(num_classes: int, cam_names: Sequence[str], background_threshold: float) -> nn.ModuleDict:
    """What every method is measured by, by the name of the figure."""
    metrics: dict[str, Metric] = {
        "map": ClassificationMAP(num_classes),
        "image_map": ImageMAP(),
        "miou": SegmentationIoU(num_classes + 1),
    }
    return nn.ModuleDict(metrics | {f"{name}_miou": CamIoU(num_classes, background_threshold) for name in cam_names})


def figures_of(metrics: nn.ModuleDict, classes: Sequence[str]) -> dict[str, Any]:
    """Figures of the metrics that have seen anything, which start anew.

    Beside its mean, `miou` gives `iou/<class>` for background and every class, NaN for one that neither masks nor
    predictions hold, and the CAMs `..._best_miou` and `..._best_threshold`.
    """
    figures: dict[str, Any] = {}
    for key, metric in metrics.items():
        assert isinstance(metric, Metric)
        if not metric.update_called:
            continue
        if isinstance(metric, SegmentationIoU):
            values = zip(("background", *classes), metric.iou().tolist(), strict=True)
            figures |= {f"iou/{name}": value for name, value in values}
        elif isinstance(metric, CamIoU):
            best, threshold = metric.best()
            figures |= {key.replace("miou", "best_miou"): best, key.replace("miou", "best_threshold"): threshold}
        figures[key] = metric.compute().float()
        metric.reset()
    return figures

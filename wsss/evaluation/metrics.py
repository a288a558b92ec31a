"""What is measured of masks and of CAMs in every evaluation, and how metrics become figures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from wsss.cam import area_prior, otsu, resize_ids
from wsss.evaluation.classification import ClassificationF1, ClassificationMAP, ImageMAP
from wsss.evaluation.measure import Measure, add_ones, by_class, listed_pairs, plain, rates
from wsss.evaluation.protocol import Protocol

PAPER_SWEEP = 0.6
"""The released sweep of MCTformer looks at the thresholds below this."""


class SegmentationIoU(Measure):
    """Intersection over union from one confusion matrix over all pixels of all images (VOC's mIoU).

    Pixels whose target is `ignore_index` do not count; a prediction of `ignore_index` counts for no class but
    remains in the union, as a miss.

    Args:
        num_ids: number of ids, background included (C + 1).
    """

    confusion: Tensor

    def __init__(self, num_ids: int, ignore_index: int = 255) -> None:
        super().__init__()
        self.num_ids, self.ignore_index = num_ids, ignore_index
        # the last column holds predictions of no class
        self.count("confusion", num_ids, num_ids + 1)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Both of one integer shape: ids 0..C or `ignore_index`."""
        counted = target != self.ignore_index
        rows, columns = target[counted].long(), prediction[counted].long()
        columns = torch.where(columns == self.ignore_index, self.num_ids, columns).clamp(max=self.num_ids)
        add_ones(self.confusion, rows * (self.num_ids + 1) + columns)

    def counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(C + 1,) pixels of each id predicted rightly, predicted, and true."""
        return self.confusion.diagonal(), self.confusion[:, :-1].sum(0), self.confusion.sum(1)

    def iou(self) -> Tensor:
        """(C + 1,) IoU per id; NaN for an id that occurs neither in a target nor in a prediction."""
        return rates(*self.counts())["iou"]

    def compute(self) -> Tensor:
        """Mean IoU over the ids that occur in the targets; NaN before any target was seen."""
        return self.iou()[self.confusion.sum(1) > 0].mean()

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
        """The mean IoU, and by what `key` begins with, if it does not stand alone:

        - `miou_all`, the mean over all C + 1 ids, 0 for one that occurs nowhere (MCTformer's evaluation);
        - `foreground_miou`, over the classes that occur in the targets, without the background;
        - `pixel_accuracy`;
        - `iou/<class>` for background and every class, NaN for one that neither masks nor predictions hold.
        """
        iou, occurs, prefix = self.iou(), self.confusion.sum(1) > 0, key.removesuffix("miou")
        each = zip(("background", *classes), iou.tolist(), strict=True)
        return {f"{prefix}iou/{name}": value for name, value in each} | {
            key: iou[occurs].mean(),
            f"{key}_all": iou.nan_to_num(0.0).mean(),
            f"{prefix}foreground_miou": iou[1:][occurs[1:]].mean(),
            f"{prefix}pixel_accuracy": self.confusion.diagonal().sum().double() / self.confusion.sum(),
        }

    def tables(self, classes: Sequence[str]) -> dict[str, Any]:
        """`classes`: the `rates` of each; `confused`: (true, predicted, pixels) of the most confused pairs."""
        names, wrong = ("background", *classes), self.confusion[:, :-1].clone()
        wrong.fill_diagonal_(0)
        return {"classes": by_class(rates(*self.counts()), names), "confused": listed_pairs(wrong, names, names)}


HUNDREDTHS = tuple(step / 100 for step in range(100))


class CamIoU(Measure):
    """Mean IoU of CAMs at a fixed background threshold, and of a whole sweep of them, in one pass.

    Pixels take the class with the largest value among the image's labels, or background where that is not above the
    threshold; one below 0 means that there is no background. Only histograms are kept: memory does not grow with the
    images, and with the number of classes no faster than it.

    The histograms also give the thresholds of rules that look at no mask, each a threshold over all images:

    - `otsu`: `wsss.cam.otsu` for each class, of the values where the class is the largest;
    - `area_prior`: the threshold at which a given share of the pixels of images with a label is foreground.

    Args:
        num_classes: C.
        background_threshold: the fixed one.
        sweep: further thresholds, of which `first_drop` needs some below 0.6.
    """

    pixels: Tensor
    targets: Tensor
    thresholds: Tensor
    in_sweep: Tensor
    next: Tensor
    before: Tensor

    def __init__(
        self,
        num_classes: int,
        background_threshold: float,
        ignore_index: int = 255,
        sweep: Sequence[float] = HUNDREDTHS,
    ) -> None:
        super().__init__()
        self.background_threshold, self.ignore_index, self.num_ids = background_threshold, ignore_index, num_classes + 1
        thresholds = torch.tensor(sorted({*sweep, background_threshold}))
        # values are looked up: the thresholds of lower cells are below all values of a cell
        cells = _cell(thresholds)
        self.in_one_cell = int(cells.bincount().max())
        buffers = {
            "thresholds": thresholds,
            "in_sweep": torch.isin(thresholds, torch.tensor(sweep)),
            "next": torch.cat([thresholds, torch.tensor([torch.inf])]),
            "before": torch.searchsorted(cells, torch.arange(CELLS + 1)),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        # [number of thresholds below the value, kind, class]: pixels of images with a label by the class of their
        # largest value; kinds: it is right, the truth is background, or another class, or ignored
        self.count("pixels", len(thresholds) + 1, 4, num_classes)
        self.count("targets", self.num_ids)

    def update(self, cam: Tensor, label: Tensor, target: Tensor, classes: Tensor | None = None) -> None:
        """
        Args:
            cam: (B, C, h, w) in [0, 1].
            label: (B, C) 0 or 1, the classes that may appear.
            target: (B, H, W) ids.
            classes: (n,) long: which classes the channels of cam and label are, where they are not all C.
        """
        counted = target != self.ignore_index
        self.targets += torch.bincount(target[counted].long(), minlength=self.num_ids)
        images, shown = (label.any(axis).nonzero()[:, 0] for axis in (1, 0))
        if len(images) == 0:
            return
        label = label[images][:, shown]
        maps = cam[images][:, shown] if len(images) < len(cam) else cam[:, shown]
        largest = maps.float().masked_fill(label[:, :, None, None] == 0, -torch.inf).max(dim=1)
        value, index = (resize_ids(maps, target.shape[-2:]) for maps in largest)
        best = (shown if classes is None else classes[shown])[index]
        truth, counted = target[images], counted[images]
        kind = 2 - 2 * (truth == best + 1).byte() - (truth == 0).byte()
        kind = torch.where(counted, kind, 3)
        place = (self.below(value) * 4 + kind) * self.pixels.shape[2] + best
        add_ones(self.pixels, place.flatten())

    def below(self, value: Tensor) -> Tensor:
        """Number of thresholds below each value, as `torch.bucketize` but in a time that does not grow with them."""
        below = self.before[_cell(value)]
        for _ in range(self.in_one_cell):
            below = below + (value > self.next[below])
        return below

    def counts(self, at: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels of each id, (T, C + 1) by threshold: predicted rightly, predicted, and true.

        `at` (R, C) long gives the numbers of other thresholds, one for each class, for the results' R rows.
        """
        # foreground at threshold t: more than t thresholds below the value
        above = self.pixels.flip(0).cumsum(0).flip(0)[1:]
        if at is not None:
            above = above.gather(0, at[:, None].expand(-1, 4, -1))
        right, background, other, _ = above.unbind(1)
        found = right + background + other
        hits = torch.cat([self.targets[0] - background.sum(1, keepdim=True), right], dim=1)
        predicted = torch.cat([self.targets.sum() - found.sum(1, keepdim=True), found], dim=1)
        return hits, predicted, self.targets.expand_as(hits)

    def curve(self) -> Tensor:
        """(T,) mean IoU by threshold, over the ids that occur in the targets."""
        hits, predicted, true = self.counts()
        return (hits / (predicted + true - hits).double())[:, self.targets > 0].mean(1)

    def curve_all(self) -> Tensor:
        """(T,) mean IoU by threshold over all C + 1 ids, 0 for one that occurs nowhere (MCTformer's evaluation)."""
        hits, predicted, true = self.counts()
        return (hits / (predicted + true - hits).double()).nan_to_num(0.0).mean(1)

    @property
    def fixed(self) -> int:
        """Number of the fixed threshold."""
        return int((self.thresholds - self.background_threshold).abs().argmin())

    def compute(self) -> Tensor:
        """Mean IoU at `background_threshold`."""
        return self.curve()[self.fixed]

    def best(self) -> tuple[Tensor, Tensor]:
        """The largest mean IoU of the sweep, and its threshold. The masks have chosen it."""
        curve = self.curve()
        return curve.max(), self.thresholds[curve.argmax()]

    def area(self) -> Tensor:
        """Mean of the curve over the range of the sweep, by trapezoids; it asks for no threshold."""
        curve, thresholds = self.curve()[self.in_sweep], self.thresholds[self.in_sweep].double()
        if len(curve) == 1:
            return curve[0]
        return torch.trapezoid(curve, thresholds) / (thresholds[-1] - thresholds[0])

    def first_drop(self) -> tuple[Tensor, Tensor]:
        """The result of the released sweep of MCTformer, the mean IoU over all C + 1 ids, and its threshold.

        It goes from 0 to 0.59, stops at the first threshold that does not improve, and so may miss the best one. The
        masks have chosen it.
        """
        swept = self.in_sweep & (self.thresholds < PAPER_SWEEP)
        curve, thresholds = self.curve_all()[swept], self.thresholds[swept]
        worse = (curve[1:] <= curve[:-1]).nonzero()[:, 0]
        stop = int(worse[0]) if len(worse) else len(curve) - 1
        return curve[stop], thresholds[stop]

    def chosen(self, rule: str, share: float | None = None) -> Tensor:
        """(C,) long: the number of each class's threshold by a rule; of these only `best` looks at the masks."""
        histogram = self.pixels.sum(1)
        if rule == "area_prior":
            assert share is not None  # the protocol has seen to it
            return area_prior(histogram.sum(1), share).expand(histogram.shape[1])
        if rule == "otsu":
            ends = torch.cat([self.thresholds.new_zeros(1), self.thresholds, self.thresholds.new_ones(1)]).clamp(0, 1)
            return otsu(histogram, (ends[1:] + ends[:-1]) / 2)
        if rule == "best":
            return self.curve().argmax().expand(histogram.shape[1])
        return torch.full_like(histogram[0], self.fixed)

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
        """Mean IoU by the protocol's rule, by the other rules, and by the masks' choice, in words that replace `miou`.

        - `miou`, `miou_all`, `foreground_miou`: by the protocol's rule; see `SegmentationIoU.figures`;
        - `fixed_miou`, `otsu_miou`, `area_prior_miou`: by the others of these rules that can be followed;
        - `best_miou`, `best_threshold`: the best of the sweep, and `first_drop_miou`, `first_drop_threshold`;
        - `gap`, `otsu_gap`, ...: what a rule loses against the best;
        - `area_under_curve`: see `area`.
        """
        prefix = key.removesuffix("miou")
        best, threshold = self.best()
        figures: dict[str, Any] = {}
        for number, rule in enumerate(protocol.rules(self.background_threshold)):
            word, at = f"{rule}_" if number else "", self.chosen(rule, protocol.area_prior)[None]
            iou = rates(*(counts[0] for counts in self.counts(at)))["iou"]
            value = iou[self.targets > 0].mean()
            figures[f"{prefix}{word}miou"] = value
            if self.background_threshold >= 0:  # else nothing is chosen
                figures[f"{prefix}{word}gap"] = best - value
            if not number:
                figures[f"{key}_all"] = iou.nan_to_num(0.0).mean()
                figures[f"{prefix}foreground_miou"] = iou[1:][self.targets[1:] > 0].mean()
            if rule == "area_prior":
                figures[f"{prefix}area_prior_threshold"] = self.thresholds[at[0, 0]]
        figures |= {f"{prefix}best_miou": best, f"{prefix}best_threshold": threshold}
        if self.background_threshold >= 0:
            value, threshold = self.first_drop()
            figures |= {f"{prefix}first_drop_miou": value, f"{prefix}first_drop_threshold": threshold}
            figures[f"{prefix}area_under_curve"] = self.area()
        return figures

    def tables(self, classes: Sequence[str]) -> dict[str, Any]:
        """The curve; the `rates` of each class at the fixed threshold; the thresholds of Otsu's rule by class."""
        at_fixed = rates(*(counts[self.fixed] for counts in self.counts()))
        seen = self.pixels.sum((0, 1)) > 0
        by_otsu = torch.where(seen, self.thresholds[self.chosen("otsu")], torch.nan)
        return {
            "thresholds": self.thresholds.tolist(),
            "curve": plain(self.curve()),
            "curve_all": plain(self.curve_all()),
            "classes": by_class(at_fixed, ("background", *classes)),
            "otsu_thresholds": dict(zip(classes, plain(by_otsu), strict=True)),
        }


CELLS = 1 << 14
"""Equal parts of [0, 1] by which values are looked up among thresholds."""


def _cell(value: Tensor) -> Tensor:
    """The part a value is in, rising with the value; those outside, and NaN, are in the first or the last."""
    return (value.clamp(0, 1) * CELLS).nan_to_num(0.0).long()


def evaluation(num_classes: int, cam_names: Sequence[str], background_threshold: float) -> nn.ModuleDict:
    """What every method is measured by, by the name of the figure."""
    metrics: dict[str, Measure] = {
        "map": ClassificationMAP(),
        "image_map": ImageMAP(),
        "f1": ClassificationF1(num_classes),
        "miou": SegmentationIoU(num_classes + 1),
    }
    return nn.ModuleDict(metrics | {f"{name}_miou": CamIoU(num_classes, background_threshold) for name in cam_names})


def figures_of(metrics: nn.ModuleDict, classes: Sequence[str], protocol: Protocol | None = None) -> dict[str, Any]:
    """Figures of the metrics that have seen anything, over all processes; see `Measure.figures` of each."""
    figures: dict[str, Any] = {}
    for key, metric in metrics.items():
        assert isinstance(metric, Metric)
        if isinstance(metric, Measure) and metric.update_called:
            with metric.sync_context():
                figures |= metric.figures(key, classes, protocol or Protocol())
        elif metric.update_called:  # one of torchmetrics', in a method from elsewhere
            figures[key] = metric.compute()
    return {key: value.float() if isinstance(value, Tensor) else value for key, value in figures.items()}


def tables_of(metrics: nn.ModuleDict, classes: Sequence[str]) -> dict[str, Any]:
    """By the names of the metrics that have seen anything what is more than a number; see `Measure.tables` of each."""
    tables: dict[str, Any] = {}
    for key, metric in metrics.items():
        if isinstance(metric, Measure) and metric.update_called:
            with metric.sync_context():
                tables[key] = metric.tables(classes)
    return {key: table for key, table in tables.items() if table}

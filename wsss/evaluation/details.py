"""What costs time to measure, and is measured when it is asked for (`detail=true` of wsss-eval)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.evaluation.measure import Measure, add_ones, by_class, listed_pairs, plain, rates
from wsss.evaluation.metrics import SegmentationIoU
from wsss.evaluation.protocol import Protocol

SIZES = {"small": 0.0, "medium": 0.01, "large": 0.1}
"""Groups of objects, and the share of its image's pixels from which on the area of a class belongs to each."""


def _uniform(ids: Tensor, width: int, beyond: float | None) -> Tensor:
    """(B, H, W) bool: all pixels up to `width` rows and columns away have the id of this one.

    Those outside of the image count as `beyond`, or not at all.
    """
    maps, window = ids[:, None].float(), 2 * width + 1  # ids are small: exact
    outside = (-torch.inf, torch.inf) if beyond is None else (beyond, beyond)
    largest = F.pad(maps, (width,) * 4, value=outside[0])
    smallest = -F.pad(maps, (width,) * 4, value=outside[1])
    for kernel in ((window, 1), (1, window)):
        largest, smallest = (F.max_pool2d(part, kernel, stride=1) for part in (largest, smallest))
    return (largest == -smallest)[:, 0]


class BoundaryIoU(Measure):
    """IoU of the parts of predicted and true masks that are near their own contours.

    B. Cheng et al., "Boundary IoU", CVPR 2021 (arXiv 2103.16562): of each mask the pixels up to d rows or
    columns inside of its contour, d being 2 % of the image's diagonal, at least 1. The border of the image is a
    contour, as in their code. They measure objects; here intersections and unions of each id are summed over the
    images, as for mIoU. Where the target is `ignore_index` neither mask has an id, so that both end there.

    Args:
        num_ids: number of ids, background included (C + 1).
        ratio: d as a share of the diagonal.
    """

    pixels: Tensor

    def __init__(self, num_ids: int, ratio: float = 0.02, ignore_index: int = 255) -> None:
        super().__init__()
        self.num_ids, self.ratio, self.ignore_index = num_ids, ratio, ignore_index
        self.count("pixels", 3, num_ids)  # near the contours of both and right, of the prediction, of the target

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Both (B, H, W): ids 0..C or `ignore_index`."""
        width = max(1, round(self.ratio * math.hypot(*target.shape[-2:])))
        counted = target != self.ignore_index
        masks = [torch.where(counted & (ids != self.ignore_index), ids.long(), -1) for ids in (prediction, target)]
        near = [(ids >= 0) & ~_uniform(ids, width, beyond=-2.0) for ids in masks]
        both = near[0] & near[1] & (masks[0] == masks[1])
        parts = ((masks[0], both), (masks[0], near[0]), (masks[1], near[1]))
        self.pixels += torch.stack([torch.bincount(ids[part], minlength=self.num_ids) for ids, part in parts])

    def iou(self) -> Tensor:
        """(C + 1,); NaN for an id that occurs nowhere."""
        return rates(*self.pixels)["iou"]

    def compute(self) -> Tensor:
        """Mean over the ids that occur in the targets."""
        return self.iou()[self.pixels[2] > 0].mean()

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
        return {key: BoundaryIoU.compute(self)}

    def tables(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"classes": by_class({"iou": self.iou()}, ("background", *classes))}


class TrimapIoU(SegmentationIoU):
    """Mean IoU of the pixels near a contour of the truth.

    P. Kohli, L. Ladicky and P. Torr, "Robust higher order potentials for enforcing label consistency", IJCV 82 (2009):
    the pixels up to `width` rows or columns away from one with another id, `ignore_index` being one: VOC's
    objects are edged with it.
    """

    def __init__(self, num_ids: int, width: int = 8, ignore_index: int = 255) -> None:
        super().__init__(num_ids, ignore_index)
        self.width = width

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Both (B, H, W): ids 0..C or `ignore_index`."""
        inside = _uniform(target, self.width, beyond=None)
        super().update(prediction, torch.where(inside, self.ignore_index, target.long()))

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
        return {key: SegmentationIoU.compute(self)}

    def tables(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"classes": by_class({"iou": self.iou()}, ("background", *classes))}


class SizeIoU(Measure):
    """IoU by the size of objects: the area that a class has in an image, as a share of its counted pixels; see SIZES.

    An image counts for a class in the group of the true area, with all pixels predicted as this class in it. What is
    predicted where the class is not has no size; `AbsentClasses` measures it.
    """

    pixels: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__()
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.count("pixels", len(SIZES), 3, num_classes)  # predicted rightly, predicted, true

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Both (B, H, W): ids 0..C or `ignore_index`."""
        least = torch.tensor(list(SIZES.values())[1:], dtype=torch.double, device=target.device)
        for ids, truth in zip(prediction, target, strict=True):
            shown, counts = image_counts(ids, truth, self.num_classes + 1, self.ignore_index)
            kept = (shown > 0) & (counts[2] > 0)
            shown, counts = shown[kept], counts[:, kept]
            group = torch.bucketize(counts[2].double() / (truth != self.ignore_index).sum(), least, right=True)
            self.pixels[group, :, shown - 1] += counts.T

    def iou(self) -> Tensor:
        """(3, C), by group; NaN for a class without an object of the size."""
        hits, predicted, true = self.pixels.unbind(1)
        return torch.where(true > 0, hits.double() / (predicted + true - hits), torch.nan)

    def compute(self) -> Tensor:
        """(3,) mean over the classes that have objects of the size, small ones first; NaN where none has."""
        return self.iou().nanmean(1)

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
        """`size_miou` becomes `small_miou`, `medium_miou`, `large_miou`."""
        values = SizeIoU.compute(self)
        return {key.replace("size", size): value for size, value in zip(SIZES, values, strict=True)}

    def tables(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"from": SIZES, "classes": by_class(dict(zip(SIZES, self.iou(), strict=True)), classes)}


def image_counts(prediction: Tensor, target: Tensor, num_ids: int, ignore_index: int = 255) -> tuple[Tensor, Tensor]:
    """Pixels of the ids that occur in an image's prediction or target (H, W).

    Returns:
        (n,) ids, ascending, and (3, n) pixels of them predicted rightly, predicted, and true.
    """
    counted = target != ignore_index
    truth, ids = target[counted].long(), prediction[counted].long()
    known = ids[(ids != ignore_index) & (ids < num_ids)]
    parts = (truth[truth == ids], known, truth)
    counts = torch.stack([torch.bincount(part, minlength=num_ids) for part in parts])
    shown = (counts[1] + counts[2]).nonzero()[:, 0]
    return shown, counts[:, shown]


class Cooccurrence(Measure):
    """How often classes are taken for others that the same image shows: horse for person, train for rail.

    Of the pixels of each id that an image's labels hold, in images whose labels also hold class b, the share that is
    predicted as b; the background is in all images.
    """

    confused: Tensor
    pixels: Tensor
    several: Tensor

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        super().__init__()
        self.num_classes, self.ignore_index = num_classes, ignore_index
        # [true id, class]: pixels predicted as the class, and all, in the images whose labels hold the class
        self.count("confused", num_classes + 1, num_classes)
        self.count("pixels", num_classes + 1, num_classes)
        self.count("several")  # pixels of true classes in images with several

    def update(self, prediction: Tensor, target: Tensor, label: Tensor) -> None:
        """prediction, target: (B, H, W) ids 0..C or `ignore_index`; label: (B, C) 0 or 1."""
        for ids, truth, labelled in zip(prediction, target, label > 0, strict=True):
            counted = truth != self.ignore_index
            true, found = truth[counted].long(), ids[counted].long()
            present = F.pad(labelled, (1, 0), value=True)  # (1 + C,), background first
            areas = torch.bincount(true, minlength=self.num_classes + 1) * present
            shown, others = areas.nonzero(), labelled.nonzero()[:, 0]  # (n, 1), (m,)
            self.pixels[shown, others] += areas[shown] * (shown != others + 1)
            if len(others) > 1:
                self.several += areas[1:].sum()
            wrong = (found != true) & (found > 0) & (found <= self.num_classes)
            true, found = true[wrong], found[wrong]
            kept = present[true] & present[found]
            add_ones(self.confused, true[kept] * self.num_classes + found[kept] - 1)

    def compute(self) -> Tensor:
        """Share of the pixels of labelled true classes, in images with several, taken for another of them."""
        return self.confused[1:].sum().double() / self.several

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
        return {key: Cooccurrence.compute(self)}

    def tables(self, classes: Sequence[str]) -> dict[str, Any]:
        """(true, predicted, share) of the pairs with the largest shares."""
        shares = (self.confused.double() / self.pixels).nan_to_num(0.0)
        return {"confused": listed_pairs(shares, ("background", *classes), classes)}


class AbsentClasses(Measure):
    """Share of the foreground that is given to classes which the image's labels do not hold. It needs no mask."""

    pixels: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.count("pixels", 2, num_classes)  # predicted in images without the class, and in all

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """prediction: (B, H, W) ids, made without the labels; label: (B, C) 0 or 1."""
        for ids, labelled in zip(prediction, label > 0, strict=True):
            known = ids[(ids > 0) & (ids <= self.num_classes)].long() - 1
            counts = torch.bincount(known, minlength=self.num_classes)
            self.pixels += torch.stack([counts * ~labelled, counts])

    def compute(self) -> Tensor:
        """NaN where nothing is foreground."""
        absent, found = self.pixels.sum(1).double()
        return absent / found

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
        return {key: AbsentClasses.compute(self)}

    def tables(self, classes: Sequence[str]) -> dict[str, Any]:
        absent, found = self.pixels.double()
        return {"classes": by_class({"absent": absent / found}, classes)}


class OverSmoothing(Measure):
    """Mean cosine of the patch tokens of an image, of all pairs of different ones, after each block of a transformer.

    Near 1 all tokens are the same, and so are all places of a map made of them (ToCo, Ru et al., CVPR 2023).
    """

    total: Tensor
    images: Tensor

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.count("total", num_blocks, dtype=torch.double)
        self.count("images")

    def update(self, tokens: Sequence[Tensor]) -> None:
        """tokens: (B, N, D) of each block, N >= 2."""
        for block, part in enumerate(tokens):
            unit, number = F.normalize(part.double(), dim=-1), part.shape[1]
            # |sum of all|^2 holds every pair twice, and each token with itself
            pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))
            self.total[block] += (pairs / (number * (number - 1))).sum()
        self.images += len(tokens[0])

    def compute(self) -> Tensor:
        """(L,) by block."""
        return self.total / self.images

    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
        """That after the last block; `tables` has all."""
        return {key: OverSmoothing.compute(self)[-1]}

    def tables(self, classes: Sequence[str]) -> dict[str, Any]:
        return {"blocks": plain(OverSmoothing.compute(self))}


def per_image(
    figure: str, names: Sequence[str], prediction: Tensor, target: Tensor, num_ids: int
) -> list[tuple[str, str, int, int, int, int]]:
    """Rows of per_image.csv, see `wsss.evaluation.comparison.COLUMNS`, of masks (B, H, W)."""
    rows = []
    for name, ids, truth in zip(names, prediction, target, strict=True):
        shown, counts = image_counts(ids, truth, num_ids)
        rows += [(name, figure, *row) for row in torch.cat([shown[None], counts]).T.tolist()]
    return rows


def mask_details(num_classes: int, prefix: str = "") -> dict[str, Measure]:
    """What masks are measured by in detail, by the name of the figure."""
    return {
        f"{prefix}boundary_miou": BoundaryIoU(num_classes + 1),
        f"{prefix}trimap_miou": TrimapIoU(num_classes + 1),
        f"{prefix}size_miou": SizeIoU(num_classes),
        f"{prefix}cooccurrence": Cooccurrence(num_classes),
        f"{prefix}absent": AbsentClasses(num_classes),
    }

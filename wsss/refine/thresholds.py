"""Thresholds and background scores that make labels of class activation maps.

Class ids of label maps: 0 background, c + 1 for class c, 255 ignore.
"""

import math
from collections import deque

import torch
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import area_prior, otsu


def cam_to_label(
    cam: Tensor,
    label: Tensor,
    background_threshold: float | Tensor,
    thresholds: tuple[float, float] | None = None,
    valid: Tensor | None = None,
    ignore_index: int = 255,
    classes: Tensor | None = None,
) -> Tensor:
    """The class with the largest CAM among an image's labels, background where that is not above a threshold.

    Args:
        cam: (B, C, H, W) in [0, 1].
        label: (B, C) 0 or 1. An image without labels is background everywhere.
        background_threshold: values up to it are background; below 0 only images without labels have any. One for
            all pixels, or (B, H, W).
        thresholds: (low, high): then values up to `low` are background and those up to `high` are ignored,
            so that `background_threshold` has no effect.
        valid: (B, H, W) bool; everything else is ignored.
        classes: (B, C) which class a map is of, where they are not all there are (see `present_classes`).

    Returns:
        (B, H, W) long.
    """
    value, index = cam.masked_fill(label[:, :, None, None] == 0, -torch.inf).max(dim=1)
    if classes is not None:
        index = classes.gather(1, index.flatten(1)).view_as(index)
    result = torch.where(value <= background_threshold, 0, index + 1)
    if thresholds is not None:
        low, high = thresholds
        result = torch.where(value <= high, ignore_index, result)
        result = torch.where(value <= low, 0, result)
    if valid is not None:
        result = torch.where(valid, result, ignore_index)
    return result


def region_map(cam: Tensor, label: Tensor, low_threshold: float, high_threshold: float) -> Tensor:
    """Where the present classes are: 0 background (<= low), 1 uncertain, 2 foreground (>= high); (B, H, W)."""
    value = (cam * label[:, :, None, None]).amax(dim=1)
    return (value > low_threshold).short() + (value >= high_threshold).short()


def power_background(cam: Tensor, alpha: float) -> Tensor:
    """The background score (1 - max_c cam)^alpha of PSA and those after it; (B, C, H, W), C >= 1 -> (B, H, W).

    The larger alpha, the less is background. A maximum outside of [0, 1], as SEAM's normalisation may leave it, counts
    as 0 or 1.
    """
    return (1 - cam.amax(dim=1).clamp(0, 1)) ** alpha


def background_scores(
    cam: Tensor, rule: str, value: float | None = None, low: float | None = None, high: float | None = None
) -> tuple[Tensor, ...]:
    """What a class has to exceed at each pixel: one score, or a low and a high one with undecided pixels between them.

    Args:
        cam: (B, C, H, W) in [0, 1] of the classes that the images show, C >= 1.
        rule: `constant` takes `value`, `alpha` takes (1 - max_c cam)^value, `pair` takes `low` and `high` (ToCo);
            `otsu` is Otsu's threshold of each class of each image (see `image_thresholds`), `area_prior` the one at
            which a share `value` of each image is foreground.

    Returns:
        One or two of (B, H, W), the low one first.

    Raises:
        InputError: no such rule, or a number that it needs is missing or out of range.
    """
    needed = {"constant": {"value": value}, "alpha": {"value": value}, "pair": {"low": low, "high": high}}
    needed |= {"otsu": {}, "area_prior": {"value": value}}
    if rule not in needed:
        raise InputError(f"background.rule is {rule!r}: expected {', '.join(needed)}")
    for name, number in needed[rule].items():
        if number is None:
            raise InputError(f"background.{name} is not set, which the rule {rule} needs: give a number")
    if rule == "alpha":
        if not value or value < 0:
            raise InputError(f"background.value is {value}: expected an alpha above 0")
        return (power_background(cam, value),)
    if rule in ("otsu", "area_prior"):
        if value is not None and not 0 < value < 1:
            raise InputError(f"background.value is {value}: expected a share of foreground between 0 and 1")
        return (image_thresholds(cam, value if rule == "area_prior" else None),)
    if low is not None and high is not None and low > high:
        raise InputError(f"background.low is {low} and high is {high}: expected low <= high")
    return tuple(torch.full_like(cam[:, 0], number or 0.0) for number in needed[rule].values())


def image_thresholds(cam: Tensor, share: float | None = None) -> Tensor:
    """For each pixel a threshold that the image's own values choose, among 0, 0.01, ..., 0.99.

    Args:
        cam: (B, C, H, W) in [0, 1] of the classes that the images show, C >= 1.
        share: how much of an image is to be foreground; None takes Otsu's threshold (`wsss.cam.otsu`) of the values of
            the pixels where a class has the largest, for the pixels of each class.

    Returns:
        (B, H, W).
    """
    thresholds = torch.arange(100, dtype=cam.dtype, device=cam.device) / 100
    middles = torch.cat([thresholds[:1], thresholds[1:] - 0.005, thresholds[-1:] + 0.005])
    result = []
    for value, index in zip(*cam.max(dim=1), strict=True):
        classes = cam.shape[1]
        place = torch.bucketize(value, thresholds) * classes + index
        counts = torch.bincount(place.flatten(), minlength=len(middles) * classes).view(len(middles), classes)
        chosen = otsu(counts, middles)[index] if share is None else area_prior(counts.sum(1), share)
        result.append(thresholds[chosen].expand_as(value))
    return torch.stack(result)


def agreement(low: Tensor, high: Tensor, ignore_index: int = 255) -> Tensor:
    """One label of two with a strong and a weak background score (PSA): of a low and of a high alpha.

    A class is certain where it beats the strong background, `low`; background where it beats every class while weak,
    `high`, which comes first; between them a pixel is ignored.

    Args:
        low: ids of any shape, labelled with the low alpha.
        high: ids of this shape, labelled with the high alpha.
    """
    return torch.where(high == 0, 0, torch.where(low == 0, ignore_index, low))


def mixture_thresholds(values: Tensor, components: int = 3, tolerance: float = 1e-3) -> tuple[float, float]:
    """Where the values of CAMs part into background, undecided and foreground, by a Gaussian mixture of them (CoSA).

    Expectation maximisation from equal weights, means at minimum, median and maximum, and variances of 1, until the
    mean log-likelihood changes by less than `tolerance`, or 100 times; as in the released code of CoSA (arXiv
    2402.17891), where it is switched off.

    Args:
        values: of any shape, above what is certainly background.

    Returns:
        The largest value of the lowest component, and the smallest of the highest one; 0 and 1 where those have none.
    """
    x = values.flatten().double()
    if len(x) == 0:
        return 0.0, 1.0
    middle = x.quantile(torch.linspace(0, 1, components, dtype=x.dtype, device=x.device))
    mean, variance, weight = middle, torch.ones_like(middle), torch.full_like(middle, 1 / components)
    likelihood = -math.inf
    for _ in range(100):
        log = (weight.log() - (variance * math.tau).log() / 2) - (x[:, None] - mean).square() / (2 * variance)
        total = log.logsumexp(dim=1)
        share = (log - total[:, None]).exp()
        count = share.sum(0) + torch.finfo(x.dtype).eps
        weight, mean = count / len(x), (share * x[:, None]).sum(0) / count
        variance = (share * (x[:, None] - mean).square()).sum(0) / count + 1e-6
        before, likelihood = likelihood, total.mean().item()
        if abs(likelihood - before) < tolerance:
            break
    log = (weight.log() - variance.log() / 2) - (x[:, None] - mean).square() / (2 * variance)
    which = log.argmax(dim=1)
    lowest, highest = x[which == 0], x[which == components - 1]
    return (lowest.max().item() if len(lowest) else 0.0, highest.min().item() if len(highest) else 1.0)


class MixtureThresholds(nn.Module):
    """Low and high background scores that follow the CAMs of a training (CoSA's dynamic thresholds).

    After each batch they move towards the `mixture_thresholds` of the values of the last ones.

    Args:
        low: where the low one starts.
        high: where the high one does.
        batches: the values of so many last batches take part.
        least: values up to it are certainly background and take no part.
        momentum: share of a threshold that stays in a step.

    Raises:
        InputError: a number that is out of range; it is called as in `dynamic_thresholds` of CoSA.
    """

    def __init__(
        self, low: float, high: float, batches: int = 100, least: float = 0.05, momentum: float = 0.99
    ) -> None:
        super().__init__()
        if not isinstance(batches, int) or batches < 1:
            raise InputError(f"dynamic_thresholds.batches is {batches!r}: expected a whole number of at least 1")
        for name, value in (("least", least), ("momentum", momentum)):
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise InputError(f"dynamic_thresholds.{name} is {value!r}: expected 0 to 1")
        self.least, self.momentum = least, momentum
        self.bounds: Tensor
        self.register_buffer("bounds", torch.tensor([low, high]))
        self.values: deque[Tensor] = deque(maxlen=batches)
        """Of the last batches; a training that goes on needs them, and nothing else does."""

    @torch.no_grad()
    def forward(self, values: Tensor) -> None:
        """values: of a batch, of any shape; with several devices those of all, as many of each, are taken."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(parts, values.contiguous())
            values = torch.cat(parts)
        self.values.append(values[values > self.least].float())
        found = mixture_thresholds(torch.cat([*self.values]))
        self.bounds.lerp_(self.bounds.new_tensor(found), 1 - self.momentum)

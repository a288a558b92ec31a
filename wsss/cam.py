"""Arithmetic of images and class activation maps: sizes, normalisation, several scales and mirror images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS_SCORES = 2**22
"""How many class scores at image size `by_rows` makes at once."""


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, align_corners=False, no antialiasing: the field's way with images and maps."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def widened(maps: Tensor) -> Tensor:
    """In single precision at least: halves resized and compared would tie."""
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


def by_rows(
    function: Callable[..., Tensor], scores: Tensor, size: Sequence[int], *pixels: Tensor, step: int = 1
) -> Tensor:
    """What a function makes of class scores at the size of an image, without holding more than some rows of them.

    Scores of a thousand classes at that size fill gigabytes. Those of a few rows are made, used, and in the backward
    pass made once more. The classes come last, where softmax is several times faster on a CPU.

    Args:
        function: ((B, r, W, K), *(B, r, W)) -> (B, s, ...): of r rows, independent of the others.
        scores: (B, K, h, w), resized bilinearly where the size differs.
        size: H and W.
        pixels: (B, H, W), further arguments of the function.
        step: r is a multiple of it, but for the last rows.

    Returns:
        What the function returned, one below the other.
    """
    height, width = size
    rows = max(1, ROWS_SCORES // (scores[:, :, 0, 0].numel() * width * step)) * step
    scores = scores.contiguous(memory_format=torch.channels_last)
    if rows >= height:
        return function(
            (scores if scores.shape[-2:] == (height, width) else resize(scores, size)).permute(0, 2, 3, 1), *pixels
        )
    if scores.shape[-2] != height:
        scores = resize(scores, (height, scores.shape[-1]))  # so that rows do not depend on one another

    def of_rows(part: Tensor, *pixels: Tensor) -> Tensor:
        part = part if part.shape[-1] == width else resize(part, (part.shape[-2], width))
        return function(part.permute(0, 2, 3, 1), *pixels)

    parts = zip(scores.split(rows, 2), *(values.split(rows, 1) for values in pixels), strict=True)
    return torch.cat([checkpoint(of_rows, *p, use_reentrant=False, preserve_rng_state=False) for p in parts], dim=1)


def rescale(image: Tensor, scale: float, align_corners: bool = False) -> Tensor:
    """`resize` by a factor, sides rounded down; or with the corner pixels' centres kept in place."""
    size = [int(scale * side) for side in image.shape[-2:]]
    return F.interpolate(image, size=size, mode="bilinear", align_corners=align_corners)


def resize_ids(ids: Tensor, size: Sequence[int]) -> Tensor:
    """(..., h, w) of any type -> (..., *size): every pixel takes the value at its centre."""
    for axis, length in zip((-2, -1), size, strict=True):
        if ids.shape[axis] != length:
            centres = 2 * torch.arange(length, device=ids.device) + 1
            ids = ids.index_select(axis, centres * ids.shape[axis] // (2 * length))
    return ids


def reduced_size(size: Sequence[int], max_side: int | None) -> tuple[int, int]:
    """Height and width of the same shape with no side above `max_side`; None reduces nothing.

    A long strip keeps what it has of 32 pixels on its short side, enough for a patch.
    """
    height, width = size
    if max_side is None or max(size) <= max_side:
        return height, width
    height, width = (max(min(side, 32), round(side * max_side / max(size))) for side in size)
    return height, width


def reduce(image: Tensor, max_side: int | None) -> Tensor:
    """Images (B, 3, H, W), bytes or floats, at their `reduced_size`, with antialiasing."""
    size = reduced_size(image.shape[-2:], max_side)
    if size == image.shape[-2:]:
        return image
    return F.interpolate(image, size=size, mode="bilinear", antialias=True)


def denormalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) normalised -> colours 0..255, float."""
    # one channel at a time: plain numbers spare the copy of a small tensor to the device
    channels = zip(image.unbind(1), mean, std, strict=True)
    return torch.stack([channel * (255 * s) + 255 * m for channel, m, s in channels], dim=1)


def rescale_photograph(image: Tensor, scale: float, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`resize_photograph` by a factor, sides rounded as Python does, 281.25 to 281 and 262.5 to 262."""
    height, width = (round(scale * side) for side in image.shape[-2:])
    return resize_photograph(image, (height, width), mean, std)


def resize_photograph(image: Tensor, size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resize the 8-bit photographs behind normalised images: PIL's bicubic filter.

    On the host, because torch's antialiased resize of bytes differs from PIL's by a level in 0.1 to 0.7 % of the
    values.
    """
    from PIL import Image  # here, because the losses import this file and need torch alone

    height, width = size
    colours = denormalise(image, mean, std).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    resized = [np.asarray(Image.fromarray(c).resize((width, height), Image.Resampling.BICUBIC)) for c in colours]
    channels = torch.from_numpy(np.stack(resized)).to(image.device).float().div(255).unbind(-1)
    scaled = torch.stack([(channel - m) / s for channel, m, s in zip(channels, mean, std, strict=True)], dim=1)
    return scaled.to(image.dtype)


def larger(plain: Tensor, mirrored: Tensor) -> Tensor:
    """The larger value of two maps where it is positive, else 0."""
    return torch.maximum(plain, mirrored).relu()


def min_max(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """Each map brought to [0, 1) by its own minimum and maximum."""
    maps = maps - maps.amin(dim=(-2, -1), keepdim=True)
    return maps / (maps.amax(dim=(-2, -1), keepdim=True) + eps)


def by_max(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """Each map divided by its maximum; maps are not negative."""
    return maps / (maps.amax(dim=(-2, -1), keepdim=True) + eps)


def max_norm(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """SEAM's normalisation in training: each map, where positive, brought to [0, 1) by its minimum and maximum."""
    cam = F.relu(cam)
    low, high = cam.amin(dim=(-2, -1), keepdim=True), cam.amax(dim=(-2, -1), keepdim=True)
    return F.relu(cam - low - eps) / (high - low + eps)


def inference_norm(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """SEAM's normalisation of seeds: as `max_norm`, but values at a map's minimum end a little below 0.

    They are set to 0 before the minimum is taken off; the lowest they become is about -min / (max - min). A map
    whose positive values are all equal has no scale, and its values are large and negative.
    """
    cam = F.relu(cam)
    low, high = cam.amin(dim=(-2, -1), keepdim=True), cam.amax(dim=(-2, -1), keepdim=True)
    return (torch.where(cam < low + eps, 0, cam) - low - eps) / (high - low + eps)


def with_background(label: Tensor) -> Tensor:
    """(B, C) labels -> (B, 1 + C): the background, channel 0, is in every image."""
    return F.pad(label, (1, 0), value=1.0)


def present_classes(label: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The classes that images show, each image's in order, so that work need not be done for all there are.

    Args:
        label: (B, C) 0 or 1.
        count: K, at least the largest number of labels of an image.

    Returns:
        The labels (B, K) of those classes, 0 where an image has fewer than K, and their numbers (B, K), 0 to C - 1.
    """
    present, classes = label.sort(dim=1, descending=True, stable=True)
    return present[:, :count], classes[:, :count]


def of_classes(maps: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Of maps (R * B, G * C, h, w) those of each image's own classes (B, K): (R * B, G * K, h, w).

    Args:
        maps: of R views of B images, all images of a view side by side; G groups of C maps.
        classes: as `present_classes` gives them.
        num_classes: C.
    """
    classes = classes.repeat(len(maps) // len(classes), 1)
    rows = torch.arange(len(maps), device=maps.device)[:, None]
    return maps.unflatten(1, (-1, num_classes))[rows, :, classes].transpose(1, 2).flatten(1, 2)


@torch.no_grad()
def multiscale_cam(
    raw_cam: Callable[[Tensor], Tensor],
    image: Tensor,
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    first: Tensor | None = None,
    rescale: Callable[[Tensor, float], Tensor] = rescale,
    fuse: Callable[[Tensor, Tensor], Tensor] = larger,
    normalise: Callable[[Tensor], Tensor] = min_max,
) -> Tensor:
    """Multi-scale, flipped and normalised CAMs; scale 1 always takes part and comes first.

    At each scale the maps of the image and of its mirror image are resized to the image and fused; the sum over
    the scales is normalised. The defaults are ToCo's.

    Args:
        raw_cam: (B, 3, H, W) -> (B, K, h, w), any K: several kinds of maps can be stacked along it.
        image: (B, 3, H, W).
        scales: factors of the image size.
        first: `raw_cam(image)` where it is known already.
        rescale: how an image is brought to another scale.
        fuse: how the maps of image and mirror image, mirrored back, become one.
        normalise: how the sum over the scales is brought to [0, 1].

    Returns:
        (B, K, H, W).
    """
    size = image.shape[-2:]
    total = torch.zeros((), device=image.device)
    for scale in (1.0, *(s for s in scales if s != 1.0)):
        if scale == 1.0 and first is not None:
            plain, mirrored = first, raw_cam(image.flip(-1))
        else:
            scaled = image if scale == 1.0 else rescale(image, scale)
            plain, mirrored = raw_cam(torch.cat([scaled, scaled.flip(-1)])).chunk(2)
        total = total + fuse(resize(plain, size), resize(mirrored, size).flip(-1))
    return normalise(total.float())  # half precision would lose the small constant in the denominator


@torch.no_grad()
def multiscale_seg(
    seg: Callable[[Tensor], Tensor],
    image: Tensor,
    size: Sequence[int],
    scales: Sequence[float] = (1.0,),
    flip: str = "none",
    fusion: str = "max",
    softmax: bool = False,
    align_corners: bool = False,
    rescale: Callable[[Tensor, float, bool], Tensor] = rescale,
) -> Tensor:
    """Class scores (B, K, *size) of several scales and mirror images.

    Args:
        seg: (B, 3, H, W) -> (B, K, h, w) scores.
        image: (B, 3, H, W).
        size: height and width of the result; scores are resized to it before they are fused.
        scales: factors of the image size.
        flip: how plain and mirrored scores become one, `sum`, `mean`, `max`, or `none` for the plain ones alone.
        fusion: how scales become one, `max`, `sum` or `mean`.
        softmax: fuse probabilities instead of scores.
        align_corners: how images are resized to a scale.
        rescale: does it, from images, scale and `align_corners`.
    """
    fuse: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "mean": torch.add, "max": torch.maximum}
    shares = (2 if flip == "mean" else 1) * (len(scales) if fusion == "mean" else 1)
    total: Tensor | None = None
    for scale in scales:
        scaled = image if scale == 1.0 else rescale(image, scale, align_corners)
        scores = resize(seg(scaled if flip == "none" else torch.cat([scaled, scaled.flip(-1)])), size)
        scores = scores.softmax(1) if softmax else scores
        if flip != "none":
            plain, mirrored = scores.chunk(2)
            scores = fuse[flip](plain, mirrored.flip(-1))
        total = scores if total is None else fuse[fusion](total, scores)
    assert total is not None  # a protocol has at least one scale
    return total / shares if shares > 1 else total


@torch.no_grad()
def windowed(seg: Callable[[Tensor], Tensor], image: Tensor, side: int, stride: int) -> Tensor:
    """Class scores (B, K, H, W) of an image seen through square windows, their mean where windows overlap.

    Windows begin every `stride` pixels; the last of a row and of a column end with the image. One that is larger than
    the image is cut to it.

    Args:
        seg: (B, 3, h, w) -> (B, K, h', w') scores.
        image: (B, 3, H, W).
        side: of a window in pixels.
        stride: from one window to the next.
    """
    size = image.shape[-2:]
    starts = [[*range(0, length - side, stride), max(0, length - side)] for length in size]
    total, count = image.new_zeros(()), image.new_zeros(size)
    for top in starts[0]:
        for left in starts[1]:
            window = (..., slice(top, top + side), slice(left, left + side))
            part = image[window]
            scores = resize(seg(part), part.shape[-2:])
            if total.ndim == 0:
                total = scores.new_zeros(*scores.shape[:2], *size)
            total[window] += scores
            count[window] += 1
    return total / count


def box_mask(box: Tensor, size: Sequence[int], stride: int = 1) -> Tensor:
    """(B, h, w) True where the centre of a cell of `stride` pixels lies in its image's box.

    Args:
        box: (B, 4) pixel rows [b0, b1) and columns [b2, b3).
        size: (h, w) of the grid of cells.
    """
    rows, cols = ((torch.arange(side, device=box.device) + 0.5) * stride for side in size)
    in_rows = (rows >= box[:, 0:1]) & (rows < box[:, 1:2])
    in_cols = (cols >= box[:, 2:3]) & (cols < box[:, 3:4])
    return in_rows[:, :, None] & in_cols[:, None, :]


def otsu(histogram: Tensor, values: Tensor) -> Tensor:
    """Otsu's threshold of each of K histograms: what parts it with the largest variance between the two parts.

    N. Otsu, "A threshold selection method from gray-level histograms", IEEE Trans. SMC 9 (1979), equation 18. The first
    of equal ones is taken; it is 0 for an empty histogram.

    Args:
        histogram: (V, K) counts of V bins, V >= 2.
        values: (V,) what each bin stands for, ascending.

    Returns:
        (K,) long: the last bin of the lower part, 0 to V - 2.
    """
    share = histogram.double() / histogram.sum(0).clamp(min=1)
    lower, moment = share.cumsum(0), (share * values.double()[:, None]).cumsum(0)
    between = (moment[-1:] * lower - moment).square() / (lower * (lower[-1:] - lower))
    return between[:-1].nan_to_num(0.0, posinf=0.0).argmax(0)


def area_prior(histogram: Tensor, share: float) -> Tensor:
    """The last bin of the lower part, 0 to V - 2, for which the upper one holds a share of (V,) counts most nearly."""
    above = 1 - histogram.double().cumsum(0) / histogram.sum().clamp(min=1)
    return (above[:-1] - share).abs().argmin()

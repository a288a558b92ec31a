"""PAR on NVIDIA and AMD GPUs, a kernel each for its weights and for an iteration; imported where triton is.

Written with the operations of torch, 48 neighbours are 48 passes over all maps and as many launches of a kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIXELS = 128
"""Pixels of a program; those of one row read neighbouring addresses."""
CHANNELS = 4
"""Maps of a program, which share the weights it has read."""


@triton.jit
def _neighbour(place, shifts, n, height, width):
    """Index of the n-th neighbour of the pixels `place`; the border repeats outside of an image."""
    y = place // width + tl.load(shifts + 2 * n)
    x = place % width + tl.load(shifts + 2 * n + 1)
    return tl.minimum(tl.maximum(y, 0), height - 1) * width + tl.minimum(tl.maximum(x, 0), width - 1)


@triton.jit
def _spread(plane, shown, shifts, height, width, count: tl.constexpr, size: tl.constexpr):
    """The standard deviation of a colour among the neighbours."""
    mean = tl.zeros((size,), tl.float32)
    for n in range(count):
        mean += tl.load(plane + _neighbour(shown, shifts, n, height, width))
    mean /= count
    squares = tl.zeros((size,), tl.float32)
    for n in range(count):
        difference = tl.load(plane + _neighbour(shown, shifts, n, height, width)) - mean
        squares += difference * difference
    return tl.sqrt(squares / (count - 1)) + 1e-8


@triton.jit
def _difference(plane, shown, there, spread):
    difference = (tl.load(plane + there) - tl.load(plane + shown)) / spread
    return difference * difference


@triton.jit
def _distance(image, shown, shifts, n, height, width, red, green, blue):
    """The mean squared difference of the colours of pixel and n-th neighbour, in units of their spreads."""
    there, pixels = _neighbour(shown, shifts, n, height, width), height * width
    total = _difference(image, shown, there, red) + _difference(image + pixels, shown, there, green)
    return (total + _difference(image + 2 * pixels, shown, there, blue)) / 3


@triton.jit
def _weigh(image, shifts, position, out, height, width, w1, count: tl.constexpr, size: tl.constexpr):
    place = tl.program_id(0) * size + tl.arange(0, size)
    pixels, batch = height * width, tl.program_id(1).to(tl.int64)
    inside = place < pixels
    shown = tl.where(inside, place, 0)
    image += batch * 3 * pixels
    out += batch * count * pixels
    red = _spread(image, shown, shifts, height, width, count, size) * w1
    green = _spread(image + pixels, shown, shifts, height, width, count, size) * w1
    blue = _spread(image + 2 * pixels, shown, shifts, height, width, count, size) * w1
    # distances are made three times: the colours are in the cache, and what is stored is better not read again
    nearest = tl.full((size,), float("inf"), tl.float32)
    for n in range(count):
        nearest = tl.minimum(nearest, _distance(image, shown, shifts, n, height, width, red, green, blue))
    total = tl.zeros((size,), tl.float32)
    for n in range(count):
        total += tl.exp(nearest - _distance(image, shown, shifts, n, height, width, red, green, blue))
    for n in range(count):
        share = tl.exp(nearest - _distance(image, shown, shifts, n, height, width, red, green, blue)) / total
        tl.store(out + n * pixels + shown, share + tl.load(position + n), mask=inside)


@triton.jit
def _mix(masks, weights, shifts, out, height, width, maps, count: tl.constexpr, size: tl.constexpr, many: tl.constexpr):
    place = tl.program_id(0) * size + tl.arange(0, size)
    channel = tl.program_id(1) * many + tl.arange(0, many)
    pixels, batch = height * width, tl.program_id(2)
    inside = (place < pixels)[None, :] & (channel < maps)[:, None]
    shown = tl.where(place < pixels, place, 0)
    weights += batch.to(tl.int64) * count * pixels
    rows = (batch.to(tl.int64) * maps + channel)[:, None] * pixels
    total = tl.zeros((many, size), tl.float32)
    for n in range(count):
        weight = tl.load(weights + n * pixels + shown)
        there = _neighbour(shown, shifts, n, height, width)
        total += weight[None, :] * tl.load(masks + rows + there[None, :], mask=inside, other=0.0)
    tl.store(out + rows + shown[None, :], total, mask=inside)


def weigh(image: Tensor, shifts: Tensor, position: Tensor, w1: float) -> Tensor:
    """(B, N, h, w) weights of the neighbours: `PAR.weights`.

    Args:
        image: (B, 3, h, w) float32.
        shifts: (N, 2) int32 rows and columns from a pixel to its neighbours.
        position: (N,) what is added for their distance.
        w1: width of the kernel in standard deviations.
    """
    batch, _, height, width = image.shape
    out = image.new_empty(batch, len(shifts), height, width)
    grid = (triton.cdiv(height * width, PIXELS), batch)
    _weigh[grid](image.contiguous(), shifts, position, out, height, width, w1, len(shifts), PIXELS)
    return out


def mix(masks: Tensor, weights: Tensor, shifts: Tensor) -> Tensor:
    """(B, K, h, w): an iteration of `PAR.forward` over float32 masks, with the weights (B, N, h, w)."""
    batch, maps, height, width = masks.shape
    out = torch.empty_like(masks, memory_format=torch.contiguous_format)
    grid = (triton.cdiv(height * width, PIXELS), triton.cdiv(maps, CHANNELS), batch)
    _mix[grid](masks.contiguous(), weights, shifts, out, height, width, maps, len(shifts), PIXELS, CHANNELS)
    return out

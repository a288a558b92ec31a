"""Pairs of cells and their labels against loops over cells."""

import math

import pytest
import torch
from torch import Tensor

from wsss.pairs import (
    affinity_labels,
    fitting_radius,
    pair_offsets,
    pair_paths,
    pair_views,
    path_affinity,
    source_size,
)


@pytest.mark.parametrize(("radius", "count"), [(0, 0), (1, 0), (2, 4), (3, 12), (5, 34), (10, 152)])
def test_offsets(radius: int, count: int) -> None:
    offsets = pair_offsets(radius)
    assert len(offsets) == len(set(offsets)) == count
    around = {(dy, dx) for dy in range(-12, 13) for dx in range(-12, 13) if 0 < dy**2 + dx**2 < radius**2}
    if radius > 1:  # one direction of every two, and all that is near
        assert {*offsets, *((-dy, -dx) for dy, dx in offsets)} == around
        assert offsets[0] == (0, 1)


@pytest.mark.parametrize("size", [(5, 9), (12, 13), (4, 9), (5, 8), (1, 1), (40, 3)])
def test_views_hold_every_pair_once(size: tuple[int, int]) -> None:
    height, width = size
    start, ends = pair_views(torch.arange(height * width).view(1, height, width), 5)
    fits = height >= 5 and width >= 9
    assert start.shape == (1, *source_size(size, 5)) == (1, *((height - 4, width - 8) if fits else (0, 0)))
    for (dy, dx), end in zip(pair_offsets(5), ends, strict=True):
        assert torch.equal(end - start, torch.full_like(start, dy * width + dx))


@pytest.mark.parametrize(
    ("size", "radius"),
    [((56, 56), 5), ((5, 9), 5), ((10, 13), 5), ((8, 8), 3), ((4, 30), 1), ((1, 1), 1), ((2, 50), 1), ((7, 8), 3)],
)
def test_radius_of_small_maps(size: tuple[int, int], radius: int) -> None:
    assert fitting_radius(size, 5) == radius
    assert radius < 2 or source_size(size, radius)[0]


def label_of(low: Tensor, high: Tensor) -> int:
    """Of one cell, by PSA's steps."""
    first, second = (int(scores.flatten(1).sum(1).div(64).argmax()) for scores in (low, high))
    label = 255 if first == 0 else first
    label = 0 if second == 0 else label
    return 255 if max(float(s.flatten(1).sum(1).div(64).max()) for s in (low, high)) < 1e-5 else label


def test_labels() -> None:
    torch.manual_seed(0)
    low, high = torch.rand(2, 3, 37, 48, dtype=torch.double), torch.rand(2, 3, 37, 48, dtype=torch.double)
    low[:, 0, :, :30], high[:, 0, :, 20:] = 0.1, 0.9
    low[1, :, 8:24], high[1, :, 8:24] = 0, 0
    found = affinity_labels(low, high)
    assert found.shape == (2, 5, 6)
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in found.shape)).tolist():
        cell = (b, slice(None), slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
        assert found[b, y, x] == label_of(low[cell], high[cell]), (b, y, x)
    assert {0, 1, 2, 255} == set(found.unique().tolist())


def test_labels_without_a_class() -> None:
    ones = torch.ones(1, 1, 16, 16)
    assert (affinity_labels(ones, ones) == 0).all()


def between(edge: Tensor, start: tuple[int, int], end: tuple[int, int]) -> Tensor:
    """1 - the strongest boundary of the cells whose centres are less than one cell from the line, within its box."""
    (y0, x0), (y1, x1) = start, end
    line = math.hypot(y1 - y0, x1 - x0)
    cells = [(y, x) for y in range(y0, y1 + 1) for x in range(min(x0, x1), max(x0, x1) + 1)]
    distances = [abs((y - y0) * (x1 - x0) - (x - x0) * (y1 - y0)) / line for y, x in cells]
    near = [edge[y, x] for (y, x), distance in zip(cells, distances, strict=True) if distance < 1 - 1e-9]
    return 1 - torch.stack(near).max()


@pytest.mark.parametrize("radius", [2, 3, 5])
def test_affinities_along_paths(radius: int) -> None:
    torch.manual_seed(0)
    edge = torch.rand(2, 1, 7, 10, dtype=torch.double, requires_grad=True)
    found, (rows, columns) = path_affinity(edge, radius), source_size((7, 10), radius)
    assert found.shape == (2, len(pair_offsets(radius)), rows * columns)
    starts = [(n // columns, n % columns + radius - 1) for n in range(rows * columns)]
    expected = torch.stack(
        [
            torch.stack([between(edge[b, 0], (y, x), (y + dy, x + dx)) for y, x in starts])
            for b in range(2)
            for dy, dx in pair_offsets(radius)
        ]
    ).view_as(found)
    assert torch.equal(found, expected)
    weight = torch.rand_like(found)
    (gradient,), (wanted,) = (torch.autograd.grad((x * weight).sum(), edge) for x in (found, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_paths_end_at_their_start() -> None:
    for offset, path in zip(pair_offsets(5), pair_paths(5), strict=True):
        assert (path[0], path[-1]) == (offset, (0, 0))
    assert path_affinity(torch.rand(2, 1, 3, 4), 1).shape == (2, 0, 12)

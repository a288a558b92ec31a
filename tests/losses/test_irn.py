"""The displacement loss of IRN against a loop over pairs in float64."""

import pytest
import torch
from torch import Tensor

from wsss.losses import DisplacementLoss, build
from wsss.pairs import pair_offsets, source_size

D = torch.float64


def reference(displacement: Tensor, label: Tensor, radius: int) -> Tensor:
    """Of displacements (B, 2, h, w) and labels (B, h, w)."""
    costs: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether it is background
    rows, columns = source_size(label.shape[1:], radius)
    for b in range(len(label)):
        for dy, dx in pair_offsets(radius):
            for y in range(rows):
                for x in range(radius - 1, radius - 1 + columns):
                    one, other = int(label[b, y, x]), int(label[b, y + dy, x + dx])
                    if one == other != 255:
                        offset = torch.tensor([dy, dx], dtype=D) * (one > 0)
                        found = displacement[b, :, y, x] - displacement[b, :, y + dy, x + dx] - offset
                        costs[one == 0].append(found.abs().sum())
    zero = displacement.sum() * 0
    return sum((sum(c, zero) / (2 * len(c) + 1e-5) for c in costs.values()), zero) / 2


def inputs(ids: tuple[int, ...], size: tuple[int, int] = (6, 9)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 2, *size, dtype=D, requires_grad=True), torch.tensor(ids)[torch.randint(len(ids), (2, *size))]


@pytest.mark.parametrize("radius", [2, 3, 5])
@pytest.mark.parametrize("ids", [(0, 1, 3, 255), (0, 255), (2, 255), (255,)])
def test_reference(ids: tuple[int, ...], radius: int) -> None:
    displacement, label = inputs(ids)
    loss, expected = DisplacementLoss(radius)(displacement, label), reference(displacement, label, radius)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,), (wanted,) = (torch.autograd.grad(x, displacement) for x in (loss, expected))
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_a_constant_does_not_matter() -> None:
    displacement, label = inputs((0, 1, 255))
    loss = DisplacementLoss(3)
    torch.testing.assert_close(loss(displacement, label), loss(displacement + 7.0, label))


def test_half_precision_is_summed_in_float32() -> None:
    displacement, label = inputs((0, 1), (40, 60))
    single, half = (DisplacementLoss(5)(x, label) for x in (displacement.float(), displacement.half()))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single, rtol=1e-3, atol=0)


def test_a_map_without_pairs() -> None:
    displacement = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = build("displacement")(displacement, torch.zeros(1, 3, 3, dtype=torch.long))
    assert loss == 0
    loss.backward()

"""The pair loss of PSA against a loop over pairs in float64."""

import math

import pytest
import torch
from torch import Tensor

from wsss.losses import AffinityLoss, affinity_labels, build
from wsss.losses.affinity import pair_labels
from wsss.pairs import pair_offsets, source_size

D = torch.float64


def reference(affinity: Tensor, label: Tensor, radius: int) -> float:
    """Of affinities (B, K, n) and labels (B, h, w)."""
    costs: dict[str, list[float]] = {"background": [], "foreground": [], "different": []}
    rows, columns = source_size(label.shape[1:], radius)
    for b in range(len(label)):
        for k, (dy, dx) in enumerate(pair_offsets(radius)):
            for index in range(rows * columns):
                y, x = index // columns, index % columns + radius - 1
                one, other, a = int(label[b, y, x]), int(label[b, y + dy, x + dx]), float(affinity[b, k, index])
                if 255 in (one, other):
                    continue
                if one != other:
                    costs["different"].append(-math.log(1 + 1e-5 - a))
                else:
                    costs["foreground" if one else "background"].append(-math.log(a + 1e-5))
    terms = {kind: sum(values) / (len(values) + 1e-5) for kind, values in costs.items()}
    return terms["background"] / 4 + terms["foreground"] / 4 + terms["different"] / 2


def inputs(ids: tuple[int, ...], radius: int, size: tuple[int, int] = (7, 10)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    rows, columns = source_size(size, radius)
    affinity = torch.rand(2, len(pair_offsets(radius)), rows * columns, dtype=D).clamp(0.01, 0.99)
    return affinity.requires_grad_(), torch.tensor(ids)[torch.randint(len(ids), (2, *size))]


@pytest.mark.parametrize("radius", [2, 3, 5])
@pytest.mark.parametrize("ids", [(0, 1, 3, 255), (0, 255), (2, 255), (0, 1), (255,)])
def test_reference(ids: tuple[int, ...], radius: int) -> None:
    affinity, label = inputs(ids, radius)
    loss = AffinityLoss(radius)(affinity, label)
    loss.backward()
    assert loss.item() == pytest.approx(reference(affinity.detach(), label, radius), rel=1e-12)
    assert affinity.grad is not None
    assert affinity.grad.isfinite().all()
    masks = pair_labels(label, radius)
    assert torch.equal(affinity.grad != 0, masks[0] | masks[1] | masks[2])


def test_gradient() -> None:
    affinity, label = inputs((0, 1, 2, 255), 3, (4, 6))
    assert torch.autograd.gradcheck(lambda a: AffinityLoss(3)(a, label), affinity)


def test_certain_affinities_have_finite_gradients() -> None:
    for value in (0.0, 1.0):
        affinity = torch.full((1, 34, 1), value, requires_grad=True)
        build("affinity")(affinity, torch.arange(45).view(1, 5, 9) % 3).backward()
        assert affinity.grad is not None
        assert affinity.grad.isfinite().all()


def test_half_precision_is_summed_in_float32() -> None:
    affinity, label = inputs((0, 1), 5, (40, 60))
    single = AffinityLoss()(affinity.float(), label)
    half = AffinityLoss()(affinity.half(), label)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, single, rtol=1e-3, atol=0)


def test_a_map_without_pairs() -> None:
    affinity = torch.zeros(1, 34, 0, requires_grad=True)
    loss = build("affinity")(affinity, torch.zeros(1, 3, 3, dtype=torch.long))
    assert loss == 0
    loss.backward()


def test_labels_are_public() -> None:
    assert affinity_labels(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)).shape == (1, 1, 1)

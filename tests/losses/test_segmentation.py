"""Balanced cross-entropy and classification loss against loops in float64."""

import math

import pytest
import torch
from torch import Tensor

from wsss.losses import BalancedCrossEntropyLoss, ClassificationLoss

D = torch.float64


def reference(logits: Tensor, label: Tensor) -> float:
    parts: dict[bool, list[float]] = {True: [], False: []}
    for b, y, x in (label != 255).nonzero().tolist():
        scores, target = logits[b, :, y, x], int(label[b, y, x])
        value = math.log(sum(math.exp(float(s)) for s in scores)) - float(scores[target])
        parts[target == 0].append(value)
    return sum(0.5 * sum(part) / len(part) for part in parts.values() if part)


@pytest.mark.parametrize("ids", [(0, 1, 3, 255), (0, 255), (2, 255), (0, 1), (255,)])
def test_reference(ids: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, dtype=D, requires_grad=True)
    label = torch.tensor(ids)[torch.randint(len(ids), (2, 5, 6))]
    loss = BalancedCrossEntropyLoss()(logits, label)
    loss.backward()
    assert loss.item() == pytest.approx(reference(logits.detach(), label), rel=1e-12)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad.movedim(1, -1)[label == 255].any()


def test_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 2, 3, dtype=D, requires_grad=True)
    label = torch.tensor([[[0, 0, 0, 0, 1, 255], [0, 2, 2, 255, 1, 1], [0, 0, 0, 0, 0, 2], [0, 1, 1, 1, 1, 1]]])
    assert torch.autograd.gradcheck(lambda x: BalancedCrossEntropyLoss()(x, label), logits)


def test_small_logits_are_resized_to_the_label() -> None:
    logits = torch.randn(1, 3, 2, 2)
    label = torch.randint(3, (1, 6, 8))
    large = torch.nn.functional.interpolate(logits, size=(6, 8), mode="bilinear", align_corners=False)
    assert torch.equal(BalancedCrossEntropyLoss()(logits, label), BalancedCrossEntropyLoss()(large, label))


def test_another_ignore_index() -> None:
    logits, label = torch.randn(1, 3, 4, 4), torch.randint(3, (1, 4, 4))
    label[0, 0], other = 255, label.clone()
    other[0, 0] = -1
    assert torch.equal(BalancedCrossEntropyLoss()(logits, label), BalancedCrossEntropyLoss(-1)(logits, other))


def test_classification() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, dtype=D, requires_grad=True)
    label = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=D)
    probability = 1 / (1 + (-logits.detach()).exp())
    expected = -(label * probability.log() + (1 - label) * (1 - probability).log()).mean()
    assert ClassificationLoss()(logits, label).item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: ClassificationLoss()(x, label), logits)

"""Token contrast against the formulas of the docstrings, written as loops in float64."""

import math

import pytest
import torch
from torch import Tensor

from wsss.losses import ClassTokenContrastLoss, PatchTokenContrastLoss

D = torch.float64


def ptc_reference(tokens: Tensor, label: Tensor) -> float:
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for image, ids in zip(tokens, label.flatten(1).tolist(), strict=True):
        for i, first in enumerate(ids):
            for j, second in enumerate(ids):
                if i != j and 255 not in (first, second):
                    a, b = image[i], image[j]
                    sums[first == second] += abs(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))
                    counts[first == second] += 1
    return 0.5 * (1 - sums[True] / (counts[True] + 1)) + 0.5 * sums[False] / (counts[False] + 1)


def ctc_reference(student: Tensor, teacher: Tensor, positive: Tensor, temperature: float) -> float:
    images = []
    for b in range(student.shape[1]):
        total, count = 0.0, float(positive[b].sum())
        for view in teacher[:, b]:
            e = [math.exp(float(view @ crop) / temperature) for crop in student[:, b]]
            negative = sum(x for x, p in zip(e, positive[b], strict=True) if not p)
            total += sum(-math.log(x / (x + negative + 1e-4)) for x, p in zip(e, positive[b], strict=True) if p)
            total += -math.log(1 / (1 + negative + 1e-4))
        images.append(total / len(teacher) / (count + 1e-4))
    return sum(images) / len(images)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("ids", [(0, 1, 2, 255), (3,), (0, 255), (255,)])
def test_ptc_reference(ids: tuple[int, ...], generator: torch.Generator) -> None:
    tokens = torch.randn(3, 12, 5, dtype=D, generator=generator)
    label = torch.tensor(ids)[torch.randint(len(ids), (3, 3, 4), generator=generator)]
    expected = ptc_reference(tokens, label)
    assert PatchTokenContrastLoss()(tokens, label).item() == pytest.approx(expected, rel=1e-12)
    assert PatchTokenContrastLoss()(tokens, label.flatten(1)).item() == pytest.approx(expected, rel=1e-12)


def test_ptc_of_ignored_tokens_is_half_without_gradient() -> None:
    tokens = torch.randn(2, 6, 4, requires_grad=True)
    loss = PatchTokenContrastLoss()(tokens, torch.full((2, 6), 255))
    loss.backward()
    assert loss.item() == 0.5
    assert tokens.grad is not None
    assert not tokens.grad.any()


def test_ptc_of_zero_tokens_is_finite() -> None:
    tokens = torch.zeros(1, 4, 4, requires_grad=True)
    PatchTokenContrastLoss()(tokens, torch.tensor([[0, 0, 1, 1]])).backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()


def test_ptc_gradient(generator: torch.Generator) -> None:
    tokens = torch.randn(2, 5, 3, dtype=D, generator=generator, requires_grad=True)
    label = torch.tensor([[0, 1, 1, 255, 0], [2, 2, 0, 0, 255]])
    assert torch.autograd.gradcheck(lambda t: PatchTokenContrastLoss()(t, label), tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_ctc_reference(temperature: float, generator: torch.Generator) -> None:
    student = torch.randn(5, 4, 3, dtype=D, generator=generator)
    teacher = torch.randn(2, 4, 3, dtype=D, generator=generator)
    positive = torch.rand(4, 5, generator=generator) < 0.5
    positive[:, :2] = True
    positive[0], positive[1] = True, False  # without a negative, without a positive
    for flags in (positive, positive.float(), positive.long()):
        loss = ClassTokenContrastLoss(temperature)(student, teacher, flags)
        assert loss.item() == pytest.approx(ctc_reference(student, teacher, positive, temperature), rel=1e-6)


def test_ctc_without_negatives_is_nearly_zero() -> None:
    student, teacher = torch.full((4, 2, 3), 0.1, requires_grad=True), torch.full((2, 2, 3), 0.1)
    loss = ClassTokenContrastLoss()(student, teacher, torch.ones(2, 4))
    loss.backward()
    assert loss.item() == pytest.approx(1e-4, rel=0.3)
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_ctc_does_not_overflow() -> None:
    student, teacher = 40 * torch.ones(3, 1, 4, requires_grad=True), 40 * torch.ones(2, 1, 4)
    loss = ClassTokenContrastLoss(0.1)(student, teacher, torch.tensor([[1, 1, 0]]))
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()


def test_ctc_gradient_reaches_the_student_alone(generator: torch.Generator) -> None:
    student = torch.randn(4, 2, 3, dtype=D, generator=generator, requires_grad=True)
    teacher = torch.randn(2, 2, 3, dtype=D, generator=generator, requires_grad=True)
    positive = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0]])
    assert torch.autograd.gradcheck(lambda s: ClassTokenContrastLoss()(s, teacher, positive), student)
    ClassTokenContrastLoss()(student, teacher, positive).backward()
    assert teacher.grad is None

"""The registry, and the losses against loops written from their formulas in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from wsss import InputError
from wsss.losses import LOSSES, build, register


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(InputError, match=r"'rcn'.*ctc.*ptc"):
        build("rcn")
    with pytest.raises(InputError, match=r"heat.*temperature"):
        build("ctc", heat=1)


def test_a_taken_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss.losses.registry.LOSSES", dict(LOSSES))
    with pytest.raises(ValueError, match="ptc"):
        register("ptc")(nn.L1Loss)


def test_a_loss_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss.losses.registry.LOSSES", dict(LOSSES))
    register("mine")(nn.SmoothL1Loss)
    assert isinstance(build("mine", beta=0.5), nn.SmoothL1Loss)


def test_a_plain_loop_trains() -> None:
    torch.manual_seed(0)
    tokens = nn.Parameter(torch.randn(2, 9, 8))
    labels = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 255]] * 2)
    loss, optimizer = build("ptc"), torch.optim.SGD([tokens], 5.0)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(tokens, labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]


def ptc_reference(tokens: Tensor, label: Tensor) -> float:
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for image, ids in zip(tokens, label, strict=True):
        for i in range(len(ids)):
            for j in range(len(ids)):
                if i != j and 255 not in (ids[i], ids[j]):
                    same = bool(ids[i] == ids[j])
                    sums[same] += abs(float(image[i] @ image[j] / image[i].norm() / image[j].norm()))
                    counts[same] += 1
    return 0.5 * (1 - sums[True] / (counts[True] + 1)) + 0.5 * sums[False] / (counts[False] + 1)


@pytest.mark.parametrize("ids", [[0, 1, 2, 255], [255], [3]])
def test_ptc(ids: list[int]) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(3, 7, 5, dtype=torch.double, requires_grad=True)
    label = torch.tensor(ids)[torch.randint(len(ids), (3, 7))]
    assert float(build("ptc")(tokens, label)) == pytest.approx(ptc_reference(tokens.detach(), label), abs=1e-12)
    assert torch.autograd.gradcheck(lambda t: build("ptc")(t, label), tokens)


def ctc_reference(student: Tensor, teacher: Tensor, positive: Tensor, temperature: float) -> float:
    total = 0.0
    for b in range(positive.shape[0]):
        image = 0.0
        for v in range(len(teacher)):
            e = [math.exp(float(teacher[v, b] @ student[k, b]) / temperature) for k in range(len(student))]
            n = sum(e[k] for k in range(len(e)) if not positive[b, k])
            image += sum(-math.log(e[k] / (e[k] + n + 1e-4)) for k in range(len(e)) if positive[b, k])
            image += -math.log(1 / (1 + n + 1e-4))
        total += image / len(teacher) / (float(positive[b].sum()) + 1e-4)
    return total / len(positive)


def test_ctc() -> None:
    torch.manual_seed(0)
    student = torch.randn(6, 3, 4, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(2, 3, 4, dtype=torch.double)
    positive = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    for temperature in (0.5, 1.0):
        loss = build("ctc", temperature=temperature)
        expected = ctc_reference(student.detach(), teacher, positive, temperature)
        assert float(loss(student, teacher, positive)) == pytest.approx(expected, abs=1e-12)
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(s, teacher, positive), student)


def test_ctc_does_not_overflow() -> None:
    student = torch.full((3, 1, 4), 50.0, requires_grad=True)
    loss = build("ctc")(student, torch.full((2, 1, 4), 50.0), torch.tensor([[1, 1, 0]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("ids", [[0, 1, 2, 255], [0], [1, 2], [255]])
def test_seg(ids: list[int]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True)
    label = torch.tensor(ids)[torch.randint(len(ids), (2, 4, 5))]
    logs, halves = logits.detach().log_softmax(1), []
    for chosen in (label == 0, (label > 0) & (label != 255)):
        values = [-float(logs[b, label[b, y, x], y, x]) for b, y, x in chosen.nonzero().tolist()]
        halves.append(sum(values) / max(len(values), 1))
    assert float(build("seg")(logits, label)) == pytest.approx(sum(halves) / 2, abs=1e-12)
    assert torch.autograd.gradcheck(lambda t: build("seg")(t, label), logits)

"""Cross-entropies of pixels and classification loss against loops in float64."""

import math

import pytest
import torch
from torch import Tensor

import wsss.cam
import wsss.losses.cross_entropy
from wsss import InputError
from wsss.losses import BalancedCrossEntropyLoss, ClassificationLoss, ClippedCrossEntropyLoss, CrossEntropyLoss, build

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


# --- of masks that a stage is trained on ------------------------------------------------------------------------------


def pixel_losses(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of every pixel, one by one, 0 where ignored."""
    result = torch.zeros(label.shape, dtype=D)
    for b, y, x in (label != 255).nonzero().tolist():
        scores = logits[b, :, y, x]
        result[b, y, x] = math.log(sum(math.exp(float(s)) for s in scores)) - float(scores[int(label[b, y, x])])
    return result


def clipped(loss: Tensor, start: float, patch: int) -> float:
    """The formula, patch by patch."""
    mean = loss.mean().item()
    if mean > start:
        return mean
    total, (_, height, width) = 0.0, loss.shape
    for y in range(0, height, patch):
        for x in range(0, width, patch):
            part = loss[:, y : y + patch, x : x + patch]
            total += part.clamp(max=max(part.mean().item(), mean)).sum().item()
    return total / loss.numel()


def noisy(ids: tuple[int, ...] = (0, 1, 3, 255)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, 10, dtype=D, requires_grad=True)
    return logits, torch.tensor(ids)[torch.randint(len(ids), (2, 7, 10))]


@pytest.mark.parametrize("ids", [(0, 1, 3, 255), (2,), (255,)])
def test_plain_cross_entropy(ids: tuple[int, ...]) -> None:
    logits, label = noisy(ids)
    loss = CrossEntropyLoss()(logits, label)
    loss.backward()
    counted = max(1, int((label != 255).sum()))
    assert loss.item() == pytest.approx(pixel_losses(logits.detach(), label).sum().item() / counted, rel=1e-12)
    assert logits.grad is not None
    assert not logits.grad.movedim(1, -1)[label == 255].any()


@pytest.mark.parametrize("start", [0.5, 3.0])
@pytest.mark.parametrize("patch", [1, 3, 5, 64])  # 7 x 10 pixels: none divides both sides
def test_clipped_cross_entropy(start: float, patch: int) -> None:
    logits, label = noisy()
    pixels = pixel_losses(logits.detach(), label)
    loss = ClippedCrossEntropyLoss(start, patch)(logits, label)
    assert loss.item() == pytest.approx(clipped(pixels, start, patch), rel=1e-12)
    assert (loss < pixels.mean() - 1e-9) == (start > pixels.mean())  # pixels are left out, or none is


def test_left_out_pixels_have_no_gradient() -> None:
    logits, label = noisy((0, 1, 2, 3))
    loss = ClippedCrossEntropyLoss(3.0, 64)
    loss(logits, label).backward()
    pixels = pixel_losses(logits.detach(), label)
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(1) > 0, pixels <= pixels.mean())


def test_equal_pixels_all_keep_their_gradient() -> None:
    logits, label = torch.zeros(1, 3, 4, 4, dtype=D, requires_grad=True), torch.ones(1, 4, 4, dtype=torch.long)
    ClippedCrossEntropyLoss(3.0, 2)(logits, label).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[:, 1], torch.full((1, 4, 4), -2 / 3 / 16, dtype=D))


def test_clipped_without_any_known_pixel() -> None:
    logits, label = noisy((255,))
    assert ClippedCrossEntropyLoss()(logits, label) == 0
    with pytest.raises(InputError, match="at least 1 pixel"):
        ClippedCrossEntropyLoss(patch=0)


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), ClippedCrossEntropyLoss()])
def test_small_logits_are_resized(loss: torch.nn.Module) -> None:
    logits, label = torch.randn(1, 3, 2, 2), torch.randint(3, (1, 6, 8))
    large = torch.nn.functional.interpolate(logits, size=(6, 8), mode="bilinear", align_corners=False)
    assert torch.equal(loss(logits, label), loss(large, label))


@pytest.mark.parametrize("name", ["ce", "clipped_ce", "seg", "dense_energy"])
@pytest.mark.parametrize("small", [(4, 5), (16, 20)])
def test_scores_made_some_rows_at_a_time(name: str, small: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many classes: the same value and gradient as all at once, also where the scores have the image's size already."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (2, 16, 20), generator=generator)
    label[0, :3] = 255
    image, found = torch.rand(2, 3, 16, 20, generator=generator) * 255, []
    scores = torch.randn(2, 5, *small, generator=generator)
    for rows in (2**22, 2 * 5 * 20 * 6):
        for module in (wsss.cam, wsss.losses.cross_entropy):
            monkeypatch.setattr(module, "ROWS_SCORES", rows)
        given = scores.clone().requires_grad_()
        loss = build(name)(image, given, label) if name == "dense_energy" else build(name)(given, label)
        loss.backward()
        found.append((loss.detach(), given.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7 if name != "dense_energy" else 1e-12)

"""WeCLIP's losses against loops over cells and pixels, in double precision; recorded numbers: parity."""

import math

import pytest
import torch
from torch import Tensor

from wsss.losses import build
from wsss.losses.weclip import near_pairs, pair_relations


def drawn(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.double, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize("radius", [1, 2, 9])
def test_feature_affinity(radius: int) -> None:
    scores, label = drawn(2, 12, 12), torch.tensor([[0, 0, 1, 255], [2, 2, 1, 0], [0, 2, 2, 1]]).repeat(2, 1, 1)
    label[1, 0] = 2
    affinity = scores.sigmoid()
    sums, counts = [affinity.new_zeros(()) for _ in range(2)], [0, 0]
    for image in range(2):
        flat = label[image].flatten().tolist()
        for i in range(12):
            for j in range(12):
                near = max(abs(i // 4 - j // 4), abs(i % 4 - j % 4)) <= radius
                if near and 255 not in (flat[i], flat[j]):
                    differ = int(flat[i] != flat[j])
                    counts[differ] += 1
                    a = affinity[image, i, j]
                    sums[differ] = sums[differ] + (a if differ else 1 - a)
    expected = 0.5 * sums[0] / (counts[0] + 1) + 0.5 * sums[1] / (counts[1] + 1)
    loss = build("aff", radius=radius)(affinity, label)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(x, scores, retain_graph=True) for x in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    same, different = pair_relations(label, radius)
    assert [int(same.sum()), int(different.sum())] == counts
    assert torch.equal(near_pairs(3, 4, radius), near_pairs(3, 4, radius).mT)


def test_dice() -> None:
    logits, label = drawn(2, 3, 2, 3), torch.tensor([[[0, 1, 255], [1, 1, 0]], [[0, 0, 0], [255, 0, 1]]])
    probability = logits.softmax(1)
    terms = []
    for k in range(3):
        both, either = probability.new_zeros(()), probability.new_zeros(())
        for b in range(2):
            for y in range(2):
                for x in range(3):
                    if label[b, y, x] != 255:
                        truth = float(label[b, y, x] == k)
                        both = both + probability[b, k, y, x] * truth
                        either = either + probability[b, k, y, x] + truth
        terms.append(2 * both / (either + 1e-7))
    expected = 1 - torch.stack(terms).mean()
    loss = build("dice")(logits, label)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)


def test_branches_do_not_teach_through_targets() -> None:
    """Each learns from the other's classes as from labels."""
    first, second = drawn(1, 3, 2, 2), drawn(2, 3, 2, 2)[1:].detach().requires_grad_()
    loss, seg = build("cross"), build("seg")
    expected = seg(first, second.argmax(1)) + seg(second, first.argmax(1))
    value = loss(first, second, (2, 2))
    torch.testing.assert_close(value, expected)
    alone = torch.autograd.grad(seg(first, second.argmax(1)), first)[0]
    torch.testing.assert_close(torch.autograd.grad(value, first)[0], alone)


def test_nothing_to_learn_from() -> None:
    label = torch.full((1, 2, 2), 255)
    logits = drawn(1, 3, 2, 2)
    assert build("aff")(logits[0, :2].new_zeros(1, 4, 4), label) == 0
    assert math.isclose(build("dice")(logits, label).item(), 1.0)

"""Losses on CAMs against the formulas of the docstrings, written as loops in float64."""

import math

import pytest
import torch
from torch import Tensor

from wsss import InputError
from wsss.cam import inference_norm, max_norm
from wsss.losses import EquivarianceLoss, EquivariantCrossLoss, MinPoolingLoss, MultiscaleAttentiveLoss, build
from wsss.losses.rcm_mam import attention_weights
from wsss.losses.seam import max_onehot, view_cam

D = torch.float64


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def label_of(classes: int) -> Tensor:
    """Two classes (or one), none, all."""
    label = torch.zeros(3, classes, dtype=D)
    label[0, :2] = label[2] = 1
    return label


# --- normalisation ----------------------------------------------------------------------------------------------------


def test_normalisations(generator: torch.Generator) -> None:
    cam = torch.randn(2, 3, 4, 5, dtype=D, generator=generator)
    cam[0, 1] = cam[0, 1].abs() + 0.5  # nothing of it is 0 before its minimum is taken off
    training, inference = max_norm(cam), inference_norm(cam)
    for b in range(2):
        for k in range(3):
            values = [max(v, 0.0) for v in cam[b, k].flatten().tolist()]
            low, high = min(values), max(values)
            for v, t, i in zip(
                values, training[b, k].flatten().tolist(), inference[b, k].flatten().tolist(), strict=True
            ):
                assert t == pytest.approx(max(v - low - 1e-5, 0) / (high - low + 1e-5), abs=1e-12)
                kept = 0.0 if v < low + 1e-5 else v
                assert i == pytest.approx((kept - low - 1e-5) / (high - low + 1e-5), abs=1e-12)
    assert inference[0, 1].min() < -0.1
    assert inference.max() < 1


@pytest.mark.parametrize("value", [0.0, -1.0, 0.5])
def test_normalisation_of_constant_maps_is_finite(value: float) -> None:
    cam = torch.full((1, 2, 3, 3), value, requires_grad=True)
    assert not max_norm(cam).any()
    assert inference_norm(cam).isfinite().all()
    (gradient,) = torch.autograd.grad(max_norm(cam).sum(), cam)
    assert gradient.isfinite().all()


def test_max_onehot_keeps_ties_the_background_and_its_argument() -> None:
    cam = torch.tensor([[0.9, 0.1], [0.4, 0.2], [0.4, 0.3], [0.1, 0.0]])[None, :, :, None]
    before = cam.clone()
    expected = torch.tensor([[0.9, 0.1], [0.4, 0.0], [0.4, 0.3], [0.0, 0.0]])[None, :, :, None]
    assert torch.equal(max_onehot(cam), expected)
    assert torch.equal(cam, before)


def test_view_cam_normalises_before_it_shrinks() -> None:
    cam = torch.zeros(1, 3, 5, 5)
    cam[:, :, 0, 1] = 7.0  # between the corners of a 2 x 2 grid
    cam[:, 1, 4, 4] = 3.5
    maps = view_cam(cam, torch.tensor([[1.0, 0.0]]), (2, 2))
    assert maps[0, 1, 1, 1].item() == pytest.approx(0.5, abs=1e-4)
    assert not maps[0, 0].any()
    assert not maps[0, 2].any()
    assert view_cam(cam, torch.zeros(1, 2), (5, 5))[0, 0, 0, 1].item() == pytest.approx(1, abs=1e-4)


# --- SEAM -------------------------------------------------------------------------------------------------------------


def er_reference(first: Tensor, second: Tensor) -> float:
    pairs = zip(first[:, 1:].flatten().tolist(), second[:, 1:].flatten().tolist(), strict=True)
    return math.fsum(abs(a - b) for a, b in pairs) / first[:, 1:].numel()


def ecr_reference(revised: Tensor, cam: Tensor, fraction: float) -> float:
    images = []
    for r, c in zip(revised.flatten(2).tolist(), cam.flatten(2).tolist(), strict=True):
        differences = []
        for pixel in range(len(c[0])):
            best = max(row[pixel] for row in c[1:])
            differences.append(abs(1 - best - r[0][pixel]))
            for row, other in zip(c[1:], r[1:], strict=True):
                differences.append(abs((row[pixel] if row[pixel] == best else 0) - other[pixel]))
        count = int(len(differences) * fraction)
        images.append(sum(sorted(differences)[-count:]) / count)
    return sum(images) / len(images)


def rvmin_reference(revised: Tensor, label: Tensor) -> float:
    total = 0.0
    for maps, present in zip(revised[:, 1:].flatten(2).tolist(), label.tolist(), strict=True):
        best = sorted(max(m[p] * y for m, y in zip(maps, present, strict=True)) for p in range(len(maps[0])))
        darkest = best[: len(best) // 4]
        total += sum(max(v, 0) for v in darkest) / len(darkest)
    return total / len(revised)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_seam_references(classes: int, generator: torch.Generator) -> None:
    label = label_of(classes)
    first, second = (torch.randn(3, 1 + classes, 5, 6, dtype=D, generator=generator) for _ in range(2))
    assert MinPoolingLoss()(first.abs(), label).item() == pytest.approx(rvmin_reference(first.abs(), label), rel=1e-12)
    first, second = view_cam(first, label, (4, 4)), view_cam(second, label, (4, 4))
    assert EquivarianceLoss()(first, second).item() == pytest.approx(er_reference(first, second), rel=1e-12)
    for fraction in (0.2, 0.5):
        loss = EquivariantCrossLoss(fraction)(first, second)
        assert loss.item() == pytest.approx(ecr_reference(first, second, fraction), rel=1e-12)


def test_seam_gradients(generator: torch.Generator) -> None:
    label = label_of(3)
    cams = [torch.randn(3, 4, 3, 4, dtype=D, generator=generator, requires_grad=True) for _ in range(2)]

    def maps(cam: Tensor) -> Tensor:
        return view_cam(cam, label, (2, 3))

    assert torch.autograd.gradcheck(lambda a, b: EquivarianceLoss()(maps(a), maps(b)), cams)
    assert torch.autograd.gradcheck(lambda a: EquivariantCrossLoss()(maps(a), maps(cams[1]).detach()), cams[0])
    assert torch.autograd.gradcheck(lambda a: MinPoolingLoss()(a, label), cams[0])
    EquivariantCrossLoss()(maps(cams[0]), maps(cams[1])).backward()
    assert cams[0].grad is not None
    assert cams[0].grad.any()
    assert cams[1].grad is None


def test_seam_without_labels() -> None:
    label = torch.zeros(2, 3)
    cam = torch.rand(2, 4, 6, 6, requires_grad=True)
    maps = view_cam(cam, label, (3, 3))
    er, rvmin = EquivarianceLoss()(maps, 2 * maps), MinPoolingLoss()(cam, label)
    assert er.item() == rvmin.item() == 0
    ecr = EquivariantCrossLoss()(maps, maps)
    (gradient,) = torch.autograd.grad(er + rvmin + ecr, cam)
    assert ecr.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[:, 1:].any()


def test_seam_of_one_pixel_is_finite() -> None:
    cam = torch.rand(1, 2, 1, 1)
    assert MinPoolingLoss()(cam, torch.ones(1, 1)).item() == pytest.approx(cam[0, 1].item())
    assert EquivariantCrossLoss()(cam, cam).isfinite()


def test_seam_is_zero_where_the_views_agree() -> None:
    maps = torch.tensor([[0.2, 0.9], [0.8, 0.0], [0.0, 0.1]])[None, :, :, None]
    assert EquivarianceLoss()(maps, maps).item() == 0
    assert EquivariantCrossLoss()(maps, maps).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(InputError, match=r"losses\.ecr\.fraction"):
        build("ecr", fraction=fraction)


# --- MAM --------------------------------------------------------------------------------------------------------------


def mam_reference(main: Tensor, support: Tensor, attention: bool) -> float:
    total = 0.0
    for m in main:
        differences = []
        for b in range(m.shape[0]):
            for k in range(m.shape[1]):
                ours, target = m[b, k].flatten().tolist(), [0.0] * m[b, k].numel()
                for s in support:
                    other, weight = s[b, k].flatten().tolist(), 1.0
                    if attention:
                        norms = [max(math.sqrt(sum(v * v for v in x)), 1e-8) for x in (ours, other)]
                        weight = 2 - sum(a * b for a, b in zip(ours, other, strict=True)) / (norms[0] * norms[1])
                    target = [t + weight * v / len(support) for t, v in zip(target, other, strict=True)]
                differences += [abs(t - v) for t, v in zip(target, ours, strict=True)]
        total += sum(differences) / len(differences)
    return total


def mam_maps(count: int, label: Tensor, generator: torch.Generator) -> Tensor:
    maps = torch.randn(count, *label.shape, 3, 4, dtype=D, generator=generator).relu()
    return maps * label[:, :, None, None]


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("classes", [1, 4])
def test_mam_reference(attention: bool, classes: int, generator: torch.Generator) -> None:
    label = label_of(classes)
    main, support = mam_maps(2, label, generator), mam_maps(3, label, generator)
    main[0, 0, 0] = 0  # a present class that the network does not see
    loss = MultiscaleAttentiveLoss(attention)(main, support)
    assert loss.item() == pytest.approx(mam_reference(main, support, attention), rel=1e-12)


def test_weights_of_mam() -> None:
    main = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])[None, None, :, None]  # classes alike, apart, unseen
    support = torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 1.0]])[None, None, :, None]
    assert attention_weights(main, support).flatten().tolist() == [1, 2, 2]


def test_mam_gradient_reaches_the_main_network_alone(generator: torch.Generator) -> None:
    main, support = (torch.rand(n, 2, 2, 3, 3, dtype=D, generator=generator, requires_grad=True) for n in (2, 3))
    MultiscaleAttentiveLoss()(main, support).backward()
    assert support.grad is None
    target = MultiscaleAttentiveLoss().target(main, support)
    assert main.grad is not None
    torch.testing.assert_close(main.grad, (main - target).sign().detach() / main[0].numel())


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("batch", [0, 2])
def test_mam_of_nothing_is_zero(attention: bool, batch: int) -> None:
    main = torch.zeros(2, batch, 3, 4, 4, requires_grad=True)
    loss = MultiscaleAttentiveLoss(attention)(main, torch.zeros(3, batch, 3, 4, 4))
    (gradient,) = torch.autograd.grad(loss, main)
    assert loss.item() == 0
    assert not gradient.any()


def test_absent_classes_left_out(generator: torch.Generator) -> None:
    """What their maps, all 0, do to the means is known without them."""
    label = torch.zeros(2, 9, dtype=D)
    label[:, [1, 4]] = 1
    maps = (
        torch.rand(2, 2, 10, 6, 5, dtype=D, generator=generator)
        * torch.cat([torch.ones_like(label[:, :1]), label], 1)[None, :, :, None, None]
    )
    for name in ("er", "ecr"):
        few = build(name)(*maps[:, :, [0, 2, 5]], num_classes=9)
        torch.testing.assert_close(few, build(name)(*maps))

"""Contrast with prototypes against the formulas of the docstrings, written as loops in float64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss import InputError
from wsss.losses import PixelPrototypeContrastLoss, PrototypeMemory, RegionalContrastLoss, build
from wsss.losses.ppc import rank_within, score_maps
from wsss.losses.rcm_mam import image_prototypes, leave_one_out_prototypes, mean_prototypes

D = torch.float64
Vector = list[float]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def unit(vector: Vector) -> Vector:
    length = math.sqrt(sum(v * v for v in vector))
    return [v / length for v in vector] if length else vector


def add(vectors: list[Vector], dim: int) -> Vector:
    return [math.fsum(v[d] for v in vectors) for d in range(dim)]


def dot(a: Vector, b: Vector) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def close(ours: Tensor, expected: object) -> None:
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=D), rtol=1e-10, atol=1e-12)


# --- RCM --------------------------------------------------------------------------------------------------------------


def pixels_of(features: Tensor, region: Tensor, normalised: bool) -> list[dict[int, list[Vector]]]:
    """For each image the feature vectors of each class id."""
    result = []
    for maps, ids in zip(features.flatten(2).mT.tolist(), region.flatten(1).tolist(), strict=True):
        found: dict[int, list[Vector]] = {}
        for vector, key in zip(maps, ids, strict=True):
            found.setdefault(key, []).append(unit(vector) if normalised else vector)
        result.append(found)
    return result


@pytest.fixture
def shown(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features (4, 3, 5, 6) and regions: class 4 is nowhere, class 3 in one image alone, 255 in all."""
    features = torch.randn(4, 3, 5, 6, dtype=D, generator=generator)
    features[0, :, 0, 0] = 0
    region = torch.randint(3, (4, 5, 6), generator=generator)
    region[:, 2, 3:] = 255
    region[1, 4] = 3
    region[2] = region[2].clamp(max=1)
    return features, region


def test_prototypes(shown: tuple[Tensor, Tensor]) -> None:
    (features, region), classes = shown, range(5)
    found = pixels_of(features, region, normalised=True)
    images = [[unit(add(image.get(k, []), 3)) for k in classes] for image in found]
    ours = image_prototypes(features, region, 4)
    close(ours, images)
    close(mean_prototypes(ours), [unit(add([image[k] for image in images], 3)) for k in classes])
    close(
        leave_one_out_prototypes(ours),
        [[unit(add([o[k] for o in images if o is not image], 3)) for k in classes] for image in images],
    )


def test_a_class_of_one_image_has_no_others() -> None:
    prototypes = F.normalize(torch.randn(7, 3, 16), dim=-1)
    prototypes[1:, 2] = 0
    others = leave_one_out_prototypes(prototypes)
    assert not others[0, 2].any()  # not a rounding error brought to length 1
    torch.testing.assert_close(others[1:, 2], prototypes[:1, 2].expand(6, -1))


def test_a_single_image_has_its_own_prototypes(shown: tuple[Tensor, Tensor]) -> None:
    prototypes = image_prototypes(shown[0][:1], shown[1][:1], 4)
    torch.testing.assert_close(leave_one_out_prototypes(prototypes)[0], mean_prototypes(prototypes))


def test_memory(generator: torch.Generator) -> None:
    memory = PrototypeMemory(num_classes=3, dim=4, length=3).double()
    stored: list[list[Vector]] = [[] for _ in range(4)]
    assert not memory(torch.zeros(2, 4, 4, dtype=D)).any()
    for batch in (2, 1, 6, 2):  # once more than fit
        images = F.normalize(torch.randn(batch, 4, 4, dtype=D, generator=generator), dim=-1)
        images[torch.rand(batch, 4, generator=generator) < 0.5] = 0
        images[:, 3] = 0
        for image in images.tolist():
            for queue, vector in zip(stored, image, strict=True):
                if any(vector):
                    queue.append(vector)
                    del queue[:-3]
        close(memory(images), [unit(add(queue, 4)) for queue in stored])
    assert [len(queue) for queue in stored] == [3, 3, 3, 0]

    resumed = PrototypeMemory(num_classes=3, dim=4, length=3).double()
    resumed.load_state_dict(memory.state_dict())
    nothing = torch.zeros(1, 4, 4, dtype=D)
    assert torch.equal(resumed(nothing), memory(nothing))


def test_memory_of_rounded_vectors() -> None:
    memory = PrototypeMemory(num_classes=1, dim=64)
    vectors = F.normalize(torch.ones(1, 2, 64), dim=-1).bfloat16()  # of length 0.998 or so
    assert memory(vectors).norm(dim=-1).tolist() == pytest.approx([1, 1])


def rcm_reference(features: Tensor, region: Tensor, prototypes: Tensor, scale: float, background: bool) -> float:
    first, losses = 0 if background else 1, []
    for b, image in enumerate(features.flatten(2).mT.tolist()):
        vectors = (prototypes if prototypes.ndim == 2 else prototypes[b]).tolist()
        for pixel, key in zip(image, region[b].flatten().tolist(), strict=True):
            if first <= key < len(vectors):
                logits = [scale * dot(unit(pixel), vector) for vector in vectors]
                losses.append(math.log(sum(math.exp(v) for v in logits[first:])) - logits[key])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("per_image", [True, False])
def test_rcm_reference(shown: tuple[Tensor, Tensor], background: bool, per_image: bool) -> None:
    features, region = shown
    prototypes = image_prototypes(features.flip(0), region, 4)
    prototypes = leave_one_out_prototypes(prototypes) if per_image else mean_prototypes(prototypes)
    for temperature in (2.0, 10.0):
        loss = RegionalContrastLoss(temperature, background)(features, region, prototypes)
        expected = rcm_reference(features, region, prototypes, temperature, background)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_rcm_gradient_reaches_the_features_alone(generator: torch.Generator) -> None:
    features = torch.randn(2, 4, 2, 3, dtype=D, generator=generator, requires_grad=True)
    support = torch.randn(2, 4, 2, 3, dtype=D, generator=generator, requires_grad=True)
    region = torch.tensor([0, 1, 255, 2])[torch.randint(4, (2, 5, 4), generator=generator)]
    prototypes = mean_prototypes(image_prototypes(support, region, 2))
    assert torch.autograd.gradcheck(lambda f: RegionalContrastLoss()(f, region, prototypes), features)
    given = torch.randn(3, 4, dtype=D, generator=generator, requires_grad=True)
    RegionalContrastLoss()(features, region, given).backward()
    assert given.grad is None
    assert not prototypes.requires_grad


@pytest.mark.parametrize("background", [True, False])
def test_rcm_of_one_class(background: bool) -> None:
    features = F.one_hot(torch.tensor([[[0, 0], [1, 1]]]), 3).permute(0, 3, 1, 2).float()
    region = torch.tensor([[[0, 0], [1, 1]]])
    prototypes = mean_prototypes(image_prototypes(features, region, 1))
    loss = RegionalContrastLoss(use_background=background)(features, region, prototypes)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)) if background else 0)


@pytest.mark.parametrize(("ids", "background"), [(255, True), (0, False)])
def test_rcm_without_pixels_is_zero(ids: int, background: bool) -> None:
    features, region = torch.randn(2, 4, 3, 3, requires_grad=True), torch.full((2, 6, 6), ids)
    prototypes = mean_prototypes(image_prototypes(features, region, 2))
    loss = RegionalContrastLoss(use_background=background)(features, region, prototypes)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == 0
    assert not gradient.any()


def test_rcm_of_images_without_labels_is_finite() -> None:
    features, region = torch.zeros(2, 4, 3, 3, requires_grad=True), torch.zeros(2, 6, 6, dtype=torch.long)
    prototypes = mean_prototypes(image_prototypes(features, region, 2))
    loss = RegionalContrastLoss()(features, region, prototypes)
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == pytest.approx(math.log(3))
    assert gradient.isfinite().all()


# --- PPC --------------------------------------------------------------------------------------------------------------


def nce_reference(pixels: list[Vector], prototypes: list[Vector], label: list[int], temperature: float) -> float:
    losses = []
    for pixel, key in zip(pixels, label, strict=True):
        logits = [dot(pixel, p) / temperature for p in prototypes]
        losses.append(math.log(math.fsum(math.exp(v) for v in logits)) - logits[key])
    return sum(losses) / len(losses)


def intra_reference(
    pixels: list[Vector],
    prototypes: list[Vector],
    label: list[int],
    temperature: float,
    negatives: int,
    drawn: Callable[[int], list[int]],
) -> float:
    """`drawn` gives the positions, in the list of a class's pixels, of those sampled at random."""
    means = []
    for key in sorted(set(label)):
        logits = [
            [dot(q, p) / temperature for p in prototypes] for q, own in zip(pixels, label, strict=True) if own == key
        ]
        losses = []
        for row in logits:
            skipped = min(3, max(0, len(row) - negatives))
            hard = sorted(row, reverse=True)[skipped : skipped + negatives]
            positive = row[key]
            losses.append(-math.log(math.exp(positive) / (math.exp(positive) + sum(math.exp(v) for v in hard))))
        n = len(losses)
        order = sorted(range(n), key=lambda i: logits[i][key])
        chosen = drawn(n) + order[int(0.6 * n) - n // 2 : int(0.6 * n)]
        means.append(sum(losses[i] for i in chosen) / len(chosen) if chosen else 0.0)
    return sum(means) / len(means)


def view_reference(
    projection: Tensor, cam: Tensor, label: Tensor, background: float, count: int
) -> tuple[list[Vector], list[int], list[Vector]]:
    """Pixel features, pseudo labels and prototypes; ties of the background go to the first pixels."""
    dim, classes = projection.shape[1], cam.shape[1]
    features: list[Vector] = []
    pseudo, scores = [], []
    for image, maps, present in zip(
        projection.flatten(2).mT.tolist(), cam.flatten(2).tolist(), label.tolist(), strict=True
    ):
        features += image
        rows = [[background] * len(image)]
        for row in maps[1:]:
            row = [max(v, 0.0) for v in row]
            low, high = min(row), max(row)
            rows.append([((0 if v < low + 1e-5 else v) - low - 1e-5) / (high - low + 1e-5) for v in row])
        for p in range(len(image)):
            masked = [row[p] * y for row, y in zip(rows, [1.0, *present], strict=True)]
            pseudo.append(masked.index(max(masked)))
            scores.append([row[p] for row in rows])
    prototypes = []
    for k in range(classes):
        top = sorted(range(len(scores)), key=lambda i: -scores[i][k])[:count]
        total = math.fsum(scores[i][k] for i in top)
        prototypes.append(unit([v / total for v in add([[scores[i][k] * v for v in features[i]] for i in top], dim)]))
    return [unit(f) for f in features], pseudo, prototypes


class Ordered(PixelPrototypeContrastLoss):
    """Draws the first pixels of a class, and breaks ties by the order of pixels."""

    def draw(self, label: Tensor) -> Tensor:
        return torch.arange(len(label)).float()

    def top_pixels(self, scores: Tensor) -> Tensor:
        return scores.sort(dim=1, descending=True, stable=True).indices[:, : self.prototype_pixels]


def two_views(
    classes: int, generator: torch.Generator, size: tuple[int, int] = (4, 5)
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Projections, revised CAMs and labels of three images, one of them without any label."""
    label = (torch.rand(3, classes, generator=generator) < 0.6).to(D)
    label[0, 0], label[1] = 1, 0
    projections = [torch.randn(3, 6, *size, dtype=D, generator=generator).relu() for _ in range(2)]
    cams = [torch.rand(3, 1 + classes, *size, dtype=D, generator=generator) - 0.2 for _ in range(2)]
    return (projections[0], projections[1]), (cams[0], cams[1]), label


@pytest.mark.parametrize("classes", [1, 2, 4, 10, 12, 20])
@pytest.mark.parametrize("pixels", [7, 500])
def test_ppc_reference(classes: int, pixels: int, generator: torch.Generator) -> None:
    projections, cams, label = two_views(classes, generator)
    weights = {"cross_prototype": 0.3, "cross_label": 0.5, "intra": 0.7}
    loss = Ordered(temperature=0.2, prototype_pixels=pixels, background_score=0.4, negatives=8, **weights)
    (q1, l1, p1), (q2, l2, p2) = (
        view_reference(f, c, label, 0.4, pixels) for f, c in zip(projections, cams, strict=True)
    )
    intra = [
        intra_reference(q, p, own, 0.2, 8, lambda n: list(range(n // 2))) for q, p, own in ((q1, p1, l1), (q2, p2, l2))
    ]
    expected = {
        "cross_prototype": 0.3 * (nce_reference(q1, p2, l1, 0.2) + nce_reference(q2, p1, l2, 0.2)) / 2,
        "cross_label": 0.5 * (nce_reference(q1, p1, l2, 0.2) + nce_reference(q2, p2, l1, 0.2)) / 2,
        "intra": 0.7 * sum(intra) / 2,
    }
    terms = loss.terms(projections, cams, label)
    assert {key: term.item() for key, term in terms.items()} == pytest.approx(expected, rel=1e-9)
    assert loss(projections, cams, label).item() == pytest.approx(sum(expected.values()), rel=1e-9)


@pytest.mark.parametrize("classes", [1, 4])
def test_ppc_gradient_reaches_the_pixel_features_alone(classes: int, generator: torch.Generator) -> None:
    projections, cams, label = two_views(classes, generator, (2, 3))
    loss = Ordered(temperature=0.5, prototype_pixels=3, negatives=3)
    one, two = ((f + 0.1).requires_grad_() for f in projections)
    prototypes = [loss.view(f, c, label, f.shape[-2:]).prototypes for f, c in zip((one, two), cams, strict=True)]
    for cam in cams:
        cam.requires_grad_()

    def with_fixed_prototypes(first: Tensor, second: Tensor) -> Tensor:
        ready = iter(prototypes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loss, "prototypes", lambda scores, features: next(ready))
            return loss((first, second), cams, label)

    assert torch.autograd.gradcheck(with_fixed_prototypes, (one, two))
    fixed = torch.autograd.grad(with_fixed_prototypes(one, two), (one, two))
    learnt = torch.autograd.grad(loss((one, two), cams, label), (one, two, *cams), allow_unused=True)
    torch.testing.assert_close(learnt[:2], fixed)
    assert learnt[2:] == (None, None)


def test_ppc_resizes_the_first_view_with_aligned_corners(generator: torch.Generator) -> None:
    projections, cams, label = two_views(3, generator, (4, 4))
    large = [
        F.interpolate(maps, size=(7, 10), mode="bilinear", align_corners=True) for maps in (projections[0], cams[0])
    ]
    loss = Ordered()
    expected = loss(projections, cams, label)
    torch.testing.assert_close(loss((large[0], projections[1]), (large[1], cams[1]), label), expected)


@pytest.mark.parametrize("classes", [1, 3, 20])
def test_ppc_without_labels_or_activation_is_finite(classes: int) -> None:
    label = torch.zeros(2, classes)
    projections = tuple(torch.rand(2, 8, 4, 4, requires_grad=True) for _ in range(2))
    for cam in (torch.zeros(2, 1 + classes, 4, 4), torch.ones(2, 1 + classes, 4, 4)):
        loss = PixelPrototypeContrastLoss()
        terms = loss.terms(projections, (cam, cam), label)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(torch.stack(list(terms.values())).sum(), projections)
        assert all(value.isfinite().all() for value in (*terms.values(), *gradients))
        assert not loss.view(projections[0], cam, label, projections[0].shape[-2:]).label.any()


def test_ppc_of_dead_features_is_finite() -> None:
    projections = tuple(torch.zeros(1, 8, 4, 4, requires_grad=True) for _ in range(2))
    cams = (torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4))
    loss = PixelPrototypeContrastLoss()(projections, cams, torch.ones(1, 2))  # type: ignore[arg-type]
    gradients = torch.autograd.grad(loss, projections)
    assert all(value.isfinite().all() for value in (loss, *gradients))


def test_prototype_of_scores_that_cancel_is_finite() -> None:
    scores, features = torch.tensor([[0.5, -0.5], [-1.0, -3.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    prototypes = PixelPrototypeContrastLoss().prototypes(scores, features)
    assert not prototypes[0].any()
    torch.testing.assert_close(prototypes[1], torch.tensor([1.0, 3.0]) / 10**0.5)


def test_score_maps_have_a_constant_background() -> None:
    scores = score_maps(torch.tensor([5.0, -1.0, 0.0, 2.0]).view(1, 2, 1, 2), 0.2)
    assert scores.flatten().tolist() == pytest.approx([0.2, 0.2, 0, 1], abs=2e-5)


def test_rank_within() -> None:
    rank, count = rank_within(torch.tensor([2, 0, 2, 0, 2]), torch.tensor([0.3, 0.9, 0.1, 0.2, 0.2]), 4)
    assert rank.tolist() == [2, 1, 0, 0, 1]
    assert count.tolist() == [2, 0, 3, 0]


def test_ppc_draws_half_of_a_class_at_random() -> None:
    loss, label = PixelPrototypeContrastLoss(), torch.zeros(10, dtype=torch.long)
    torch.manual_seed(0)
    often = torch.stack([rank_within(label, loss.draw(label), 1)[0] < 5 for _ in range(400)]).float()
    assert (often.sum(1) == 5).all()
    assert often.mean(0).tolist() == pytest.approx([0.5] * 10, abs=0.1)


@pytest.mark.parametrize("name", ["prototype_pixels", "negatives"])
def test_bad_numbers(name: str) -> None:
    with pytest.raises(InputError, match=rf"losses\.ppc\.{name} is 0"):
        build("ppc", **{name: 0})

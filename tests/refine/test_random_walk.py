"""The random walk written out in float64, that its two forms agree, and what it does at the borders."""

import pytest
import torch
from torch import Tensor

from wsss.pairs import pair_offsets, pair_paths, source_size
from wsss.refine.random_walk import (
    dense_affinity,
    edge_walk,
    pad_to_cells,
    random_walk,
    refine_scores,
    transition,
    with_background_score,
)


def affinities(batch: int, size: tuple[int, int], radius: int, seed: int = 0) -> Tensor:
    rows, columns = source_size(size, radius)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, len(pair_offsets(radius)), rows * columns, generator=generator).sqrt()


def written_out(affinity: Tensor, maps: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    """Of one image: (K, n) and (C, h, w)."""
    h, w = maps.shape[-2:]
    matrix = torch.eye(h * w, dtype=torch.double)
    rows, columns = source_size((h, w), radius)
    for k, (dy, dx) in enumerate(pair_offsets(radius)):
        for index in range(rows * columns):
            y, x = index // columns, index % columns + radius - 1
            i, j = y * w + x, (y + dy) * w + x + dx
            matrix[i, j] = matrix[j, i] = float(affinity[k, index])
    matrix = matrix**beta
    matrix /= matrix.sum(0)
    result = maps.double().flatten(1)
    for _ in range(steps):
        result = result @ matrix
    return result.view_as(maps)


@pytest.mark.parametrize(("size", "radius"), [((7, 10), 5), ((6, 5), 3), ((4, 3), 2)])
@pytest.mark.parametrize("dense", [True, False, None])
def test_written_out(size: tuple[int, int], radius: int, dense: bool | None) -> None:
    affinity, maps = affinities(2, size, radius), torch.rand(2, 3, *size)
    found = random_walk(affinity, maps, radius, beta=3.0, logt=4, dense=dense)
    for image in range(2):
        expected = written_out(affinity[image], maps[image], radius, 3.0, 16)
        torch.testing.assert_close(found[image].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("size", [(13, 40), (31, 22), (20, 30)])
def test_both_forms_agree(size: tuple[int, int]) -> None:
    affinity, maps = affinities(2, size, 5), torch.rand(2, 4, *size)
    dense, sparse = (random_walk(affinity, maps, dense=form) for form in (True, False))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-5)
    # in double precision they are the same
    exact = [random_walk(affinity.double(), maps.double(), dense=form) for form in (True, False)]
    assert exact[0].dtype == torch.double
    torch.testing.assert_close(*exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dense", [True, False])
def test_what_a_walk_keeps(dense: bool) -> None:
    """A map of one value everywhere stays, and an absent class does not appear."""
    maps = torch.cat([torch.full((1, 1, 12, 20), 0.7), torch.zeros(1, 1, 12, 20)], dim=1)
    found = random_walk(affinities(1, (12, 20), 5), maps, dense=dense)
    torch.testing.assert_close(found, maps, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dense", [True, False])
def test_images_of_a_batch_are_apart(dense: bool) -> None:
    affinity, maps = affinities(3, (9, 14), 5), torch.rand(3, 2, 9, 14)
    alone = [random_walk(affinity[i : i + 1], maps[i : i + 1], dense=dense) for i in range(3)]
    torch.testing.assert_close(random_walk(affinity, maps, dense=dense), torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("radius", [0, 1])
@pytest.mark.parametrize("dense", [True, False])
def test_without_a_pair_nothing_moves(radius: int, dense: bool) -> None:
    maps = torch.rand(2, 3, 2, 3)
    affinity = torch.zeros(2, 0, source_size((2, 3), radius)[0] * source_size((2, 3), radius)[1])
    torch.testing.assert_close(random_walk(affinity, maps, radius, dense=dense), maps)


def test_half_precision_walks_in_float32() -> None:
    affinity, maps = affinities(1, (6, 10), 5), torch.rand(1, 2, 6, 10)
    for dense in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found = random_walk(affinity.half(), maps.half(), dense=dense)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, random_walk(affinity, maps, dense=dense), rtol=0, atol=5e-3)


def test_inputs_are_left_alone() -> None:
    affinity, maps = affinities(1, (6, 10), 5), torch.rand(1, 2, 6, 10)
    before = affinity.clone(), maps.clone()
    random_walk(affinity, maps, dense=False)
    assert torch.equal(affinity, before[0])
    assert torch.equal(maps, before[1])


def test_affinities_of_another_map() -> None:
    with pytest.raises(ValueError, match=r"affinities of a 6 x 10 map and radius 5 are \(34, 4\) an image"):
        random_walk(affinities(1, (7, 10), 5), torch.rand(1, 1, 6, 10))


def test_transition_divides_columns() -> None:
    matrix = transition(dense_affinity(affinities(2, (6, 10), 5), (6, 10), 5), 8)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(2, 60))


def test_scores_of_the_background() -> None:
    cam = torch.tensor([[0.2, 0.9], [0.5, 0.1]])[None, :, None]  # two classes, two pixels
    torch.testing.assert_close(with_background_score(cam, alpha=2)[0, :, 0, 0], torch.tensor([0.25, 0.2, 0.5]))
    torch.testing.assert_close(with_background_score(cam, 0.4)[0, :, 0, 1], torch.tensor([0.4, 0.9, 0.1]))


@pytest.mark.parametrize("size", [(41, 70), (40, 72), (3, 9)])
def test_scores_have_the_size_of_the_image(size: tuple[int, int]) -> None:
    scores = torch.rand(2, 3, *size)
    cells = tuple(side // 8 for side in pad_to_cells(scores).shape[-2:])
    radius = 5 if source_size(cells, 5)[0] else 0
    found = refine_scores(affinities(2, (cells[0], cells[1]), radius), scores, radius, logt=2)
    assert found.shape == scores.shape
    assert found.isfinite().all()
    assert found.max() <= 1


def edges_written_out(edge: Tensor, maps: Tensor, radius: int, beta: float, steps: int) -> Tensor:
    """Of one image: (h, w) and (C, h, w), in float64, over all pairs of the map."""
    h, w = edge.shape
    matrix = torch.eye(h * w, dtype=torch.double)
    for (dy, dx), path in zip(pair_offsets(radius), pair_paths(radius), strict=True):
        for y in range(h):
            for x in range(w):
                if y + dy < h and 0 <= x + dx < w:
                    i, j = y * w + x, (y + dy) * w + x + dx
                    matrix[i, j] = matrix[j, i] = 1 - max(float(edge[y + py, x + px]) for py, px in path)
    matrix = matrix**beta
    matrix /= matrix.sum(0)
    result = (maps * (1 - edge)).double().flatten(1)
    for _ in range(steps):
        result = result @ matrix
    return result.view_as(maps)


@pytest.mark.parametrize(("size", "radius"), [((7, 10), 5), ((6, 5), 3), ((3, 2), 5)])
@pytest.mark.parametrize("dense", [True, False, None])
def test_walk_between_edges_written_out(size: tuple[int, int], radius: int, dense: bool | None) -> None:
    torch.manual_seed(0)
    edge, maps = torch.rand(2, 1, *size) ** 2, torch.rand(2, 3, *size)
    found = edge_walk(edge, maps, radius, beta=3.0, logt=4, dense=dense)
    for image in range(2):
        expected = edges_written_out(edge[image, 0], maps[image], radius, 3.0, 16)
        torch.testing.assert_close(found[image].double(), expected, rtol=0, atol=2e-6)


def test_both_forms_of_the_walk_between_edges_agree() -> None:
    torch.manual_seed(0)
    edge, maps = torch.rand(2, 1, 21, 30) ** 4, torch.rand(2, 4, 21, 30)
    dense, sparse = (edge_walk(edge, maps, dense=form) for form in (True, False))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=1e-5)


def test_a_boundary_stops_the_walk() -> None:
    edge, maps = torch.zeros(1, 1, 12, 20), torch.zeros(1, 1, 12, 20)
    edge[..., 9] = 1.0
    maps[..., 5, 3] = 1.0
    walked = edge_walk(edge, maps)[0, 0]
    assert (walked[:, :9] > 0).all()
    assert (walked[:, 9:] == 0).all()

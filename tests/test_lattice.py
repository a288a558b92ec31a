"""The permutohedral filter against recordings of the original one and a point-by-point reference."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wsss.lattice import PermutohedralLattice

GOLDEN = Path(__file__).parent / "golden" / "toco" / "losses.npz"


def slow_filter(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """features (N, d), values (N, C) -> (N, C): one point at a time, vertices in a dict, float64."""
    d = features.shape[1]
    table: dict[tuple[int, ...], np.ndarray] = {}
    corners = []
    for feature, value in zip(features, values, strict=True):
        c = [feature[i] * np.sqrt(2 / 3) * (d + 1) / np.sqrt((i + 1) * (i + 2)) for i in range(d)]
        elevated = np.array([sum(c[j:]) - (j * c[j - 1] if j else 0) for j in range(d + 1)])
        remainder = (np.round(elevated / (d + 1)) * (d + 1)).astype(int)
        rank = np.zeros(d + 1, dtype=int)
        for i in range(d + 1):
            for j in range(i + 1, d + 1):
                rank[i if elevated[i] - remainder[i] < elevated[j] - remainder[j] else j] += 1
        rank += remainder.sum() // (d + 1)
        for i in range(d + 1):
            turn = (rank[i] < 0) * (d + 1) - (rank[i] > d) * (d + 1)
            rank[i] += turn
            remainder[i] += turn
        weight = np.zeros(d + 2)
        for i in range(d + 1):
            v = (elevated[i] - remainder[i]) / (d + 1)
            weight[d - rank[i]] += v
            weight[d + 1 - rank[i]] -= v
        weight[0] += 1 + weight[d + 1]
        corners.append([])
        for r in range(d + 1):
            key = tuple(int(remainder[i] + (r if rank[i] <= d - r else r - d - 1)) for i in range(d + 1))
            table[key] = table.get(key, 0) + weight[r] * value
            corners[-1].append((key, weight[r]))
    for j in range(d + 1):
        step = np.full(d + 1, -1)
        step[j] = d
        nothing = np.zeros(values.shape[1])
        table = {
            key: own
            + 0.5 * (table.get(tuple(np.array(key) + step), nothing) + table.get(tuple(np.array(key) - step), nothing))
            for key, own in table.items()
        }
    return np.array([sum(w * table[key] for key, w in corner) for corner in corners]) / (1 + 2.0**-d)


def points(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


@pytest.mark.parametrize("name", ["bf", "bf_odd"])
def test_matches_recorded_bilateral_filter(name: str) -> None:
    with np.load(GOLDEN) as golden:
        image, values, expected = (torch.from_numpy(golden[f"{name}_{k}"]) for k in ("img", "in", "out"))
    batch, _, height, width = image.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    position = (torch.stack([x, y]) / 50).expand(batch, -1, -1, -1)
    features = torch.cat([position, image / 15], 1).flatten(2).mT
    out = PermutohedralLattice(features)(values.flatten(2).mT).mT.reshape(values.shape)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_matches_slow_reference(d: int, spread: float) -> None:
    features, values = points(60, d, seed=d, spread=spread), points(60, 4, seed=9)
    expected = torch.from_numpy(slow_filter(features.numpy(), values.numpy()))
    out = PermutohedralLattice(features[None])(values[None])[0]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    single = PermutohedralLattice(features[None].float())(values[None].float())[0]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d", [2, 5])
def test_normalised(d: int) -> None:
    features, values = points(3, 50, d), points(3, 50, 2, seed=1)
    plain = PermutohedralLattice(features)
    norm = (plain(torch.ones(3, 50, 1, dtype=torch.float64)) + 1e-20).rsqrt()
    expected = 2.5 * norm * plain(norm * values)
    torch.testing.assert_close(PermutohedralLattice(features).normalise(2.5)(values), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [2, 5])
def test_batch_is_filtered_image_by_image(d: int) -> None:
    features, values = points(3, 50, d), points(3, 50, 2, seed=1)
    features[2] = features[0]  # the same places in two images must not share vertices
    together = PermutohedralLattice(features)(values)
    alone = torch.cat([PermutohedralLattice(features[i : i + 1])(values[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("d", [2, 5])
def test_linear_shift_invariant_and_positive(d: int) -> None:
    features, values = points(1, 80, d), points(1, 80, 2, seed=1)
    lattice = PermutohedralLattice(features)
    torch.testing.assert_close(lattice(3 * values + 1), 3 * lattice(values) + lattice(torch.ones_like(values)))
    assert (lattice(values.abs()) > 0).all()
    # Elevated, this is the lattice vector (d+1) * (1, -1, 0, ..): it moves every vertex alike.
    period = torch.zeros(d, dtype=torch.float64)
    period[0] = np.sqrt(3)
    torch.testing.assert_close(PermutohedralLattice(features + period)(values), lattice(values))


@pytest.mark.parametrize("d", [2, 5])
def test_response_is_nearly_symmetric(d: int) -> None:
    identity = torch.eye(40, dtype=torch.float64)[None]
    kernel = PermutohedralLattice(points(1, 40, d, spread=0.5))(identity)[0]
    # Every axis' blur is symmetric but they do not commute at missing vertices: what is left is small.
    assert (kernel - kernel.t()).norm() < 0.15 * kernel.norm()


@pytest.mark.parametrize("d", [2, 5])
def test_coinciding_points_pool(d: int) -> None:
    features = torch.full((1, 7, d), 0.4)
    values = torch.rand(1, 7, 3)
    out = PermutohedralLattice(features)(values)
    one = PermutohedralLattice(features[:, :1])(torch.ones(1, 1, 1))
    torch.testing.assert_close(out, (values.sum(1, keepdim=True) * one).expand_as(out))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e15])
def test_hopeless_features_are_refused(bad: float) -> None:
    features = torch.zeros(1, 4, 5)
    features[0, 0] = bad
    with pytest.raises(ValueError, match="not finite or spread too far"):
        PermutohedralLattice(features)


@pytest.mark.parametrize("d", [2, 5])
def test_room_for_all_vertices_that_there_can_be(d: int) -> None:
    """How a training step on a GPU builds it, which never waits for their number."""
    features, values = points(2, 50, d), points(2, 50, 3, seed=1)
    roomy = PermutohedralLattice(features, compact=False).normalise()
    torch.testing.assert_close(roomy(values), PermutohedralLattice(features).normalise()(values), rtol=0, atol=0)

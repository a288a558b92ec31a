"""Objects told apart by where their cells point to."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from wsss.refine import instances
from wsss.refine.instances import cluster, find_centroids, separate


def pointing_to(centres: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    """Displacements of cells that point to the nearest of some centres."""
    y, x = torch.meshgrid(*(torch.arange(float(side)) for side in size), indexing="ij")
    offsets = torch.stack([torch.stack([cy - y, cx - x]) for cy, cx in centres])  # (n, 2, h, w)
    nearest = offsets.norm(dim=1).argmin(dim=0)
    return offsets.gather(0, nearest[None, None].expand(1, 2, *size))[0]


def written_out(displacement: Tensor, y: float, x: float, steps: int) -> tuple[int, int]:
    h, w = displacement.shape[-2:]
    for _ in range(steps):
        low, high = (int(y), int(x)), (-int(-y // 1), -int(-x // 1))
        moved = [0.0, 0.0]
        for row, row_share in ((low[0], 1 - (y - low[0])), (high[0], y - low[0])):
            for column, share in ((low[1], 1 - (x - low[1])), (high[1], x - low[1])):
                for axis in (0, 1):
                    moved[axis] += row_share * share * float(displacement[axis, row, column])
        y, x = min(max(y + moved[0], 0.0), h - 1.0), min(max(x + moved[1], 0.0), w - 1.0)
    return round(y), round(x)


def test_centroids_written_out() -> None:
    torch.manual_seed(0)
    displacement = torch.randn(2, 7, 9)
    found = find_centroids(displacement, 3)
    for y in range(7):
        for x in range(9):
            assert (int(found[0, y, x]), int(found[1, y, x])) == written_out(displacement, y, x, 3)


def test_cells_of_two_objects() -> None:
    displacement = pointing_to([(5, 5), (6, 20)], (12, 26))
    centroids = find_centroids(0.5 * displacement)  # half of the way at each step
    assert set(map(tuple, centroids.flatten(1).T.tolist())) == {(5, 5), (6, 20)}
    clusters = cluster(centroids, displacement)
    assert set(clusters.unique().tolist()) == {1, 2}
    assert (clusters[:, :12] == clusters[5, 5]).all()
    assert (clusters[:, 14:] == clusters[6, 20]).all()
    assert (cluster(centroids, displacement + 9) == 0).all()  # nowhere short, so that there is no centre


def stay(maps: Tensor) -> Tensor:
    """A walk without steps at four times the size."""
    return maps.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("chunk", [1, 16])
def test_instances(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Two of one class side by side, one of another class, and a crumb; numbers fall with the scores."""
    monkeypatch.setattr(instances, "CHUNK", chunk)
    cam, clusters = torch.zeros(2, 12, 26), torch.ones(12, 26, dtype=torch.long)
    clusters[:, 13:] = 2
    cam[0, 2:9, 8:13], cam[0, 2:9, 13:18] = 0.5, 0.8
    cam[1, 1:11, 21:25] = 0.6
    cam[1, 0, 0] = 0.8
    found = separate(cam, clusters, stay, (48, 104))
    assert (found.classes, found.scores) == ([0, 1, 0], pytest.approx([1.0, 0.75, 0.625]))
    expected = torch.zeros(12, 26, dtype=torch.long)
    expected[2:9, 8:13], expected[2:9, 13:18], expected[1:11, 21:25] = 3, 1, 2
    assert torch.equal(found.numbers, stay(expected[None, None])[0, 0])
    every = separate(cam, clusters, stay, (48, 104), smallest=0.0)
    assert sorted(every.classes) == [0, 0, 1, 1]
    assert separate(cam, clusters, stay, (48, 104), background=0.7).classes == [0, 1]


def test_many_clusters_are_walked_a_few_at_a_time() -> None:
    counts: list[int] = []

    def counting(maps: Tensor) -> Tensor:
        counts.append(maps.shape[1])
        return maps

    clusters = torch.arange(400).view(20, 20)
    cam = torch.linspace(0, 1, 400).view(1, 20, 20)
    found = separate(cam, clusters, counting, (20, 20), background=0.5, smallest=0.0)
    assert max(counts) == instances.CHUNK
    assert sum(counts) < 220  # those that cannot beat the background are left out
    assert torch.equal(found.numbers > 0, cam[0] > 0.5)


def test_maps_of_nothing() -> None:
    found = separate(torch.zeros(2, 5, 6), torch.zeros(5, 6, dtype=torch.long), lambda maps: maps, (5, 6))
    assert (found.classes, found.scores, int(found.numbers.max())) == ([], [], 0)

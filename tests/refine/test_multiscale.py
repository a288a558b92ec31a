"""Multi-scale CAMs and scores against the recipe written out, with small stand-ins for a network."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from wsss.cam import by_max, min_max, multiscale_cam, multiscale_seg, reduce, reduced_size, resize_ids, windowed


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class Network(nn.Module):
    """Four maps of half the size, of both signs; a mirror image gives other maps than the mirrored ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(4, 3, 3, 3, seed=1) - 0.5)
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        return F.conv2d(image, self.weight, stride=2, padding=1)

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """Number, height and width of the images of every call."""
        return [(len(image), *image.shape[-2:]) for image in self.seen]


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def image() -> Tensor:
    return noise(2, 3, 13, 18, seed=2) - 0.3


def bilinear(maps: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)


def scaled(image: Tensor, scale: float) -> Tensor:
    return bilinear(image, int(scale * image.shape[2]), int(scale * image.shape[3]))


def mirrored(maps: Tensor) -> Tensor:
    return maps.flip(3)


def cam_written_out(network: nn.Module, image: Tensor, scales: Sequence[float]) -> Tensor:
    """Map by map: larger of plain and mirrored, negative values cut, summed, then brought to [0, 1)."""
    size, total = image.shape[2:], torch.zeros(())
    for scale in scales:
        plain = bilinear(network(scaled(image, scale)), *size)
        other = mirrored(bilinear(network(mirrored(scaled(image, scale))), *size))
        total = total + torch.where(plain > other, plain, other).clamp(min=0)
    result = torch.empty_like(total)
    for i, k in product(range(total.shape[0]), range(total.shape[1])):
        above = total[i, k] - total[i, k].min()
        result[i, k] = above / (above.max() + 1e-5)
    return result


# --- CAMs -------------------------------------------------------------------------------------------------------------


def test_stand_in_is_not_mirror_symmetric(network: Network, image: Tensor) -> None:
    assert (network(image) - mirrored(network(mirrored(image)))).abs().max() > 0.1


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5, 1.5), (1.0, 0.75), (1.0, 2.0, 0.3)])
def test_cams_are_the_recipe(network: Network, image: Tensor, scales: tuple[float, ...]) -> None:
    torch.testing.assert_close(multiscale_cam(network, image, scales), cam_written_out(network, image, scales))


def test_the_published_scales_are_the_default(network: Network, image: Tensor) -> None:
    torch.testing.assert_close(multiscale_cam(network, image), cam_written_out(network, image, (1.0, 0.5, 1.5)))


@pytest.mark.parametrize("scales", [(), (0.5,), (0.5, 1.0), (1.0, 0.5)])
def test_scale_one_always_takes_part_and_comes_first(
    network: Network, image: Tensor, scales: tuple[float, ...]
) -> None:
    others = [s for s in scales if s != 1.0]
    found = multiscale_cam(network, image, scales)
    assert network.sizes == [(4, 13, 18), *((4, 6, 9) for _ in others)]
    torch.testing.assert_close(found, cam_written_out(network, image, (1.0, *others)))


def test_cams_run_image_and_mirror_image_at_floored_sizes(network: Network, image: Tensor) -> None:
    multiscale_cam(network, image, (1.5, 0.5, 0.99, 1.0))
    assert network.sizes == [(4, 13, 18), (4, 19, 27), (4, 6, 9), (4, 12, 17)]
    assert torch.equal(network.seen[0], torch.cat([image, mirrored(image)]))
    for both in network.seen:
        assert torch.equal(both[2:], mirrored(both[:2]))


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 0.5, 1.5), (0.5,)])
def test_known_maps_spare_one_run_and_change_nothing(network: Network, image: Tensor, scales: Any) -> None:
    first = network(image)
    network.seen.clear()
    found = multiscale_cam(network, image, scales, first=first)
    assert network.sizes[0] == (2, 13, 18)
    assert torch.equal(network.seen[0], mirrored(image))
    torch.testing.assert_close(found, multiscale_cam(network, image, scales))


def test_known_maps_are_taken_as_they_are(network: Network, image: Tensor) -> None:
    first = 100 + noise(2, 4, 13, 18, seed=3)  # above all that the mirror image can give
    assert torch.equal(multiscale_cam(network, image, (1.0,), first=first), min_max(first))


def test_each_map_is_normalised_by_itself(network: Network, image: Tensor) -> None:
    found = multiscale_cam(network, image, (1.0, 0.5))
    assert (found.amin((2, 3)) == 0).all()
    assert (found.amax((2, 3)) < 1).all()
    assert (found.amax((2, 3)) > 0.999).all()
    louder = torch.tensor([1.0, 10.0, 100.0, 3.0])[:, None, None]
    torch.testing.assert_close(
        multiscale_cam(lambda x: louder * network(x), image, (1.0, 0.5)), found, atol=1e-3, rtol=0
    )
    alone = torch.cat([multiscale_cam(network, image[i : i + 1], (1.0, 0.5)) for i in range(2)])
    torch.testing.assert_close(alone, found)


def test_maps_without_positive_values_are_zero(network: Network, image: Tensor) -> None:
    assert not multiscale_cam(lambda x: -network(x).abs(), image).any()


def test_cams_of_the_image_itself() -> None:
    """A network that returns its image: the larger of a pixel and itself."""
    image = torch.tensor([[-1.0, 0.0, 4.0], [2.0, 1.0, 3.0]]).expand(1, 3, 2, 3)
    expected = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.25, 0.75]]).expand(1, 3, 2, 3)
    torch.testing.assert_close(multiscale_cam(lambda x: x, image, (1.0,)), expected, atol=1e-5, rtol=0)


def test_other_ways_to_scale_fuse_and_normalise(network: Network, image: Tensor) -> None:
    def nearest(image: Tensor, scale: float) -> Tensor:
        return F.interpolate(image, scale_factor=scale, mode="nearest")

    found = multiscale_cam(
        network, image, (1.0, 2.0), rescale=nearest, fuse=lambda a, b: (a - b).abs(), normalise=by_max
    )
    total = torch.zeros(())
    for scale in (1.0, 2.0):
        at_scale = nearest(image, scale)
        plain, other = network(at_scale), mirrored(network(mirrored(at_scale)))
        total = total + (bilinear(plain, 13, 18) - bilinear(other, 13, 18)).abs()
    torch.testing.assert_close(found, (total / (total.amax((2, 3), keepdim=True) + 1e-5)).detach())


def test_cams_in_half_precision_are_normalised_in_single(network: Network, image: Tensor) -> None:
    found = multiscale_cam(lambda x: network(x).bfloat16(), image)
    assert found.dtype == torch.float32
    assert found.max() <= 1
    torch.testing.assert_close(found, multiscale_cam(network, image), atol=0.03, rtol=0)


# --- scores -----------------------------------------------------------------------------------------------------------

ADD_OR_LARGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "max": torch.maximum}


def scores_written_out(
    network: nn.Module, image: Tensor, size: tuple[int, int], scales: Sequence[float], flip: str, fusion: str
) -> Tensor:
    maps = []
    for scale in scales:
        scores = bilinear(network(scaled(image, scale)), *size)
        if flip != "none":
            other = mirrored(bilinear(network(mirrored(scaled(image, scale))), *size))
            fused = {
                "sum": scores + other,
                "mean": (scores + other) / 2,
                "max": torch.where(scores > other, scores, other),
            }
            scores = fused[flip]
        maps.append(scores)
    every = torch.stack(maps)
    return {"sum": every.sum(0), "mean": every.mean(0), "max": every.amax(0)}[fusion]


@pytest.mark.parametrize("fusion", ["max", "sum", "mean"])
@pytest.mark.parametrize("flip", ["none", "sum", "mean", "max"])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.5, 1.25), (0.5, 1.3)])
def test_scores_are_the_recipe(
    network: Network, image: Tensor, scales: tuple[float, ...], flip: str, fusion: str
) -> None:
    size = (21, 15)
    found = multiscale_seg(network, image, size, scales, flip, fusion)
    assert found.shape == (2, 4, *size)
    torch.testing.assert_close(found, scores_written_out(network, image, size, scales, flip, fusion).detach())


def test_scores_run_the_given_scales_in_their_order(network: Network, image: Tensor) -> None:
    multiscale_seg(network, image, (5, 5), (1.5, 0.5, 1.25))
    assert network.sizes == [(2, 19, 27), (2, 6, 9), (2, 16, 22)]
    network.seen.clear()
    multiscale_seg(network, image, (5, 5), (0.5, 1.0), flip="sum")
    assert network.sizes == [(4, 6, 9), (4, 13, 18)]


def test_scores_are_those_of_the_network_alone_by_default(network: Network, image: Tensor) -> None:
    torch.testing.assert_close(multiscale_seg(network, image, (7, 9)), network(image).detach())
    assert network.sizes[0] == (2, 13, 18)
    both = multiscale_seg(network, image, (7, 9), (1.0, 0.5))
    assert torch.equal(both, multiscale_seg(network, image, (7, 9), (1.0, 0.5), "none", "max"))


def test_scores_of_the_image_itself(image: Tensor) -> None:
    for flip, fusion, factor in (("none", "sum", 2), ("sum", "max", 2), ("sum", "sum", 4), ("max", "max", 1)):
        found = multiscale_seg(lambda x: x, image, (13, 18), (1.0, 1.0), flip, fusion)
        torch.testing.assert_close(found, factor * image)


def test_no_gradient_is_kept(network: Network, image: Tensor) -> None:
    assert network(image).requires_grad
    assert not multiscale_cam(network, image).requires_grad
    assert not multiscale_seg(network, image, (5, 5), (1.0, 0.5), "max").requires_grad


@pytest.mark.parametrize("size", [(7, 5), (13, 40), (3, 2), (1, 1), (7, 11)])
def test_ids_take_the_nearest(size: tuple[int, int]) -> None:
    ids = torch.randint(0, 255, (2, 7, 5))
    expected = [np.asarray(Image.fromarray(one).resize(size[::-1], 0)) for one in ids.byte().numpy()]
    assert np.array_equal(resize_ids(ids, size).numpy(), np.stack(expected))


@pytest.mark.parametrize(
    ("size", "max_side", "reduced"),
    [
        ((3000, 4000), 1024, (768, 1024)),
        ((3000, 4000), None, (3000, 4000)),
        ((768, 1024), 1024, (768, 1024)),
        ((1, 65535), 1024, (1, 1024)),
        ((40, 65535), 1024, (32, 1024)),
        ((20000, 500), 400, (400, 32)),
    ],
)
def test_no_side_is_longer_than_the_longest(
    size: tuple[int, int], max_side: int | None, reduced: tuple[int, int]
) -> None:
    assert reduced_size(size, max_side) == reduced
    assert reduced_size(reduced, max_side) == reduced


def test_an_image_is_reduced_as_pil_does() -> None:
    image = torch.randint(0, 256, (1, 3, 90, 150), dtype=torch.uint8)
    assert reduce(image, 150) is image
    colours = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((100, 60), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(colours)).permute(2, 0, 1)[None]
    torch.testing.assert_close(reduce(image, 100), expected, atol=1, rtol=0)
    torch.testing.assert_close(reduce(image.float(), 100), expected.float(), atol=1, rtol=0)


@pytest.mark.parametrize("flip", ["none", "sum"])
def test_probabilities_are_fused_at_the_size_of_the_result(network: Network, image: Tensor, flip: str) -> None:
    found = multiscale_seg(network, image, (21, 15), (0.5, 1.0), flip, "max", softmax=True, align_corners=True)
    maps = []
    for scale in (0.5, 1.0):
        size = (int(13 * scale), int(18 * scale))
        at_scale = F.interpolate(image, size=size, mode="bilinear", align_corners=True)
        scores = bilinear(network(at_scale), 21, 15).softmax(1)
        if flip == "sum":
            scores = scores + mirrored(bilinear(network(mirrored(at_scale)), 21, 15).softmax(1))
        maps.append(scores)
    torch.testing.assert_close(found, torch.maximum(*maps).detach())


@pytest.mark.parametrize("size", [(23, 31), (8, 20), (5, 7)])
def test_windows_against_a_plain_computation(size: tuple[int, int]) -> None:
    """Means where windows overlap, in double precision; an image of a window's size is seen once, whole."""
    torch.manual_seed(0)
    side, stride = 8, 5
    image = torch.randn(2, 3, *size, dtype=torch.double)
    seen: list[Tensor] = []

    def seg(part: Tensor) -> Tensor:  # depends on all of the window
        seen.append(part)
        return torch.cat([part[:, :1] * part.mean((1, 2, 3), keepdim=True), part[:, 1:2].cumsum(-1)], dim=1)

    found = windowed(seg, image, side, stride)
    total, count = torch.zeros(2, 2, *size, dtype=torch.double), torch.zeros(size, dtype=torch.double)
    tops, lefts = ([*range(0, n - side, stride), max(0, n - side)] for n in size)
    for top in tops:
        for left in lefts:
            total[..., top : top + side, left : left + side] += seg(image[..., top : top + side, left : left + side])
            count[top : top + side, left : left + side] += 1
    assert (count > 0).all()
    torch.testing.assert_close(found, total / count)
    assert {tuple(part.shape[-2:]) for part in seen} == {(min(side, size[0]), min(side, size[1]))}
    torch.testing.assert_close(windowed(seg, image, 40, 20), seg(image))

"""The affinity network: on any backbone cells of 8 pixels, its initial weights, and the distances of pairs."""

import math
from typing import Any

import pytest
import torch
from timm.models.vgg import VGG

from wsss import InputError
from wsss.networks.affinity import AffinityHead, AffinityNet, pair_affinity
from wsss.pairs import pair_offsets

SLIM: dict[str, Any] = {"width": 4, "frozen_stages": 0, "batch_norm_momentum": 0.1}


@pytest.mark.parametrize(
    ("backbone", "arguments"), [("resnet38", SLIM), ("resnet10t", None), ("convnext_atto", None), ("vgg11", None)]
)
@pytest.mark.parametrize("size", [(64, 64), (75, 100)])
def test_cells_of_eight_pixels(backbone: str, arguments: Any, size: tuple[int, int]) -> None:
    if backbone.startswith("vgg") and not hasattr(VGG, "forward_intermediates"):
        pytest.skip("this timm gives no intermediate features of VGG: the network refuses it in a sentence")
    network = AffinityNet(backbone, arguments=arguments).eval()
    with torch.no_grad():
        features = network(torch.randn(2, 3, *size))
    assert features.shape == (2, 448, *(-(-side // 8) for side in size))
    assert features.isfinite().all()


def test_initial_weights() -> None:
    torch.manual_seed(0)
    head = AffinityHead((512, 1024, 4096))
    for layer, channels in ((head.f8_3, 512), (head.f8_4, 1024), (head.f8_5, 4096)):
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / channels), rel=0.05)
    bound = 4 * math.sqrt(6 / (448 + 448))
    assert head.f9.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert head.f9.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_distances_of_pairs() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 5, 6, 11, dtype=torch.double, requires_grad=True)
    found = pair_affinity(features, 5)
    assert found.dtype == torch.float32
    assert found.shape == (2, 34, 6)
    for k, (dy, dx) in enumerate(pair_offsets(5)):
        for n in range(6):
            y, x = n // 3, 4 + n % 3
            distance = (features[:, :, y, x] - features[:, :, y + dy, x + dx]).abs().mean(1)
            torch.testing.assert_close(found[:, k, n], (-distance).exp().float())
    found.sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 8)])
def test_maps_without_pairs(size: tuple[int, int]) -> None:
    assert pair_affinity(torch.randn(2, 3, *size), 5).shape == (2, 34, 0)
    assert pair_affinity(torch.randn(2, 3, *size), 1).shape == (2, 0, size[0] * size[1])


def test_equal_features_are_one_class() -> None:
    features = torch.ones(1, 3, 5, 9, requires_grad=True)
    found = pair_affinity(features, 5)
    assert torch.equal(found, torch.ones(1, 34, 1))
    found.sum().backward()
    assert torch.equal(features.grad, torch.zeros_like(features))


@pytest.mark.parametrize(
    ("backbone", "said"),
    [("vit_tiny_patch16_224", "gives no maps of features"), ("nothing", "unknown backbone 'nothing'")],
)
def test_refusals(backbone: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        AffinityNet(backbone)


def test_a_network_that_shows_no_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.resnet import ResNet

    monkeypatch.delattr(ResNet, "forward_intermediates")
    with pytest.raises(InputError, match="backbone 'resnet10t' does not give the features of its stages"):
        AffinityNet("resnet10t")

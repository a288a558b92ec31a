"""IRN's network: on any backbone cells of 4 pixels; the backbone stays as it is; the mean of the displacements."""

from typing import Any

import pytest
import torch
from timm.models.vgg import VGG

from wsss import InputError
from wsss.networks.irn import IRNet

SLIM: dict[str, Any] = {"width": 4, "frozen_stages": 0, "batch_norm_momentum": 0.1}


@pytest.mark.parametrize(
    ("backbone", "arguments", "strides"),
    [
        ("resnet38", SLIM, [4, 8, 8, 8]),
        ("resnet10t", {"output_stride": 16}, [2, 4, 8, 16, 16]),
        ("convnext_atto", None, [4, 8, 16, 32]),
        ("vgg11", None, [2, 4, 8, 16, 32]),
    ],
)
def test_cells_of_four_pixels(backbone: str, arguments: Any, strides: list[int]) -> None:
    if backbone.startswith("vgg") and not hasattr(VGG, "forward_intermediates"):
        pytest.skip("this timm gives no intermediate features of VGG: the network refuses it in a sentence")
    network = IRNet(backbone, arguments=arguments).eval()
    assert network.strides == strides
    for size in ((64, 96), (75, 101)):
        stages, cells = network.stages(torch.randn(2, 3, *size))
        assert cells == tuple(-(-side // 4) for side in size)
        for branch, channels in ((network.edge, 1), (network.displacement, 2)):
            found = branch(stages, cells)
            assert found.shape == (2, channels, *cells)
            assert found.isfinite().all()


def test_sizes_of_the_paper() -> None:
    network = IRNet(arguments={"output_stride": 16})
    assert [layer[0].weight.shape[:2] for layer in network.edge.stages] == [  # type: ignore[index, union-attr]
        (32, channels) for channels in (64, 256, 512, 1024, 2048)
    ]
    assert [p.shape[:2] for p in network.displacement.parameters() if p.ndim == 4] == [
        (64, 64), (128, 256), (256, 512), (256, 1024), (256, 2048), (256, 768), (256, 448), (2, 256)
    ]  # fmt: skip
    assert all(p.requires_grad != name.startswith("backbone.") for name, p in network.named_parameters())


def test_the_backbone_stays_as_it_is() -> None:
    network = IRNet("resnet38", arguments=SLIM).train()
    before = {name: tensor.clone() for name, tensor in network.backbone.state_dict().items()}
    stages, size = network.stages(torch.randn(2, 3, 64, 64))
    (network.edge(stages, size).sum() + network.displacement(stages, size).sum()).backward()
    assert all(p.grad is None for p in network.backbone.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.backbone.state_dict().items())


def test_the_mean_displacement_is_subtracted() -> None:
    torch.manual_seed(0)
    network = IRNet("resnet38", arguments=SLIM)
    stages, size = network.stages(torch.randn(2, 3, 64, 64))
    for _ in range(400):
        found = network.displacement(stages, size)
    torch.testing.assert_close(network.displacement.mean, found.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-6)
    network.eval()
    mean = network.displacement.mean.clone()
    torch.testing.assert_close(network.displacement(stages, size), found - mean[:, None, None])
    assert torch.equal(network.displacement.mean, mean)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="gives no maps of features"):
        IRNet("vit_tiny_patch16_224")
    monkeypatch.setattr("wsss.networks.irn.EDGE_CELL", 2)
    with pytest.raises(InputError, match=r"strides \[4, 8, 8, 8\]: the boundary network needs finer and coarser ones"):
        IRNet("resnet38", arguments=SLIM)

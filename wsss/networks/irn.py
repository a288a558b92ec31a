"""IRN's network: class boundaries and displacements to the centres of objects, for cells of 4 x 4 pixels.

Ahn, Cho and Kwak, "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR 2019,
arXiv 1904.05044, as its code has it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import resize
from wsss.networks.cnn import CNN
from wsss.pairs import EDGE_CELL, cells_of


def normed(channels: int, out: int, groups: int) -> nn.Sequential:
    """1x1 convolution without bias, then group norm."""
    return nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), nn.GroupNorm(groups, out))


def at(x: Tensor, size: Sequence[int]) -> Tensor:
    """ReLU of maps at a size (bilinear)."""
    return F.relu(x if x.shape[-2:] == tuple(size) else resize(x, size))


class EdgeBranch(nn.Module):
    """All stages -> one logit of a class boundary for each cell.

    Args:
        channels: of the stages.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(normed(c, 32, 4) for c in channels)
        self.last = nn.Conv2d(32 * len(channels), 1, 1)

    def forward(self, stages: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) -> (B, 1, *size)."""
        features = [at(layer(stage), size) for layer, stage in zip(self.stages, stages, strict=True)]
        logits: Tensor = self.last(torch.cat(features, dim=1))
        return logits


class DisplacementBranch(nn.Module):
    """All stages -> a vector (dy, dx) in cells for each cell, less its mean over the images of the training.

    Pairs of cells, which it learns from, leave open a vector that is added to all. In training nothing is subtracted,
    and `mean` follows the mean of the batches of about the last twenty steps; the released code measures it once, over
    the training images, when the training is over.

    Args:
        fine: channels of one or two stages with cells of `EDGE_CELL` pixels.
        deep: channels of the deeper ones.
    """

    mean: Tensor

    def __init__(self, fine: Sequence[int], deep: Sequence[int]) -> None:
        super().__init__()
        widths = (64, 128)[-len(fine) :]
        self.fine = nn.ModuleList(normed(c, width, width // 8) for c, width in zip(fine, widths, strict=True))
        self.deep = nn.ModuleList(normed(c, 256, 16) for c in deep)
        self.joined = normed(256 * len(deep), 256, 16)
        self.last = nn.Sequential(normed(sum(widths) + 256, 256, 16), nn.ReLU(), nn.Conv2d(256, 2, 1, bias=False))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, stages: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) -> (B, 2, *size)."""
        fine, deep = stages[: len(self.fine)], stages[len(self.fine) :]
        within = deep[0].shape[-2:]
        features = [at(layer(stage), size) for layer, stage in zip(self.fine, fine, strict=True)]
        coarse = [at(layer(stage), within) for layer, stage in zip(self.deep, deep, strict=True)]
        features.append(at(self.joined(torch.cat(coarse, dim=1)), size))
        found: Tensor = self.last(torch.cat(features, dim=1))
        if not self.training:
            return found - self.mean[:, None, None]
        mean = found.detach().mean(dim=(0, 2, 3)).to(self.mean)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)  # else only the first device's images would count
            mean /= torch.distributed.get_world_size()
        self.mean.lerp_(mean, 0.05)
        return found


class IRNet(nn.Module):
    """`EdgeBranch` and `DisplacementBranch` on the frozen stages of ResNet38 or of a timm CNN.

    Of ResNet50 these are, as in the paper, the first convolution after its pooling and the four blocks; its code has a
    last block without a stride and without dilation, timm's of `output_stride=16` dilates. Stages finer than cells of
    `EDGE_CELL` pixels are brought to them by max pooling, and only the last two of those that fine take part.

    Args:
        backbone: `resnet38` or a timm name.
        weights: of the backbone, see `wsss.networks.cnn.CNN`.
        arguments: of `ResNet38` or of timm's constructor.

    Raises:
        InputError: as `CNN`, and for a network without fine or without deep stages.
    """

    def __init__(
        self, backbone: str = "resnet50", weights: str | None = None, arguments: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.backbone = CNN(backbone, weights, arguments).requires_grad_(False)
        described = self.backbone.describe_stages()
        strides = [stride for _, stride in described]
        fine = sum(stride <= EDGE_CELL for stride in strides)
        if fine in (0, len(described)):
            raise InputError(
                f"backbone {backbone!r} has stages of strides {strides}: the boundary network needs finer and coarser "
                f"ones than {EDGE_CELL} pixels, e.g. those of resnet50, resnet38 or convnext_tiny"
            )
        self.first = max(0, fine - 2)
        channels, self.strides = [c for c, _ in described[self.first :]], strides[self.first :]
        self.edge = EdgeBranch(channels)
        self.displacement = DisplacementBranch(channels[: fine - self.first], channels[fine - self.first :])
        self.train()

    def train(self, mode: bool = True) -> "IRNet":
        """The backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def stages(self, image: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        """Features of (B, 3, H, W) normalised, what the branches take, and the size (h, w) of the map of cells."""
        stages = list(self.backbone.stages(image))[self.first :]
        for index, stride in enumerate(self.strides):
            while stride < EDGE_CELL:
                stages[index], stride = F.max_pool2d(stages[index], 3, stride=2, padding=1), 2 * stride
        return stages, cells_of(image.shape[-2:], EDGE_CELL)

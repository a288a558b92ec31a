"""PSA's affinity network: features of cells of 8 x 8 pixels that are near each other within a class, and only there.

Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision", CVPR 2018, arXiv 1803.10464, as its
PyTorch code has it; the paper's own network was another one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import resize
from wsss.networks.cnn import CNN
from wsss.pairs import CELL, pair_views


class AffinityHead(nn.Module):
    """Three stages of features -> 448 channels in which a distance of 0 means one class.

    Args:
        channels: of the three, the last one being the deepest.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        first, second, third = channels
        self.f8_3 = nn.Conv2d(first, 64, 1, bias=False)
        self.f8_4 = nn.Conv2d(second, 128, 1, bias=False)
        self.f8_5 = nn.Conv2d(third, 256, 1, bias=False)
        self.f9 = nn.Conv2d(448, 448, 1, bias=False)
        for layer in (self.f8_3, self.f8_4, self.f8_5):
            nn.init.kaiming_normal_(layer.weight)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)

    def forward(self, stages: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) -> (B, 448, *size); what has another size is resized (bilinear)."""
        layers = (self.f8_3, self.f8_4, self.f8_5)
        features = [F.elu(layer(stage)) for layer, stage in zip(layers, stages, strict=True)]
        same = [x if x.shape[-2:] == tuple(size) else resize(x, size) for x in features]
        return F.elu(self.f9(torch.cat(same, dim=1)))


class AffinityNet(nn.Module):
    """`AffinityHead` on conv4, conv5 and conv6 of ResNet38, or on the last three stages of a timm CNN.

    (B, 3, H, W) normalised -> features (B, 448, h, w), h x w being ceil(H / 8) x ceil(W / 8) with any network.

    Args:
        backbone: `resnet38` or a timm name.
        weights: of the backbone, see `wsss.networks.cnn.CNN`.
        arguments: of `ResNet38` or of timm's constructor.

    Raises:
        InputError: as `CNN`, and for a network without three stages.
    """

    def __init__(
        self, backbone: str = "resnet38", weights: str | None = None, arguments: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.backbone = CNN(backbone, weights, arguments)
        stages = self.backbone.describe_stages(3)
        if len(stages) < 3:
            raise InputError(f"backbone {backbone!r} has {len(stages)} stages: the affinity network reads three")
        self.head = AffinityHead([channels for channels, _ in stages])

    def stages(self, image: Tensor) -> Sequence[Tensor]:
        """Three maps of features, the last one the deepest."""
        return self.backbone.stages(image, 3)

    def forward(self, image: Tensor) -> Tensor:
        size = [-(-side // CELL) for side in image.shape[-2:]]
        features: Tensor = self.head(self.stages(image), size)
        return features


def pair_affinity(features: Tensor, radius: int) -> Tensor:
    """exp(-mean over the channels of |f_i - f_j|) of all pairs: (B, D, h, w) -> (B, K, n) in (0, 1], float32.

    Pairs are those of `wsss.pairs.pair_views`.
    """
    with torch.autocast(features.device.type, enabled=False):
        start, ends = pair_views(features.float(), radius)
        if not ends:
            return features.new_zeros((len(features), 0, start[0, 0].numel()), dtype=torch.float32)
        # one direction at a time: the differences of all of them would be K times the features
        distance = [torch.linalg.vector_norm(start - end, ord=1, dim=1) for end in ends]  # K of (B, rows, columns)
        return (-torch.stack(distance, dim=1).flatten(2) / features.shape[1]).exp()

"""Heads on patch and class tokens."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class LargeFOV(nn.Module):
    """DeepLab's large field-of-view head: two dilated 3x3 convolutions and a 1x1 classifier, none with a bias.

    (B, in_channels, h, w) -> (B, out_channels, h, w); the stride is the input's.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: int = 512, dilation: int = 5) -> None:
        super().__init__()
        self.conv6 = nn.Conv2d(in_channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv7 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv8 = nn.Conv2d(channels, out_channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        features = F.relu(self.conv6(features))
        features = F.relu(self.conv7(features))
        return self.conv8(features)


class Projector(nn.Module):
    """DINO's projection head: a three-layer MLP, L2 normalisation, a weight-normalised linear layer.

    (..., in_features) -> (..., out_features), not normalised. The gains of the last layer are 1 and frozen.
    """

    def __init__(self, in_features: int, hidden: int = 2048, bottleneck: int = 256, out: int = 1024) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_features, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02, a=-2.0, b=2.0)
                nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck, out, bias=False))
        gain = self.last_layer.parametrizations.weight.original0
        nn.init.ones_(gain)
        gain.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(tokens), dim=-1, eps=1e-12))

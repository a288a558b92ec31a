"""Heads on patch and class tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
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


class MaskTransformer(nn.Module):
    """Segmenter's decoder (Strudel et al., ICCV 2021, arXiv 2105.05633): class embeddings that look at the patches.

    Patch tokens and one learnt token for each id go through transformer blocks; the mask of an id is the cosine of its
    token with every patch, both projected, normalised over the ids.

    Args:
        in_channels: D, of a token.
        num_ids: 1 + C.
        heads: attention heads, which divide D.
        depth: blocks.
    """

    def __init__(self, in_channels: int, num_ids: int, heads: int, depth: int = 2) -> None:
        super().__init__()
        self.proj_dec = nn.Linear(in_channels, in_channels)
        self.cls_emb = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_ids, in_channels), std=0.02))
        self.blocks = nn.ModuleList(
            [Block(in_channels, heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(depth)]
        )
        self.proj_patch = nn.Parameter(in_channels**-0.5 * torch.randn(in_channels, in_channels))
        self.proj_classes = nn.Parameter(in_channels**-0.5 * torch.randn(in_channels, in_channels))
        self.decoder_norm = nn.LayerNorm(in_channels)
        self.mask_norm = nn.LayerNorm(num_ids)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, num_ids, h, w)."""
        size: Sequence[int] = patches.shape[-2:]
        tokens = self.proj_dec(patches.flatten(2).mT)
        tokens = torch.cat([tokens, self.cls_emb.expand(len(tokens), -1, -1)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.decoder_norm(tokens)
        count = self.cls_emb.shape[1]
        patch = F.normalize(tokens[:, :-count] @ self.proj_patch, dim=-1)
        ids = F.normalize(tokens[:, -count:] @ self.proj_classes, dim=-1)
        return self.mask_norm(patch @ ids.mT).mT.unflatten(2, size)

"""What WeCLIP learns on frozen towers: heads that fuse their tokens, a decoder; DINO's tower."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import resize
from wsss.networks.clip import Frozen, Seen
from wsss.networks.vit import create_timm


class Fusion(nn.Module):
    """Patch tokens of L layers, each through two linear layers of its own, then one 1x1 convolution of all.

    Args:
        width: of the tokens.
        layers: L.
        channels: of the fused map.
        dropout: probability that a channel of it is dropped.
    """

    def __init__(self, width: int, layers: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(width, channels), nn.ReLU(), nn.Linear(channels, channels)) for _ in range(layers)
        )
        self.fuse = nn.Conv2d(layers * channels, channels, 1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """(L, B, N, D) -> (B, channels, h, w)."""
        maps = [head(layer).mT.unflatten(2, size) for head, layer in zip(self.heads, tokens, strict=True)]
        fused: Tensor = self.dropout(self.fuse(torch.cat(maps, dim=1)))
        return fused


class Decoder(nn.Module):
    """Pre-norm transformer blocks without positions, then a 1x1 convolution to scores.

    Args:
        channels: of the fused map.
        depth: number of blocks.
        heads: of their attention.
        outputs: 1 + C.
    """

    def __init__(self, channels: int, depth: int, heads: int, outputs: int) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise InputError(f"channels is {channels}: expected a multiple of decoder_heads={heads}, at least 1")
        kinds: Any = {"act_layer": QuickGELU, "norm_layer": nn.LayerNorm}
        blocks = (Block(channels, heads, qkv_bias=True, **kinds) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Conv2d(channels, outputs, 1)

    def forward(self, fused: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, 1 + C, h, w)."""
        tokens = self.blocks(fused.flatten(2).mT)
        scores: Tensor = self.classifier(tokens.mT.unflatten(2, fused.shape[-2:]))
        return scores


class DINOTower(Frozen):
    """The patch tokens of DINOv2, say, or another vision transformer of timm, behind its last norm.

    Args:
        name: timm name, `vit_small_patch14_dinov2`.
        weights: a timm tag (`lvd142m`) or a file; None freezes random ones of a fixed seed, which is for tests.
        arguments: of timm's constructor.

    Raises:
        InputError: see `create_timm`; no vision transformer.
    """

    def __init__(self, name: str, weights: str | None, arguments: Mapping[str, Any] | None) -> None:
        given = {key: value for key, value in (arguments or {}).items() if value is not None}
        if not timm.is_model(name) or not timm.model_entrypoint(name).__module__.endswith("vision_transformer"):
            raise InputError(f"dino {name!r} is no vision transformer of timm: give vit_small_patch14_dinov2, say")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network, loaded = create_timm(name, weights, {**given, "dynamic_img_size": True})
        assert isinstance(network, VisionTransformer)
        super().__init__(network, "method.dino_weights")
        self.loaded = loaded
        self.patch: int = network.patch_embed.patch_size[0]
        self.width: int = network.embed_dim

    @torch.no_grad()
    def forward(self, image: Tensor) -> Seen:
        """image: (B, 3, H, W) normalised, resized to whole patches; the only `blocks` are the patches (1, B, N, D)."""
        h, w = (max(1, side // self.patch) for side in image.shape[-2:])
        tokens = self.network.forward_features(resize(image, (h * self.patch, w * self.patch)))
        patches = tokens[:, self.network.num_prefix_tokens :]
        return Seen(patches[None], patches.new_zeros(1, image.shape[0], 0, 0), (h, w))

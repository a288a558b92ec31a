"""The multi-class token transformer of MCTformer: one class token per class, attention maps on request."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from wsss import InputError
from wsss.networks.vit import create_vit, resize_grid
from wsss.networks.weights import is_file, read_state_dict, without_prefixes


class JointPosition(nn.Module):
    """One table for class tokens and patches, resized as MCTformer V1 and V2 do.

    Square images with the table's number of patches take it as it is. For all others the patch part is resized
    (bicubic) by the factors (h + 0.1) / g and (w + 0.1) / g, which also map the coordinates.

    Args:
        class_part: (1, C, D).
        grid: (1, D, g, g) patch part.
    """

    def __init__(self, class_part: Tensor, grid: Tensor) -> None:
        super().__init__()
        self.num_classes = class_part.shape[1]
        self.pos_embed = nn.Parameter(torch.cat([class_part, grid.flatten(2).mT], dim=1))

    def forward(self, size: tuple[int, int], pixels: tuple[int, int]) -> Tensor:
        """(1, C + h*w, D) for a grid of `size` (h, w) and images of so many `pixels` (H, W)."""
        class_part, patches = self.pos_embed.split(
            [self.num_classes, self.pos_embed.shape[1] - self.num_classes], dim=1
        )
        if torch.onnx.is_in_onnx_export():  # of any size: no branch, and no factors that are constants of the graph
            return torch.cat([class_part, self._resized(_to_grid(patches), size, pixels).flatten(2).mT], dim=1)
        if pixels[0] == pixels[1] and size[0] * size[1] == patches.shape[1]:
            return self.pos_embed
        grid = _to_grid(patches)
        factors = [(side + 0.1) / grid.shape[-1] for side in size]
        return torch.cat([class_part, resize_grid(grid, size, factors).flatten(2).mT], dim=1)

    @staticmethod
    def _resized(grid: Tensor, size: tuple[int, int], pixels: tuple[int, int]) -> Tensor:
        """What `forward` makes of the grid (1, D, g, g), in operations on tensors alone."""
        g = grid.shape[-1]
        unlike = (pixels[0] - pixels[1]) ** 2 + (size[0] - g) ** 2  # 0 where the table is taken as it is
        surplus = 0.1 * torch.full((), unlike, dtype=torch.float32).clamp(max=1)
        return resize_grid(grid, size, [(side + surplus) / g for side in size])

    @staticmethod
    def from_pretrained(grid: Tensor, side: int) -> Tensor:
        """(1, D, side, side) from the grid (1, D, k, k) of ImageNet weights."""
        return F.interpolate(grid, size=(side, side), mode="bicubic")


class SplitPosition(nn.Module):
    """Separate tables for class tokens and patches, as in MCTformer+; the patch table is resized to (h, w).

    The released code resizes by factors, which comes out one row short for some sizes (61, 115, ...) and then
    fails; the values are the same.
    """

    def __init__(self, class_part: Tensor, grid: Tensor) -> None:
        super().__init__()
        self.pos_embed_cls = nn.Parameter(class_part)
        self.pos_embed_pat = nn.Parameter(grid.flatten(2).mT)

    def forward(self, size: tuple[int, int], pixels: tuple[int, int]) -> Tensor:
        """(1, C + h*w, D); see `JointPosition.forward`."""
        patches: Tensor = self.pos_embed_pat
        if not (pixels[0] == pixels[1] and size[0] * size[1] == patches.shape[1]):
            patches = resize_grid(_to_grid(patches), size).flatten(2).mT
        return torch.cat([self.pos_embed_cls, patches], dim=1)

    @staticmethod
    def from_pretrained(grid: Tensor, side: int) -> Tensor:
        """(1, D, side, side): every cell of the ImageNet grid repeated, 2x2 for 448 pixels and patches of 16."""
        return F.interpolate(grid, size=(side, side), mode="nearest")


POSITIONS: dict[str, type[JointPosition | SplitPosition]] = {"joint": JointPosition, "split": SplitPosition}


def _to_grid(patches: Tensor) -> Tensor:
    """(1, g*g, D) -> (1, D, g, g)."""
    side = int(patches.shape[1] ** 0.5)
    return patches.mT.unflatten(2, (side, side))


class MCTTokens(NamedTuple):
    """Outputs for a batch of images, h x w being the grid of patches; nothing passes the final norm."""

    class_tokens: list[Tensor]  # L of (B, C, D), after every block
    patches: Tensor  # (B, D, h, w) after the last block
    attention: Tensor | None  # (B, C, h, w) of class tokens to patches, mean over heads and the last blocks
    affinity: Tensor | None  # (B, h*w, h*w) of patches (rows) to patches, mean over heads, sum over all blocks


class AdaptiveAttentionFusion(nn.Module):
    """Weights for the attention maps of all heads and blocks, made of what each head contributes (WeakTr's AAF).

    Zhu et al., "WeakTr", arXiv 2304.01184. The output of a block's attention, after its projection, is taken apart into
    one feature of every token and head; channel c belongs to head c mod H, the released code's interleaved view, though
    the heads of the attention lie one behind the other. Pooled over the tokens, two linear layers make one number of
    it, and a bottleneck of all these numbers the weights, between 0 and 1. Map m is that of head m // L, block m mod L.

    Args:
        depth: L, blocks.
        heads: H.
        width: of a token, which H divides.
        reduction: the bottleneck has int(L*H / reduction) features.
        feature_reduction: the linear layers have int(width / H / feature_reduction) between them.
        pool: `max` or `avg` over class tokens and patches.

    Raises:
        InputError: no such pooling, or a reduction that leaves no feature.
    """

    def __init__(
        self,
        depth: int,
        heads: int,
        width: int,
        reduction: int = 8,
        feature_reduction: int = 8,
        pool: str = "max",
    ) -> None:
        super().__init__()
        if pool not in ("max", "avg"):
            raise InputError(f"fusion.pool is {pool!r}: expected max or avg")
        self.heads, self.pool = heads, pool
        maps, channels = depth * heads, width // heads
        for name, value, most in (("reduction", reduction, maps), ("feature_reduction", feature_reduction, channels)):
            if not isinstance(value, int | float) or not 1 <= value <= most:
                raise InputError(f"fusion.{name} is {value}: expected 1 to {most}, as many as there are to reduce")
        between = int(channels / feature_reduction)
        self.feature = nn.Sequential(nn.Linear(channels, between), nn.Linear(between, 1))
        bottleneck = int(maps / reduction)
        self.gate = nn.Sequential(
            nn.Linear(maps, bottleneck, bias=False), nn.ReLU(), nn.Linear(bottleneck, maps, bias=False), nn.Sigmoid()
        )

    def forward(self, outputs: Tensor) -> Tensor:
        """(L, B, N, D) outputs of the attention of all blocks -> (B, H, L) weights."""
        features = outputs.unflatten(-1, (-1, self.heads)).permute(1, 4, 0, 2, 3)  # (B, H, L, N, D/H)
        pooled = features.amax(3) if self.pool == "max" else features.mean(3)
        size = pooled.shape[1:3]
        return self.gate(self.feature(pooled).flatten(1)).unflatten(1, size)


class MCTEncoder(nn.Module):
    """A timm vision transformer with C class tokens (Xu et al., CVPR 2022, arXiv 2203.02891).

    Images may have any size of at least one patch; a remainder at the bottom and right is dropped.

    Args:
        num_classes: C.
        backbone: timm name of a plain vision transformer with one class token.
        weights: None for random weights, a timm tag, or a `.pth` or `.safetensors` file of that backbone. Its class
            token, with its position, is repeated for every class.
        arguments: what timm's constructor takes; `img_size` is the side of the square images that the position
            table is made for (the backbone's own when None).
        position: `joint` (V1, V2) or `split` (+).
        fusion: arguments of `AdaptiveAttentionFusion`, which then makes one map of those of all blocks and learns from
            it alone: the attention maps are constants for its gradient. None gives those of all blocks.

    Raises:
        InputError: unknown backbone, argument, tag or position; a file that does not fit.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "deit_small_patch16_224",
        weights: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        position: str = "joint",
        fusion: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if position not in POSITIONS:
            raise InputError(f"position is {position!r}: expected one of {', '.join(POSITIONS)}")
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        # at the weights' own size, so that the table is resized by MCTformer's rule and not by timm's
        size = given.pop("img_size", None)
        own_size = {"img_size": _trained_size(weights)} if weights is not None and is_file(weights) else {}
        vit, self.loaded = create_vit(backbone, weights, given | own_size)
        assert vit.cls_token is not None  # create_vit has seen to it
        assert vit.pos_embed is not None
        self.embed_dim: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.patch_embed, self.blocks = vit.patch_embed, vit.blocks
        if odd := [type(b).__name__ for b in vit.blocks if type(b) is not Block or type(b.attn) is not Attention]:
            raise InputError(f"backbone {backbone!r} has blocks of its own ({odd[0]}): choose one with plain ones")
        self.num_prefix_tokens = num_classes  # timm's word for those before the patches
        if unknown := (fusion or {}).keys() - {"reduction", "feature_reduction", "pool"}:
            raise InputError(f"fusion.{min(unknown)} does not exist: known are reduction, feature_reduction, pool")
        first: Any = vit.blocks[0]
        sizes = (len(self.blocks), first.attn.num_heads, self.embed_dim)
        self.fusion = AdaptiveAttentionFusion(*sizes, **fusion) if fusion is not None else None
        side = size // self.patch_size if size is not None else vit.patch_embed.grid_size[0]
        if side < 1:
            raise InputError(f"img_size is {size}: expected at least one patch of {self.patch_size} pixels")
        table = POSITIONS[position]
        if weights is None:
            class_token, class_part, grid = (
                nn.init.trunc_normal_(torch.empty(1, *shape), std=0.02)
                for shape in (
                    (num_classes, self.embed_dim),
                    (num_classes, self.embed_dim),
                    (self.embed_dim, side, side),
                )
            )
            self.patch_embed.proj.reset_parameters()
        else:
            class_token = vit.cls_token.detach().repeat(1, num_classes, 1)
            class_part = vit.pos_embed.detach()[:, :1].repeat(1, num_classes, 1)
            grid = table.from_pretrained(_to_grid(vit.pos_embed.detach()[:, 1:]), side)
        self.cls_token = nn.Parameter(class_token)
        self.position = table(class_part, grid)

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens after the position embedding, (B, C + h*w, D) with the class tokens first, and (h, w)."""
        height, width = image.shape[-2:]
        if min(height, width) < self.patch_size:
            raise InputError(f"an image of {width}x{height} pixels is smaller than one patch of {self.patch_size}")
        patches = self.patch_embed.proj(image)  # (B, D, h, w)
        size = (patches.shape[-2], patches.shape[-1])
        tokens = torch.cat([self.cls_token.expand(image.shape[0], -1, -1), patches.flatten(2).mT], dim=1)
        return tokens + self.position(size, (height, width)), size

    def forward(self, image: Tensor, attention_layers: int = 0, affinity: bool = False) -> MCTTokens:
        """image: (B, 3, H, W) normalised; the attention of so many last blocks and the affinity are given if asked for.

        They cost time, the affinity also memory: three maps of all tokens to all, whatever the number of blocks.
        """
        tokens, size = self.embed(image)
        classes, patches = self.cls_token.shape[1], size[0] * size[1]
        if self.fusion is not None and (attention_layers or affinity):
            class_tokens, tokens, fused = self.fuse(tokens, self.fusion)
            attention, related = fused[:, :classes, classes:], fused[:, classes:, classes:] if affinity else None
            grid = tokens[:, classes:].mT.unflatten(2, size)
            return MCTTokens(class_tokens, grid, attention.unflatten(2, size), related)
        class_tokens = []
        # in an export the length of a tensor, unlike its shape, would be a constant
        attention = tokens.new_zeros(tokens.shape[0], classes, patches)
        related = tokens.new_zeros(tokens.shape[0], patches, patches) if affinity else None
        for left, block in zip(range(len(self.blocks), 0, -1), self.blocks, strict=True):
            last = left <= attention_layers
            if related is None and not last:
                tokens = block(tokens)
            else:
                tokens, weights = attend(block, tokens, classes if related is None else None)
                if last:
                    attention += weights[:, :classes, classes:] / attention_layers
                if related is not None:
                    related += weights[:, classes:, classes:]
            class_tokens.append(tokens[:, :classes])
        grid = tokens[:, classes:].mT.unflatten(2, size)
        return MCTTokens(class_tokens, grid, attention.unflatten(2, size) if attention_layers else None, related)

    def fuse(self, tokens: Tensor, fusion: AdaptiveAttentionFusion) -> tuple[list[Tensor], Tensor, Tensor]:
        """Class tokens after every block, all tokens (B, N, D) after the last, the fused attention (B, N, N).

        Its gradient reaches the weights of the fusion alone. The maps are made one by one, when all weights are known.
        """
        class_tokens, outputs, attended = [], [], []
        for block in self.blocks:
            tokens, output, heads = attend_apart(block, tokens)
            class_tokens.append(tokens[:, : self.cls_token.shape[1]])
            outputs.append(output.detach())
            attended.append(heads)
        weights = fusion(torch.stack(outputs))  # (B, H, L)
        fused = tokens.new_zeros(())
        for layer, heads in enumerate(attended):
            for head, found in enumerate(heads):
                fused = fused + weights[:, head, layer, None, None] * found.detach()
        return class_tokens, tokens, fused / weights[0].numel()


def _trained_size(path: str) -> int:
    """Side in pixels of the images that the position table of a file of ImageNet weights is made for."""
    content = read_state_dict(path)
    state = next((state for state in without_prefixes(content) if "pos_embed" in state), content)
    table, filters = state.get("pos_embed"), state.get("patch_embed.proj.weight")
    if table is None or filters is None or table.ndim != 3 or filters.ndim != 4:
        raise InputError(
            f"weights file {path} is no vision transformer: expected pos_embed and patch_embed.proj.weight"
        )
    if (tokens := state["cls_token"].shape[1] if "cls_token" in state else 0) != 1:
        raise InputError(
            f"weights file {path} has {tokens} class tokens, expected one: it is no ImageNet model but perhaps a "
            "trained MCTformer, which goes to wsss-eval or wsss-predict as checkpoint=FILE"
        )
    return math.isqrt(table.shape[1] - 1) * filters.shape[-1]


def attend(block: nn.Module, tokens: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """What a timm block does to tokens (B, N, D), and the attention (B, rows, N), mean over its heads.

    `rows` is the number of first tokens whose attention is given; None: that of all. On a processor one head is held at
    a time, since those of all heads at once are the most memory that anything takes and leave the cache.
    """
    part: Any = block
    layer = part.attn
    queries, keys, values = layer.qkv(part.norm1(tokens)).unflatten(2, (3, layer.num_heads, -1)).permute(2, 3, 0, 1, 4)
    queries, keys = layer.q_norm(queries), layer.k_norm(keys)  # (heads, B, N, D / heads)
    drop = layer.attn_drop
    mean = tokens.new_zeros(*tokens.shape[:1], rows or tokens.shape[1], tokens.shape[1])
    heads: list[Tensor] = []
    at_once = layer.num_heads if tokens.is_cuda else 1
    for q, k, v in zip(*(part.split(at_once) for part in (queries, keys, values)), strict=True):
        weights = ((q[..., :rows, :] * layer.scale) @ k.mT).softmax(-1)
        mean.add_(weights.sum(0), alpha=1 / layer.num_heads)
        if rows is None:
            heads.extend(drop(weights) @ v)
    if rows is None:
        mixed = torch.stack(heads, 2)  # (B, N, heads, D / heads)
    else:
        mixed = F.scaled_dot_product_attention(queries, keys, values, dropout_p=drop.p if drop.training else 0.0)
        mixed = mixed.permute(1, 2, 0, 3)
    tokens = tokens + part.drop_path1(part.ls1(layer.proj_drop(layer.proj(layer.norm(mixed.flatten(2))))))
    return tokens + part.drop_path2(part.ls2(part.mlp(part.norm2(tokens)))), mean


def attend_apart(block: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor, Iterator[Tensor]]:
    """What a timm block does to tokens, what its attention adds to them, and the attention of each head.

    The first two are (B, N, D), the latter of them after the projection and before anything scales or drops it; the
    attention is (B, N, N), after the softmax. The maps are made when they are asked for.
    """
    layer: Any = block.attn
    seen: list[Tensor] = []
    watched = (layer.q_norm, layer.k_norm, layer)
    hooks = [module.register_forward_hook(lambda _, inputs, output: seen.append(output)) for module in watched]
    try:
        tokens = block(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    queries, keys = (maps.unbind(1) for maps in seen[:2])
    return tokens, seen[2], (((q * layer.scale) @ k.mT).softmax(-1) for q, k in zip(queries, keys, strict=True))


def global_average_pool(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C)."""
    return maps.mean(dim=(-2, -1))


def global_weighted_rank_pool(maps: Tensor, decay: float = 0.996) -> Tensor:
    """(B, C, h, w) -> (B, C): the values of a map from the largest on, weighted by decay^rank.

    Kolesnikov and Lampert, ECCV 2016; 1 is average pooling, 0 takes the maximum.
    """
    values = maps.flatten(2).sort(dim=-1, descending=True).values
    weights = decay ** torch.arange(values.shape[-1], device=maps.device, dtype=maps.dtype)
    return values @ weights / weights.sum()

"""MCTformer: multi-class token transformer (Xu et al., CVPR 2022, arXiv 2203.02891; TPAMI 2024, arXiv 2308.03005).

WeakTr (Zhu et al., arXiv 2304.01184) is MCTformer with attention maps that are weighted for each image.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import min_max
from wsss.methods.base import OfficialCheckpoint, WSSSModule
from wsss.networks.mct import MCTEncoder, MCTTokens, global_average_pool, global_weighted_rank_pool
from wsss.networks.weights import VIT_LAYOUT, compare_layout, vit_arguments
from wsss.optim import adamw, stepwise, warmup_cosine

POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {"gap": global_average_pool, "gwrp": global_weighted_rank_pool}

MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "attention": lambda attention, patch_cam: attention,
    "patchcam": lambda attention, patch_cam: patch_cam,
    "fused": lambda attention, patch_cam: attention * patch_cam,
    "root_fused": lambda attention, patch_cam: (attention * patch_cam).sqrt(),
}
"""Localisation maps from class attention and patch CAM, both (B, C, h, w) and not negative."""

PAPER_LR_TIMES_WIDTH = 6.25e-5 * 384
"""Of the paper's DeiT-S."""


class MCTformer(WSSSModule):
    """Class tokens, one per class, whose attention to the patches localises the classes.

    The three published versions and WeakTr are four sets of arguments; the defaults are V2:

    | | V1 | V2 | + | WeakTr |
    |---|---|---|---|---|
    | `patch_pooling` | None | gap | gwrp | gap |
    | `map_type` | attention | fused | root_fused | fused |
    | `attention_layers` | 3 | 3 | 12 | (all) |
    | `fusion` | None | None | None | reduction 8, 8, max |
    | `position` | joint | joint | split | joint |
    | `classify_by` | class_tokens | class_tokens | both | class_tokens |
    | `losses` | cls | cls, patch_cls | cls, patch_cls, cct | cls, patch_cls, fine_cls |
    | `cam_scales` | 1 | 1 | 1, 0.75, 1.25 | 1, 1.2 |

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone: timm name of a plain vision transformer.
        weights: None, a timm tag, or a `.pth` or `.safetensors` file of the backbone.
        backbone_args: arguments of timm's constructor, e.g. `depth`, `drop_path_rate`; `img_size` is the side of
            the training crops.
        position: `joint`, one position table for class tokens and patches, or `split`, one for each.
        patch_pooling: how the patch CAM becomes logits, `gap` (mean) or `gwrp` (weighted by rank); None: there is
            no patch CAM.
        map_type: `attention`, `patchcam`, their product (`fused`) or its square root (`root_fused`).
        attention_layers: number of last blocks whose attention is averaged; of no effect with a `fusion`.
        fusion: `reduction`, `feature_reduction` and `pool` of `AdaptiveAttentionFusion` (WeakTr), whose weighted mean
            of the attention of all heads and blocks takes the place of both sums; it learns from `fine_cls` alone.
        refine: spread the maps with the attention between patches, summed over all blocks.
        classify_by: whose logits tell the classes, `class_tokens`, or the mean of `both` heads.
        cam_scales: scales of the multi-scale maps; 1 always takes part.
        background_threshold: up to this value a CAM means background in the evaluation.
        losses: weight and arguments of cls, patch_cls, cct and, with a `fusion`, fine_cls, on the means of the
            finished maps; null leaves a term out.
        lr: peak of the cosine schedule, which starts before the warm-up ends and is never quite reached.
        min_lr: its end.
        warmup_lr: rate of the first epoch.
        warmup_epochs: epochs of linear warm-up.
        epochs: into how many equal parts the steps are divided; the rate changes between them.
        weight_decay: of matrices and convolutions; biases, norms, class tokens and a joint table have none.
    """

    photographic_scales = True
    fuse = staticmethod(torch.add)
    normalise = staticmethod(partial(min_max, eps=1e-8))

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "deit_small_patch16_224",
        weights: str | None = None,
        backbone_args: Mapping[str, Any] | None = None,
        position: str = "joint",
        patch_pooling: str | None = "gap",
        map_type: str = "fused",
        attention_layers: int = 3,
        fusion: Mapping[str, Any] | None = None,
        refine: bool = True,
        classify_by: str = "class_tokens",
        cam_scales: Sequence[float] = (1.0,),
        background_threshold: float = 0.39,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        lr: float = 6.25e-5,
        min_lr: float = 1e-5,
        warmup_lr: float = 1e-6,
        warmup_epochs: int = 5,
        epochs: int = 60,
        weight_decay: float = 0.05,
    ) -> None:
        if losses is None:
            losses = {"cls": {"weight": 1.0}, "patch_cls": {"weight": 1.0}}
        computed = ["cls", "cct"] if patch_pooling is None else ["cls", "patch_cls", "cct"]
        if fusion is not None:
            computed.append("fine_cls")
        super().__init__(num_classes, classes, background_threshold, cam_scales, losses, computed)
        self.save_hyperparameters()
        for name, value, known in (
            ("map_type", map_type, tuple(MAPS) if patch_pooling is not None else ("attention",)),
            ("patch_pooling", patch_pooling, (None, *POOLINGS)),
            ("classify_by", classify_by, ("class_tokens", "both") if patch_pooling is not None else ("class_tokens",)),
        ):
            if value not in known:
                without = " without patch_pooling" if patch_pooling is None else ""
                raise InputError(f"{name} is {value!r}: expected{without} one of {', '.join(map(str, known))}")
        self.encoder = MCTEncoder(num_classes, backbone, weights, backbone_args, position, fusion)
        pace = lr * self.encoder.embed_dim / PAPER_LR_TIMES_WIDTH
        if weights is not None and pace > 1.5:
            warnings.warn(
                f"class logits are means over the {self.encoder.embed_dim} channels of a token and move by lr x "
                f"channels, {pace:.1f} times as fast as in the paper, with which wide networks are reported to "
                f"collapse: set method.lr={lr / pace:.3g}",
                stacklevel=2,
            )
        depth = len(self.encoder.blocks)
        if not 1 <= attention_layers <= depth:
            raise InputError(f"attention_layers is {attention_layers}: {backbone} has {depth} blocks, use 1 to {depth}")
        if patch_pooling is not None:
            self.pool = POOLINGS[patch_pooling]
            self.head: nn.Module | None = nn.Conv2d(self.encoder.embed_dim, num_classes, 3, padding=1)
        else:
            self.head = None
        self.locate = MAPS[map_type]
        self.rate = warmup_cosine(epochs, lr, min_lr, warmup_lr, warmup_epochs)

    @property
    def smallest_side(self) -> int:
        return self.least_side(self.encoder.patch_size)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        label = batch["label"]
        refined = "fine_cls" in self.losses  # the loss of the maps themselves
        layers = self.hparams.attention_layers if refined else 0
        tokens = self.encoder(batch["image"], layers, affinity=refined and self.hparams.refine)
        patch_cam = None if self.head is None else self.head(tokens.patches)
        terms: dict[str, Tensor] = {}
        if "cls" in self.losses:
            terms["cls"] = self.losses["cls"](tokens.class_tokens[-1].mean(-1), label)
        if "patch_cls" in self.losses:
            assert patch_cam is not None  # or patch_cls would have been refused
            terms["patch_cls"] = self.losses["patch_cls"](self.pool(patch_cam), label)
        if "cct" in self.losses:
            terms["cct"] = self.losses["cct"](torch.stack(tokens.class_tokens), label)
        if "fine_cls" in self.losses:
            fine = self.maps(tokens, None if patch_cam is None else patch_cam.detach())
            terms["fine_cls"] = self.losses["fine_cls"](global_average_pool(fine), label)
        return self.combine(terms, self.loss_weights)

    def forward(self, image: Tensor) -> dict[str, Any]:
        """(B, 3, H, W) -> logits (B, C); cam and attention (B, C, h, w), the class attention alone; seg None."""
        tokens = self.encoder(image, self.hparams.attention_layers, affinity=self.hparams.refine)
        logits = tokens.class_tokens[-1].mean(-1)
        patch_cam = None if self.head is None else self.head(tokens.patches)
        if patch_cam is not None and self.hparams.classify_by == "both":
            logits = (logits + self.pool(patch_cam)) / 2
        return {"logits": logits, "cam": self.maps(tokens, patch_cam), "attention": tokens.attention, "seg": None}

    def maps(self, tokens: MCTTokens, patch_cam: Tensor | None) -> Tensor:
        """Localisation maps (B, C, h, w) of tokens with attention, the patch CAM and, where there is one, affinity."""
        assert tokens.attention is not None
        cam = tokens.attention if patch_cam is None else self.locate(tokens.attention, patch_cam.relu())
        if tokens.affinity is not None:  # what each row's patch takes from the others
            cam = (cam.flatten(2) @ tokens.affinity.mT).unflatten(2, cam.shape[-2:])
        return cam

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        decayed: list[Tensor] = []
        free: list[Tensor] = []
        for name, parameter in self.named_parameters():
            last = name.rsplit(".", 1)[-1]
            exempt = parameter.ndim <= 1 or last in ("bias", "cls_token", "pos_embed")
            (free if exempt else decayed).append(parameter)
        groups = [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": self.hparams.weight_decay}]
        lr, epochs, steps = self.hparams.lr, self.hparams.epochs, self.total_steps
        return stepwise(adamw(groups, lr=lr), lambda step: self.rate(step * epochs // steps) / lr)

    @classmethod
    def read_official(cls, state: Mapping[str, Tensor], path: str) -> OfficialCheckpoint | None:
        """A checkpoint of V1, V2, + or WeakTr; it tells `num_classes` and `backbone_args`, see `vit_arguments`.

        One of WeakTr also tells the heads and the reductions, but not how `fusion` pools: as published.
        """
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        if "cls_token" not in state:
            return None
        tokens, head = state["cls_token"], state.get("head.weight", torch.empty(0))
        if tokens.ndim == 3 and tokens.shape[1] == 1 and len(head) != 1:
            raise InputError(
                f"checkpoint {path} holds the ImageNet weights of a vision transformer (one class token), no trained "
                f"MCTformer: train from it with method.weights={path}"
            )
        if "pos_embed_cls" in state or "pos_embed_pat" in state:
            version = "mctformer_plus"
        elif any(name.startswith(OFFICIAL_FUSION) for name in state):
            version = "weaktr"
        else:
            version = "mctformer" if head.ndim == 4 else "mctformer_v1"
        faults, sizes = compare_layout(state, OFFICIAL_LAYOUT | VERSIONS[version], ("norm.weight", "norm.bias"))
        patches = sizes.get("patches", sizes.get("positions", 0) - sizes.get("classes", 0))
        side = math.isqrt(max(0, patches))
        if not faults and (side == 0 or side**2 != patches):
            faults = f"has {patches} patch positions, which is no square grid"
        if not faults and version == "weaktr" and sizes["maps"] * sizes["head"] != sizes["depth"] * sizes["width"]:
            faults = f"weighs {sizes['maps']} maps of heads of {sizes['head']} channels, not all of its heads"
        if faults:
            raise InputError(
                f"checkpoint {path} looks like one of the original MCTformer code (method={version}), but it {faults}; "
                "give a checkpoint.pth of V1, V2, + or WeakTr, or a checkpoint of wsss-train"
            )
        values: dict[str, Any] = {"num_classes": sizes["classes"], "backbone_args": vit_arguments(sizes, side)}
        if version == "weaktr":
            values["backbone_args"]["num_heads"] = sizes["width"] // sizes["head"]
            values["fusion"] = {
                "reduction": sizes["maps"] // sizes["bottleneck"],
                "feature_reduction": sizes["head"] // sizes["between"],
                "pool": "max",
            }
        used = {n: t.float() for n, t in state.items() if not f"{n}.".startswith(UNUSED[version])}
        return OfficialCheckpoint(version, {_our_name(name): tensor for name, tensor in used.items()}, values)


OFFICIAL_FUSION = "adaptive_attention_fusion."
"""How the names of WeakTr's fusion begin."""

OFFICIAL_LAYOUT = {
    "cls_token": "1 classes width",
    **VIT_LAYOUT,
    "norm.weight": "width",
    "norm.bias": "width",
    "head.bias": "classes",
}
"""Names and shapes that the files of all versions share."""

VERSIONS = {
    "mctformer_v1": {"pos_embed": "1 positions width", "head.weight": "classes width"},
    "mctformer": {"pos_embed": "1 positions width", "head.weight": "classes width 3 3"},
    "mctformer_plus": {
        "pos_embed": "1 unused width",
        "pos_embed_cls": "1 classes width",
        "pos_embed_pat": "1 patches width",
        "head.weight": "classes width 3 3",
    },
    "weaktr": {
        "pos_embed": "1 positions width",
        "head.weight": "classes width 3 3",
        f"{OFFICIAL_FUSION}attn_head_ffn.0.weight": "bottleneck maps",
        f"{OFFICIAL_FUSION}attn_head_ffn.2.weight": "maps bottleneck",
        f"{OFFICIAL_FUSION}attn_feat_ffn.0.weight": "between head",
        f"{OFFICIAL_FUSION}attn_feat_ffn.0.bias": "between",
        f"{OFFICIAL_FUSION}attn_feat_ffn.1.weight": "1 between",
        f"{OFFICIAL_FUSION}attn_feat_ffn.1.bias": "1",
    },
}
"""What is in the files of one version, by the name of our method."""

UNUSED = {
    "mctformer_v1": ("norm.", "head."),
    "mctformer": ("norm.",),
    "mctformer_plus": ("norm.", "pos_embed."),
    "weaktr": ("norm.",),
}
"""What a file holds and the network never uses, by the name of our method."""

OFFICIAL_MODULES = {
    f"{OFFICIAL_FUSION}attn_head_ffn.": "encoder.fusion.gate.",
    f"{OFFICIAL_FUSION}attn_feat_ffn.": "encoder.fusion.feature.",
}
"""First part of the names of WeakTr -> ours."""


def _our_name(name: str) -> str:
    """A name of the original -> ours."""
    for first, ours in OFFICIAL_MODULES.items():
        if name.startswith(first):
            return ours + name.removeprefix(first)
    places = {"pos_embed": "encoder.position.", "head.": ""}
    return next((place for first, place in places.items() if name.startswith(first)), "encoder.") + name

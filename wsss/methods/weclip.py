"""WeCLIP (Zhang et al., CVPR 2024, arXiv 2406.11189), with DINO WeCLIP+ (TPAMI 2025): a decoder on frozen towers."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from wsss import InputError
from wsss.cam import box_mask, multiscale_seg, of_classes, present_classes, resize
from wsss.evaluation.protocol import Measured, Protocol
from wsss.methods.base import OfficialCheckpoint
from wsss.methods.clip_es import CLIPMaps, unsaid
from wsss.networks.cache import FeatureCache
from wsss.networks.clip import Seen
from wsss.networks.weclip import Decoder, DINOTower, Fusion
from wsss.networks.weights import VIT_LAYOUT, compare_layout
from wsss.optim import adamw, stepwise, warmup_poly
from wsss.refine.affinity import refined_attention
from wsss.refine.par import PAR


class Decoded(NamedTuple):
    """What is learnt of a batch, on the grid of CLIP's patches."""

    seg: Tensor  # (B, 1 + C, h, w), of WeCLIP+ the mean of both branches
    branches: tuple[Tensor, ...]  # of CLIP's features and, with DINO, of its
    affinity: Tensor  # (B, N, N) in [0, 1], of the fused features


class WeCLIP(CLIPMaps):
    """A decoder of CLIP's tokens learns from CLIP-ES's maps, which its features refine in turn; the towers are frozen.

    The maps of a training crop are of the classes of the whole image, spread by the mean attention of the last layers
    until `static_steps`, and behind it, as in every evaluation, by that of the layers that agree with the affinity of
    the fused features, times that affinity (refinement module). PAR makes them labels, none undecided. `logits` are the
    log odds of each class where the decoder finds it most probable, so that `val/map` follows the training.

    With `dino` it is WeCLIP+: of CLIP the last but one block alone, beside it another tower with a head of its own, one
    decoder for both. Its labels also take the prediction into account (`soft_product`) and, from a step on, are it
    where it is certain (`self_labels`).

    The released code computes the output projection of every attention, frozen or learnt, in half precision; it is
    float32 here: rounding to half is not the same on two machines, and moves scores by 0.1 %. In a batch without
    foreground its loss is NaN, here the background alone counts. True labels came from masks there, here from labels.

    Args:
        num_classes, classes, backbone, weights, backbone_args, text, background, logit_scale, half_positions,
            cache_features, cache_folder, cache_folder_gb: see `CLIPES`; logit_scale is 25 with CLIP's ViT-L in WeCLIP+.
        affinity_layers: so many last layers spread maps until `static_steps`.
        refine_layers: among so many last ones the refinement module chooses.
        static_steps: from this step on it does.
        box_threshold: see `CLIPES`.
        background_threshold: see `CLIPES`; training knows none.
        normalisation: `imagenet`, as the released code gives images to CLIP, or `clip`.
        long_side: of the images of an evaluation in pixels, which are enlarged or reduced to it; None leaves them.
        channels: of the fused features, and width of the decoder.
        decoder_depth, decoder_heads: blocks of the decoder and heads of each.
        dropout: probability that a channel of the fused features is dropped.
        par: arguments of `PAR`.
        dino: timm name of the second tower, `vit_small_patch14_dinov2`; None for WeCLIP.
        dino_weights: a timm tag or a file, see `DINOTower`; it has to be given again with every checkpoint.
        dino_args: arguments of timm's constructor.
        soft_product: whether maps are multiplied by the predicted probabilities before they are spread.
        ignore_padding: leave pixels undecided where a training crop reaches beyond its image; as released they are not.
        self_labels: `step`, from which on pixels with a probability above `threshold` take the predicted class;
            `gate` keeps to the classes of the image. None never does.
        skip_block: make maps of the last block behind the last but two, the one between left out, as WeCLIP+ on VOC.
        losses: weight and arguments of seg, aff, dice and, with `dino`, cross; null leaves a term out.
        lr: learning rate of AdamW, for everything that learns.
        weight_decay: of everything, biases and norms among it.
        warmup_steps, warmup_ratio, power: see `warmup_poly`.
    """

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "vit_base_patch16_clip_quickgelu_224",
        weights: str | None = "openai",
        backbone_args: Mapping[str, Any] | None = None,
        text: str | None = "ViT-B-16-quickgelu/openai",
        background: Sequence[str] | None = None,
        logit_scale: float = 100.0,
        affinity_layers: int = 8,
        refine_layers: int = 6,
        static_steps: int = 15_000,
        box_threshold: float | None = 0.4,
        background_threshold: float = 0.5,
        normalisation: str = "imagenet",
        long_side: int | None = 512,
        channels: int = 256,
        decoder_depth: int = 3,
        decoder_heads: int = 8,
        dropout: float = 0.1,
        par: Mapping[str, Any] | None = None,
        dino: str | None = None,
        dino_weights: str | None = "lvd142m",
        dino_args: Mapping[str, Any] | None = None,
        soft_product: bool = False,
        self_labels: Mapping[str, Any] | None = None,
        skip_block: bool = False,
        ignore_padding: bool = False,
        half_positions: bool = False,
        cache_features: float | None = None,
        cache_folder: str | None = None,
        cache_folder_gb: float = 20.0,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 50,
        warmup_ratio: float = 1e-6,
        power: float = 1.0,
    ) -> None:
        losses = {"seg": {"weight": 1.0}, "aff": {"weight": 0.1}} if losses is None else losses
        super().__init__(num_classes, classes, background_threshold, (1.0,), losses, ("seg", "aff", "dice", "cross"))
        if dino is None and "cross" in self.losses:
            raise InputError(
                "losses.cross lets two branches learn from each other: set method.dino, or losses.cross=null"
            )
        self.save_hyperparameters(ignore=unsaid(weights=weights, dino_weights=dino_weights))
        cache = (cache_features, cache_folder, cache_folder_gb)
        self.build_tower(backbone, weights, backbone_args, half_positions, cache)
        self.build_text(text, background)
        if normalisation not in ("imagenet", "clip"):
            raise InputError(f"normalisation is {normalisation!r}: expected imagenet or clip")
        if normalisation == "clip":
            self.mean, self.std = self.tower.mean, self.tower.std
        if not 1 <= refine_layers <= self.tower.depth:
            raise InputError(f"refine_layers is {refine_layers}, but {backbone} has {self.tower.depth}: give 1 to that")
        if long_side is not None and long_side < 1:
            raise InputError(f"long_side is {long_side}: expected a number of pixels, or null")
        if self_labels is not None:
            kinds = {"step": int, "threshold": int | float, "gate": bool}
            fits = set(self_labels) == set(kinds)
            if not fits or not all(isinstance(self_labels[key], kind) for key, kind in kinds.items()):
                raise InputError(
                    f"self_labels is {dict(self_labels)}: expected null, or {{step: NUMBER, threshold: NUMBER, gate: "
                    "true or false}"
                )
        if unknown := set(par or {}) - set(inspect.signature(PAR).parameters):
            known = ", ".join(inspect.signature(PAR).parameters)
            raise InputError(f"par.{min(unknown)} does not exist: known are {known}")
        layers = self.tower.depth - 1 if dino is None else 1
        self.fusion = Fusion(self.tower.width, layers, channels, dropout)
        self.dino: DINOTower | None = None
        if dino is not None:
            self.dino = DINOTower(dino, dino_weights, dino_args)
            self.dino_cache = FeatureCache(f"{self.dino.digest} {dino} {dino_args}", *cache)
            self.dino_fusion = Fusion(self.dino.width, 1, channels, dropout)
        self.decoder = Decoder(channels, decoder_depth, decoder_heads, 1 + num_classes)
        self.par = PAR(**{"iterations": 20} | dict(par or {}))

    def sized(self, image: Tensor) -> Tensor:
        """Images at the protocol's size, their longer side brought to `long_side`."""
        image, side = super().sized(image), self.hparams.long_side
        if side is None or self.protocol.size is not None:
            return image
        size = [max(1, int(side / max(image.shape[-2:]) * length)) for length in image.shape[-2:]]
        return image if size == list(image.shape[-2:]) else resize(image, size)

    @property
    def smallest_side(self) -> int:
        return super().smallest_side if self.hparams.long_side is None else 1

    @property
    def views(self) -> tuple[str, ...]:
        return ("image", "image_box") if self.hparams.ignore_padding else ("image",)

    def look(self, image: Tensor) -> tuple[Seen, Seen | None]:
        """What CLIP and, where it is there, DINO see in images (B, 3, H, W)."""
        seen = self.see(image)
        if self.dino is None:
            return seen, None
        return seen, self.dino_cache(image, self.dino)

    def decode(self, seen: Seen, dino: Seen | None) -> Decoded:
        """What is learnt, from what the towers see."""
        fused = [self.fusion(seen.blocks[-len(self.fusion.heads) :, :, 1:], seen.size)]
        if dino is not None:
            fused.append(resize(self.dino_fusion(dino.blocks, dino.size), seen.size))
        branches = tuple(map(self.decoder, fused))
        features = torch.cat(fused, dim=1).flatten(2)  # (B, D, N)
        affinity = (features.mT @ features).sigmoid()
        return Decoded(torch.stack(branches).mean(0), branches, affinity.float())

    def forward(self, image: Tensor) -> dict[str, Any]:
        """(B, 3, H, W) -> logits (B, C), seg (B, 1 + C, h, w)."""
        seg = self.decode(*self.look(image)).seg
        return {"logits": log_odds(seg), "seg": seg}

    @torch.no_grad()
    def infer_batch(self, batch: Mapping[str, Any], cams: bool = True) -> dict[str, Tensor]:
        """`forward`, and with `cams` the refined maps cam (B, C, h, w) in [0, 1], see `CLIPES.infer_batch`."""
        seen, dino = self.look(self.sized(batch["image"]))
        decoded = self.decode(seen, dino)
        output = {"logits": log_odds(decoded.seg), "seg": decoded.seg}
        if not cams:
            return output
        return output | {"cam": self.refined_cam(seen, self.sought(batch, output["logits"]), decoded, refine=True)}

    def refined_cam(self, seen: Seen, label: Tensor, decoded: Decoded, refine: bool) -> Tensor:
        """`cam`, by the refinement module or by the mean attention; nothing of it has a gradient."""
        if self.hparams.skip_block:
            last = self.tower.last_attention(seen.blocks[-2])[None]
            seen = Seen(seen.blocks[:-1], torch.cat([seen.attention[:-1], last]), seen.size)
        attention = self.attention(seen)
        if refine:
            attention = refined_attention(seen.attention[-self.hparams.refine_layers :, :, 1:, 1:], decoded.affinity)
        weights = decoded.seg.softmax(1)[:, 1:] if self.hparams.soft_product else None
        return self.cam(seen, label, attention, weights)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        image, label = batch["image"], batch["label"]
        seen, dino = self.look(image)
        decoded = self.decode(seen, dino)
        pseudo = self.online_label(image, label, seen, decoded, batch.get("max_labels"))
        if self.hparams.ignore_padding:
            pseudo = pseudo.where(box_mask(batch["image_box"], pseudo.shape[-2:]), 255)
        size = pseudo.shape[-2:]
        seg = resize(decoded.seg, size)
        terms: dict[str, Tensor] = {}
        for key, loss in self.losses.items():
            if key == "aff":
                cells = F.interpolate(pseudo[:, None].float(), size=seen.size, mode="nearest")[:, 0].long()
                terms[key] = loss(decoded.affinity, cells)
            elif key == "cross":
                terms[key] = loss(*decoded.branches, size)
            else:
                terms[key] = loss(seg, pseudo)
        return self.combine(terms, self.loss_weights)

    @torch.no_grad()
    def online_label(
        self, image: Tensor, label: Tensor, seen: Seen, decoded: Decoded, max_labels: int | None = None
    ) -> Tensor:
        """(B, H, W) ids that a training batch learns from."""
        cam = self.refined_cam(seen, label, decoded, self.global_step >= self.hparams.static_steps)
        pseudo = self.pseudo_label(image, cam, label, image.shape[-2:], max_labels)
        own = self.hparams.self_labels
        if own is None or self.global_step < own["step"]:
            return pseudo
        certainty, ids = resize(decoded.seg, pseudo.shape[-2:]).softmax(1).max(1)
        certain = certainty > own["threshold"]
        if own["gate"]:
            certain &= F.pad(label, (1, 0), value=1.0).gather(1, ids.flatten(1)).view_as(ids) > 0
        return torch.where(certain, ids, pseudo)

    @torch.no_grad()
    def pseudo_label(
        self,
        image: Tensor,
        cam: Tensor,
        label: Tensor,
        size: Sequence[int] | None = None,
        max_labels: int | None = None,
    ) -> Tensor:
        """(B, *size) ids of maps (B, C, h, w) and the background 1 - max after PAR; by default of the maps' size.

        The image, of any size, is brought to that size. PAR takes its time for every channel: `max_labels`, at least as
        many as an image has, or all classes.
        """
        size = tuple(size or cam.shape[-2:])
        present, index = present_classes(label, max_labels or self.num_classes)
        maps = resize(of_classes(cam, index, label.shape[1]) * present[:, :, None, None], size)
        scores = torch.cat([1 - maps.amax(1, keepdim=True), maps], dim=1)
        if image.shape[-2:] != size:
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=True)
        ids = torch.cat([torch.zeros_like(index[:, :1]), index + 1], dim=1)
        best = self.par(image, scores).argmax(1)  # which divides by the deviation of colours: any scale of them does
        pseudo = ids.gather(1, best.flatten(1)).view_as(best)
        return pseudo if self.has_background else pseudo.masked_fill(pseudo == 0, 255)

    def _fuse(self, image: Tensor, size: Sequence[int], seg: Tensor, protocol: Protocol) -> Tensor:
        """Scores of all scales, which are factors of coordinates, too, fused on the grid of scale 1, as released."""
        if tuple(protocol.scales) == (1.0,) and protocol.flip == "none" and protocol.window is None:
            return super()._fuse(image, size, seg, protocol)
        how = (protocol.scales, protocol.flip, protocol.fusion, protocol.softmax == "before", protocol.align_corners)
        scores = multiscale_seg(self.scores(protocol), self.sized(image), seg.shape[-2:], *how, rescale_by_factor)
        return resize(scores, size)

    def describe(self, split: str) -> dict[str, Measured]:
        notes, side = super().describe(split), self.hparams.long_side
        if side is None or self.protocol.size is not None:
            return notes
        return {key: replace(note, size=f"{side} pixels on the longer side") for key, note in notes.items()}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        learnt = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = adamw(learnt, lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)
        schedule = (self.hparams.warmup_steps, self.hparams.warmup_ratio, self.hparams.power)
        return stepwise(optimizer, warmup_poly(self.total_steps, *schedule))

    @classmethod
    def read_official(cls, state: Mapping[str, Tensor], path: str) -> OfficialCheckpoint | None:
        """A checkpoint of WeCLIP; the names in those of WeCLIP+ are not known here.

        It tells `num_classes`, `channels` and `decoder_depth`. The tower and the embeddings of the names come from the
        command, `weights` and `text`; where the file holds its tower, `complete` compares the two.
        """
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        if not any(name.startswith("decoder_fts_fuse.") for name in state):
            return None
        learnt = {name: tensor for name, tensor in state.items() if not name.startswith(("encoder.", "par."))}
        ours = {_our_name(name): tensor for name, tensor in learnt.items()}
        layers = len({name.split(".")[2] for name in ours if name.startswith("fusion.heads.")})
        heads = {
            f"fusion.heads.{layer}.{part}": axes
            for layer in range(layers)
            for part, axes in (("0.weight", "width tower"), ("0.bias", "width"), ("2.weight", "width width"))
        } | {f"fusion.heads.{layer}.2.bias": "width" for layer in range(layers)}
        said, sizes = compare_layout(ours, OFFICIAL_LAYOUT | heads, shown=official_name)
        if not said and sizes["fused"] != layers * sizes["width"]:
            said = f"has {layers} layers of {sizes['width']} channels, but fuses {sizes['fused']} channels"
        if said:
            raise InputError(
                f"checkpoint {path} looks like one of the original WeCLIP code, but it {said}; give one of WeCLIP (of "
                "WeCLIP+ the names are not known), or a checkpoint of wsss-train"
            )
        values = {"num_classes": sizes["outputs"] - 1, "channels": sizes["width"], "decoder_depth": sizes["depth"]}
        tower = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.visual.")}
        tower.pop("visual.positional_embedding_new", None)  # of the last image
        kept = {name: tensor.float() for name, tensor in (ours | tower).items()}
        return OfficialCheckpoint("weclip", kept, values, ("text",))

    def complete(self, state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
        """With the key of the tower and the embeddings of the names, after the file's tower was compared with ours."""
        own = self.state_dict()
        given = {name: own[name] for name in ("tower.key", "text", "background_text")}
        tower = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
        if tower and not self.tower.is_that_of(tower):
            raise InputError(
                f"checkpoint {path} was trained on another image tower of CLIP than method.weights gives: add "
                "method.weights=FILE, or the tag of timm, of its own, and method.backbone where it is no ViT-B/16"
            )
        learnt = {name: tensor for name, tensor in state.items() if name not in tower}
        return learnt | given


def log_odds(seg: Tensor) -> Tensor:
    """(B, C): the largest log odds of each class over the positions of scores (B, 1 + C, h, w)."""
    probability = seg.log_softmax(1)[:, 1:].amax((-2, -1)).clamp(max=-1e-6)
    return probability - torch.log(-torch.expm1(probability))


def rescale_by_factor(image: Tensor, scale: float, align_corners: bool) -> Tensor:
    """Resized bilinearly by a factor, which also maps the coordinates, though sides are rounded down."""
    return F.interpolate(image, scale_factor=scale, mode="bilinear", align_corners=align_corners)


OFFICIAL_MODULES = {
    "fusion.heads.": "decoder_fts_fuse.linears_modulelist.",
    "fusion.fuse.": "decoder_fts_fuse.linear_fuse.",
    "decoder.blocks.": "decoder.transformer.resblocks.",
    "decoder.classifier.": "decoder.linear_pred.",
}
"""First part of our names -> the original's."""

OFFICIAL_PARTS = {
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj.": "attn.out_proj.",
    ".norm1.": ".ln_1.",
    ".norm2.": ".ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
"""Parts of our names behind it -> the original's."""

OFFICIAL_LAYOUT = {
    "fusion.fuse.weight": "width fused 1 1",
    "fusion.fuse.bias": "width",
    **{f"decoder.{name}": axes for name, axes in VIT_LAYOUT.items() if name.startswith("blocks.")},
    "decoder.classifier.weight": "outputs width 1 1",
    "decoder.classifier.bias": "outputs",
}
"""Our names and the shapes of what is learnt, but for the heads of the layers."""


def official_name(name: str) -> str:
    """Our name of what is learnt -> the original's."""
    for ours, theirs in OFFICIAL_MODULES.items():
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
    for ours, theirs in OFFICIAL_PARTS.items():
        name = name.replace(ours, theirs)
    name = re.sub(r"(modulelist\.\d+)\.0\.", r"\1.proj.", name)
    return re.sub(r"(modulelist\.\d+)\.2\.", r"\1.proj_2.", name)


def _our_name(name: str) -> str:
    """A name of the original -> ours; one that is not known stays."""
    name = re.sub(r"(modulelist\.\d+)\.proj\.", r"\1.0.", name)
    name = re.sub(r"(modulelist\.\d+)\.proj_2\.", r"\1.2.", name)
    for ours, theirs in OFFICIAL_PARTS.items():
        name = name.replace(theirs, ours)
    first = {theirs: ours for ours, theirs in OFFICIAL_MODULES.items()}
    head = next((theirs for theirs in first if name.startswith(theirs)), "")
    return first.get(head, "") + name.removeprefix(head)

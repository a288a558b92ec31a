"""ToCo: token contrast (Ru et al., CVPR 2023, arXiv 2303.01267)."""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import box_mask, multiscale_cam, of_classes, present_classes, resize
from wsss.methods.base import OfficialCheckpoint, WSSSModule
from wsss.networks.decoders import LargeFOV, Projector
from wsss.networks.vit import ViTEncoder
from wsss.networks.weights import VIT_LAYOUT, compare_layout, vit_arguments
from wsss.optim import adamw, stepwise, update_average, warmup_poly
from wsss.refine.par import PAR, refine_cam
from wsss.refine.thresholds import cam_to_label, region_map


class ToCo(WSSSModule):
    """Single-stage segmentation with a plain vision transformer, learnt from image labels.

    Final patch tokens feed a classifier and a segmentation decoder, those of an earlier block an auxiliary
    classifier. The auxiliary CAM says which patch tokens should agree (patch token contrast) and where to cut
    local crops whose class token is contrasted with that of the whole image (class token contrast). The main CAM,
    refined by PAR, is the pseudo label of the decoder.

    A training batch holds `image`, `label`, `image_box` (B, 4) and, unless `ctc` is left out, `global_view`
    (B, 3, H, W) and `local_source` (B, 3, H, W), the view that local crops are cut from.

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone: timm name of a plain vision transformer.
        weights: None, a timm tag, or a `.pth` or `.safetensors` file.
        backbone_args: arguments of timm's constructor, e.g. `depth`.
        aux_layer: index into the list of block outputs for the auxiliary patch tokens.
        decoder_channels: width of the LargeFOV decoder.
        decoder_dilation: dilation of its 3x3 convolutions.
        projector: `hidden`, `bottleneck` and `out` features of the class-token projector.
        ema_momentum: momentum of the projector's teacher copy, updated once a step.
        local_crops: number of local crops an image.
        local_crop_size: their side in pixels.
        negative_ratio: a crop is a negative when its mean region value (0 background, 1 uncertain, 2 foreground)
            does not exceed this.
        cam_scales: scales of the multi-scale CAM; 1 always takes part.
        background_threshold: up to this value a CAM means background in the evaluation.
        low_threshold: a CAM value up to it is background in the contrast labels and the region map; the low
            background score of the pseudo label.
        high_threshold: a CAM value above it is foreground; the high background score of the pseudo label.
        par: arguments of `PAR`.
        par_scale: PAR's resolution relative to the image's.
        losses: weight and arguments of cls, aux_cls, ptc, ctc, seg, dense_energy; null leaves a term out,
            weight 0 multiplies it (its parameters then still see weight decay).
        phases: list of `{until: step, weights: {loss: weight or null}, pseudo_label_from: cam or aux_cam}`: up to
            and including that optimizer step these weights replace those of `losses`.
        lr: learning rate of the encoder.
        head_lr_factor: the other parameters learn this much faster.
        weight_decay: of all parameters, biases and norms included.
        warmup_steps: steps of linear warm-up.
        warmup_ratio: the first step's fraction of the learning rate.
        power: of the polynomial decay.
        released_behaviour: reproduce the released code where it departs from its own intention:
            the box of valid pixels is compared with patch indices when contrast labels are made (so a padded
            image mostly has none; otherwise with patch centres in pixels); PAR sees the image truncated to
            8 bits (otherwise rounding-free); and, in the transform, each view is mirrored independently, so in
            half of the images local crops are cut at the mirrored place and the box is that of the unmirrored
            image (otherwise main view, crop source and box are mirrored together).
    """

    cam_names = ("cam", "aux_cam")

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "vit_base_patch16_224",
        weights: str | None = None,
        backbone_args: Mapping[str, Any] | None = None,
        aux_layer: int = -3,
        decoder_channels: int = 512,
        decoder_dilation: int = 5,
        projector: Mapping[str, int] | None = None,
        ema_momentum: float = 0.9,
        local_crops: int = 8,
        local_crop_size: int = 96,
        negative_ratio: float = 0.2,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5),
        background_threshold: float = 0.5,
        low_threshold: float = 0.25,
        high_threshold: float = 0.7,
        par: Mapping[str, Any] | None = None,
        par_scale: float = 0.5,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        phases: Sequence[Mapping[str, Any]] = (),
        lr: float = 6e-5,
        head_lr_factor: float = 10.0,
        weight_decay: float = 0.01,
        warmup_steps: int = 1500,
        warmup_ratio: float = 1e-6,
        power: float = 0.9,
        released_behaviour: bool = False,
    ) -> None:
        if losses is None:
            losses = {
                "cls": {"weight": 1.0},
                "aux_cls": {"weight": 1.0},
                "ptc": {"weight": 0.2},
                "ctc": {"weight": 0.5},
                "seg": {"weight": 0.1},
                "dense_energy": {"weight": 0.05},
            }
        computed = ("cls", "aux_cls", "ptc", "ctc", "seg", "dense_energy")
        super().__init__(num_classes, classes, background_threshold, cam_scales, losses, computed)
        self.save_hyperparameters()
        if not 0 <= low_threshold <= high_threshold <= 1:
            raise InputError(
                f"low_threshold={low_threshold} and high_threshold={high_threshold}: expected 0 <= low <= high <= 1"
            )
        for name, value in (
            ("decoder_channels", decoder_channels),
            ("local_crops", local_crops),
            ("local_crop_size", local_crop_size),
            ("par_scale", par_scale),
        ):
            if value <= 0:
                raise InputError(f"{name} is {value}: expected more than 0")
        for phase in phases:
            if (
                not isinstance(phase, Mapping)
                or not {"until", "weights"} <= set(phase) <= {"until", "weights", "pseudo_label_from"}
                or not set(phase["weights"]) <= set(computed)
                or phase.get("pseudo_label_from", "cam") not in self.cam_names
            ):
                raise InputError(
                    f"phases holds {phase}: expected until, weights (of {', '.join(computed)}) and perhaps "
                    f"pseudo_label_from (one of {', '.join(self.cam_names)})"
                )
        self.phases = sorted(map(dict, phases), key=lambda phase: phase["until"])

        self.encoder = ViTEncoder(backbone, weights, backbone_args, aux_layer)
        width = self.encoder.embed_dim
        self.classifier = nn.Conv2d(width, num_classes, 1, bias=False)
        self.aux_classifier = nn.Conv2d(width, num_classes, 1, bias=False)
        self.decoder = LargeFOV(width, num_classes + 1, decoder_channels, decoder_dilation)
        self.projector = Projector(width, **(projector or {}))
        self.teacher_projector = deepcopy(self.projector).requires_grad_(False)
        self.par = PAR(**(par or {}))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> logits (B, C), cam and aux_cam (B, C, h, w) raw, seg (B, 1 + C, h, w)."""
        tokens = self.encoder(image)
        return {
            "logits": self.classify(self.classifier, tokens.patches),
            "cam": self.classifier(tokens.patches),
            "aux_cam": self.aux_classifier(tokens.aux_patches),
            "seg": self.decoder(tokens.patches),
        }

    def raw_cam(self, image: Tensor) -> Tensor:
        """Both raw CAMs of one pass, (B, 2C, h, w), without the decoder."""
        tokens = self.encoder(image)
        return torch.cat([self.classifier(tokens.patches), self.aux_classifier(tokens.aux_patches)], dim=1)

    @staticmethod
    def classify(classifier: nn.Module, patches: Tensor) -> Tensor:
        """Logits (B, C) from the global maximum of each channel of (B, D, h, w)."""
        return classifier(F.adaptive_max_pool2d(patches, 1)).flatten(1)

    def phase(self, step: int) -> tuple[Mapping[str, Any], dict[str, float]]:
        """The phase of a step, and the weights of the loss terms that take part in it."""
        phase: Mapping[str, Any] = next((p for p in self.phases if step <= p["until"]), {"weights": {}})
        changed = {key: weight for key, weight in phase["weights"].items() if key in self.losses}
        return phase, {key: w for key, w in (self.loss_weights | changed).items() if w is not None}

    @property
    def views(self) -> tuple[str, ...]:
        return ("image", "image_box", *(("global_view", "local_source") if "ctc" in self.losses else ()))

    @property
    def loss_starts(self) -> dict[str, int]:
        begins = [0, *(phase["until"] + 1 for phase in self.phases)]  # of the phases, and of what follows them
        return {key: next((step for step in begins if key in self.phase(step)[1]), begins[-1]) for key in self.losses}

    @property
    def smallest_side(self) -> int:
        return self.least_side(self.encoder.patch_size)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        image, label, box = batch["image"], batch["label"], batch["image_box"]
        phase, weights = self.phase(self.global_step)
        terms: dict[str, Tensor] = {}

        # one pass of the main view serves the losses, the CAMs of scale 1 and the class token contrast
        views = [image, batch["global_view"]] if "ctc" in weights else [image]
        tokens = self.encoder(torch.cat(views))
        patches, aux_patches = tokens.patches[: len(image)], tokens.aux_patches[: len(image)]
        if "cls" in weights:
            terms["cls"] = self.losses["cls"](self.classify(self.classifier, patches), label)
        if "aux_cls" in weights:
            terms["aux_cls"] = self.losses["aux_cls"](self.classify(self.aux_classifier, aux_patches), label)

        if not weights.keys() <= {"cls", "aux_cls"}:
            # maps at image size of the classes that are there: of a thousand they would cost more than the network
            shown, classes = present_classes(label, batch.get("max_labels", self.num_classes))  # (B, K)
            with torch.no_grad():
                first = torch.cat([self.classifier(patches), self.aux_classifier(aux_patches)], dim=1)
            first = of_classes(first, classes, self.num_classes)
            how = (self.cam_scales, first, self.rescale, self.fuse, self.normalise)
            maps = multiscale_cam(lambda v: of_classes(self.raw_cam(v), classes, self.num_classes), image, *how)
            cam, aux_cam = maps.chunk(2, dim=1)  # (B, K, H, W)
        if "ptc" in weights:
            token_label = self.token_label(aux_cam, shown, box, classes)
            terms["ptc"] = self.losses["ptc"](patches.flatten(2).transpose(1, 2), token_label)
        if "ctc" in weights:
            crops, positive = self.cut_local_crops(batch["local_source"], aux_cam, shown)
            if self._trainer is None or batch_idx % self.trainer.accumulate_grad_batches == 0:
                self.update_teacher()  # once a step, however many batches the step takes
            student = torch.cat([tokens.class_token, self.encoder(crops.flatten(0, 1)).class_token])
            student = self.projector(student).unflatten(0, (-1, len(image)))  # (2 + K, B, out)
            teacher = self.teacher_projector(tokens.class_token.detach()).unflatten(0, (-1, len(image)))
            terms["ctc"] = self.losses["ctc"](student, teacher, positive)
        if "seg" in weights or "dense_energy" in weights:
            source = aux_cam if phase.get("pseudo_label_from") == "aux_cam" else cam
            pseudo = self.pseudo_label(image, source, shown, box, shown.shape[1], classes)
            seg = self.decoder(patches)  # the losses bring it to the image's size
        if "seg" in weights:
            terms["seg"] = self.losses["seg"](seg, pseudo)
        if "dense_energy" in weights:
            terms["dense_energy"] = self.losses["dense_energy"](self.colours(image), seg, pseudo, box)
        return self.combine(terms, weights)

    def token_label(self, aux_cam: Tensor, label: Tensor, box: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, h, w) ids of the patches, 255 where the auxiliary CAM is undecided or outside the box."""
        size = [side // self.encoder.patch_size for side in aux_cam.shape[-2:]]
        stride = 1 if self.hparams.released_behaviour else self.encoder.patch_size
        thresholds = (self.hparams.low_threshold, self.hparams.high_threshold)
        valid = box_mask(box, size, stride)
        cam = resize(aux_cam, size)
        ids = cam_to_label(cam, label, self.background_threshold, thresholds, valid, classes=classes)
        return self.decided(ids)

    def decided(self, pseudo: Tensor) -> Tensor:
        """Ids of a pseudo label; where there is no background, what looks like it is undecided (255)."""
        return pseudo if self.has_background else pseudo.masked_fill(pseudo == 0, 255)

    def cut_local_crops(self, source: Tensor, aux_cam: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Crops (K, B, 3, s, s), and (B, 2 + K) which of the two global views and the crops are positives."""
        region = region_map(aux_cam, label, self.hparams.low_threshold, self.hparams.high_threshold)
        if min(region.shape[-2:]) <= self.hparams.local_crop_size + 1:
            raise InputError(
                f"method.local_crop_size is {self.hparams.local_crop_size}, but the training images are "
                f"{region.shape[-1]}x{region.shape[-2]}: make the crops smaller or transform.crop_size larger"
            )
        top_left = draw_crops(region, self.hparams.local_crop_size, self.hparams.local_crops)
        inside = cut_crops(region.float(), top_left, self.hparams.local_crop_size).mean(dim=(-2, -1)).T  # (B, K)
        positive = F.pad(inside > self.hparams.negative_ratio, (2, 0), value=True)
        return cut_crops(source, top_left, self.hparams.local_crop_size), positive

    def update_teacher(self) -> None:
        """Exponential moving average of the projector; the gains and biases follow too."""
        update_average(self.teacher_projector.parameters(), self.projector.parameters(), self.hparams.ema_momentum)

    def pseudo_label(
        self,
        image: Tensor,
        cam: Tensor,
        label: Tensor,
        box: Tensor | None = None,
        max_labels: int | None = None,
        classes: Tensor | None = None,
    ) -> Tensor:
        """(B, H, W) ids from the CAM refined by PAR; 255 where undecided or outside the box.

        Args:
            image: (B, 3, H, W) normalised.
            cam: (B, C, H, W) in [0, 1], or of n classes of each image.
            label: (B, C) or (B, n) 0 or 1.
            box: (B, 4), None for the whole image.
            max_labels: at least the largest number of labels of an image.
            classes: (B, n) the numbers of the classes.
        """
        if box is None:
            box = torch.tensor([[0, image.shape[2], 0, image.shape[3]]], device=image.device).expand(len(image), -1)
        colours = self.colours(image)
        colours = colours.to(torch.uint8).float() if self.hparams.released_behaviour else colours.clamp(0, 255)
        pseudo = refine_cam(
            self.par,
            colours / 255,
            cam,
            label,
            (self.hparams.low_threshold, self.hparams.high_threshold),
            box_mask(box, image.shape[-2:]),
            max_labels or label.shape[1],
            self.hparams.par_scale,
            classes=classes,
        )
        return self.decided(pseudo)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        heads = [self.classifier, self.aux_classifier, self.projector, self.decoder]
        groups = [
            {"params": [p for p in self.encoder.parameters() if p.requires_grad], "lr": self.hparams.lr},
            {
                "params": [p for head in heads for p in head.parameters() if p.requires_grad],
                "lr": self.hparams.lr * self.hparams.head_lr_factor,
            },
        ]
        optimizer = adamw(groups, weight_decay=self.hparams.weight_decay)
        warmup = (self.hparams.warmup_steps, self.hparams.warmup_ratio)
        return stepwise(optimizer, warmup_poly(self.total_steps, *warmup, self.hparams.power))

    @classmethod
    def read_official(cls, state: Mapping[str, Tensor], path: str) -> OfficialCheckpoint | None:
        """A checkpoint `model_iter_<n>.pth`; of what it should hold only the ImageNet head may be absent.

        It tells `num_classes`, `backbone_args` (see `vit_arguments`), `decoder_channels` and `projector`.
        """
        if not any(name.removeprefix("module.").startswith("proj_head") for name in state):
            return None
        projector = {name: axes for name, axes in OFFICIAL_LAYOUT.items() if name.startswith("projector.")}
        layout = OFFICIAL_LAYOUT | {f"teacher_{name}": axes for name, axes in projector.items()}
        kept, sizes, values, said = read_official_vit(state, layout)
        if said:
            raise InputError(
                f"checkpoint {path} is no checkpoint of the original ToCo code: it {said}; give a "
                "model_iter_<n>.pth of a ViT-B or DeiT-B run, or a checkpoint of wsss-train"
            )
        values["projector"] = {key: sizes[key] for key in ("hidden", "bottleneck", "out")}
        return OfficialCheckpoint("toco", kept, values)


def read_official_vit(
    state: Mapping[str, Tensor], layout: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Any], str]:
    """What a file of the original code, or of CoSA's, which has its names, holds for us.

    Args:
        state: of the file.
        layout: our names and the shapes, as in `OFFICIAL_LAYOUT`.

    Returns:
        Our weights by our names, without the ImageNet head, which alone may be absent; the sizes that the shapes tell;
        `num_classes`, `backbone_args` and `decoder_channels`; in words what does not fit.
    """
    ours = {_our_name(name): tensor for name, tensor in state.items()}
    head = [name for name in layout if name.startswith(OFFICIAL_HEAD)]
    said, sizes = compare_layout(ours, layout, head, _official_name)
    faults = [said] if said else []
    side = math.isqrt(sizes.get("positions", 2) - 1)  # a missing embedding is among the faults already
    if side == 0 or sizes.get("positions", 2) != 1 + side**2:
        faults.append("has a grid of positions that is no square in encoder.pos_embed")
    if len(ours) < len(state):
        faults.append("has some weights twice under different names")
    if faults:
        return {}, sizes, {}, " and ".join(faults)
    values = {"num_classes": sizes["classes"], "backbone_args": vit_arguments(sizes, side)}
    values["decoder_channels"] = sizes["channels"]
    return {name: tensor.float() for name, tensor in ours.items() if name not in head}, sizes, values, ""


def draw_crops(region: Tensor, crop_size: int, count: int) -> Tensor:
    """Random top-left corners (B, count, 2) of crops centred on uncertain or background pixels.

    Only crops that lie inside the image are drawn, no corner twice. An image with fewer than `count` such
    centres draws from all positions.

    Args:
        region: (B, H, W) of `region_map`; H and W exceed `crop_size`.
    """
    margin = crop_size // 2
    centres = region[:, margin : region.shape[1] - margin, margin : region.shape[2] - margin] <= 1
    width = centres.shape[2]
    centres = centres.flatten(1)
    centres = centres | (centres.sum(1, keepdim=True) < count)
    # the largest of independent uniform numbers are a random subset: no loop over images, no host sync
    order = torch.rand(centres.shape, device=region.device).masked_fill(~centres, -1.0)
    chosen = order.topk(count, dim=1).indices
    return torch.stack([chosen // width, chosen % width], dim=-1)


def cut_crops(maps: Tensor, top_left: Tensor, crop_size: int) -> Tensor:
    """Crops (K, B, ..., crop_size, crop_size) of maps (B, ..., H, W) at top-left corners (B, K, 2)."""
    windows = maps.unfold(-2, crop_size, 1).unfold(-2, crop_size, 1)  # (B, ..., rows, cols, s, s), a view
    windows = windows.movedim((-4, -3), (1, 2))
    batch = torch.arange(len(maps), device=maps.device)[None]
    rows, cols = top_left.unbind(-1)
    return windows[batch, rows.T, cols.T]


OFFICIAL_MODULES = {"encoder.vit.": "encoder.", "projector.": "proj_head.", "teacher_projector.": "proj_head_t."}
"""First part of our names -> the original's; classifier, aux_classifier and decoder are called the same."""

OFFICIAL_PARAMETERS = {
    ".parametrizations.weight.original0": ".weight_g",  # gains of the weight normalisation
    ".parametrizations.weight.original1": ".weight_v",  # directions
}
"""Last part of our names -> that of the original's older files; newer ones have ours."""

OFFICIAL_HEAD = "encoder.head."
"""The ImageNet classifier: the original keeps it in every checkpoint and never uses it."""

OFFICIAL_LAYOUT = {
    "encoder.vit.cls_token": "1 1 width",
    "encoder.vit.pos_embed": "1 positions width",
    **{f"encoder.vit.{name}": axes for name, axes in VIT_LAYOUT.items()},
    "encoder.vit.norm.weight": "width",
    "encoder.vit.norm.bias": "width",
    "encoder.head.weight": "1000 width",
    "encoder.head.bias": "1000",
    "classifier.weight": "classes width 1 1",
    "aux_classifier.weight": "classes width 1 1",
    "decoder.conv6.weight": "channels width 3 3",
    "decoder.conv7.weight": "channels channels 3 3",
    "decoder.conv8.weight": "1+classes channels 1 1",
    "projector.mlp.0.weight": "hidden width",
    "projector.mlp.0.bias": "hidden",
    "projector.mlp.2.weight": "hidden hidden",
    "projector.mlp.2.bias": "hidden",
    "projector.mlp.4.weight": "bottleneck hidden",
    "projector.mlp.4.bias": "bottleneck",
    "projector.last_layer.parametrizations.weight.original0": "out 1",
    "projector.last_layer.parametrizations.weight.original1": "out bottleneck",
}
"""Our names and the shapes of their tensors; the teacher's projector is like the student's."""


def _official_name(name: str) -> str:
    """Our name -> the original's."""
    return _rename(name, OFFICIAL_MODULES, OFFICIAL_PARAMETERS)


def _our_name(name: str) -> str:
    """A name of the original, with `module.` or without -> ours; the head keeps its own."""
    modules = {OFFICIAL_HEAD: OFFICIAL_HEAD} | {theirs: ours for ours, theirs in OFFICIAL_MODULES.items()}
    parameters = {theirs: ours for ours, theirs in OFFICIAL_PARAMETERS.items()}
    return _rename(name.replace("module.", ""), modules, parameters)


def _rename(name: str, first: Mapping[str, str], last: Mapping[str, str]) -> str:
    """`name` with its first and its last part replaced where the tables know them."""
    head = next((part for part in first if name.startswith(part)), "")
    tail = next((part for part in last if name.endswith(part)), "")
    return first.get(head, "") + name[len(head) : len(name) - len(tail)] + last.get(tail, "")

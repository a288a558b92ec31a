"""ToCo: token contrast (Ru et al., CVPR 2023, arXiv 2303.01267)."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from wsss import InputError
from wsss.methods.base import WSSSModule
from wsss.networks.decoders import LargeFOV, Projector
from wsss.networks.vit import ViTEncoder
from wsss.optim import update_average, warmup_poly
from wsss.refine.cam import (
    box_mask,
    cam_to_label,
    cut_crops,
    draw_crops,
    region_map,
    resize,
)
from wsss.refine.par import PAR, refine_cam


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
            *(("cam_scales", scale) for scale in cam_scales),
        ):
            if value <= 0:
                raise InputError(f"{name} is {value}: expected more than 0")
        self.low_threshold, self.high_threshold = low_threshold, high_threshold
        self.local_crops, self.local_crop_size = local_crops, local_crop_size
        self.negative_ratio, self.ema_momentum = negative_ratio, ema_momentum
        self.par_scale, self.released_behaviour = par_scale, released_behaviour
        self.lr, self.head_lr_factor, self.weight_decay = lr, head_lr_factor, weight_decay
        self.warmup_steps, self.warmup_ratio, self.power = warmup_steps, warmup_ratio, power
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

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        # read while the labels are on the host, so that PAR knows its number of maps without a sync in the step
        return batch | {"max_labels": max(1, int(batch["label"].sum(1).max()))}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        image, label, box = batch["image"], batch["label"], batch["image_box"]
        phase: Mapping[str, Any] = next((p for p in self.phases if self.global_step <= p["until"]), {"weights": {}})
        changed = {key: weight for key, weight in phase["weights"].items() if key in self.losses}
        weights = {key: w for key, w in (self.loss_weights | changed).items() if w is not None}
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
            first = torch.cat([self.classifier(patches), self.aux_classifier(aux_patches)], dim=1).detach()
            cam, aux_cam = self.multiscale(image, first).chunk(2, dim=1)
        if "ptc" in weights:
            token_label = self.token_label(aux_cam, label, box)
            terms["ptc"] = self.losses["ptc"](patches.flatten(2).transpose(1, 2), token_label)
        if "ctc" in weights:
            crops, positive = self.cut_local_crops(batch["local_source"], aux_cam, label)
            if self._trainer is None or batch_idx % self.trainer.accumulate_grad_batches == 0:
                self.update_teacher()  # once a step, however many batches the step takes
            student = torch.cat([tokens.class_token, self.encoder(crops.flatten(0, 1)).class_token])
            student = self.projector(student).unflatten(0, (-1, len(image)))  # (2 + K, B, out)
            teacher = self.teacher_projector(tokens.class_token.detach()).unflatten(0, (-1, len(image)))
            terms["ctc"] = self.losses["ctc"](student, teacher, positive)
        if "seg" in weights or "dense_energy" in weights:
            source = aux_cam if phase.get("pseudo_label_from") == "aux_cam" else cam
            pseudo = self.pseudo_label(image, source, label, box, batch.get("max_labels"))
            seg = resize(self.decoder(patches), image.shape[-2:])
        if "seg" in weights:
            terms["seg"] = self.losses["seg"](seg, pseudo)
        if "dense_energy" in weights:
            terms["dense_energy"] = self.losses["dense_energy"](self.colours(image), seg, pseudo, box)
        return self.combine(terms, weights)

    def token_label(self, aux_cam: Tensor, label: Tensor, box: Tensor) -> Tensor:
        """(B, h, w) ids of the patches, 255 where the auxiliary CAM is undecided or outside the box."""
        size = [side // self.encoder.patch_size for side in aux_cam.shape[-2:]]
        stride = 1 if self.released_behaviour else self.encoder.patch_size
        thresholds = (self.low_threshold, self.high_threshold)
        valid = box_mask(box, size, stride)
        return self.decided(cam_to_label(resize(aux_cam, size), label, self.background_threshold, thresholds, valid))

    def decided(self, pseudo: Tensor) -> Tensor:
        """Ids of a pseudo label; where there is no background, what looks like it is undecided (255)."""
        return pseudo if self.has_background else pseudo.masked_fill(pseudo == 0, 255)

    def cut_local_crops(self, source: Tensor, aux_cam: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Crops (K, B, 3, s, s), and (B, 2 + K) which of the two global views and the crops are positives."""
        region = region_map(aux_cam, label, self.low_threshold, self.high_threshold)
        if min(region.shape[-2:]) <= self.local_crop_size + 1:
            raise InputError(
                f"method.local_crop_size is {self.local_crop_size}, but the training images are "
                f"{region.shape[-1]}x{region.shape[-2]}: make the crops smaller or transform.crop_size larger"
            )
        top_left = draw_crops(region, self.local_crop_size, self.local_crops)
        inside = cut_crops(region.float(), top_left, self.local_crop_size).mean(dim=(-2, -1)).T  # (B, K)
        positive = F.pad(inside > self.negative_ratio, (2, 0), value=True)
        return cut_crops(source, top_left, self.local_crop_size), positive

    def update_teacher(self) -> None:
        """Exponential moving average of the projector; the gains and biases follow too."""
        update_average(self.teacher_projector.parameters(), self.projector.parameters(), self.ema_momentum)

    def pseudo_label(
        self,
        image: Tensor,
        cam: Tensor,
        label: Tensor,
        box: Tensor | None = None,
        max_labels: int | None = None,
    ) -> Tensor:
        """(B, H, W) ids from the CAM refined by PAR; 255 where undecided or outside the box."""
        if box is None:
            box = torch.tensor([[0, image.shape[2], 0, image.shape[3]]], device=image.device).expand(len(image), -1)
        colours = self.colours(image)
        colours = colours.to(torch.uint8).float() if self.released_behaviour else colours.clamp(0, 255)
        pseudo = refine_cam(
            self.par,
            colours / 255,
            cam,
            label,
            (self.low_threshold, self.high_threshold),
            box_mask(box, image.shape[-2:]),
            max_labels or self.num_classes,
            self.par_scale,
        )
        return self.decided(pseudo)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        heads = [self.classifier, self.aux_classifier, self.projector, self.decoder]
        groups = [
            {"params": [p for p in self.encoder.parameters() if p.requires_grad], "lr": self.lr},
            {
                "params": [p for head in heads for p in head.parameters() if p.requires_grad],
                "lr": self.lr * self.head_lr_factor,
            },
        ]
        optimizer: Optimizer = AdamW(groups, weight_decay=self.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = LambdaLR(optimizer, warmup_poly(total, self.warmup_steps, self.warmup_ratio, self.power))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

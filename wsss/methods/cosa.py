"""CoSA: co-training with swapping assignments (Yang et al., ECCV 2024, arXiv 2402.17891)."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import box_mask, larger, min_max, rescale, resize, with_background
from wsss.methods.base import OfficialCheckpoint, WSSSModule
from wsss.methods.toco import OFFICIAL_HEAD, OFFICIAL_LAYOUT, ToCo, read_official_vit
from wsss.networks.decoders import LargeFOV
from wsss.networks.vit import ViTEncoder
from wsss.optim import adamw, stepwise, update_average, warmup_poly
from wsss.refine.par import refine_cam
from wsss.refine.thresholds import MixtureThresholds


class Stream(nn.Module):
    """ToCo's network without what its class token learns from: an encoder, two classifiers, a decoder."""

    def __init__(
        self,
        num_classes: int,
        backbone: str,
        weights: str | None,
        backbone_args: Mapping[str, Any] | None,
        aux_layer: int,
        channels: int,
        dilation: int,
    ) -> None:
        super().__init__()
        self.encoder = ViTEncoder(backbone, weights, backbone_args, aux_layer)
        width = self.encoder.embed_dim
        self.classifier = nn.Conv2d(width, num_classes, 1, bias=False)
        self.aux_classifier = nn.Conv2d(width, num_classes, 1, bias=False)
        self.decoder = LargeFOV(width, num_classes + 1, channels, dilation)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> (aux_)logits (B, C), (aux_)cam (B, C, h, w) raw, seg (B, 1 + C, h, w), all with gradient."""
        tokens = self.encoder(image)
        return {
            "logits": ToCo.classify(self.classifier, tokens.patches),
            "aux_logits": ToCo.classify(self.aux_classifier, tokens.aux_patches),
            "cam": self.classifier(tokens.patches),
            "aux_cam": self.aux_classifier(tokens.aux_patches),
            "seg": self.decoder(tokens.patches),
        }


class CoSA(WSSSModule):
    """Two streams of one network: what a slow teacher finds in a weak view, a student learns to find in a strong one.

    The teacher's CAM is the pseudo label of the student's segmentation, and the teacher's segmentation, made soft and
    cut to the image labels, the target of the student's CAM. The teacher is the moving average of the student, and what
    is evaluated and predicts. The soft perplexity weights and the contrastive separation of the paper are in no
    released run, nor here; its dynamic thresholds are in the released code and switched off in all runs, and so here.

    A training batch holds `image`, the weak view, `strong_view` (B, 3, H, W), the same pixels in other colours, `label`
    and `image_box` (B, 4).

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone: timm name of a plain vision transformer.
        weights: None, a timm tag, or a `.pth` or `.safetensors` file.
        backbone_args: arguments of timm's constructor, e.g. `depth`.
        aux_layer: index into the list of block outputs for the auxiliary patch tokens.
        decoder_channels: width of the LargeFOV decoder.
        decoder_dilation: dilation of its 3x3 convolutions.
        copy_teacher: the teacher starts as a copy of the student; as released it is a network of its own, with the same
            `weights` and other random heads, which it forgets at the rate of the average.
        ema_momentum: share of the teacher that stays in a step.
        cam_scales: scales of the teacher's maps, with mirror images.
        background_threshold: up to this value a CAM means background in the evaluation.
        low_threshold: the low background score of the pseudo label.
        high_threshold: the high background score of the pseudo label.
        aux_low_threshold: the low one of the pseudo label of the auxiliary CAM.
        aux_high_threshold: the high one of it.
        dynamic_thresholds: `batches`, `least` and `momentum` of `MixtureThresholds`, {} for those of the released code:
            in each step that makes pseudo labels these four begin to follow the largest values of the teacher's CAMs on
            the grid of patches, of main and auxiliary CAM apart. None leaves them as they are.
        label_scale: the pseudo labels are made at this resolution relative to the image's.
        temperature: of the softmax that makes the target of the CAM of the sum of the teacher's scores.
        losses: weight and arguments of cls, aux_cls, seg, swap_cam, dense_energy; null leaves a term out.
        loss_warmup_steps: up to and including this optimizer step, counted from 0, `warmup_weights` replace those of
            `losses`: 0 multiplies a term (its parameters then still see weight decay), null leaves it out.
        warmup_weights: by loss.
        lr: learning rate of the encoder.
        head_lr_factor: the other parameters learn this much faster.
        weight_decay: of all parameters, biases and norms included.
        warmup_steps: steps of linear warm-up.
        warmup_ratio: the first step's fraction of the learning rate.
        power: of the polynomial decay.
        released_behaviour: the auxiliary CAM is that of the last of `cam_scales` alone, as released; otherwise the sum
            of all, as the main one.
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
        copy_teacher: bool = False,
        ema_momentum: float = 0.9994,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5),
        background_threshold: float = 0.5,
        low_threshold: float = 0.25,
        high_threshold: float = 0.7,
        aux_low_threshold: float = 0.25,
        aux_high_threshold: float = 0.7,
        dynamic_thresholds: Mapping[str, Any] | None = None,
        label_scale: float = 0.5,
        temperature: float = 0.01,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        loss_warmup_steps: int = 6000,
        warmup_weights: Mapping[str, float | None] | None = None,
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
                "seg": {"weight": 0.1},
                "swap_cam": {"weight": 0.05},
                "dense_energy": {"weight": 0.05},
            }
        if warmup_weights is None:
            warmup_weights = {"seg": 0.0, "swap_cam": 0.0, "dense_energy": 0.0}
        computed = ("cls", "aux_cls", "seg", "swap_cam", "dense_energy")
        super().__init__(num_classes, classes, background_threshold, cam_scales, losses, computed)
        self.save_hyperparameters()
        for low, high, kind in (
            (low_threshold, high_threshold, ""),
            (aux_low_threshold, aux_high_threshold, "aux_"),
        ):
            if not 0 <= low <= high <= 1:
                raise InputError(
                    f"{kind}low_threshold={low} and {kind}high_threshold={high}: expected 0 <= low <= high <= 1"
                )
        for name, value in (
            ("decoder_channels", decoder_channels),
            ("temperature", temperature),
            ("label_scale", label_scale),
        ):
            if value <= 0:
                raise InputError(f"{name} is {value}: expected more than 0")
        if not 0 <= ema_momentum <= 1:
            raise InputError(f"ema_momentum is {ema_momentum}: expected the share of the teacher that stays, 0 to 1")
        for key, weight in warmup_weights.items():
            if key not in computed or not isinstance(weight, int | float | None):
                raise InputError(
                    f"warmup_weights.{key} is {weight}: expected a number or null for one of {', '.join(computed)}"
                )
        self.warmup_weights = dict(warmup_weights)
        self.dynamic: Any = None  # MixtureThresholds of each kind of CAM
        if dynamic_thresholds is not None:
            known = ("batches", "least", "momentum")
            if unknown := set(dynamic_thresholds) - set(known):
                raise InputError(f"dynamic_thresholds.{min(unknown)} does not exist: known are {', '.join(known)}")
            starts = {"cam": (low_threshold, high_threshold), "aux_cam": (aux_low_threshold, aux_high_threshold)}
            self.dynamic = nn.ModuleDict(
                {name: MixtureThresholds(*start, **dynamic_thresholds) for name, start in starts.items()}
            )

        network = (num_classes, backbone, weights, backbone_args, aux_layer, decoder_channels, decoder_dilation)
        self.student = Stream(*network)
        self.teacher = deepcopy(self.student) if copy_teacher else Stream(*network)
        self.teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "CoSA":
        super().train(mode)
        self.teacher.eval()  # it drops nothing
        return self

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> what the teacher finds, see `Stream.forward`."""
        return self.teacher(image)

    @property
    def views(self) -> tuple[str, ...]:
        return ("image", "strong_view", "image_box")

    def weights_at(self, step: int) -> dict[str, float]:
        """The weights of the loss terms that take part in an optimizer step."""
        early = self.warmup_weights if step <= self.hparams.loss_warmup_steps else {}
        changed = {key: weight for key, weight in early.items() if key in self.losses}
        return {key: weight for key, weight in (self.loss_weights | changed).items() if weight is not None}

    @property
    def loss_starts(self) -> dict[str, int]:
        first, begin = self.weights_at(0), self.hparams.loss_warmup_steps + 1
        return {key: 0 if key in first else max(0, begin) for key in self.losses}

    @property
    def transformer(self) -> Any:
        return self.teacher.encoder.vit  # which is what is evaluated

    @property
    def smallest_side(self) -> int:
        return self.least_side(self.teacher.encoder.patch_size)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        weak, strong, label, box = batch["image"], batch["strong_view"], batch["label"], batch["image_box"]
        weights = self.weights_at(self.global_step)
        terms: dict[str, Tensor] = {}

        output = self.student(strong)
        if "cls" in weights:
            terms["cls"] = self.losses["cls"](output["logits"], label)
        if "aux_cls" in weights:
            terms["aux_cls"] = self.losses["aux_cls"](output["aux_logits"], label)

        if not weights.keys() <= {"cls", "aux_cls"}:
            cam, aux_cam, scores = self.assign(weak)
            seg = resize(output["seg"], strong.shape[-2:])
            for name, maps in (("cam", cam), ("aux_cam", aux_cam)) if self.dynamic is not None else ():
                values = resize(maps * label[:, :, None, None], output["cam"].shape[-2:]).amax(1)
                self.dynamic[name](values)
            pseudo = self.pseudo_label(weak, cam, label, box, batch.get("max_labels"))
        if "seg" in weights:
            aux_pseudo = self.pseudo_label(weak, aux_cam, label, box, batch.get("max_labels"), "aux_")
            terms["seg"] = 0.5 * self.losses["seg"](seg, pseudo) + 0.5 * self.losses["seg"](seg, aux_pseudo)
        if "swap_cam" in weights:
            terms["swap_cam"] = self.losses["swap_cam"](output["cam"], self.probabilities(scores, label))
        if "dense_energy" in weights:
            terms["dense_energy"] = self.losses["dense_energy"](self.colours(strong), seg, pseudo, box)
        return self.combine(terms, weights)

    @torch.no_grad()
    def assign(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the teacher finds at all scales and in mirror images, each (B, ..., H, W).

        Main and auxiliary CAMs in [0, 1), and the sum of the scores of the segmentation, 1 + C.
        """
        size, found = image.shape[-2:], []
        for scale in self.cam_scales:
            scaled = image if scale == 1.0 else rescale(image, scale)
            output = self.teacher(torch.cat([scaled, scaled.flip(-1)]))
            pairs = (resize(output[name], size).chunk(2) for name in ("cam", "aux_cam", "seg"))
            (cam, other_cam), (aux, other_aux), (seg, other_seg) = pairs
            found.append((larger(cam, other_cam.flip(-1)), larger(aux, other_aux.flip(-1)), seg + other_seg.flip(-1)))
        cams, aux_cams, scores = (torch.stack(maps).float() for maps in zip(*found, strict=True))
        aux_cam = aux_cams[-1] if self.hparams.released_behaviour else aux_cams.sum(0)
        return min_max(cams.sum(0)), min_max(aux_cam), scores.sum(0)

    def multiscale(self, image: Tensor, first: Tensor | None = None) -> Tensor:
        """(B, 2C, H, W) in [0, 1]: both CAMs of the teacher, as its student is taught with."""
        return torch.cat(self.assign(image)[:2], dim=1)

    def pseudo_label(
        self,
        image: Tensor,
        cam: Tensor,
        label: Tensor,
        box: Tensor | None = None,
        max_labels: int | None = None,
        kind: str = "",
    ) -> Tensor:
        """(B, H, W) ids from a CAM and two background scores; 255 where undecided or outside the box.

        `kind` is `aux_` for the auxiliary CAM.
        """
        if box is None:
            box = torch.tensor([[0, image.shape[2], 0, image.shape[3]]], device=image.device).expand(len(image), -1)
        thresholds = [self.hparams[f"{kind}low_threshold"], self.hparams[f"{kind}high_threshold"]]
        if self.dynamic is not None:
            thresholds = self.dynamic[f"{kind}cam"].bounds.tolist()
        valid, count = box_mask(box, image.shape[-2:]), max_labels or self.num_classes
        pseudo = refine_cam(None, image, cam, label, thresholds, valid, count, self.hparams.label_scale)
        return pseudo if self.has_background else pseudo.masked_fill(pseudo == 0, 255)

    def probabilities(self, scores: Tensor, label: Tensor) -> Tensor:
        """(B, 1 + C, H, W), nearly one-hot, from the sum of the teacher's scores; none for classes without label."""
        present = with_background(label)
        if not self.has_background:
            present[:, 0] = 0
        scores = scores.masked_fill(present[:, :, None, None] == 0, -1e5)
        return (scores / self.hparams.temperature).softmax(dim=1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        update_average(self.teacher.parameters(), self.student.parameters(), self.hparams.ema_momentum)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.dynamic is not None:
            checkpoint["cam_values"] = {name: [*thresholds.values] for name, thresholds in self.dynamic.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, values in checkpoint.get("cam_values", {}).items() if self.dynamic is not None else ():
            self.dynamic[name].values.extend(tensor.to(self.device) for tensor in values)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        heads = (self.student.classifier, self.student.aux_classifier, self.student.decoder)
        groups = [
            {"params": [p for p in self.student.encoder.parameters() if p.requires_grad], "lr": self.hparams.lr},
            {
                "params": [p for head in heads for p in head.parameters()],
                "lr": self.hparams.lr * self.hparams.head_lr_factor,
            },
        ]
        optimizer = adamw(groups, weight_decay=self.hparams.weight_decay)
        warmup = (self.hparams.warmup_steps, self.hparams.warmup_ratio)
        return stepwise(optimizer, warmup_poly(self.total_steps, *warmup, self.hparams.power))

    @classmethod
    def read_official(cls, state: Mapping[str, Tensor], path: str) -> OfficialCheckpoint | None:
        """The state dict of one network of the original code, student or teacher, which both of ours become.

        It tells `num_classes`, `backbone_args` (see `vit_arguments`) and `decoder_channels`. ToCo has the same names,
        and projectors.
        """
        names = {name.removeprefix("module.") for name in state}
        if any(name.startswith(("encoder.visual.", "proj_head")) for name in names):
            return None
        if not any(name.startswith("encoder.") for name in names):
            return None
        kept, _, values, said = read_official_vit(state, STREAM_LAYOUT)
        if said:
            raise InputError(
                f"checkpoint {path} is no network of the original CoSA code: it {said}; give the state dict of its "
                "student or its teacher, or a checkpoint of wsss-train"
            )
        both = {f"{stream}.{name}": t for stream in ("student", "teacher") for name, t in kept.items()}
        return OfficialCheckpoint("cosa", both, values)

    def _fuse(self, image: Tensor, size: Sequence[int], seg: Tensor, protocol: Any) -> Tensor:
        """As released: scales are summed at the network's size, and their sum is enlarged."""
        return resize(super()._fuse(image, self.sized(image).shape[-2:], seg, protocol), size)


STREAM_LAYOUT = {name: axes for name, axes in OFFICIAL_LAYOUT.items() if not name.startswith("projector.")}
STREAM_LAYOUT |= {f"{OFFICIAL_HEAD}weight": "labels width", f"{OFFICIAL_HEAD}bias": "labels"}
"""Names of `Stream` and shapes in a file of the original code, whose unused head is of any size."""

"""What all methods share: logging, evaluation steps and checkpoint contents. No training logic."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from wsss import InputError
from wsss.losses import build
from wsss.metrics import Protocol, evaluation, figures_of
from wsss.refine.cam import cam_to_label, denormalise, multiscale_cam, multiscale_seg, resize
from wsss.refine.crf import dense_crf


class WSSSModule(pl.LightningModule):
    """Base of the methods.

    A method gives `forward(image) -> {"logits": (B, C), "seg": (B, 1 + C, h, w) or None, <cam name>: (B, C, h, w)}`,
    one pass over the network with raw maps, and `training_step`, which ends with `self.combine(terms, weights)`.

    Args:
        num_classes: C, foreground classes only; `classes` are their names, numbers when None.
        background_threshold: up to this value a CAM means background in the evaluation.
        cam_scales: scales of the multi-scale CAM, in training and evaluation.
        losses: mapping from a loss key to its `weight` and arguments, or to None to leave the term out.
        computed: the loss keys this method computes.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    cam_names: tuple[str, ...] = ("cam",)
    has_background: bool = True

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None,
        background_threshold: float,
        cam_scales: Sequence[float],
        losses: Mapping[str, Mapping[str, Any] | None],
        computed: Sequence[str],
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.classes = tuple(classes or map(str, range(num_classes)))
        if len(self.classes) != num_classes:
            raise InputError(f"classes has {len(self.classes)} names for num_classes={num_classes}")
        self.background_threshold = background_threshold
        self.cam_scales = tuple(cam_scales)
        self.protocol = Protocol()
        self.origin: dict[str, Any] = {}  # names of method and data set, for those who load a checkpoint
        self.losses = nn.ModuleDict()
        self.loss_weights: dict[str, float] = {}
        for key, settings in losses.items():
            if key not in computed:
                raise InputError(f"losses.{key}: {type(self).__name__} does not compute it, only {', '.join(computed)}")
            if settings is not None:
                if not isinstance(settings, Mapping) or not isinstance(settings.get("weight", 1.0), int | float):
                    raise InputError(f"losses.{key} is {settings}: expected {{weight: number, ...}} or null")
                arguments = dict(settings)
                self.loss_weights[key] = float(arguments.pop("weight", 1.0))
                self.losses[key] = build(key, **arguments)
        if not self.losses:
            raise InputError("losses: every term is null, so there is nothing to learn")
        self.metrics: Any = evaluation(num_classes, self.cam_names, background_threshold)

    def without_background(self) -> None:
        """For data whose classes tile the image: no pixel of a CAM, a pseudo label or a prediction is background."""
        self.has_background, self.background_threshold = False, -1.0
        self.metrics = evaluation(self.num_classes, self.cam_names, self.background_threshold)

    def combine(self, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Any]:
        """Weighted sum of the loss terms, shown with its parts; what `training_step` returns and RunLog logs."""
        total = torch.stack([weights[key] * term for key, term in terms.items()]).sum()
        self.log("train/loss", total.detach(), prog_bar=True, logger=False)
        parts = {key: term.detach() for key, term in terms.items()}
        self.log_dict({f"train/loss_{key}": term for key, term in parts.items()}, prog_bar=True, logger=False)
        return {"loss": total, "terms": parts}

    def raw_cam(self, image: Tensor) -> Tensor:
        """(B, K*C, h, w): the raw maps of one pass, one group of C channels for each of `cam_names`."""
        output = self(image)
        return torch.cat([output[name] for name in self.cam_names], dim=1)

    @torch.no_grad()
    def infer(self, image: Tensor, cams: bool = True) -> dict[str, Tensor]:
        """`forward` at the protocol's size; CAMs multi-scale, in [0, 1), at image size (if `cams`, or without seg)."""
        if self.protocol.size is not None:
            image = resize(image, (self.protocol.size, self.protocol.size))
        output = self(image)
        if not cams and output["seg"] is not None:
            return output
        first = torch.cat([output[name] for name in self.cam_names], dim=1)
        maps = self.multiscale(image, first).chunk(len(self.cam_names), dim=1)
        return output | dict(zip(self.cam_names, maps, strict=True))

    def colours(self, image: Tensor) -> Tensor:
        """Undoes the normalisation: (B, 3, H, W) colours 0..255, float."""
        return denormalise(image, self.mean, self.std)

    def multiscale(self, image: Tensor, first: Tensor | None = None) -> Tensor:
        """(B, K*C, H, W) in [0, 1]: `raw_cam` over `cam_scales` and mirror images; `first` is that of `image`."""
        return multiscale_cam(self.raw_cam, image, self.cam_scales, first)

    def segment(self, image: Tensor, size: Sequence[int], seg: Tensor) -> Tensor:
        """Class scores (B, 1 + C, *size) under the protocol, from images as loaded and the `seg` of `infer`."""
        protocol, side = self.protocol, self.protocol.size
        if tuple(protocol.scales) == (1.0,) and protocol.flip == "none":
            scores = resize(seg, size)
        else:
            sized = image if side is None else resize(image, (side, side))
            how = (protocol.scales, protocol.flip, protocol.fusion)
            scores = multiscale_seg(lambda x: self(x)["seg"], sized, size, *how)
        if protocol.crf is not None:
            scores = dense_crf(resize(self.colours(image), size), scores.softmax(1), **protocol.crf)
        return scores if self.has_background else torch.cat([scores[:, :1] - torch.inf, scores[:, 1:]], dim=1)

    def pseudo_label(self, image: Tensor, cam: Tensor, label: Tensor) -> Tensor:
        """(B, H, W) ids, 255 ignore: the pixel supervision a method makes from its CAM."""
        return cam_to_label(cam, label, self.background_threshold)

    def describe(self, split: str) -> dict[str, str]:
        """For each evaluated figure what it was measured on and under which protocol."""
        notes = self.protocol.describe(split, self.cam_scales, self.background_threshold)
        return {f"val/{key}": note for key, note in notes.items()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        output, label = self.infer(batch["image"]), batch["label"]
        for key in ("map", "image_map"):
            self.metrics[key].update(output["logits"], label)
        if "mask" not in batch:
            return
        mask, size = batch["mask"], batch["mask"].shape[-2:]
        if output["seg"] is not None:
            self.metrics["miou"].update(self.segment(batch["image"], size, output["seg"]).argmax(1), mask)
        kept = label if self.protocol.image_labels == "true" else (output["logits"] > 0).to(label)
        for name in self.cam_names:
            self.metrics[f"{name}_miou"].update(resize(output[name], size), kept, mask)

    def on_validation_epoch_end(self) -> None:
        figures = figures_of(self.metrics, self.classes)
        self.log_dict({f"val/{key}": value for key, value in figures.items()}, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        images = {"classes": list(self.classes), "mean": list(self.mean), "std": list(self.std)}
        images["has_background"] = self.has_background
        checkpoint["wsss"] = images | {"protocol": asdict(self.protocol)} | self.origin

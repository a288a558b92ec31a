"""SEAM (Wang et al., CVPR 2020, arXiv 2004.04581) and PPC on top of it (Du et al., CVPR 2022, arXiv 2110.07110)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from wsss import InputError
from wsss.cam import inference_norm, of_classes, present_classes
from wsss.losses.seam import view_cam
from wsss.methods.base import OfficialCheckpoint, WSSSModule
from wsss.networks.resnet38 import ResNet38, SEAMHead, compare_released, with_counters
from wsss.optim import sgd_poly


class SEAM(WSSSModule):
    """CAMs that do not change when the image is shrunk, and that similar pixels share.

    A pixel correlation module revises the CAM by the similarity of low-level features. Image and shrunk image go
    through one network; their CAMs have to agree (`er`), and the revised CAM of each with the CAM of the other
    (`ecr`). PPC adds a contrast between pixels and class prototypes (`ppc`); its arguments are `view_size=128`,
    `projection=128` and that loss.

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone: `resnet38`, whose inner layers the module reads.
        weights: None, MXNet's `.params` file of ImageNet weights, or a `.pth` file of ResNet38.
        backbone_args: arguments of `ResNet38`.
        dropout: probability that a channel of the last features is dropped.
        view_scale: size of the second view relative to the first.
        view_size: its side in pixels instead; None for `view_scale`.
        projection: features of a pixel for `ppc`; None where this loss is left out.
        cam_scales: scales of the multi-scale maps; 1 always takes part.
        background_threshold: up to this value a CAM means background in the evaluation.
        losses: weight and arguments of cls, rvmin, er, ecr, ppc; null leaves a term out.
        lr: learning rate of the backbone's weights; biases learn twice, new layers ten times as fast.
        weight_decay: of weights, not of biases.
        momentum: of SGD. The released code means 0.9, but its optimizer takes the weight decay for the momentum:
            5e-4 is what its results were made with.
        power: of the polynomial decay.
    """

    photographic_scales = True
    fuse = staticmethod(torch.add)
    normalise = staticmethod(inference_norm)  # what is lowest ends a little below 0

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "resnet38",
        weights: str | None = None,
        backbone_args: Mapping[str, Any] | None = None,
        dropout: float = 0.5,
        view_scale: float = 0.3,
        view_size: int | None = None,
        projection: int | None = None,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5, 2.0),
        background_threshold: float = 0.26,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        momentum: float = 5e-4,
        power: float = 0.9,
    ) -> None:
        if losses is None:
            losses = {key: {"weight": 1.0} for key in ("cls", "rvmin", "er", "ecr")}
        computed = ("cls", "rvmin", "er", "ecr", *(("ppc",) if projection is not None else ()))
        super().__init__(num_classes, classes, background_threshold, cam_scales, losses, computed)
        self.save_hyperparameters()
        if backbone != "resnet38":
            raise InputError(f"backbone is {backbone!r}: the pixel correlation module needs resnet38")
        self.backbone = ResNet38.build(weights, backbone_args)
        self.head = SEAMHead(self.backbone.channels, num_classes, projection, dropout)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        label = batch["label"]
        views = [batch["image"], self.second_view(batch["image"])]
        outputs = [self.head(view, self.backbone(view)) for view in views]
        # maps at image size of the background and the classes that are there, (B, 1 + K, H, W)
        shown, classes = present_classes(label, batch.get("max_labels", self.num_classes))
        classes = F.pad(classes + 1, (1, 0))

        def up_sampled(maps: Tensor, view: Tensor) -> Tensor:
            return up_sample(of_classes(maps, classes, 1 + self.num_classes), view)

        cams = [up_sampled(output.cam, view) for output, view in zip(outputs, views, strict=True)]
        revised = [up_sampled(output.revised_cam, view) for output, view in zip(outputs, views, strict=True)]
        terms: dict[str, Tensor] = {}
        if "cls" in self.losses:
            logits = [self.classify(output.cam, view) for output, view in zip(outputs, views, strict=True)]
            terms["cls"] = torch.stack([self.losses["cls"](scores, label) for scores in logits]).mean()
        if "rvmin" in self.losses:
            terms["rvmin"] = torch.stack([self.losses["rvmin"](cam, shown) for cam in revised]).mean()
        # what is compared has the size of the second view
        compared = [view_cam(cam, shown, views[1].shape[-2:]) for cam in cams]
        if "er" in self.losses:
            terms["er"] = self.losses["er"](*compared, self.num_classes)
        if "ecr" in self.losses:
            first, second = (view_cam(cam, shown, views[1].shape[-2:]) for cam in revised)
            ecr = self.losses["ecr"]
            terms["ecr"] = ecr(first, compared[1], self.num_classes) + ecr(second, compared[0], self.num_classes)
        if "ppc" in self.losses:
            projections = (outputs[0].projection, outputs[1].projection)
            terms["ppc"] = self.losses["ppc"](projections, (outputs[0].revised_cam, outputs[1].revised_cam), label)
        return self.combine(terms, self.loss_weights)

    def second_view(self, image: Tensor) -> Tensor:
        side, scale = self.hparams.view_size, self.hparams.view_scale
        size = [side] * 2 if side else [int(length * scale) for length in image.shape[-2:]]
        return F.interpolate(image, size=tuple(size), mode="bilinear", align_corners=True)

    @staticmethod
    def classify(cam: Tensor, image: Tensor) -> Tensor:
        """Logits (B, C) of a CAM (B, 1 + C, h, w): its mean at the image's size; the background takes no part."""
        # the mean of what is interpolated is a weighted sum of what there is: the maps need not be enlarged
        rows, columns = (
            F.interpolate(torch.eye(short, device=cam.device)[None], size=long, mode="linear", align_corners=True)[
                0
            ].mean(1)
            for short, long in zip(cam.shape[-2:], image.shape[-2:], strict=True)
        )
        return (cam[:, 1:] * (rows[:, None] * columns)).sum(dim=(-2, -1))

    def forward(self, image: Tensor) -> dict[str, Any]:
        """(B, 3, H, W) -> logits (B, C); cam (B, C, H, W), the revised one; seg None."""
        output = self.head(image, self.backbone(image))
        logits = self.classify(output.cam, image)
        return {"logits": logits, "cam": up_sample(output.revised_cam[:, 1:], image), "seg": None}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        settings = {name: self.hparams[name] for name in ("lr", "weight_decay", "momentum", "power")}
        return sgd_poly(self, [self.head], self.total_steps, **settings)

    @classmethod
    def read_official(cls, state: Mapping[str, Tensor], path: str) -> OfficialCheckpoint | None:
        """`resnet38_SEAM.pth`, or PPC's file, which also has `fc_proj`; it tells `num_classes` and the widths."""
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        if not {"conv1a.weight", "f9.weight"} <= state.keys():
            return None
        option = "ppc" if "fc_proj.weight" in state else "seam"
        heads = OFFICIAL_HEADS | ({"fc_proj.weight": "projection conv6 1 1"} if option == "ppc" else {})
        said, sizes = compare_released(state, heads)
        if not said and sizes["maps"] < 2:
            said = "has no class beside the background in fc8.weight"
        if said:
            raise InputError(
                f"checkpoint {path} looks like one of SEAM or PPC (method={option}), but it {said}; give "
                "resnet38_SEAM.pth or the file of PPC on it, or a checkpoint of wsss-train"
            )
        ours = {f"{'head' if name in heads else 'backbone'}.{name}": tensor for name, tensor in state.items()}
        values: dict[str, Any] = {"num_classes": sizes["maps"] - 1, "backbone_args": {"width": sizes["width"]}}
        if option == "ppc":
            values["projection"] = sizes["projection"]
        return OfficialCheckpoint(option, with_counters(ours), values)


OFFICIAL_HEADS = {
    "fc8.weight": "maps conv6 1 1",
    "f8_3.weight": "64 conv4 1 1",
    "f8_4.weight": "128 conv5 1 1",
    "f9.weight": "192 195 1 1",
}
"""Names and shapes of what a released file holds beside the body; one of the maps is that of the background."""


def up_sample(maps: Tensor, image: Tensor) -> Tensor:
    """Bilinear with aligned corners to the image's size, as the released network does inside."""
    return F.interpolate(maps, size=image.shape[-2:], mode="bilinear", align_corners=True)

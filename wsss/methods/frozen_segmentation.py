"""Frozen segmentation: a small decoder of features that are computed once, trained on pseudo masks in seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import reduce, resize
from wsss.evaluation.classification import ClassificationMAP
from wsss.evaluation.metrics import SegmentationIoU
from wsss.evaluation.protocol import Measured
from wsss.methods.segmentation import PixelStage
from wsss.networks.frozen import FrozenNetwork
from wsss.optim import adamw, cosine, stepwise

ABSENT = -1e4
"""Score of a class that the classifier does not find: small, but finite, since scores of scales are added."""


class FrozenSegmentation(PixelStage):
    """Segmentation from pseudo masks on a network that never learns, with a classifier that says which classes to seek.

    The decoder overfits the faults of its masks within a few passes over them: it is small, drops channels, and its
    training short. No figure of it can be had from image labels but the classifier's, so that the last checkpoint is
    the result.

    A training batch holds `features` (B, D, h, w), `mean` (B, K), `pseudo_mask` (B, 4 h, 4 w) and `label` (B, C).

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone, weights, backbone_args, size: see `FrozenCAM`.
        channels: of the decoder: a 1x1 convolution, a 3x3 one, and the 1x1 one that scores the classes.
        dropout: probability that a channel is dropped before each of the last two convolutions.
        gate: classes whose probability in an image is below this are not sought there, the most probable one always
            is: what learns from few images is unsure of all. None seeks all.
        losses: weight and arguments of ce and clipped_ce, of the pixels, and cls, of the classifier; null leaves a term
            out.
        lr: largest learning rate of AdamW, which falls to 0 as a cosine.
        weight_decay: of AdamW.
    """

    learns_from = "maps"

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "tf_efficientnet_lite2",
        weights: str | None = "efficientnet_lite2",
        backbone_args: Mapping[str, Any] | None = None,
        size: int = 384,
        channels: int = 128,
        dropout: float = 0.2,
        gate: float | None = 0.2,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
    ) -> None:
        losses = {"ce": {"weight": 1.0}, "cls": {"weight": 1.0}} if losses is None else losses
        super().__init__(num_classes, classes, losses, ("ce", "clipped_ce", "cls"))
        self.save_hyperparameters()
        if gate is not None and "cls" not in self.losses:
            raise InputError(f"gate is {gate}, which needs the classifier: set losses.cls, or gate=null")
        self.frozen = FrozenNetwork(backbone, weights, backbone_args, size)
        self.mean, self.std = self.frozen.normalisation or (self.mean, self.std)
        self.decoder = nn.Sequential(
            ChannelNorm(self.frozen.widths[0]),
            nn.Conv2d(self.frozen.widths[0], channels, 1),
            nn.ReLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(channels, 1 + num_classes, 1),
        )
        self.classifier = nn.Conv2d(self.frozen.widths[1], num_classes, 1)
        self.metrics = nn.ModuleDict({"map": ClassificationMAP(), "miou": SegmentationIoU(1 + num_classes)})
        if "cls" not in self.losses:  # then nobody teaches the classifier
            self.classifier.requires_grad_(False)
            del self.metrics["map"]

    def sized(self, image: Tensor) -> Tensor:
        return self.frozen.resize(reduce(image, self.protocol.max_side))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) at the working size or a scale of it -> seg (B, 1 + C, h, w), logits (B, C)."""
        return self.decode(self.frozen(image).stages)

    def decode(self, features: Tensor) -> dict[str, Tensor]:
        """`forward` of the features (B, D, h, w) of the stages of images."""
        logits = self.classifier(self.frozen.finish(features).mean(dim=(-2, -1), keepdim=True))
        seg = self.decoder(features)
        if self.hparams.gate is not None and not self.training:
            absent = (logits.sigmoid() < self.hparams.gate) & (logits < logits.amax(dim=1, keepdim=True))
            seg = torch.cat([seg[:, :1], seg[:, 1:].masked_fill(absent, ABSENT)], dim=1)
        return {"seg": seg, "logits": logits.flatten(1)}

    @torch.no_grad()
    def infer_batch(self, batch: Mapping[str, Any], cams: bool = True) -> dict[str, Tensor]:
        return self.decode(batch["features"].float()) if "features" in batch else self.infer(batch["image"], cams)

    def describe(self, split: str) -> dict[str, Measured]:
        return {key: replace(note, size=self.frozen.sized) for key, note in super().describe(split).items()}

    @property
    def views(self) -> tuple[str, ...]:
        return ("features", "mean", "pseudo_mask")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        seg = self.decoder(batch["features"].float())
        logits = self.classifier(batch["mean"][:, :, None, None]).flatten(1)
        seg = resize(seg, batch["pseudo_mask"].shape[-2:])
        terms = {
            key: loss(logits, batch["label"]) if key == "cls" else loss(seg, batch["pseudo_mask"])
            for key, loss in self.losses.items()
        }
        return self.combine(terms, self.loss_weights)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        learnt = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = adamw(learnt, lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)
        return stepwise(optimizer, cosine(self.total_steps))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position (B, D, h, w): the scale of features differs among networks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, features: Tensor) -> Tensor:
        normed: Tensor = self.norm(features.movedim(1, -1))
        return normed.movedim(-1, 1)

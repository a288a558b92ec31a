"""Frozen CAM: class activation maps of a linear classifier on a network that never learns; masks in minutes.

What weights of ImageNet know already is kept: the features of an image are computed once, a classifier of their mean
(Zhou et al., CVPR 2016) is trained on these in seconds, and its maps spread over positions of similar features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import by_max, reduce
from wsss.evaluation.protocol import Measured
from wsss.methods.base import WSSSModule
from wsss.networks.frozen import FrozenNetwork
from wsss.optim import adamw, cosine, stepwise


class FrozenCAM(WSSSModule):
    """A classifier on frozen features; applied to every position it gives the maps.

    It learns from `mean` (B, K), the mean features of whole images; nothing of the network below them changes, and
    dropout is the only augmentation. Images are brought to one working size, small ones enlarged, since the maps have
    a cell for every 16 pixels or so.

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone: timm name of a convolutional network or a vision transformer.
        weights: `efficientnet_lite0`, 1 or 2 of the extra `pretrained`, a timm tag, or a file.
        backbone_args: arguments of timm's constructor, e.g. `output_stride`.
        size: longer side of an image in pixels.
        hidden: channels between two layers of the classifier; None for a single, linear one.
        dropout: probability that a channel of the features is dropped in training.
        propagation: `power` and `steps`: maps spread, so many times, by the cosine of the features to this power,
            its rows made to sum to 1 (as PCM of SEAM, Wang et al., CVPR 2020, without learning); None leaves it out.
        cam_scales: scales of the multi-scale maps. At scale 1 alone no mirror image takes part, and what is kept of
            an image is all that is needed.
        background_threshold: up to this value a CAM means background in the evaluation.
        losses: weight and arguments of cls.
        lr: largest learning rate of AdamW, which falls to 0 as a cosine.
        weight_decay: of AdamW.
    """

    normalise = staticmethod(by_max)
    learns_from = "mean"

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "tf_efficientnet_lite2",
        weights: str | None = "efficientnet_lite2",
        backbone_args: Mapping[str, Any] | None = None,
        size: int = 384,
        hidden: int | None = None,
        dropout: float = 0.5,
        propagation: Mapping[str, Any] | None = None,
        cam_scales: Sequence[float] = (1.0,),
        background_threshold: float = 0.2,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
    ) -> None:
        losses = {"cls": {"weight": 1.0}} if losses is None else losses
        super().__init__(num_classes, classes, background_threshold, cam_scales, losses, ("cls",))
        self.save_hyperparameters()
        if propagation is not None and (
            set(propagation) != {"power", "steps"} or propagation["power"] <= 0 or propagation["steps"] < 1
        ):
            raise InputError(
                f"propagation is {dict(propagation)}: expected {{power: above 0, steps: 1 or more}} or null"
            )
        self.frozen = FrozenNetwork(backbone, weights, backbone_args, size)
        self.mean, self.std = self.frozen.normalisation or (self.mean, self.std)
        self.dropout = nn.Dropout(dropout)
        if hidden is None:
            self.classifier: nn.Module = nn.Conv2d(self.frozen.widths[1], num_classes, 1)
        else:
            layers = nn.Conv2d(self.frozen.widths[1], hidden, 1), nn.ReLU(), nn.Conv2d(hidden, num_classes, 1)
            self.classifier = nn.Sequential(*layers)

    @property
    def views(self) -> tuple[str, ...]:
        return ("mean",)

    def sized(self, image: Tensor) -> Tensor:
        return self.frozen.resize(reduce(image, self.protocol.max_side))

    def forward(self, image: Tensor) -> dict[str, Any]:
        """(B, 3, H, W) at the working size -> logits (B, C); cam (B, C, h, w), not negative; seg None."""
        return self.classify(self.frozen(image).final)

    def classify(self, features: Tensor) -> dict[str, Any]:
        """`forward` of the final features (B, K, h, w) of images."""
        cam = self.classifier(features).relu()
        if self.hparams.propagation is not None:
            cam = propagate(cam, features, **self.hparams.propagation)
        return {
            "logits": self.classifier(features.mean(dim=(-2, -1), keepdim=True)).flatten(1),
            "cam": cam,
            "seg": None,
        }

    @torch.no_grad()
    def infer_batch(self, batch: Mapping[str, Any], cams: bool = True) -> dict[str, Tensor]:
        if "features" not in batch or self.cam_scales != (1.0,):
            return self.infer(batch["image"], cams)
        output = self.classify(self.frozen.finish(batch["features"].float()))
        return output | {"cam": self.multiscale(batch["image"], output["cam"])}

    def multiscale(self, image: Tensor, first: Tensor | None = None) -> Tensor:
        if self.cam_scales == (1.0,) and first is not None:
            return self.normalise(first)
        return super().multiscale(image, first)

    def describe(self, split: str) -> dict[str, Measured]:
        notes = {key: replace(note, size=self.frozen.sized) for key, note in super().describe(split).items()}
        if self.cam_scales == (1.0,):  # then no mirror image takes part
            notes |= {key: replace(note, flip="none") for key, note in notes.items() if note.flip == "always"}
        return notes

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        logits = self.classifier(self.dropout(batch["mean"])[:, :, None, None]).flatten(1)
        return self.combine({"cls": self.losses["cls"](logits, batch["label"])}, self.loss_weights)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = adamw(
            list(self.classifier.parameters()), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay
        )
        return stepwise(optimizer, cosine(self.total_steps))


def propagate(cam: Tensor, features: Tensor, power: float, steps: int) -> Tensor:
    """Every position takes the mean map of all positions, `steps` times, weighted by the similarity of features.

    Args:
        cam: (B, C, h, w).
        features: (B, D, h, w); the weight of two positions is their cosine, where positive, to the power `power`.
    """
    unit = F.normalize(features.flatten(2), dim=1)  # (B, D, N)
    similarity = F.relu(unit.mT @ unit) ** power
    similarity = similarity / (similarity.sum(dim=-1, keepdim=True) + 1e-6)  # a position without features has no row
    maps = cam.flatten(2).mT  # (B, N, C)
    for _ in range(steps):
        maps = similarity @ maps
    return maps.mT.reshape_as(cam)

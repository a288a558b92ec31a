"""CAM: the class activation maps of a plain classifier (Zhou et al., CVPR 2016), the baseline of every table."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import by_max
from wsss.methods.base import OfficialCheckpoint, WSSSModule
from wsss.networks.cnn import CNN
from wsss.networks.resnet38 import compare_released, with_counters
from wsss.networks.weights import start_classifier
from wsss.optim import sgd_poly


class CAM(WSSSModule):
    """A convolutional classifier whose last layer, applied to every position, gives the maps.

    With ResNet38 this is the first stage of PSA (Ahn and Kwak, CVPR 2018), on which SEAM, PPC and the networks of
    KAIST build. Images are normalised as timm's weights expect it, otherwise with ImageNet's mean.

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone: `resnet38`, or the timm name of a convolutional network.
        weights: None; of ResNet38 MXNet's `.params` file or a `.pth` file; else a timm tag, the name of
            an installed package (`efficientnet_lite0`), or a file.
        backbone_args: arguments of `ResNet38` or of timm's constructor, e.g. `output_stride`.
        init_checkpoint: a checkpoint of this method, or of `frozen_cam` with this backbone, to start from: a classifier
            that fits the backbone already does not disturb it in the first steps.
        freeze_norm: batch norms keep the statistics, scales and shifts that the weights bring, as small batches need.
            Those of ResNet38 do anyway, unless `backbone_args.batch_norm_momentum` is set.
        dropout: probability that a channel of the last features is dropped.
        cam_scales: scales of the multi-scale maps; 1 always takes part.
        background_threshold: up to this value a CAM means background in the evaluation.
        losses: weight and arguments of cls.
        lr: learning rate of the backbone's weights; biases learn twice, the classifier ten times as fast.
        weight_decay: of weights, not of biases.
        momentum: of SGD. The released code of this family means 0.9, but its optimizer takes the weight decay for the
            momentum: 5e-4 is what its results were made with.
        power: of the polynomial decay.
    """

    photographic_scales = True
    start_arguments = ("weights", "init_checkpoint")
    fuse = staticmethod(torch.add)
    normalise = staticmethod(by_max)

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "resnet38",
        weights: str | None = None,
        backbone_args: Mapping[str, Any] | None = None,
        init_checkpoint: str | None = None,
        freeze_norm: bool = False,
        dropout: float = 0.5,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5, 2.0),
        background_threshold: float = 0.2,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        momentum: float = 5e-4,
        power: float = 0.9,
    ) -> None:
        losses = {"cls": {"weight": 1.0}} if losses is None else losses
        super().__init__(num_classes, classes, background_threshold, cam_scales, losses, ("cls",))
        self.save_hyperparameters()
        self.backbone = CNN(backbone, weights, backbone_args, freeze_norm)
        self.mean, self.std = self.backbone.normalisation or (self.mean, self.std)
        self.dropout = nn.Dropout2d(dropout)
        self.fc8 = nn.Conv2d(self.backbone.channels, num_classes, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)
        if init_checkpoint is not None:
            network = nn.ModuleDict({"backbone": self.backbone, "fc8": self.fc8})
            advice = "give one of method=cam, or of frozen_cam with this backbone and method.hidden=null"
            self.start_as(start_classifier(network, init_checkpoint, self.classes, ("fc8",), advice))

    def forward(self, image: Tensor) -> dict[str, Any]:
        """(B, 3, H, W) -> logits (B, C); cam (B, C, h, w), not negative; seg None."""
        # averaging commutes with the last layer, so the maps of the very pass that classifies cost nothing
        maps = self.fc8(self.dropout(self.backbone(image)))
        return {"logits": maps.mean(dim=(-2, -1)), "cam": F.relu(maps), "seg": None}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        logits = self(batch["image"])["logits"]
        return self.combine({"cls": self.losses["cls"](logits, batch["label"])}, self.loss_weights)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        settings = {name: self.hparams[name] for name in ("lr", "weight_decay", "momentum", "power")}
        return sgd_poly(self, [self.fc8], self.total_steps, **settings)

    @classmethod
    def read_official(cls, state: Mapping[str, Tensor], path: str) -> OfficialCheckpoint | None:
        """PSA's `res38_cls.pth`: a ResNet38 and its classifier; it tells `num_classes` and the width."""
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        if "conv1a.weight" not in state or "f9.weight" in state:  # that of SEAM, PPC and AffinityNet
            return None
        if not any(name.startswith(("fc", "f8_")) for name in state):
            raise InputError(
                f"checkpoint {path} holds the weights of a ResNet38 without a classifier, nothing to evaluate: train "
                f"from it with method.weights={path}"
            )
        said, sizes = compare_released(state, {"fc8.weight": "classes conv6 1 1"})
        if said:
            raise InputError(
                f"checkpoint {path} looks like PSA's classifier on ResNet38, but it {said}; give res38_cls.pth, or a "
                "checkpoint of wsss-train"
            )
        ours = {name if name == "fc8.weight" else f"backbone.body.{name}": tensor for name, tensor in state.items()}
        values = {"num_classes": sizes["classes"], "backbone": "resnet38", "backbone_args": {"width": sizes["width"]}}
        return OfficialCheckpoint("cam", with_counters(ours), values)

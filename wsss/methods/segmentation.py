"""The last stage of a recipe: a segmentation network that learns from the masks of an earlier stage."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import SGD

from wsss import InputError
from wsss.cam import reduced_size, resize, resize_ids
from wsss.evaluation.metrics import SegmentationIoU
from wsss.evaluation.protocol import Measured
from wsss.methods.stage import Stage
from wsss.networks.segmenters import build_segmenter
from wsss.networks.weights import start_backbone
from wsss.optim import stepwise, warmup_poly


class PixelStage(Stage):
    """What stages that learn from pseudo masks share: how they are evaluated and shown. No training logic."""

    supervision = "pseudo_masks"

    @property
    def smallest_side(self) -> int:
        return math.ceil(1 / self.protocol.smallest_scale)  # a pixel at the smallest scale

    def describe(self, split: str) -> dict[str, Measured]:
        notes = self.protocol.describe(self.measured_on(split), (1.0,), 0.0, cam_names=())
        return {f"val/{key}": note for key, note in notes.items()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if "mask" not in batch and "map" not in self.metrics:
            return {"counts": []}
        with self.watching_tokens():
            output = self.infer_batch(batch)
        if "map" in self.metrics:
            self.metrics["map"].update(output["logits"], batch["label"])
        if "mask" not in batch:
            return {"counts": []}
        counts, size = [], batch["mask"].shape[-2:]
        work = reduced_size(size, self.protocol.max_side)
        for word, scores in self.segment_steps(batch["image"], work, output["seg"], batch["label"]).items():
            ids = resize_ids(scores.argmax(1), size)
            self.metrics[f"{word}miou"].update(ids, batch["mask"])
            counts += self.compare(ids, batch, word)
        return {"counts": counts}

    @torch.no_grad()
    def illustrate(self, batch: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Image, prediction and, where there is any, truth."""
        image = batch["image"].to(self.device)
        colours = self.colours(image)[0].round().clamp(0, 255).byte().permute(1, 2, 0)
        prediction = resize(self.infer(image)["seg"], image.shape[-2:]).argmax(1)[0]
        pictures = {"image": colours, "prediction": prediction}
        return {"examples": pictures | ({"truth": batch["mask"][0]} if "mask" in batch else {})}


class Segmentation(PixelStage):
    """Fully supervised segmentation, but of pseudo masks: no true mask takes part.

    With ResNet38 and `large_fov` it is DeepLab-LargeFOV (Chen et al., ICLR 2015, arXiv 1412.7062) as released with
    MCTformer (Xu et al., CVPR 2022), SEAM and others; the papers' scales, softmax and CRF are `protocol=large_fov`. No
    figure of it can be had from image labels, so that nothing but masks could choose a best checkpoint: the last one
    is the result, and `monitor` is null in its recipes.

    A training batch holds `image` and `pseudo_mask` (B, H, W): 0 background, c + 1 for class c, 255 undecided.

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone: with the decoder `large_fov` as `CNN` has it, `resnet38` or the timm name of a convolutional network;
            with `mask_transformer` the timm name of a plain vision transformer;
            with the others an encoder of segmentation-models-pytorch, e.g. `tu-` and a timm name.
        weights: of the backbone: None, or what `ResNet38`, timm or `EncoderDecoder` take.
        backbone_args: arguments of `ResNet38`, or of timm's constructor.
        init_checkpoint: a checkpoint of a method with this backbone, e.g. cam, to start it from, as PSA's followers do.
        decoder: `large_fov`, `mask_transformer`, Segmenter's on a plain vision transformer, with which WeakTr ends, or
            one of segmentation-models-pytorch (the extra `seg`): `unet`, `deeplabv3plus`, ...
        decoder_args: `channels` and `dilation` of `large_fov`, `depth` of `mask_transformer`, or arguments of another.
        losses: weight and arguments of ce and clipped_ce; null leaves a term out.
        lr: learning rate of the backbone.
        head_lr_factor: all other parameters learn this much faster.
        weight_decay: of all parameters. The released code gives SGD the weight decay in the place of the momentum: 0,
            and a momentum of 1e-5 instead of 0.9, is what its results were made with.
        momentum: of SGD.
        power: of the polynomial decay.
        lr_floor: the fraction of the learning rates that the decay ends at.
    """

    start_arguments = ("weights", "init_checkpoint")

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "resnet38",
        weights: str | None = None,
        backbone_args: Mapping[str, Any] | None = None,
        init_checkpoint: str | None = None,
        decoder: str = "large_fov",
        decoder_args: Mapping[str, Any] | None = None,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        lr: float = 7e-4,
        head_lr_factor: float = 10.0,
        weight_decay: float = 0.0,
        momentum: float = 1e-5,
        power: float = 0.9,
        lr_floor: float = 0.0,
    ) -> None:
        losses = {"ce": {"weight": 1.0}} if losses is None else losses
        super().__init__(num_classes, classes, losses, ("ce", "clipped_ce"))
        self.save_hyperparameters()
        if not 0 <= lr_floor <= 1:
            raise InputError(f"lr_floor is {lr_floor}: expected a fraction of the learning rates, from 0 to 1")
        self.network = build_segmenter(backbone, weights, backbone_args, decoder, decoder_args, 1 + num_classes)
        self.mean, self.std = self.network.normalisation or (self.mean, self.std)
        if init_checkpoint is not None:
            self.start_as(start_backbone(self.network.encoder, init_checkpoint))
        self.metrics = nn.ModuleDict({"miou": SegmentationIoU(1 + num_classes)})

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> seg (B, 1 + C, h, w)."""
        return {"seg": self.network(image)}

    @property
    def views(self) -> tuple[str, ...]:
        return ("image", "pseudo_mask")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        seg = self(batch["image"])["seg"]
        terms = {key: loss(seg, batch["pseudo_mask"]) for key, loss in self.losses.items()}
        return self.combine(terms, self.loss_weights)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        lr, own = self.hparams.lr, set(self.network.encoder.parameters())
        learnt = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in learnt if p in own], "lr": lr},
            {"params": [p for p in learnt if p not in own], "lr": self.hparams.head_lr_factor * lr},
        ]
        optimizer = SGD(groups, momentum=self.hparams.momentum, weight_decay=self.hparams.weight_decay)
        decay, floor = warmup_poly(self.total_steps, warmup_steps=0, power=self.hparams.power), self.hparams.lr_floor
        return stepwise(optimizer, lambda step: floor + (1 - floor) * decay(step))

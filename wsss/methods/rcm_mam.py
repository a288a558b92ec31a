"""RCM and MAM: pixel-level self-supervision by a support network (Yoon et al., arXiv 2112.05351).

The authors released no code. Two networks, their EMA, the two modules, 256 features, crops of 192 and the scales are
the paper's. Thresholds, temperature, prototype averaging, attention weights and the order of the stages are
reconstructed from early public scripts of the authors' group; each is an argument.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import by_max, of_classes, present_classes, resize
from wsss.losses.rcm_mam import PrototypeMemory, image_prototypes, leave_one_out_prototypes, mean_prototypes
from wsss.methods.base import WSSSModule
from wsss.networks.cnn import CNN
from wsss.networks.resnet38 import ResNet38
from wsss.networks.weights import start_classifier
from wsss.optim import sgd_poly, update_average
from wsss.refine.thresholds import cam_to_label


class TwoLayerNet(nn.Module):
    """A backbone, 1x1 convolution to `features` channels and ReLU, 1x1 convolution to the classes."""

    def __init__(
        self,
        num_classes: int,
        features: int,
        backbone: str,
        weights: str | None,
        backbone_args: Mapping[str, Any] | None,
        freeze_norm: bool,
    ) -> None:
        super().__init__()
        self.backbone = CNN(backbone, weights, backbone_args, freeze_norm)
        self.fc8 = nn.Conv2d(self.backbone.channels, features, 1, bias=False)
        self.fc9 = nn.Conv2d(features, num_classes, 1, bias=False)
        for layer in (self.fc8, self.fc9):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, image: Tensor, begun: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W), and what `backbone.begin` makes of it -> features (B, D, h, w), at least 0, and raw CAMs."""
        features = F.relu(self.fc8(self.backbone(image, begun)))
        return features, self.fc9(features)


class Prototypes(nn.Module):
    """A rule that makes prototypes of `image_prototypes` of the images of a batch."""

    over_batch = 1

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, prototypes: Tensor) -> Tensor:
        return self.rule(prototypes)


class RCMMAM(WSSSModule):
    """A main network that learns from its own moving average, the support network.

    Multi-scale CAMs of the support network divide the image into regions of classes and background. The regional
    contrastive module (`rcm`) draws each pixel of the main network to the prototype of its region, made by the
    support network; the multi-scale attentive module (`mam`) draws the main network's CAMs to the support network's
    of all scales, those that differ most having the largest weight.

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone: `resnet38`, or the timm name of a convolutional network.
        weights: None; of ResNet38 MXNet's `.params` file or a `.pth` file; else a timm tag, the name of
            an installed package (`efficientnet_lite0`), or a file.
        backbone_args: arguments of `ResNet38` or of timm's constructor.
        init_checkpoint: a checkpoint of this method to start both networks from, e.g. of a run without `mam`; or one of
            `frozen_cam` with this backbone and `hidden` equal to `features`.
        freeze_norm: batch norms keep the statistics, scales and shifts that the weights bring, as small batches need.
            Those of ResNet38 do anyway, unless `backbone_args.batch_norm_momentum` is set.
        features: D, channels of the features that are contrasted.
        ema_momentum: share of the support network that stays at each step.
        main_scales: scales of the main network's CAMs in `mam`.
        support_scales: scales of the support network's CAMs; both lists hold 1.
        region_threshold: up to this value of the support network's CAM a pixel is background.
        prototypes: `mean` over the images of the batch, `loo` (of the other images) or `memory` (of the last five
            images with the class).
        mam_fraction: share of the batch that takes part in `mam`, to save memory; at least one image does.
        rcm_start: `rcm` takes part from this step on.
        mam_start: `mam` takes part from this step on.
        cam_scales: scales of the multi-scale maps in the evaluation; 1 always takes part.
        background_threshold: up to this value a CAM means background in the evaluation.
        losses: weight and arguments of cls, rcm, mam; null leaves a term out.
        lr: learning rate of the weights; biases learn twice as fast.
        weight_decay: of weights, not of biases.
        momentum: of SGD. The scripts mean 0.9, but their optimizer takes the weight decay for the momentum.
        power: of the polynomial decay.
    """

    photographic_scales = True
    start_arguments = ("weights", "init_checkpoint")
    normalise = staticmethod(by_max)

    @staticmethod
    def fuse(plain: Tensor, mirrored: Tensor) -> Tensor:
        """The sum of what is positive."""
        return plain.relu() + mirrored.relu()

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "resnet38",
        weights: str | None = None,
        backbone_args: Mapping[str, Any] | None = None,
        init_checkpoint: str | None = None,
        freeze_norm: bool = False,
        features: int = 256,
        ema_momentum: float = 0.997,
        main_scales: Sequence[float] = (0.5, 1.0, 2.0),
        support_scales: Sequence[float] = (0.5, 1.0, 2.0),
        region_threshold: float = 0.3,
        prototypes: str = "mean",
        mam_fraction: float = 0.5,
        rcm_start: int = 0,
        mam_start: int = 0,
        cam_scales: Sequence[float] = (1.0, 0.5, 1.5, 2.0),
        background_threshold: float = 0.2,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        momentum: float = 5e-4,
        power: float = 0.9,
    ) -> None:
        if losses is None:
            losses = {key: {"weight": 1.0} for key in ("cls", "rcm", "mam")}
        super().__init__(num_classes, classes, background_threshold, cam_scales, losses, ("cls", "rcm", "mam"))
        self.save_hyperparameters()
        for name, scales in (("main_scales", main_scales), ("support_scales", support_scales)):
            if 1.0 not in scales or min(scales) <= 0:
                raise InputError(f"{name} is {list(scales)}: expected positive factors with 1 among them")
        for name, value in (("mam_fraction", mam_fraction), ("ema_momentum", ema_momentum)):
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}: expected 0 to 1")
        self.main = TwoLayerNet(num_classes, features, backbone, weights, backbone_args, freeze_norm)
        self.mean, self.std = self.main.backbone.normalisation or (self.mean, self.std)
        rules: dict[str, Callable[[], nn.Module]] = {
            "mean": lambda: Prototypes(mean_prototypes),
            "loo": lambda: Prototypes(leave_one_out_prototypes),
            "memory": lambda: PrototypeMemory(num_classes, features),
        }
        if prototypes not in rules:
            raise InputError(f"prototypes is {prototypes!r}: expected one of mean, loo, memory")
        self.memory = rules[prototypes]()  # the others remember nothing
        self.support = deepcopy(self.main).requires_grad_(False).eval()
        if init_checkpoint is not None:
            self.start_from(init_checkpoint)
        self.compare_beginnings()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's; the networks may no longer begin alike."""
        result = super().load_state_dict(*args, **kwargs)
        self.compare_beginnings()
        return result

    def compare_beginnings(self) -> None:
        """Whether the stages that do not learn are the same in both networks, so that one may run for both."""
        bodies: list[Any] = [network.backbone.body for network in (self.main, self.support)]
        self.one_beginning = isinstance(bodies[0], ResNet38)
        if self.one_beginning:
            ours, theirs = (body.beginning().state_dict().values() for body in bodies)
            self.one_beginning = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    def start_from(self, path: str) -> None:
        """Both networks' weights, and how their images are normalised, from a checkpoint.

        Raises:
            InputError: it cannot be read, or is of another network or of other classes.
        """
        hidden = self.hparams.features
        advice = f"give one of method=rcm_mam, or of frozen_cam with this backbone and method.hidden={hidden}"
        for name in ("main", "support"):
            network, layers = getattr(self, name), ("fc8", "fc9")
            origin = start_classifier(network, path, self.classes, layers, advice, prefix=f"{name}.")
        self.start_as(origin)

    def train(self, mode: bool = True) -> "RCMMAM":
        """The support network stays in evaluation mode."""
        super().train(mode)
        self.support.eval()
        return self

    @property
    def loss_starts(self) -> dict[str, int]:
        starts = {"rcm": self.hparams.rcm_start, "mam": self.hparams.mam_start}
        return {key: starts.get(key, 0) for key in self.losses}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        image, label = batch["image"], batch["label"]
        weights = {key: w for key, w in self.loss_weights.items() if self.global_step >= self.loss_starts[key]}
        terms: dict[str, Tensor] = {}
        size = image.shape[-2:]
        scales = {1.0, *self.hparams.support_scales} if {"rcm", "mam"} & weights.keys() else {1.0}
        views = {scale: rescale_view(image, scale) for scale in scales}
        begun = {scale: self.main.backbone.begin(view) for scale, view in views.items() if self.one_beginning}
        features, cam = self.main(image, begun.get(1.0))
        if "cls" in weights:
            terms["cls"] = self.losses["cls"](cam.mean(dim=(-2, -1)), label)
        if "rcm" in weights or "mam" in weights:
            with torch.no_grad():
                outputs = {scale: self.support(views[scale], begun.get(scale)) for scale in self.hparams.support_scales}
                # maps at image size of the classes that are there
                shown, classes = present_classes(label, batch.get("max_labels", self.num_classes))  # (B, K)
                raws = {scale: of_classes(raw, classes, self.num_classes) for scale, (_, raw) in outputs.items()}
                support = {scale: self.visible(raw, shown, size) for scale, raw in raws.items()}
                fused = torch.stack(list(support.values()))  # (S, B, K, H, W)
        if "rcm" in weights:
            region = self.region(fused.sum(0), shown, classes)
            seen = self.region(support[1.0], shown, classes)
            own = image_prototypes(outputs[1.0][0], seen, self.num_classes, classes)
            terms["rcm"] = self.losses["rcm"](features, region, self.memory(own))
        if "mam" in weights:
            part = max(1, int(len(image) * self.hparams.mam_fraction))

            def raw_cam(scale: float) -> Tensor:
                if scale == 1.0:
                    return cam[:part]
                view, known = views.get(scale), begun.get(scale)
                view = rescale_view(image[:part], scale) if view is None else view[:part]
                return self.main(view, None if known is None else known[:part])[1]

            raw = [raw_cam(scale) for scale in self.hparams.main_scales]
            raw = [of_classes(maps, classes[:part], self.num_classes) for maps in raw]
            main = torch.stack([self.visible(maps, shown[:part], size) for maps in raw])
            terms["mam"] = self.losses["mam"](main, fused[:, :part], self.num_classes)
        return self.combine(terms, weights)

    @staticmethod
    def visible(cam: Tensor, label: Tensor, size: Sequence[int]) -> Tensor:
        """Raw CAMs (B, C, h, w) -> (B, C, *size): resized, where positive, absent classes 0."""
        return F.relu(resize(cam, size)) * label[:, :, None, None]

    def region(self, cam: Tensor, label: Tensor, classes: Tensor) -> Tensor:
        """(B, H, W) ids of the strongest of `classes` where its normalised CAM exceeds the threshold, else 0."""
        threshold = self.hparams.region_threshold if self.has_background else -1.0
        return cam_to_label(by_max(cam), label, threshold, classes=classes)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.update_support()

    def update_support(self) -> None:
        """Exponential moving average of parameters, and of batch-norm statistics, which only move where they learn."""
        support, main = (
            [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]
            for network in (self.support, self.main)
        )
        update_average(support, main, self.hparams.ema_momentum)

    def forward(self, image: Tensor) -> dict[str, Any]:
        """(B, 3, H, W) -> logits (B, C); cam (B, C, h, w), raw; seg None. Of the main network."""
        _, cam = self.main(image)
        return {"logits": cam.mean(dim=(-2, -1)), "cam": cam, "seg": None}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        settings = {name: self.hparams[name] for name in ("lr", "weight_decay", "momentum", "power")}
        return sgd_poly(self, [], self.total_steps, **settings)


def rescale_view(image: Tensor, scale: float) -> Tensor:
    """A normalised crop at another scale: bilinear with aligned corners, as the paper resizes its inputs."""
    if scale == 1.0:
        return image
    size = [int(scale * side) for side in image.shape[-2:]]
    return F.interpolate(image, size=tuple(size), mode="bilinear", align_corners=True)

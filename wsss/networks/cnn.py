"""Convolutional networks behind one interface: image in, last features out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wsss import InputError
from wsss.networks.resnet38 import ResNet38, Taps
from wsss.networks.vit import create_timm


class CNN(nn.Module):
    """Last features (B, channels, h, w) of `resnet38` (output stride 8) or of a convolutional network of timm.

    `normalisation` is the mean and the standard deviation that timm's weights were made with, where there are any.

    Args:
        backbone: `resnet38` or a timm name.
        weights: None; of ResNet38 see there; else a timm tag, a name of `pretrained.PACKAGES`, or a `.pth` or
            `.safetensors` file.
        arguments: arguments of `ResNet38`, or of timm's constructor; None leaves one as it is.
        freeze_norm: batch norms keep their statistics, scales and shifts.

    Raises:
        InputError: unknown backbone, argument or tag; a file that does not fit; a network without maps of features.
    """

    def __init__(
        self,
        backbone: str = "resnet38",
        weights: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        freeze_norm: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.freeze_norm = backbone, freeze_norm
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        self.body: nn.Module
        self.channels: int
        self.normalisation: tuple[Any, Any] | None = None
        if backbone == "resnet38":
            self.body = body = ResNet38.build(weights, given)
            self.channels, self.loaded = body.channels[-1], body.loaded
        else:
            self.channels, self.loaded = self._build_timm(backbone, weights, given)
        for norm in self._frozen():
            norm.requires_grad_(False)
        self.train()

    def _build_timm(self, backbone: str, weights: str | None, given: dict[str, Any]) -> tuple[int, str | None]:
        """The channels of its features, and which weights it has."""
        try:
            self.body, loaded = create_timm(backbone, weights, given | {"global_pool": ""})
        except InputError as error:
            foreign = [name for name in ResNet38.arguments() if name in given]
            if any(f"'{name}'" in str(error) for name in foreign):
                raise InputError(
                    f"{backbone} does not take the backbone_args {', '.join(foreign)} of resnet38, which a recipe may "
                    "have set: set them to null, or all there are by method.backbone_args=null"
                ) from error
            raise
        settings: Any = self.body.pretrained_cfg
        if weights is not None:
            self.normalisation = tuple(settings["mean"]), tuple(settings["std"])
        size = settings["input_size"]  # a transformer takes no other
        with torch.no_grad():
            shape = self.eval()(torch.zeros(1, *size)).shape
        if len(shape) != 4:
            raise InputError(f"backbone {backbone!r} gives no maps of features: expected resnet38 or a timm CNN")
        return shape[1], loaded

    def _frozen(self) -> Iterator[nn.Module]:
        return (m for m in self.body.modules() if self.freeze_norm and isinstance(m, nn.modules.batchnorm._BatchNorm))

    def train(self, mode: bool = True) -> "CNN":
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        for norm in self._frozen():
            norm.eval()
        return self

    def begin(self, image: Tensor) -> Tensor | None:
        """What the leading stages that do not learn make of images; None of a network that has none."""
        return self.body.begin(image) if isinstance(self.body, ResNet38) else None

    def forward(self, image: Tensor, begun: Tensor | None = None) -> Tensor:
        """image: (B, 3, H, W) normalised; `begun` is `begin(image)` where it is known already."""
        features = self.body(image) if begun is None else self.body(image, begun)
        result: Tensor = features.conv6 if isinstance(features, Taps) else features
        return result

    def stages(self, image: Tensor, count: int | None = None) -> Sequence[Tensor]:
        """Features (B, C_i, h_i, w_i) of the last `count` stages, None of all, the deepest last."""
        body: Any = self.body
        if isinstance(body, ResNet38):
            return body.stages(image)[-(count or 0) :]
        features: list[Tensor] = body.forward_intermediates(image, indices=count, intermediates_only=True)
        return features

    def describe_stages(self, count: int | None = None) -> list[tuple[int, int]]:
        """Channels of `stages`, and their strides in pixels, powers of two.

        Raises:
            InputError: a network that does not give its stages.
        """
        settings: Any = getattr(self.body, "pretrained_cfg", {"input_size": (3, 64, 64)})
        size, training = settings["input_size"], self.training
        try:
            with torch.no_grad():
                stages = self.eval().stages(torch.zeros(1, *size), count)
        except (AttributeError, AssertionError, IndexError, ValueError) as error:
            raise InputError(
                f"backbone {self.name!r} does not give the features of its stages, which this network reads: expected "
                "resnet38 or a timm CNN that does, e.g. resnet50 or convnext_tiny"
            ) from error
        self.train(training)
        return [(stage.shape[1], 2 ** round(math.log2(size[1] / stage.shape[2]))) for stage in stages]

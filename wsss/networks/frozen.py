"""A frozen network with weights of ImageNet, say, whose features are computed once for each image."""

import hashlib
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.networks.cnn import CNN
from wsss.networks.vit import create_timm


class TokenMap(nn.Module):
    """The patch tokens (B, D, h, w) of the last block of a vision transformer of timm, normalised, at any size."""

    def __init__(self, backbone: str, weights: str | None, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.vit, self.loaded = create_timm(backbone, weights, {"dynamic_img_size": True} | arguments)
        settings: Any = self.vit.pretrained_cfg
        self.normalisation = None if weights is None else (tuple(settings["mean"]), tuple(settings["std"]))

    def forward(self, image: Tensor) -> Tensor:
        vit: Any = self.vit
        features: list[Tensor] = vit.forward_intermediates(image, indices=1, norm=True, intermediates_only=True)
        return features[-1]


def is_vit(backbone: str) -> bool:
    """Whether timm makes a vision transformer of this name."""
    return timm.is_model(backbone) and "vision_transformer" in timm.model_entrypoint(backbone).__module__


class FrozenNetwork(nn.Module):
    """Last features (B, channels, h, w) of a network of timm that never learns, of images at one working size.

    Args:
        backbone: timm name of a convolutional network or of a vision transformer; or `resnet38`.
        weights: see `CNN`; None would freeze random ones, which is for tests.
        arguments: of timm's constructor, e.g. `output_stride`; None leaves one as it is.
        size: the longer side of an image, in pixels; the shorter one follows, both rounded to a whole number of cells.

    Raises:
        InputError: see `create_timm`; a size below a cell of 32 pixels.
    """

    def __init__(self, backbone: str, weights: str | None, arguments: Mapping[str, Any] | None, size: int) -> None:
        super().__init__()
        if not isinstance(size, int) or size < 32:
            raise InputError(f"method.size is {size!r}: expected a whole number of at least 32 pixels")
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        self.size = size
        self.body = (TokenMap if is_vit(backbone) else CNN)(backbone, weights, given)
        self.loaded, self.normalisation = self.body.loaded, self.body.normalisation
        self.requires_grad_(False).eval()
        with torch.no_grad():
            features = self(torch.zeros(1, 3, 224, 224))
        self.channels: int = features.shape[1]
        self.cell: int = 224 // features.shape[-1]

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Its batch norms never learn either."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W) normalised, at the working size or another scale of it."""
        features: Tensor = self.body(image)
        return features

    def resize(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) at the working size, with antialiasing."""
        size = self.work_size(*image.shape[-2:])
        if size == tuple(image.shape[-2:]):
            return image
        return F.interpolate(image, size=size, mode="bilinear", antialias=True)

    def work_size(self, height: int, width: int) -> tuple[int, int]:
        """Of an image: its longer side is `size`, both are whole cells."""
        scale = self.size / max(height, width)
        rows, columns = (max(1, round(side * scale / self.cell)) for side in (height, width))
        return rows * self.cell, columns * self.cell

    @property
    def key(self) -> str:
        """Tells these weights and this size from others."""
        told = hashlib.sha256(f"{self.size} {self.cell}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            told.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return told.hexdigest()[:16]

"""A network with the weights of ImageNet, say, that never learns: its features are computed once for each image."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import resize
from wsss.networks.vit import create_timm


class Maps(NamedTuple):
    """Features of a batch, of one grid of h x w cells."""

    stages: Tensor  # (B, D, h, w): a middle stage and the last one, one upon the other
    final: Tensor  # (B, K, h, w): what the network's own classifier averages


class FrozenNetwork(nn.Module):
    """A convolutional network or a vision transformer of timm that never learns.

    The two maps of `stages` are of the last two strides of a convolutional network, with `output_stride=16` both of 16
    pixels, else the coarser one is enlarged; of a transformer of the blocks at two thirds and at the end. The middle
    one knows better where things end, which decoders need.

    Args:
        backbone: timm name.
        weights: `efficientnet_lite0`, say, of the extra `pretrained`, a timm tag or a file; None freezes random ones,
            which is for tests.
        arguments: of timm's constructor, e.g. `output_stride`; None leaves one as it is.
        size: the longer side of an image in pixels; the shorter one follows, both rounded to whole cells.

    Raises:
        InputError: see `create_timm`; a network that does not give its stages; a size below 32 pixels.
    """

    def __init__(self, backbone: str, weights: str | None, arguments: Mapping[str, Any] | None, size: int) -> None:
        super().__init__()
        if not isinstance(size, int) or size < 32:
            raise InputError(f"method.size is {size!r}: expected a whole number of at least 32 pixels")
        self.size = size
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        module = timm.model_entrypoint(backbone).__module__ if timm.is_model(backbone) else ""
        transformer = module.endswith(("vision_transformer", "deit"))
        given = {"dynamic_img_size": True} | given if transformer else given | {"global_pool": ""}
        self.built = f"{backbone} {sorted(given.items())}"  # what weights of one kind may be used by in several ways
        body: Any
        body, self.loaded = create_timm(backbone, weights, given)
        if not hasattr(body, "forward_intermediates"):
            raise InputError(f"backbone {backbone!r} does not give the features of its stages: choose another of timm")
        self.body = body
        self.indices = [2 * len(body.blocks) // 3 - 1, len(body.blocks) - 1] if transformer else 2
        settings = body.pretrained_cfg
        self.normalisation = None if weights is None else (tuple(settings["mean"]), tuple(settings["std"]))
        self.requires_grad_(False).eval()
        # a transformer takes whole patches only
        self.patch: int = body.patch_embed.patch_size[0] if transformer else 1
        self.last_width: int = body.num_features if transformer else body.feature_info[-1]["num_chs"]
        try:
            maps = self(torch.zeros(1, 3, 224, 256))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"backbone {backbone!r} does not take an image of 256x224 pixels: {reason}") from error
        self.widths = maps.stages.shape[1], maps.final.shape[1]
        self.cell = 256 // maps.final.shape[-1]

    def train(self, mode: bool = True) -> "FrozenNetwork":
        """Its batch norms and dropouts do not learn either."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Maps:
        """image: (B, 3, H, W) normalised, at the working size or a scale of it."""
        if any(side % self.patch for side in image.shape[-2:]):  # at another scale
            size = [max(1, side // self.patch) * self.patch for side in image.shape[-2:]]
            image = resize(image, size)
        middle, last = self.body.forward_intermediates(
            image, indices=self.indices, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        last = last if last.shape == middle.shape else resize(last, middle.shape[-2:])
        stages = torch.cat([middle, last], dim=1)
        return Maps(stages, self.finish(stages))

    @torch.no_grad()
    def finish(self, stages: Tensor) -> Tensor:
        """`final` from `stages`: only networks like EfficientNet have a layer between the last stage and the mean."""
        last = stages[:, -self.last_width :]
        body = self.body
        final: Tensor = body.bn2(body.conv_head(last)) if isinstance(body, EfficientNet) else last
        return final

    def resize(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) at the working size, with antialiasing."""
        cell = self.cell * max(image.shape[-2:])
        size = [max(1, round(side * self.size / cell)) * self.cell for side in image.shape[-2:]]
        if size == list(image.shape[-2:]):
            return image
        return F.interpolate(image, size=size, mode="bilinear", antialias=True)

    @property
    def sized(self) -> str:
        """The working size in words."""
        return f"{self.size} pixels on the longer side"

    @property
    def key(self) -> str:
        """Tells these weights and this size from others."""
        told = hashlib.sha256(f"{self.size} {self.cell} {self.widths} {self.built}".encode())
        for name, tensor in sorted(self.state_dict().items()):
            told.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return told.hexdigest()[:16]

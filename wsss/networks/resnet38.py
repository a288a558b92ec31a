"""ResNet38, the wide residual network of this field, its ImageNet weights, and the head of SEAM and PPC."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss import InputError
from wsss.networks.mxnet import read_params
from wsss.networks.pretrained import check_backbone
from wsss.networks.vit import TINY_PARAMETERS
from wsss.networks.weights import COUNTER, compare_layout, load_weights, read_state_dict

IMAGENET_FILE = "ilsvrc-cls_rna-a1_cls1000_ep-0001.params"
IMAGENET_MD5 = "ff21f45d6bf03284100dcbec571edfad"
"""Of the file with the ImageNet weights of model A1; those of model A have other names and do not fit."""

STAGES = {2: (3, 2, 2, 2, 1), 3: (3, 4, 4, 2, 1), 4: (6, 8, 8, 2, 1), 5: (3, 8, 16, 1, 2)}
"""Blocks, inner and outer channels in units of the width, stride of the first block, dilation."""

HEADS = ("fc", "f8_", "f9.", "bn8.", "arg:linear1000_")
"""How the names begin of what released files hold beside the body."""

BATCH_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
"""PyTorch's names -> MXNet's."""


class Taps(NamedTuple):
    """Features of a batch of images, h x w being ceil(H / 8) x ceil(W / 8), w8 the width; all after a ReLU."""

    conv4: Tensor  # (B, 8 * width, h, w), activated input of b5
    conv5: Tensor  # (B, 16 * width, h, w), activated input of b6
    conv6: Tensor  # (B, 64 * width, h, w)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU.

    (B, in_channels, H, W) -> the sum with the shortcut, (B, out_channels, H / stride, W / stride) rounded up, and
    the activated input.
    """

    def __init__(
        self, in_channels: int, channels: int, out_channels: int, stride: int, dilation: tuple[int, int]
    ) -> None:
        super().__init__()
        first, second = dilation
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, channels, 3, stride, padding=first, dilation=first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(channels)
        self.conv_branch2b1 = nn.Conv2d(channels, out_channels, 3, padding=second, dilation=second, bias=False)
        self.conv_branch1: nn.Conv2d | None = None
        if in_channels != out_channels or stride != 1:
            self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activated = F.relu(self.bn_branch2a(x))
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(activated)
        y = self.conv_branch2a(activated)
        y = self.conv_branch2b1(F.relu(self.bn_branch2b1(y)))
        return shortcut + y, activated


class BottleneckBlock(nn.Module):
    """1x1, dilated 3x3 and 1x1 convolution, the latter two after channelwise dropout; shapes as in `ResBlock`."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        quarter, half = out_channels // 4, out_channels // 2
        self.bn_branch2a = nn.BatchNorm2d(in_channels)
        self.conv_branch2a = nn.Conv2d(in_channels, quarter, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(quarter)
        self.conv_branch2b1 = nn.Conv2d(quarter, half, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(half)
        self.conv_branch2b2 = nn.Conv2d(half, out_channels, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        activated = F.relu(self.bn_branch2a(x))
        y = self.conv_branch2a(activated)
        y = self.conv_branch2b1(F.dropout2d(F.relu(self.bn_branch2b1(y)), self.dropout, self.training))
        y = self.conv_branch2b2(F.dropout2d(F.relu(self.bn_branch2b2(y)), self.dropout, self.training))
        return self.conv_branch1(activated) + y, activated


class ResNet38(nn.Module):
    """Model A1 of "Wider or Deeper" (Wu et al., arXiv 1611.10080), pre-activated, output stride 8.

    The names of its parameters are those of the released PSA, SEAM, PPC and KAIST files. (B, 3, H, W) of any size,
    normalised with ImageNet's mean and standard deviation, -> `Taps`.

    Args:
        weights: None for random weights, MXNet's ImageNet file (`.params`), or a `.pth` file of PSA and its followers.
        width: channels of the first convolution; the others are multiples of it. Only 64 fits the released files.
        dropout: rates in b6 and b7; 0.3 and 0.5 in PSA and SEAM, 0.2 and 0.2 in KAIST's two-layer heads.
        frozen_stages: this many leading stages do not learn, 0 to 7: 1 is conv1a, 2 also b2, b2_1 and b2_2, ...
        batch_norm_momentum: None freezes statistics and affine parameters of every batch norm, as the methods do
            that start from ImageNet weights; a number trains both.

    Raises:
        InputError: an argument out of its range; a file that does not fit.
    """

    def __init__(
        self,
        weights: str | None = None,
        width: int = 64,
        dropout: tuple[float, float] = (0.3, 0.5),
        frozen_stages: int = 2,
        batch_norm_momentum: float | None = None,
    ) -> None:
        super().__init__()
        if len(dropout) != 2:
            raise InputError(f"dropout of ResNet38 is {list(dropout)}: expected two rates, of b6 and b7")
        for name, value, low, high in (
            ("width", width, 1, 1024),
            ("frozen_stages", frozen_stages, 0, 7),
            ("batch_norm_momentum", batch_norm_momentum or 0, 0, 1),
            *(("dropout", rate, 0, 1) for rate in dropout),
        ):
            if not low <= value <= high:
                raise InputError(f"{name} of ResNet38 is {value}: expected {low} to {high}")
        self.frozen_stages, self.batch_norm_momentum = frozen_stages, batch_norm_momentum
        self.channels = (8 * width, 16 * width, 64 * width)
        self.conv1a = nn.Conv2d(3, width, 3, padding=1, bias=False)
        channels = width
        for stage, (blocks, inner, outer, stride, dilation) in STAGES.items():
            for index in range(blocks):
                block = ResBlock(
                    channels,
                    inner * width,
                    channels := outer * width,
                    1 if index else stride,
                    (dilation if index else 1, dilation),
                )
                self.add_module(f"b{stage}_{index}" if index else f"b{stage}", block)
        self.b6 = BottleneckBlock(channels, 32 * width, 4, dropout[0])
        self.b7 = BottleneckBlock(32 * width, 64 * width, 4, dropout[1])
        self.bn7 = nn.BatchNorm2d(64 * width)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d) and batch_norm_momentum is not None:
                module.momentum = batch_norm_momentum
        for module in self._frozen():
            module.requires_grad_(False)
        self.train()
        self.loaded = None if weights is None else self.load(weights)
        if weights is None and (frozen_stages or sum(p.numel() for p in self.parameters()) > TINY_PARAMETERS):
            warnings.warn(
                f"ResNet38 starts from random weights, and {frozen_stages} frozen stages keep them: "
                f"set method.weights to {IMAGENET_FILE} or a .pth file",
                stacklevel=2,
            )

    @classmethod
    def build(cls, weights: str | None, arguments: Mapping[str, Any] | None) -> "ResNet38":
        """From plain values, as they come from a configuration; None leaves an argument as it is.

        Raises:
            InputError: as the constructor, and for an unknown argument.
        """
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        if unknown := given.keys() - set(known := cls.arguments()):
            raise InputError(f"backbone_args.{min(unknown)}: resnet38 takes {', '.join(known)}")
        return cls(weights, **given)

    @classmethod
    def arguments(cls) -> list[str]:
        """Names of `backbone_args`."""
        return [name for name in inspect.signature(cls).parameters if name != "weights"]

    def load(self, path: str) -> str:
        """Load all weights of the body from a file and say which, see `networks.weights.load_weights`.

        Args:
            path: MXNet's `.params` file, or a file of PyTorch tensors under the body's own names (PSA, SEAM, KAIST).

        Raises:
            InputError: the file is missing, damaged or of another network; the first names of each kind are given.
        """
        check_backbone(path, "resnet38")
        theirs: dict[str, str] = {}
        if Path(path).suffix == ".params":
            theirs = {name: mxnet_name(name) for name in self.state_dict() if not name.endswith(COUNTER)}
        ours = {name: own for own, name in theirs.items()}
        return load_weights(
            self,
            f"this ResNet38 of width {self.conv1a.out_channels}",
            path,
            read_params(path) if theirs else read_state_dict(path),
            lambda state: {ours.get(name, name): tensor for name, tensor in state.items()},
            HEADS,
            lambda name: theirs.get(name, name),
            f"for width 64 give {IMAGENET_FILE} (model A1, md5 {IMAGENET_MD5}) or res38_cls.pth",
        )

    def _frozen(self) -> Iterator[nn.Module]:
        for name, module in self.named_modules():
            fixed_norm = self.batch_norm_momentum is None and isinstance(module, nn.BatchNorm2d)
            if fixed_norm or (name and _stage(name) <= self.frozen_stages):
                yield module

    def train(self, mode: bool = True) -> "ResNet38":
        """What is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def beginning(self) -> nn.ModuleList:
        """The leading stages that do not learn and whose features are not among `stages`: at most conv1a, b2 and b3."""
        return nn.ModuleList(m for name, m in self.named_children() if _stage(name) <= min(self.frozen_stages, 3))

    def begin(self, image: Tensor) -> Tensor:
        """What `beginning` makes of images, the same for networks that share it; the images if empty."""
        x = image
        for layer in self.beginning():
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x)[0]
        return x

    def stages(self, image: Tensor, begun: Tensor | None = None) -> list[Tensor]:
        """conv3 (B, 4 * width, ceil(H / 4), ceil(W / 4)), the activated input of b4, then those of `Taps`.

        `begun` is `begin(image)` where it is known already.
        """
        taps = []
        x = self.begin(image) if begun is None else begun
        x = x if self.frozen_stages else self.conv1a(x)
        for name, block in self.named_children():
            if isinstance(block, ResBlock | BottleneckBlock) and _stage(name) > min(self.frozen_stages, 3):
                x, activated = block(x)
                if name in ("b4", "b5", "b6"):
                    taps.append(activated)
        return [*taps, F.relu(self.bn7(x))]

    def forward(self, image: Tensor, begun: Tensor | None = None) -> Taps:
        return Taps(*self.stages(image, begun)[1:])


def _stage(name: str) -> int:
    """1 of conv1a, 4 of b4_3, 7 of bn7."""
    return int(name.lstrip("convb")[:1])


def mxnet_name(name: str) -> str:
    """`b4_3.bn_branch2a.running_mean` -> `aux:bn4b3_branch2a_moving_mean`; block b4 is called 4a there."""
    *block, layer, parameter = name.split(".")
    if not layer.startswith("conv"):
        parameter = BATCH_NORM[parameter]
    if block:
        kind, branch = layer.split("_")
        stage, _, index = block[0].removeprefix("b").partition("_")
        layer = f"{'res' if kind == 'conv' else 'bn'}{stage}{f'b{index}' if index else 'a'}_{branch}"
    return f"{'aux' if parameter.startswith('moving') else 'arg'}:{layer}_{parameter}"


def compare_released(state: Mapping[str, Tensor], heads: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """How a released file differs from a ResNet38 with these heads, in words, and the sizes it tells.

    Args:
        state: tensors by name, with `conv1a.weight` among them.
        heads: names and shapes as `compare_layout` takes them; `conv4`, `conv5` and `conv6` stand for the channels.

    Returns:
        Empty where it does not differ; `width` and what the heads name.
    """
    width = min(max((*state["conv1a.weight"].shape, 1)[0], 1), 1024)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        body = ResNet38(width=width)
    layout = {name: " ".join(map(str, tensor.shape)) for name, tensor in body.state_dict().items()}
    layout = {name: axes for name, axes in layout.items() if not name.endswith(COUNTER)} | dict(heads)
    given = {name: tensor for name, tensor in state.items() if not name.endswith(COUNTER)}
    sizes = {"width": width, **dict(zip(("conv4", "conv5", "conv6"), body.channels, strict=True))}
    return compare_layout(given, layout, sizes=sizes)


def with_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as floats, and for every batch norm the counter that files older than PyTorch 0.4.1 lack."""
    counters = {name.removesuffix(".running_mean") + COUNTER for name in state if name.endswith(".running_mean")}
    weights = {name: tensor.float() for name, tensor in state.items() if name not in counters}
    return weights | {name: torch.tensor(0) for name in counters}


class SEAMOutput(NamedTuple):
    """Outputs for a batch of images; channel 0 is the background, none is up-sampled."""

    cam: Tensor  # (B, 1 + C, h, w), before any ReLU
    revised_cam: Tensor  # (B, 1 + C, h, w); no gradient reaches cam or the body
    projection: Tensor | None  # (B, D, h, w), at least 0


class SEAMHead(nn.Module):
    """CAM and pixel correlation module of SEAM (Wang et al., CVPR 2020, arXiv 2004.04581), projection of PPC.

    Args:
        channels: of conv4, conv5 and conv6.
        num_classes: C, foreground classes only.
        projection: D of PPC (Du et al., CVPR 2022, arXiv 2110.07110), 128 there; None leaves it out.
        dropout: probability that a channel of conv6 is dropped.
    """

    def __init__(
        self, channels: tuple[int, int, int], num_classes: int, projection: int | None = None, dropout: float = 0.5
    ) -> None:
        super().__init__()
        conv4, conv5, conv6 = channels
        self.dropout7 = nn.Dropout2d(dropout)
        self.fc8 = nn.Conv2d(conv6, 1 + num_classes, 1, bias=False)
        self.fc_proj = None if projection is None else nn.Conv2d(conv6, projection, 1, bias=False)
        self.f8_3 = nn.Conv2d(conv4, 64, 1, bias=False)
        self.f8_4 = nn.Conv2d(conv5, 128, 1, bias=False)
        self.f9 = nn.Conv2d(3 + 64 + 128, 192, 1, bias=False)
        nn.init.xavier_uniform_(self.fc8.weight)
        if self.fc_proj is not None:
            nn.init.xavier_uniform_(self.fc_proj.weight)
        nn.init.kaiming_normal_(self.f8_3.weight)
        nn.init.kaiming_normal_(self.f8_4.weight)
        nn.init.xavier_uniform_(self.f9.weight, gain=4)

    def forward(self, image: Tensor, taps: Taps) -> SEAMOutput:
        """image: (B, 3, H, W) normalised, as the body got it."""
        conv6 = self.dropout7(taps.conv6)
        cam = self.fc8(conv6)
        features = [
            F.interpolate(image, size=cam.shape[-2:], mode="bilinear", align_corners=True),
            F.relu(self.f8_3(taps.conv4.detach())),
            F.relu(self.f8_4(taps.conv5.detach())),
        ]
        revised = propagate(strongest_class(cam.detach()), self.f9(torch.cat(features, dim=1)))
        return SEAMOutput(cam, revised, None if self.fc_proj is None else F.relu(self.fc_proj(conv6)))


def strongest_class(cam: Tensor) -> Tensor:
    """(B, 1 + C, h, w) with the background first -> in [0, 1]: per pixel only the strongest class, and 1 - it.

    Each channel is divided by its maximum over the image first; the background's own scores are not used.
    """
    cam = F.relu(cam[:, 1:])
    cam = F.relu(cam - 1e-5) / (cam.amax(dim=(-2, -1), keepdim=True) + 1e-5)
    strongest = cam.amax(dim=1, keepdim=True)
    return torch.cat([1 - strongest, torch.where(cam < strongest, 0, cam)], dim=1)


def propagate(cam: Tensor, features: Tensor) -> Tensor:
    """Every pixel takes the mean CAM of all pixels, weighted by the cosine of their features where positive.

    (B, C, h, w) and (B, D, h, w) -> (B, C, h, w).
    """
    size, features = cam.shape[-2:], features.flatten(2)  # (B, D, N)
    features = features / (features.norm(dim=1, keepdim=True) + 1e-5)
    similarity = F.relu(features.mT @ features)  # (B, N, N)
    similarity = similarity / (similarity.sum(dim=1, keepdim=True) + 1e-5)
    return (cam.flatten(2) @ similarity).unflatten(2, size)

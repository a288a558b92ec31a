"""Plain vision transformers on timm, with the tokens of an intermediate block."""

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from wsss import InputError
from wsss.networks.pretrained import CLASSIFIER, PACKAGES, check_backbone, package_names, packaged_file
from wsss.networks.weights import HEADS, is_file, load_weights, read_state_dict

TINY_PARAMETERS = 6_000_000
"""A little more than a ViT-Ti: what learns from random weights on a data set of this field's size."""


class Tokens(NamedTuple):
    """What an encoder gives for a batch of images, h x w being the grid of patches."""

    class_token: Tensor  # (B, D), after the last norm
    patches: Tensor  # (B, D, h, w), after the last norm
    aux_patches: Tensor  # (B, D, h, w), output of an intermediate block, not normalised


class ViTEncoder(nn.Module):
    """A timm `VisionTransformer` that accepts any image size and also gives auxiliary patch tokens.

    The position embedding is frozen and resized at every forward to the grid of the image (bicubic, no
    antialiasing), as ToCo and AFA do. Sizes that are no multiple of the patch are floored.

    Args:
        backbone: timm name of a plain vision transformer with one class token.
        weights: None for random weights, a timm tag (`orig_in21k_ft_in1k`), or a `.pth` or `.safetensors` file.
        arguments: what timm's constructor takes, e.g. `depth`, `embed_dim`, `patch_size`, `img_size`;
            None leaves one as it is.
        aux_layer: index into the list of block outputs (whose last entry is normalised); -3 is the tenth
            of twelve blocks.

    Raises:
        InputError: unknown backbone, argument, tag or layer; a file that does not fit.
    """

    def __init__(
        self,
        backbone: str,
        weights: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        aux_layer: int = -3,
    ) -> None:
        super().__init__()
        given = {name: value for name, value in (arguments or {}).items() if value is not None}
        self.vit, self.loaded = create_vit(backbone, weights, given)
        depth = len(self.vit.blocks)
        if not -depth <= aux_layer < depth:
            raise InputError(
                f"aux_layer is {aux_layer}, but {backbone} has {depth} blocks: use {-depth} to {depth - 1}"
            )
        self.aux_block = aux_layer % depth
        self.embed_dim: int = self.vit.embed_dim
        self.patch_size: int = self.vit.patch_embed.patch_size[0]
        assert self.vit.pos_embed is not None
        self.vit.pos_embed.requires_grad_(False)

    def embed(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens after the position embedding, (B, 1 + h*w, D) with the class token first, and (h, w)."""
        if min(image.shape[-2:]) < self.patch_size:
            height, width = image.shape[-2:]
            raise InputError(f"an image of {width}x{height} pixels is smaller than one patch of {self.patch_size}")
        patches = self.vit.patch_embed.proj(image)  # (B, D, h, w)
        h, w = patches.shape[-2:]
        class_token, position = self.vit.cls_token, self.vit.pos_embed
        assert class_token is not None  # create_vit has seen to it
        assert position is not None
        grid = position[:, 1:]
        side = int(grid.shape[1] ** 0.5)
        grid = grid.transpose(1, 2).unflatten(2, (side, side))
        grid = resize_grid(grid, (h, w))
        first = (class_token + position[:, :1]).expand(image.shape[0], -1, -1)
        return torch.cat([first, (patches + grid).flatten(2).transpose(1, 2)], dim=1), (h, w)

    def forward(self, image: Tensor) -> Tokens:
        """image: (B, 3, H, W) normalised."""
        tokens, size = self.embed(image)
        for index, block in enumerate(self.vit.blocks):
            tokens = block(tokens)
            if index == self.aux_block:
                aux_tokens = tokens
        tokens = self.vit.norm(tokens)
        if self.aux_block == len(self.vit.blocks) - 1:
            aux_tokens = tokens
        return Tokens(tokens[:, 0], _grid(tokens, size), _grid(aux_tokens, size))


def _grid(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    return tokens[:, 1:].transpose(1, 2).unflatten(2, size)


def resize_grid(grid: Tensor, size: tuple[int, int], scale: Sequence[float | Tensor] | None = None) -> Tensor:
    """`F.interpolate(mode="bicubic")` of (1, D, g, k) to (1, D, h, w), as two products with matrices.

    torch's kernel for GPUs goes through all D channels in one thread, and its gradient is a sum in any order.
    `scale` are the factors, h / g and w / k unless given.
    """
    factors = scale or [length / side for length, side in zip(size, grid.shape[-2:], strict=True)]
    with torch.autocast(grid.device.type, enabled=False):
        rows, columns = (
            bicubic(length, side, factor, grid.device).to(grid)
            for length, side, factor in zip(size, grid.shape[-2:], factors, strict=True)
        )
        return rows @ grid @ columns.mT


def bicubic(length: int, side: int, scale: float | Tensor, device: torch.device) -> Tensor:
    """(length, side): the weights by which bicubic interpolation (a = -0.75) by a factor mixes an axis."""
    at = (torch.arange(length, device=device) + 0.5) * (1 / scale) - 0.5
    taps = torch.arange(-1, 3, device=device)
    d = (at[:, None] - at[:, None].floor() - taps).abs()  # (length, 4) distances from the four neighbours
    weights = torch.where(d <= 1, (1.25 * d - 2.25) * d * d + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3)
    neighbours = (at[:, None].floor().long() + taps).clamp(0, side - 1)
    return (weights[:, :, None] * (neighbours[:, :, None] == torch.arange(side, device=device))).sum(1)


def create_vit(backbone: str, weights: str | None, arguments: dict[str, Any]) -> tuple[VisionTransformer, str | None]:
    """`create_timm` of a plain vision transformer; see `ViTEncoder` for the arguments and errors."""
    model, loaded = create_timm(backbone, weights, arguments)
    if not isinstance(model, VisionTransformer) or model.cls_token is None or model.num_prefix_tokens != 1:
        raise InputError(f"backbone {backbone!r} is not a plain vision transformer with one class token")
    if weights is None and sum(p.numel() for p in model.parameters()) > TINY_PARAMETERS:
        warnings.warn(
            f"{backbone} starts from random weights: a network larger than ViT-Ti learns little from image labels "
            "alone; set method.weights to a timm tag or a file",
            stacklevel=3,
        )
    return model, loaded


def create_timm(
    backbone: str,
    weights: str | None,
    arguments: dict[str, Any],
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> tuple[nn.Module, str | None]:
    """A timm model without its head, and in words which weights it has; None for random ones.

    Args:
        backbone: its name, without a tag.
        weights: None for random weights, a timm tag, a name of `PACKAGES`, or a `.pth` or `.safetensors` file.
        arguments: of its constructor; with `num_classes`, the number of the weights, it keeps their head.
        rename: from the names of a file's tensors to some that timm knows.

    Raises:
        InputError: an unknown name, tag or argument; a file that does not fit; a download that fails; a package that
            is not installed.
    """
    if not timm.is_model(backbone):
        near = ", ".join(timm.list_models(f"{backbone.split('_')[0]}*")[:8]) or "vit_base_patch16_224, resnet50"
        raise InputError(f"unknown backbone {backbone!r}: give the name of a timm model, e.g. {near}")
    if weights in PACKAGES:
        check_backbone(weights, backbone)
        weights = packaged_file(weights)
    tag = None if weights is None or is_file(weights) else weights
    known = [name.split(".", 1)[1] for name in timm.list_models(f"{backbone}.*", pretrained=True)]
    if tag is not None and tag not in known:
        known += [name for name, package in PACKAGES.items() if package.backbone == backbone]
        raise InputError(
            f"weights {tag!r} is neither a .pth or .safetensors file nor a timm tag of {backbone}, which has "
            f"{', '.join(known) or 'none'}: give one of these, or start without by method.weights=null"
        )
    source = f"timm weights {backbone}.{tag}"
    try:
        if tag is None:
            model: Any = timm.create_model(backbone, **{"num_classes": 0, **arguments})
        else:
            # timm is strict about its weights only where the head is theirs too
            others = {name: value for name, value in arguments.items() if name not in ("num_classes", "global_pool")}
            model = timm.create_model(f"{backbone}.{tag}", pretrained=True, **others)
            if "global_pool" in arguments or arguments.get("num_classes", 0) != model.num_classes:
                model.reset_classifier(arguments.get("num_classes", 0), arguments.get("global_pool"))
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        unfit = f"backbone_args {arguments}" if tag is None or isinstance(error, TypeError) else source
        raise InputError(f"{unfit} does not fit {backbone}: {reason}") from error
    except OSError as error:  # the hub cannot be reached, or the file is not in its cache
        raise InputError(
            f"{source} could not be downloaded ({type(error).__name__}): pass method.weights=FILE with a local .pth "
            "or .safetensors file, or method.weights=null for random weights"
        ) from error
    if weights is not None and tag is None:
        return model, load_timm(model, backbone, weights, rename)
    return model, None if tag is None else f"all tensors of {source}"


def load_timm(
    model: Any, backbone: str, path: str, rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
) -> str:
    """`load_weights` of a timm model, converted as timm does: position table and patches resized, names translated.

    For the networks of `PACKAGES` the packages' own files are read too, and named as they name their tensors.
    """
    module = sys.modules[timm.model_entrypoint(backbone).__module__]
    convert = getattr(module, "checkpoint_filter_fn", lambda state, model: state)  # timm's convention
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    content, theirs = rename(read_state_dict(path)), {}
    if any(package.backbone == backbone for package in PACKAGES.values()) and any("_blocks." in key for key in content):
        theirs, heads = package_names(model), (*heads, CLASSIFIER)
    ours = {name: own for own, name in theirs.items()}

    def converted(state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        renamed = {ours.get(name, name): tensor for name, tensor in state.items()}
        return convert(renamed if len(renamed) == len(state) else state, model)  # with both names it is refused

    return load_weights(
        model,
        backbone if model.num_classes else f"{backbone} without its head",
        path,
        content,
        converted,
        HEADS + heads,
        lambda name: theirs.get(name, name),
    )

"""Files of weights: reading them without executing anything, and saying in words what does not fit."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsss import InputError

SUFFIXES = {".pth", ".pt", ".bin", ".safetensors"}


def is_file(weights: str) -> bool:
    """Whether `weights` is the name of a file rather than a timm tag."""
    return Path(weights).suffix in SUFFIXES


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of a `.pth` file that holds nothing but tensors and containers.

    A state dict under `model` or `state_dict` (DeiT, Lightning) is taken out.

    Raises:
        InputError: the file is missing, damaged, or holds anything else.
    """
    if not Path(path).is_file():
        raise InputError(f"weights file {path} does not exist")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes in the readers
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"weights file {path} cannot be read as a file of tensors: {reason}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(inner := content.get(key), dict):
            content = inner
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"weights file {path} holds no state dict: expected a mapping from names to tensors")
    return content


def describe_misfit(faults: Mapping[str, Sequence[str]], shown: Callable[[str], str] = str) -> str:
    """`lacks a, b, c (5 in all) and has unknown d (1 in all)` of names by fault; empty where there are none.

    Args:
        faults: what is wrong, in words -> the names it is wrong with.
        shown: how a name is called in the file.
    """
    said = (
        f"{what} {', '.join(map(shown, names[:3]))} ({len(names)} in all)" for what, names in faults.items() if names
    )
    return " and ".join(said)


def misfit(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """How names and shapes of a file's tensors differ from a network's own, in words; empty where they do not."""
    return describe_misfit(
        {
            "lacks": [name for name in ours if name not in theirs],
            "has unknown": [name for name in theirs if name not in ours],
            "has other shapes for": [n for n in ours if n in theirs and ours[n].shape != theirs[n].shape],
        }
    )


VIT_LAYOUT = {
    "patch_embed.proj.weight": "width 3 patch patch",
    "patch_embed.proj.bias": "width",
    "blocks.*.norm1.weight": "width",
    "blocks.*.norm1.bias": "width",
    "blocks.*.attn.qkv.weight": "3*width width",
    "blocks.*.attn.qkv.bias": "3*width",
    "blocks.*.attn.proj.weight": "width width",
    "blocks.*.attn.proj.bias": "width",
    "blocks.*.norm2.weight": "width",
    "blocks.*.norm2.bias": "width",
    "blocks.*.mlp.fc1.weight": "mlp width",
    "blocks.*.mlp.fc1.bias": "mlp",
    "blocks.*.mlp.fc2.weight": "width mlp",
    "blocks.*.mlp.fc2.bias": "width",
}
"""Names and shapes of a vision transformer's tensors; `*` is every block."""


def compare_layout(
    state: Mapping[str, Tensor],
    layout: Mapping[str, str],
    optional: Sequence[str] = (),
    shown: Callable[[str], str] = str,
) -> tuple[str, dict[str, int]]:
    """How names and shapes of a transformer's file differ from a layout, in words, and the sizes its tensors tell.

    Args:
        state: tensors by name.
        layout: the names expected, with `*` for every block, and their shapes, as in `VIT_LAYOUT`. A size is a number
            or a name, which has to be the same number everywhere; `depth` is the number of blocks.
        optional: names that may be absent.
        shown: how a name is called in the file.
    """
    prefix = next(name for name in layout if "blocks.*" in name).partition("*")[0]
    sizes = {"depth": len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})}
    expected = {
        name.replace("*", str(index)): axes
        for name, axes in layout.items()
        for index in range(sizes["depth"] if "*" in name else 1)
    }
    faults = {
        "lacks": [name for name in expected if name not in state and name not in optional],
        "has unknown": [name for name in state if name not in expected],
        "has no float weights or an unexpected shape in": [
            name
            for name, axes in expected.items()
            if name in state and not (state[name].is_floating_point() and _has_shape(state[name], axes, sizes))
        ],
    }
    return describe_misfit(faults, shown), sizes


def _has_shape(tensor: Tensor, axes: str, sizes: dict[str, int]) -> bool:
    """Whether a shape is the one described; a size met for the first time is entered into `sizes`."""
    described = axes.split()
    if tensor.ndim != len(described) or tensor.numel() == 0:
        return False
    expected = []
    for axis, size in zip(described, tensor.shape, strict=True):
        if axis == "3*width":
            expected.append(3 * sizes.get("width", 0))
        elif axis == "1+classes":
            expected.append(1 + sizes.get("classes", 0))
        else:
            expected.append(int(axis) if axis.isdigit() else sizes.setdefault(axis, size))
    return list(tensor.shape) == expected


def vit_arguments(sizes: Mapping[str, int], side: int) -> dict[str, Any]:
    """`backbone_args` of a transformer of these sizes with a `side` x `side` table of positions.

    No tensor tells the number of attention heads.
    """
    return {
        "embed_dim": sizes["width"],
        "depth": sizes["depth"],
        "patch_size": sizes["patch"],
        "img_size": side * sizes["patch"],
        "mlp_ratio": sizes["mlp"] / sizes["width"],
    }

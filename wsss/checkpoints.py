"""Checkpoints: reading them safely, what they say about themselves, and those of the original repositories."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wsss import InputError
from wsss.networks.vit import read_state_dict


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint of `wsss-train`, or of the original ToCo or MCTformer code, read without executing anything of it.

    Beside Lightning's entries it holds `hyper_parameters`, the plain values of the method's constructor, and
    `wsss`: `method` and `dataset` (names of config options), `dataset_values`, `protocol`, `classes`, `mean`, `std`.
    Of the original's only `state_dict`, `hyper_parameters` and `wsss` with `method` are known.

    Raises:
        InputError: the file is missing, damaged, or something else.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path} does not exist: give the .ckpt file of a run, e.g. checkpoints/last.ckpt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes in the unpickler
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]  # without torch's advice
        raise InputError(f"checkpoint {path} cannot be read as a file of tensors and plain values: {reason}") from error
    inner = content.get("model", content) if isinstance(content, dict) else None
    if isinstance(inner, dict) and inner and all(isinstance(value, Tensor) for value in inner.values()):
        method = "toco"
        if any(str(name).endswith("cls_token") and "encoder." not in str(name) for name in inner):
            method, state, values = read_official_mctformer(path)
        else:
            state, values = read_official_toco(path)
        return {"state_dict": state, "hyper_parameters": values, "wsss": {"method": method}}
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters", "wsss"} <= content.keys():
        raise InputError(f"checkpoint {path} was not written by wsss-train: it lacks what the method was built with")
    return content


def load_weights(method: torch.nn.Module, checkpoint: dict[str, Any], path: str) -> None:
    """Load a checkpoint's weights into a method built from its values.

    Raises:
        InputError: names or shapes differ; the first of each kind are named.
    """
    ours, theirs = method.state_dict(), checkpoint["state_dict"]
    faults = {
        "lacks": [key for key in ours if key not in theirs],
        "has unknown": [key for key in theirs if key not in ours],
        "has other shapes for": [k for k in ours if k in theirs and ours[k].shape != theirs[k].shape],
    }
    said = [f"{what} {', '.join(keys[:3])} ({len(keys)} in all)" for what, keys in faults.items() if keys]
    if said:
        raise InputError(f"checkpoint {path} does not fit {type(method).__name__}: it {' and '.join(said)}")
    method.load_state_dict(theirs)


TOCO_MODULES = {"encoder.vit.": "encoder.", "projector.": "proj_head.", "teacher_projector.": "proj_head_t."}
"""First part of our names -> the original's; classifier, aux_classifier and decoder are called the same."""

TOCO_PARAMETERS = {
    ".parametrizations.weight.original0": ".weight_g",  # gains of the weight normalisation
    ".parametrizations.weight.original1": ".weight_v",  # directions
}
"""Last part of our names -> the original's."""

TOCO_HEAD = "encoder.head."
"""The ImageNet classifier: the original keeps it in every checkpoint and never uses it."""

VIT_SHAPES = {
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

TOCO_SHAPES = {
    "encoder.vit.cls_token": "1 1 width",
    "encoder.vit.pos_embed": "1 positions width",
    **{f"encoder.vit.{name}": axes for name, axes in VIT_SHAPES.items()},
    "encoder.vit.norm.weight": "width",
    "encoder.vit.norm.bias": "width",
    "encoder.head.weight": "1000 width",
    "encoder.head.bias": "1000",
    "classifier.weight": "classes width 1 1",
    "aux_classifier.weight": "classes width 1 1",
    "decoder.conv6.weight": "channels width 3 3",
    "decoder.conv7.weight": "channels channels 3 3",
    "decoder.conv8.weight": "1+classes channels 1 1",
    "projector.mlp.0.weight": "hidden width",
    "projector.mlp.0.bias": "hidden",
    "projector.mlp.2.weight": "hidden hidden",
    "projector.mlp.2.bias": "hidden",
    "projector.mlp.4.weight": "bottleneck hidden",
    "projector.mlp.4.bias": "bottleneck",
    "projector.last_layer.parametrizations.weight.original0": "out 1",
    "projector.last_layer.parametrizations.weight.original1": "out bottleneck",
}
"""Our names and the shapes of their tensors; `*` is every block. The teacher's projector is like the student's."""


def _rename(name: str, first: Mapping[str, str], last: Mapping[str, str]) -> str:
    """`name` with its first and its last part replaced where the tables know them."""
    head = next((part for part in first if name.startswith(part)), "")
    tail = next((part for part in last if name.endswith(part)), "")
    return first.get(head, "") + name[len(head) : len(name) - len(tail)] + last.get(tail, "")


def toco_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of the original ToCo code -> ours: `module.` is removed, the unused ImageNet head left out.

    Both layouts of weight normalisation are understood, `weight_g` and `parametrizations.weight.original0`.
    """
    return {name: tensor for name, tensor in _our_names(state).items() if not name.startswith(TOCO_HEAD)}


def _our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`toco_from_official` with the head, under the name it has there."""
    modules = {theirs: ours for ours, theirs in TOCO_MODULES.items()} | {TOCO_HEAD: TOCO_HEAD}
    modules = dict(sorted(modules.items(), key=lambda item: -len(item[0])))  # the head before its encoder
    parameters = {theirs: ours for ours, theirs in TOCO_PARAMETERS.items()}
    return {_rename(name.replace("module.", ""), modules, parameters): tensor for name, tensor in state.items()}


def toco_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> those of the original ToCo code, whose strict loading also wants the head: zeros."""
    official = {_rename(name, TOCO_MODULES, TOCO_PARAMETERS): tensor for name, tensor in state.items()}
    width = official["encoder.norm.bias"]
    head = {f"{TOCO_HEAD}weight": width.new_zeros(1000, len(width)), f"{TOCO_HEAD}bias": width.new_zeros(1000)}
    return official | head


def read_official_toco(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of a checkpoint of the original ToCo code (`model_iter_<n>.pth`), under our names, float32.

    The file is read without executing anything of it, and every name and shape is checked; only the ImageNet
    head may be absent.

    Returns:
        The state dict of `wsss.methods.toco.ToCo`, and the arguments of its constructor that the file itself
        tells: `num_classes`, `backbone_args`, `decoder_channels`, `projector`. No tensor tells the number of
        attention heads: it is the backbone's, or has to be added to `backbone_args`.

    Raises:
        InputError: the file is missing, damaged, or not such a checkpoint; names what is wrong.
    """
    content = {str(name): tensor for name, tensor in read_state_dict(path).items()}
    state = _our_names(content)
    projector = [name for name in TOCO_SHAPES if name.startswith("projector.")]
    shapes = TOCO_SHAPES | {f"teacher_{name}": TOCO_SHAPES[name] for name in projector}
    head = [name for name in shapes if name.startswith(TOCO_HEAD)]
    faults, sizes = _compare(state, shapes, head, lambda name: _rename(name, TOCO_MODULES, TOCO_PARAMETERS))
    side = math.isqrt(sizes.get("positions", 2) - 1)  # a missing embedding is among the faults already
    if side == 0 or sizes.get("positions", 2) != 1 + side**2:
        faults.append("has a grid of positions that is no square in encoder.pos_embed")
    if len(state) < len(content):
        faults.append("has some weights twice under different names")
    if faults:
        raise InputError(
            f"weights file {path} is no checkpoint of the original ToCo code: it {' and '.join(faults)}; give a "
            "model_iter_<n>.pth of a ViT-B or DeiT-B run, or a checkpoint of wsss-train"
        )
    values = {
        "num_classes": sizes["classes"],
        "backbone_args": _vit_arguments(sizes, side),
        "decoder_channels": sizes["channels"],
        "projector": {key: sizes[key] for key in ("hidden", "bottleneck", "out")},
    }
    return {name: tensor.float() for name, tensor in toco_from_official(content).items()}, values


MCTFORMER_SHAPES = {
    "cls_token": "1 classes width",
    **VIT_SHAPES,
    "norm.weight": "width",
    "norm.bias": "width",
    "head.bias": "classes",
}
"""Names and shapes that the three versions of MCTformer share; the norm is in every file and used by none."""

MCTFORMER_VERSIONS = {
    "mctformer_v1": {"pos_embed": "1 positions width", "head.weight": "classes width"},
    "mctformer": {"pos_embed": "1 positions width", "head.weight": "classes width 3 3"},
    "mctformer_plus": {
        "pos_embed": "1 unused width",
        "pos_embed_cls": "1 classes width",
        "pos_embed_pat": "1 patches width",
        "head.weight": "classes width 3 3",
    },
}
"""What is in the files of one version, by the name of our method."""


def mctformer_from_official(state: Mapping[str, Tensor], version: str) -> dict[str, Tensor]:
    """Names of the original MCTformer code -> ours; what the network never uses is left out."""
    unused = {"mctformer_v1": ("norm.", "head."), "mctformer": ("norm.",), "mctformer_plus": ("norm.", "pos_embed.")}
    kept = {name: t for name, t in state.items() if not f"{name}.".startswith(unused[version])}
    places = {"pos_embed": "encoder.position.", "head.": ""}
    return {
        next((p for k, p in places.items() if name.startswith(k)), "encoder.") + name: t for name, t in kept.items()
    }


def mctformer_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names -> those of the original MCTformer code, whose strict loading also wants what it never uses."""
    official = {name.removeprefix("encoder.").removeprefix("position."): tensor for name, tensor in state.items()}
    classes, width = official["cls_token"].shape[1:]
    like = official["cls_token"]
    unused = {"norm.weight": like.new_ones(width), "norm.bias": like.new_zeros(width)}
    if "pos_embed_cls" in official:
        unused["pos_embed"] = like.new_zeros(1, 197, width)
    if "head.weight" not in official:
        unused |= {"head.weight": like.new_zeros(classes, width), "head.bias": like.new_zeros(classes)}
    return official | unused


def read_official_mctformer(path: str) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Weights of a checkpoint of the original MCTformer code, V1, V2 or +, under our names, float32.

    Returns:
        The name of our method, its state dict, and the constructor's arguments that the file itself tells:
        `num_classes` and `backbone_args`. No tensor tells the number of attention heads.

    Raises:
        InputError: the file is missing, damaged, or not such a checkpoint; names what is wrong.
    """
    state = {str(name).removeprefix("module."): tensor for name, tensor in read_state_dict(path).items()}
    tokens, head = state.get("cls_token", torch.empty(0)), state.get("head.weight", torch.empty(0))
    if tokens.ndim == 3 and tokens.shape[1] == 1 and len(head) != 1:
        raise InputError(
            f"checkpoint {path} holds the ImageNet weights of a vision transformer (one class token), no trained "
            f"MCTformer: train from it with method.weights={path}"
        )
    if "pos_embed_cls" in state or "pos_embed_pat" in state:
        version = "mctformer_plus"
    else:
        version = "mctformer" if head.ndim == 4 else "mctformer_v1"
    faults, sizes = _compare(state, MCTFORMER_SHAPES | MCTFORMER_VERSIONS[version], ("norm.weight", "norm.bias"))
    patches = sizes.get("patches", sizes.get("positions", 0) - sizes.get("classes", 0))
    side = math.isqrt(max(0, patches))
    if not faults and (side == 0 or side**2 != patches):
        faults.append(f"has {patches} patch positions, which is no square grid")
    if faults:
        raise InputError(
            f"checkpoint {path} looks like one of the original MCTformer code (method={version}), but it "
            f"{' and '.join(faults)}; give a checkpoint.pth of V1, V2 or +, or a checkpoint of wsss-train"
        )
    values = {"num_classes": sizes["classes"], "backbone_args": _vit_arguments(sizes, side)}
    return version, {n: t.float() for n, t in mctformer_from_official(state, version).items()}, values


def _compare(
    state: Mapping[str, Tensor],
    shapes: Mapping[str, str],
    optional: Sequence[str] = (),
    theirs: Callable[[str], str] = str,
) -> tuple[list[str], dict[str, int]]:
    """What is wrong with the names and shapes of a file, in words, and the sizes its tensors tell.

    Args:
        state: tensors by name, our names where `theirs` gives back the file's.
        shapes: the names and shapes expected, with `*` for every block; their number of blocks is `sizes["depth"]`.
        optional: names that may be absent.
    """
    prefix = next(name for name in shapes if "blocks.*" in name).partition("*")[0]
    sizes = {"depth": len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})}
    expected = {
        name.replace("*", str(index)): axes
        for name, axes in shapes.items()
        for index in range(sizes["depth"] if "*" in name else 1)
    }
    faults = {
        "lacks": [name for name in expected if name not in state and name not in optional],
        "has unknown": [name for name in state if name not in expected],
        "has no float weights or an unexpected shape in": [
            name
            for name, axes in expected.items()
            if name in state and not (state[name].is_floating_point() and _fits(state[name], axes, sizes))
        ],
    }
    said = [
        f"{what} {', '.join(map(theirs, names[:3]))} ({len(names)} in all)" for what, names in faults.items() if names
    ]
    return said, sizes


def _vit_arguments(sizes: Mapping[str, int], side: int) -> dict[str, Any]:
    """`backbone_args` of a transformer with a `side` x `side` table of positions."""
    return {
        "embed_dim": sizes["width"],
        "depth": sizes["depth"],
        "patch_size": sizes["patch"],
        "img_size": side * sizes["patch"],
        "mlp_ratio": sizes["mlp"] / sizes["width"],
    }


def _fits(tensor: Tensor, axes: str, sizes: dict[str, int]) -> bool:
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

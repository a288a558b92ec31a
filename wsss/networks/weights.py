"""Files of weights: reading them without executing anything, and saying in words what does not fit."""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsss import InputError
from wsss.pickles import load_plain

SUFFIXES = {".pth", ".pt", ".bin", ".safetensors"}

CONTAINERS = ("model", "state_dict", "teacher")
"""Keys that a state dict lies under: DeiT, Lightning, DINO."""

PREFIXES = ("module.", "model.", "teacher.", "encoder.", "backbone.")
"""What stands before names where a network was part of another one, the outermost first."""

HEADS = ("head.", "head_dist.", "fc.", "classifier.", "pre_logits.")
"""How names of classifiers begin, which a file may hold or lack."""

COUNTER = ".num_batches_tracked"
"""Of every batch norm since PyTorch 0.4.1; older files lack it, and nothing here uses it."""


def is_file(weights: str) -> bool:
    """Whether `weights` is the name of a file rather than a timm tag."""
    return Path(weights).suffix in SUFFIXES


def read_state_dict(path: str) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file or of a `.pth` file that holds nothing but tensors and containers.

    A state dict under one of `CONTAINERS` is taken out.

    Raises:
        InputError: the file is missing, damaged, or holds anything else.
    """
    return state_dict_of(read_content(path), path)


def state_dict_of(content: Any, path: str) -> dict[str, Tensor]:
    """The state dict in what was read from a file, see `read_state_dict`."""
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(inner := content.get(key), dict):
            content = inner
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"weights file {path} holds no state dict: expected a mapping from names to tensors")
    return {str(name): tensor for name, tensor in content.items()}


def read_content(path: str) -> Any:
    """All of a `.safetensors` file, or of a `.pth` or `.ckpt` file of tensors, plain values and containers.

    Raises:
        InputError: the file is missing, damaged, or holds anything else.
    """
    if not Path(path).is_file():
        raise InputError(f"weights file {path} does not exist")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return load_plain(path)
    except Exception as error:  # whatever a damaged or hostile file provokes in the readers
        raise InputError(
            f"weights file {path} cannot be read as a file of tensors: {why_unreadable(error, path)}"
        ) from error


def why_unreadable(error: Exception, path: str) -> str:
    """What torch's unpickler could not read, and how the tensors are got out of a file of a training script."""
    if refused := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return (
            f"beside tensors it holds a Python object, {refused[1]}, and reading one can execute code; if you trust "
            "its source, keep only the tensors, if 'model' is their key: import torch; "
            f"torch.save({{'model': torch.load({path!r}, weights_only=False)['model']}}, 'stripped.pth')"
        )
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]  # without torch's advice


def load_weights(
    network: nn.Module,
    name: str,
    path: str,
    content: Mapping[str, Tensor],
    convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict,
    heads: tuple[str, ...] = HEADS,
    shown: Callable[[str], str] = str,
    advice: str = "give a file of this very backbone, or method.weights=null to start without",
) -> str:
    """Load every tensor of a network from a file, or refuse it; only classifiers may be left over.

    Args:
        network: without its classifier.
        name: what it is called in the message.
        path: of the file; `content` is what was read from it. Names may have `PREFIXES` if all fit without.
        convert: from the names and shapes of the file to the network's.
        heads: how the names of classifiers begin.
        shown: how a name of the network is called in the file.
        advice: the end of the message.

    Returns:
        `174 of 174 tensors of FILE (sha256 ab12...)`.

    Raises:
        InputError: tensors are missing, unknown, of another shape, or not finite; the first of each kind are named.
    """
    own = {key: tensor for key, tensor in network.state_dict().items() if not key.endswith(COUNTER)}
    tried = []
    for state in without_prefixes(content):
        try:
            converted = convert(dict(state))
        except Exception:  # whatever a foreign file provokes in timm's filters: its own names tell more
            converted = state
        found = {
            key: tensor
            for key, tensor in converted.items()
            if key in own or not (key.startswith(heads) or key.endswith(COUNTER))
        }
        faults = faults_of(own, found)
        if not any(faults.values()):
            network.load_state_dict(found, strict=False)
            with Path(path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return f"{len(found)} of {len(own)} tensors of {path} (sha256 {digest})"
        tried.append(faults)
    nearest = min(tried, key=lambda faults: sum(map(len, faults.values())))
    raise InputError(f"weights file {path} does not fit {name}: it {describe_misfit(nearest, shown)}; {advice}")


def start_backbone(backbone: nn.Module, path: str) -> Mapping[str, Any]:
    """A backbone's weights from a checkpoint of a method with the same one; of two that of its `main` network.

    Returns:
        What the checkpoint says of itself, `mean` and `std` among it; empty where it says nothing.

    Raises:
        InputError: it cannot be read, or is of another network.
    """
    content = read_content(path)
    own = {name.removeprefix("body."): name for name in backbone.state_dict()}  # some methods have the body alone
    state = {name.removeprefix("main."): tensor for name, tensor in unfrozen(state_dict_of(content, path)).items()}
    found = {
        n.removeprefix("backbone.").removeprefix("body."): t for n, t in state.items() if n.startswith("backbone.")
    }
    if said := misfit({short: backbone.state_dict()[name] for short, name in own.items()}, found):
        raise InputError(f"init_checkpoint {path} does not fit this network (backbone.*): it {said}")
    backbone.load_state_dict({own[short]: tensor for short, tensor in found.items()})
    return told_by(content)


def start_classifier(
    network: nn.Module, path: str, classes: Sequence[str], layers: Sequence[str], advice: str, prefix: str = ""
) -> Mapping[str, Any]:
    """A network's `backbone` and `layers` from a checkpoint of its own method, or of `frozen_cam` with the same ones.

    Args:
        network: its layers are convolutions without biases.
        path: of the checkpoint.
        classes: that the network knows.
        layers: names of its layers, the last of which scores the classes.
        advice: the end of the message.
        prefix: what the names begin with in checkpoints of its own method.

    Returns:
        What the checkpoint says of itself, `mean` and `std` among it; empty where it says nothing.

    Raises:
        InputError: it cannot be read, is of another network or of other classes.
    """
    content = read_content(path)
    state = state_dict_of(content, path)
    own = unfrozen(state, layers)
    if own.keys() == state.keys():
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if said := misfit(network.state_dict(), own):
        raise InputError(f"init_checkpoint {path} does not fit this network ({prefix}*): it {said}; {advice}")
    origin = told_by(content)
    if list(origin.get("classes", classes)) != list(classes):
        raise InputError(
            f"init_checkpoint {path} knows the classes {', '.join(map(str, origin['classes']))}, but the data have "
            f"{', '.join(classes)}: start from one of the same classes, in the same order"
        )
    network.load_state_dict(own)
    return origin


def told_by(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint of ours says of itself; empty of other files."""
    origin = content.get("wsss")
    return origin if isinstance(origin, dict) else {}


def unfrozen(state: Mapping[str, Tensor], layers: Sequence[str] = ()) -> dict[str, Tensor]:
    """State of `frozen_cam` under the names `backbone` and `layers` of networks that learn; of others it stays.

    The biases of its classifier are left out: they are near 0, and its maps hardly change without.
    """
    if not any(name.startswith("frozen.") for name in state):
        return dict(state)
    kernels = [name for name in state if name.startswith("classifier.") and name.endswith(".weight")]
    names = {kernel: f"{layer}.weight" for kernel, layer in zip(kernels, layers, strict=False)}
    return {
        names.get(name, re.sub(r"^frozen\.", "backbone.", name)): tensor
        for name, tensor in state.items()
        if not (name.startswith("classifier.") and name.endswith(".bias"))
    }


def without_prefixes(state: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """The state dict as it is, then again without each of `PREFIXES` that is there."""
    yield state
    for prefix in PREFIXES:
        shorter = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        if shorter.keys() != state.keys() and len(shorter) == len(state):
            yield (state := shorter)


def faults_of(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """In words what is wrong with a file's tensors for a network's own -> their names."""
    common = {key: tensor for key, tensor in found.items() if key in own}
    fitting = {
        key: tensor
        for key, tensor in common.items()
        if tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
        if tensor.shape == own[key].shape
    }
    return {
        "lacks": [key for key in own if key not in found],
        "has unknown": [key for key in found if key not in own],
        "has no float weights or another shape for": [key for key in common if key not in fitting],
        "has NaN or infinite values in": [key for key, tensor in fitting.items() if not tensor.isfinite().all()],
    }


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


HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16}
"""Attention heads of the published ViT and DeiT, tiny to large."""


def compare_layout(
    state: Mapping[str, Tensor],
    layout: Mapping[str, str],
    optional: Sequence[str] = (),
    shown: Callable[[str], str] = str,
    sizes: Mapping[str, int] | None = None,
) -> tuple[str, dict[str, int]]:
    """How names and shapes of a file differ from a layout, in words, and the sizes its tensors tell.

    Args:
        state: tensors by name.
        layout: the names expected, with `*` for every block, and their shapes, as in `VIT_LAYOUT`. A size is a number
            or a name, which has to be the same number everywhere; `depth` is the number of blocks, where there are any.
        optional: names that may be absent.
        shown: how a name is called in the file.
        sizes: those known already.
    """
    sizes = dict(sizes or {})
    if prefix := next((name.partition("*")[0] for name in layout if "blocks.*" in name), None):
        sizes["depth"] = len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})
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

    No tensor tells the number of attention heads: it is that of the ViT or DeiT of this width, None for other widths.
    """
    return {
        "embed_dim": sizes["width"],
        "depth": sizes["depth"],
        "patch_size": sizes["patch"],
        "img_size": side * sizes["patch"],
        "mlp_ratio": sizes["mlp"] / sizes["width"],
        "num_heads": HEADS_OF_WIDTH.get(sizes["width"]),
    }

"""What may come from a checkpoint: a file is data, and every entry of it is looked at before it is used."""

import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wsss import InputError
from wsss.networks.weights import why_unreadable
from wsss.pickles import load_plain

MAX_CLASSES = 10_000
MAX_DEPTH = 8
MAX_VALUES = 50_000
MAX_TEXT = 4096
"""Classes, nesting, plain values in all and characters of a value: far beyond what any run writes."""

DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
BACKBONE_ARGS = """
    img_size patch_size embed_dim depth num_heads mlp_ratio qkv_bias qk_norm proj_bias init_values class_token pos_embed
    no_embed_class pre_norm final_norm fc_norm global_pool weight_init fix_init norm_layer act_layer drop_rate
    pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate
    output_stride layers channels cardinality base_width stem_width stem_size stem_type replace_stem_pool
    block_reduce_first down_kernel_size avg_down zero_init_last drop_block_rate aa_layer depths dims kernel_sizes
    ls_init_value conv_mlp conv_bias use_grn norm_eps pad_type num_features growth_rate block_config
    width dropout frozen_stages batch_norm_momentum
"""
"""Sizes and rates of transformers, convolutional networks and ResNet38 that a file may set."""

FORBIDDEN = {"url", "uri", "path", "file", "dir", "cache", "hub", "pretrained", "cfg", "checkpoint", "ckpt", "_target_"}
"""Words in the names of arguments that a file may not set, at any depth."""

ANY = (-1e9, 1e9)

LIMITS = {
    "decoder_dilation": (1, 64),
    "depth": (1, 200),
    "dilations": (1, 256),
    "img_size": (1, 4096),
    "iterations": (0, 100),
    "label_scale": (0, 4),
    "layers": (1, 200),
    "long_side": (1, 4096),
    "object_scale": (0, 1),
    "objects": (0, 100),
    "par_scale": (0, 4),
    "size": (1, 4096),
    "train_size": (0, 10**6),
    "val_size": (0, 10**6),
    "window": (1, 4096),
}
"""Of numbers that time and memory depend on, beside scales and the sizes of tensors."""


def read_plain(path: str) -> Any:
    """The content of a file of `torch.save`, if it is made of tensors and plain values alone.

    Raises:
        InputError: the file is damaged or holds something else; the sentence names it.
    """
    try:
        return load_plain(path)
    except Exception as error:  # whatever a damaged or hostile file provokes in the readers
        reason = why_unreadable(error, path)[:500]
        raise InputError(f"checkpoint {path} cannot be read as a file of tensors and plain values: {reason}") from error


def check_checkpoint(content: Any, path: str) -> None:
    """Whether what `wsss-train` writes is there, of the right kinds and within sane bounds.

    Raises:
        InputError: it is not; the sentence names the file, the entry, what was found and what was expected.
    """
    for key in ("state_dict", "hyper_parameters", "wsss"):
        if not isinstance(content[key], Mapping):
            _refuse(path, key, _shown(content[key]), "a mapping")
    check_tensors(content["state_dict"], path)
    values, origin = content["hyper_parameters"], content["wsss"]
    _check_plain(values, "hyper_parameters", path)
    _check_plain(origin, "wsss", path)
    count = values.get("num_classes")
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_CLASSES:
        _refuse(path, "hyper_parameters.num_classes", _shown(count), f"a whole number from 1 to {MAX_CLASSES}")
    for where, names in (("hyper_parameters", values.get("classes")), ("wsss", origin.get("classes"))):
        if names is not None and not _are_names(names, count):
            _refuse(path, f"{where}.classes", _shown(names), f"{count} different names")
    if not isinstance(origin.get("method", ""), str):
        _refuse(path, "wsss.method", _shown(origin.get("method")), "a name")
    for key, kind in (("dataset", str), ("dataset_values", Mapping), ("protocol", Mapping), ("has_background", bool)):
        if key in origin and not isinstance(origin[key], kind):
            _refuse(
                path, f"wsss.{key}", _shown(origin[key]), {str: "a name", bool: "true or false"}.get(kind, "a mapping")
            )
    rule = origin.get("checkpoint_rule", "last")
    if not isinstance(rule, str) or not re.fullmatch(r"[\w /().-]{1,100}", rule):
        _refuse(path, "wsss.checkpoint_rule", _shown(rule), "plain words")
    for key, least in (("mean", 0), ("std", 0.001)):
        numbers = origin.get(key, (least,) * 3)
        if not isinstance(numbers, list | tuple) or len(numbers) != 3 or not all(_within(x, least, 1) for x in numbers):
            _refuse(path, f"wsss.{key}", _shown(numbers), f"three numbers from {least} to 1")


def check_tensors(state: Mapping[Any, Any], path: str) -> None:
    """Whether a state dict holds weights: dense tensors of finite numbers, no larger than the file.

    Raises:
        InputError: it does not; the sentence names the tensor.
    """
    if not state:
        _refuse(path, "state_dict", "nothing", "tensors by name")
    left = 4 * Path(path).stat().st_size  # weights that are shared stand in the file once
    for name, tensor in state.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
            _refuse(path, "the name of a tensor", _shown(name), "a line of text")
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_nested or tensor.dtype not in DTYPES:
            found = (
                f"{tensor.dtype} {tensor.layout} on {tensor.device}" if isinstance(tensor, Tensor) else _shown(tensor)
            )
            _refuse(path, f"state_dict.{name}", found, "a dense tensor of numbers")
        left -= tensor.numel() * tensor.element_size()
        if left < 0:
            _refuse(path, f"state_dict.{name}", f"a shape of {list(tensor.shape)}", "no more numbers than the file has")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            _refuse(path, f"state_dict.{name}", "NaN or infinite weights", "finite ones")
    if not any(tensor.is_floating_point() and tensor.any() for tensor in state.values()):
        _refuse(path, "state_dict", "nothing but zeros", "trained weights")


def check_values(group: str, values: Mapping[str, Any], own: Mapping[str, Any], path: str) -> None:
    """Whether a file may set what it sets of the arguments of a method, a data set or a protocol.

    Numbers have bounds. To a method nothing may name an address, a path, a cache or other weights, at any depth, and
    of a network of timm only sizes and rates are set. What the user or our configuration gives is theirs to decide.

    Args:
        group: of the configuration: method, dataset or protocol.
        values: the arguments, from the file and from elsewhere.
        own: those of the configuration and the command line, without the file.

    Raises:
        InputError: it may not; the sentence names the argument.
    """
    for where, value in _leaves(values, group):
        steps = where.split(".")[1:]
        given = _at(own, steps)
        if value is None or given is value or given == value:
            continue
        parts = [step for step in steps if not step.isdigit()] or steps
        if group == "method" and not _may_be_set(parts):
            raise InputError(
                f"checkpoint {path} sets {where} to {reprlib.repr(value)}, which no file may: if it has to be, give "
                f"{where}=VALUE on the command line, or +{where}=VALUE where the configuration lacks it"
            )
        rate = re.fullmatch(r"dropout|\w*drop\w*_rate|background_threshold|region_threshold", parts[-1])
        low, high = (0, 1) if rate else LIMITS.get(parts[-1], ANY)
        for item in value if isinstance(value, list | tuple) else [value]:
            word = r"\w{1,64}(\.\w{1,64})?" if parts == ["backbone"] else r"[\w ,+-]{0,64}"
            if isinstance(item, str) and group != "dataset" and not re.fullmatch(word, item):
                _refuse(path, where, _shown(item), "plain words")
            if isinstance(item, int | float) and not isinstance(item, bool) and not low <= item <= high:
                _refuse(path, where, _shown(value), f"{low:g} to {high:g}")


def _may_be_set(parts: list[str]) -> bool:
    if parts[0] in ("backbone_args", "dino_args") and len(parts) > 1:
        return parts[1] in BACKBONE_ARGS.split() and len(parts) == 2
    return not any(FORBIDDEN & {*part.lower().split("_"), part} for part in parts)


def _leaves(node: Any, where: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The values in nested mappings and lists by the path to them; a list of plain values is one."""
    nested = isinstance(node, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in node)
    if depth < MAX_DEPTH and node and (nested or isinstance(node, Mapping)):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _leaves(value, f"{where}.{key}", depth + 1)
    else:
        yield where, node


def _at(node: Any, steps: list[str]) -> Any:
    """What stands at a path of `_leaves`; something that equals nothing where there is nothing."""
    for step in steps:
        entries = dict(enumerate(node)) if isinstance(node, list | tuple) else node
        key: Any = int(step) if isinstance(node, list | tuple) and step.isdigit() else step
        if not isinstance(entries, Mapping) or key not in entries:
            return object()
        node = entries[key]
    return node


def _check_plain(node: Mapping[str, Any], where: str, path: str) -> None:
    """Whether all that is in nested mappings is text, finite numbers, truth values or None, in sane numbers."""
    left = MAX_VALUES
    for place, value in _leaves(node, where):
        if not place.isprintable() or len(place) > 1000:
            _refuse(path, f"a name in {where}", _shown(place), "a line of text")
        items = value if isinstance(value, list | tuple) else [value]
        left -= 1 + len(items)
        if left < 0:
            _refuse(path, where, f"more than {MAX_VALUES} values", "fewer")
        for item in items:
            if isinstance(item, Mapping | list | tuple) and item:
                _refuse(path, place, "more of the same", f"at most {MAX_DEPTH} mappings or lists in each other")
            if isinstance(item, str) and len(item) > MAX_TEXT:
                _refuse(path, place, f"{len(item)} characters", f"at most {MAX_TEXT}")
            empty = isinstance(item, Mapping | list | tuple)
            if not (empty or item is None or isinstance(item, str | bool) or _within(item, -(2**63), 2**63)):
                _refuse(path, place, _shown(item), "text, a finite number, true, false or null")


def _within(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # NaN is not


def _are_names(names: Any, count: int) -> bool:
    return (
        isinstance(names, list | tuple)
        and len(names) == count
        and all(isinstance(name, str) and 0 < len(name) <= 256 for name in names)
        and len(set(names)) == count
    )


def _shown(value: Any) -> str:
    """A value in a few characters on one line; of what is not plain only the kind."""
    if not isinstance(value, str | int | float | list | tuple | dict | None):
        return type(value).__name__
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # a number of thousands of digits
        return "too large a number"


def _refuse(path: str, where: str, found: str, expected: str) -> None:
    raise InputError(f"checkpoint {path} holds {found} as {where}: expected {expected}")


MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace}


class Bounded(TorchFunctionMode):
    """While it is entered, tensors are made in the number and size of a state dict; 8 times as many are too many.

    So a network that a file describes takes no more time and memory than the weights that the file has for it. Of a
    frozen network the file has the key alone; it may be as large as the published ones.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        frozen = sum(name.endswith(".key") for name in state)
        self.tensors = 1000 + 8 * len(state)
        self.numbers = 2**27 + 2**29 * min(frozen, 2) + 8 * sum(tensor.numel() for tensor in state.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in MAKERS:
            self.tensors -= 1
            self.numbers -= made.numel()
            if self.tensors < 0 or self.numbers < 0:
                raise InputError("its values describe a far larger network than it has weights for")
        return made

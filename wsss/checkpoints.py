"""From a checkpoint to a method: what the file says, checked, under what the command line gives."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from wsss import InputError
from wsss.assemble import build_protocol
from wsss.config import (
    class_named,
    given_directories,
    given_values,
    group_options,
    instantiate,
    is_chosen,
    method_option,
    plain_values,
    stored_values,
)
from wsss.networks.weights import misfit
from wsss.stored import Bounded, check_checkpoint, check_tensors, check_values, read_plain

if TYPE_CHECKING:
    from wsss.methods.stage import Stage


def read_checkpoint(path: str, directories: Sequence[str] = ()) -> dict[str, Any]:
    """A checkpoint of `wsss-train`, or of a paper's own code, read without executing anything of it.

    Beside Lightning's entries it holds `hyper_parameters`, the plain values of the method's constructor, and
    `wsss`: `method` and `dataset` (names of config options), `dataset_values`, `protocol`, `classes`, `mean`, `std`.
    Of a paper's own only `state_dict`, `hyper_parameters`, `wsss` with `method`, and what it `asks` are known.

    Args:
        path: the file.
        directories: of configuration beside ours, whose methods may know the file.

    Raises:
        InputError: the file is missing, damaged, or something else.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path} does not exist: give the .ckpt file of a run, e.g. checkpoints/last.ckpt")
    if Path(path).suffix == ".params":
        raise InputError(
            f"checkpoint {path} holds ImageNet weights of MXNet, no trained method: train from it with "
            f"method.weights={path}"
        )
    content = read_plain(path)
    inner = content.get("model", content) if isinstance(content, dict) else None
    if isinstance(inner, dict) and inner and all(isinstance(value, Tensor) for value in inner.values()):
        check_tensors(inner, path)
        return _read_official(inner, path, directories)
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters", "wsss"} <= content.keys():
        raise InputError(f"checkpoint {path} was not written by wsss-train: it lacks what the method was built with")
    check_checkpoint(content, path)
    return {name: value for name, value in content.items() if name != "asks"}  # which no file of ours does


def _read_official(state: dict[str, Tensor], path: str, directories: Sequence[str]) -> dict[str, Any]:
    """The checkpoint of a paper's own code, from the method that knows its names."""
    from wsss.methods.base import WSSSModule

    options = group_options("method", directories)
    classes = dict.fromkeys(class_named(method_option(option, directories)._target_) for option in options)
    for method in classes:
        if issubclass(method, WSSSModule) and (official := method.read_official(state, path)):
            values, origin = official.values, {"method": official.option}
            content = {"state_dict": official.state_dict, "hyper_parameters": values, "wsss": origin}
            return content | {"asks": official.asks}
    raise InputError(
        f"checkpoint {path} is neither of wsss-train nor of the original code of a method known here "
        f"({', '.join(options)}): it holds {', '.join(list(state)[:3])}, ... ({len(state)} tensors in all)"
    )


def checkpoint_overrides(arguments: list[str], dataset: bool = True) -> list[str]:
    """The command line with the checkpoint's names of method and data set in front, where it does not give them.

    Raises:
        InputError: no checkpoint is given, it cannot be read, or another method was asked for.
    """
    given = given_values(arguments, "checkpoint")
    if not given or given[0] in ("", "None"):
        raise InputError("checkpoint is not set: add checkpoint=FILE, e.g. outputs/.../checkpoints/last.ckpt")
    # the checkpoints of a sweep share their method and data set, those of the first
    origin = read_checkpoint(given[0], given_directories(arguments))["wsss"]
    asked = given_values(arguments, "method")
    if "method" not in origin and not asked:
        raise InputError(f"checkpoint {given[0]} was written without wsss-train and names no method: add method=NAME")
    if "method" in origin and asked not in ([], [origin["method"]]):
        raise InputError(
            f"method={','.join(asked)} was asked for, but checkpoint {given[0]} is of method={origin['method']}: "
            "leave it out"
        )
    if dataset and "dataset" not in origin and not given_values(arguments, "dataset"):
        raise InputError(
            f"checkpoint {given[0]} does not say which data set it belongs to: add dataset=voc dataset.root=DIR"
        )
    groups = ("method", "dataset") if dataset else ("method",)
    names = {group: origin[group] for group in groups if group in origin and not given_values(arguments, group)}
    for group, name in names.items():
        if name not in (known := group_options(group, given_directories(arguments))):
            raise InputError(f"checkpoint {given[0]} names the {group} {name!r}: known are {', '.join(known)}")
    first = next((i for i, o in enumerate(arguments) if not o.startswith("-") and "=" in o), len(arguments))
    return [*arguments[:first], *(f"{group}={name}" for group, name in names.items()), *arguments[first:]]


def load_method(
    cfg: DictConfig, checkpoint: Mapping[str, Any], classes: Sequence[str] | None = None, as_trained: bool = True
) -> "Stage":
    """The method of `cfg.checkpoint`: its class from conf/, its values and weights from the file.

    What the command line gives wins over the file. `classes`, where given, are those of a data set that the checkpoint
    has to agree with. The protocol is that of the training only if it is to be `as_trained`, and none is chosen.
    """
    values = checked_values(cfg, "method", built_with(checkpoint, cfg.method._target_))
    method = restore(cfg.method._target_, values, checkpoint, cfg.checkpoint, classes)
    stored = checkpoint["wsss"].get("protocol", {}) if as_trained and not is_chosen("protocol") else {}
    with naming(cfg.checkpoint):
        if stored:  # what an older file does not say was not there when its figures were made
            stored = asdict(build_protocol(stored))
        method.protocol = build_protocol(checked_values(cfg, "protocol", stored))
    return method


def checked_values(cfg: DictConfig, group: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that a checkpoint holds, under those of the command line.

    Raises:
        InputError: the file sets what no file may.
    """
    values = stored_values(cfg[group], stored, group)
    own: Any = OmegaConf.to_container(cfg[group], resolve=True)
    check_values(group, values, own, cfg.checkpoint)
    return values


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Whatever goes wrong with values of a checkpoint is said of the file."""
    try:
        yield
    except Exception as error:  # a network's constructor raises nearly everything
        said = " ".join(str(error).split())[:1000] or type(error).__name__
        if isinstance(error, InputError) and path in said:
            raise
        raise InputError(f"checkpoint {path} does not fit: {said}") from error


def built_with(checkpoint: Mapping[str, Any], target: str) -> dict[str, Any]:
    """What a method was built with, says its checkpoint; weights come from there, not from where training started."""
    values = {k: v for k, v in checkpoint["hyper_parameters"].items() if k not in ("num_classes", "classes")}
    method = class_named(target)
    known, asked = inspect.signature(method).parameters, checkpoint.get("asks", ())
    return values | {name: None for name in method.start_arguments if name in known and name not in asked}


def restore(
    target: str,
    values: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    path: str,
    classes: Sequence[str] | None = None,
) -> "Stage":
    """The method of a checkpoint, built from `values`, with its weights and what it says of images and classes.

    Raises:
        InputError: other classes than `classes`, values that do not fit the class, weights that do not fit the values.
    """
    origin, count = checkpoint["wsss"], checkpoint["hyper_parameters"]["num_classes"]
    sizes = values.get("backbone_args") or {}
    # in a file of wsss-train null is the backbone's own number
    if "classes" not in origin and sizes.get("num_heads", 1) is None:
        raise InputError(
            f"checkpoint {path} holds a transformer of width {sizes['embed_dim']}, which no published one has, and no "
            "tensor tells the number of its attention heads: give method.backbone_args.num_heads=N"
        )
    # a checkpoint of a paper's own code does not name its classes
    known = tuple(origin.get("classes") or (classes if classes and len(classes) == count else map(str, range(count))))
    if classes is not None and tuple(classes) != known:
        raise InputError(
            f"checkpoint {path} knows {len(known)} classes ({', '.join(known[:3])}, ...), the data set has "
            f"{len(classes)} ({', '.join(classes[:3])}, ...): use a data set with the same classes, or list those of "
            "the checkpoint in its order as dataset.classes"
        )
    with warnings.catch_warnings(), naming(path), Bounded(checkpoint["state_dict"]):
        warnings.filterwarnings("ignore", ".*starts from random weights")  # the checkpoint's come next
        method: Stage = instantiate(target, values, "method", num_classes=len(known), classes=known)
    ours, theirs = method.state_dict(), checkpoint["state_dict"]
    if checkpoint.get("asks"):
        theirs = method.complete(theirs, path)
    if said := misfit(ours, theirs):
        raise InputError(f"checkpoint {path} does not fit {type(method).__name__}: it {said}")
    if odd := [name for name in ours if ours[name].is_floating_point() != theirs[name].is_floating_point()]:
        raise InputError(f"checkpoint {path} has another kind of numbers in {', '.join(odd[:3])} ({len(odd)} in all)")
    method.load_state_dict(theirs)
    method.start_as(origin)
    method.checkpoint_rule = origin.get("checkpoint_rule", "not known")
    if not origin.get("has_background", True):
        method.without_background()
    return method


def load_stage(
    path: str, classes: Sequence[str] | None = None, directories: Sequence[str] = (), **arguments: Any
) -> "Stage":
    """What a checkpoint holds, without a command: its class from conf/ or more `directories`, the rest from the file.

    Args:
        path: the file.
        classes: names, where the file has none.
        directories: of configuration beside ours.
        arguments: of the constructor, over those of the file; a mapping changes what it names.

    Raises:
        InputError: the file cannot be read or does not fit its method; the sentence says what is wrong.
    """
    checkpoint = read_checkpoint(path, directories)
    if "method" not in checkpoint["wsss"]:
        raise InputError(
            f"checkpoint {path} was written without wsss-train and names no method: build the method, load its "
            "state_dict, and make a wsss.predictor.Predictor of it"
        )
    with naming(path):
        node = method_option(checkpoint["wsss"]["method"], directories)
    own = _over(plain_values(node, "method"), arguments)
    values = _over(plain_values(node, "method") | built_with(checkpoint, node._target_), arguments)
    check_values("method", values, own, path)
    method = restore(node._target_, values, checkpoint, path, classes)
    stored = checkpoint["wsss"].get("protocol", {})
    check_values("protocol", stored, {}, path)
    with naming(path):
        method.protocol = build_protocol(stored)
    return method.eval()


def _over(values: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The values with the arguments over them, a mapping over what it names."""
    merged = {
        name: {**values[name], **value} if isinstance(value, dict) and isinstance(values.get(name), dict) else value
        for name, value in arguments.items()
    }
    return values | merged

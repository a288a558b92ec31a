"""From a configuration or a checkpoint to data, method and trainer."""

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from wsss import InputError
from wsss.config import (
    build,
    call_checked,
    check_arguments,
    class_named,
    given_directories,
    given_values,
    instantiate,
    is_chosen,
    is_option_name,
    method_option,
    method_options,
    plain_values,
    stored_values,
)
from wsss.data.base import Images, ImageSubset, PlainImages, inspect_items
from wsss.data.datamodule import DataModule
from wsss.data.pseudo import PseudoScores
from wsss.data.transforms import Transform
from wsss.evaluation.protocol import Protocol
from wsss.networks.weights import misfit
from wsss.refine.crf import dense_crf
from wsss.report.tables import progress

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from wsss.methods.stage import Stage


def build_data(cfg: DictConfig) -> tuple[DataModule, list[str]]:
    """The data module of a composed configuration, and a sentence for each image that it leaves out."""
    transform: Transform | None = None
    if cfg.transform is not None:
        # a method without a transform of its own has the default one, of which values may be set
        views = plain_values(cfg.transform, "transform")
        transform = instantiate(cfg.transform.get("_target_", "wsss.data.transforms.FlipCrop"), views, "transform")
    settings, values = plain_values(cfg.data, "data"), plain_values(cfg.dataset, "dataset")
    (train, bad), (val, more) = (
        open_images(cfg.dataset._target_, values, split, cfg.on_bad_image, settings["num_workers"])
        for split in ("train", "val")
    )
    if cfg.pseudo_scores is not None and train is not None:
        train = PseudoScores(train, cfg.pseudo_scores)
    data = call_checked(DataModule, settings, "data", train=train, val=val, transform=transform, seed=cfg.seed)
    return data, [*bad, *more]


def open_images(
    target: str, values: Mapping[str, Any], split: str, on_bad_image: str, num_workers: int
) -> tuple[PlainImages | None, list[str]]:
    """A data set by its class and values, None where it holds nothing, and a sentence for each image it leaves out.

    With `on_bad_image=skip` those that cannot be used are left out, else they are met when they are loaded.
    """
    if on_bad_image not in ("error", "skip"):
        raise InputError(f"on_bad_image is {on_bad_image!r}: expected error or skip")
    images: Images = instantiate(target, values, "dataset", split=split)
    bad: list[str] = []
    if on_bad_image == "skip":
        seen, bad = inspect_all(images, split, num_workers)
        if bad and not seen:
            raise InputError(f"none of the {len(bad)} images of {split} can be used: {bad[0]}")
        images = ImageSubset(images, list(seen)) if bad else images
    return (images if len(images) else None), bad


def inspect_all(images: Images, what: str, num_workers: int) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Open all of them under a progress bar: by index what is known of a readable one, and why the others are not."""
    if not isinstance(num_workers, int) or num_workers < 0:
        raise InputError(f"num_workers is {num_workers!r}: expected a whole number of at least 0")
    items = list(progress(inspect_items(images, num_workers), len(images), f"opening {what}"))
    seen = {index: item for index, item in enumerate(items) if not isinstance(item, str)}
    return seen, [item for item in items if isinstance(item, str)]


def build_method(cfg: DictConfig, data: DataModule) -> "Stage":
    """The method of a composed configuration, for the classes of a data module, to be trained."""
    method: Stage = build(cfg.method, "method", num_classes=data.num_classes, classes=data.classes)
    check_supervision(cfg, method)
    method.protocol = build_protocol(plain_values(cfg.protocol, "protocol"))
    if not data.has_background:
        method.without_background()
    return method


def check_supervision(cfg: DictConfig, method: "Stage") -> None:
    """Refuse pixels that a method does not learn from, and one without the pixels that it needs.

    Raises:
        InputError: either of them.
    """
    name = type(method).__name__
    if method.supervision == "pseudo_scores" and cfg.pseudo_scores is None:
        raise InputError(f"{name} learns from the scores of an earlier stage: add pseudo_scores=FOLDER")
    if method.supervision != "pseudo_scores" and cfg.pseudo_scores is not None:
        raise InputError(f"{name} learns nothing from pseudo_scores={cfg.pseudo_scores}: leave it out")


def fit_sizes(images: Images, method: "Stage", on_bad_image: str) -> tuple[Images, list[str]]:
    """Images to evaluate on without those that the network cannot take, and a sentence for each of these.

    Raises:
        InputError: there are some and `on_bad_image` is not skip, or there are no others.
    """
    small = images.too_small(method.smallest_side)
    if not small:
        return images, []
    first, more = next(iter(small.values())), f" ({len(small)} images in all)" if len(small) > 1 else ""
    if on_bad_image != "skip" or len(small) == len(images):
        raise InputError(f"{first}{more}: enlarge it, leave it out, or evaluate with on_bad_image=skip")
    return ImageSubset(images, [index for index in range(len(images)) if index not in small]), list(small.values())


def build_protocol(values: Mapping[str, Any]) -> Protocol:
    """The protocol of plain values, the arguments of its CRF checked."""
    protocol: Protocol = call_checked(Protocol, values, "protocol")
    if protocol.crf is not None:
        check_arguments(dense_crf, protocol.crf, "protocol.crf", given=("image", "probability"))
    return protocol


def build_trainer(settings: dict[str, Any], **extra: Any) -> "pl.Trainer":
    """A Lightning Trainer; what it refuses is the user's to mend."""
    import pytorch_lightning as pl
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        return call_checked(pl.Trainer, settings, "trainer", enable_model_summary=False, **extra)
    except (ValueError, MisconfigurationException) as error:
        if isinstance(error, InputError):
            raise
        given = ", ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
        raise InputError(f"trainer ({given}): {' '.join(str(error).split())}") from error


def read_checkpoint(path: str, directories: Sequence[str] = ()) -> dict[str, Any]:
    """A checkpoint of `wsss-train`, or of a paper's own code, read without executing anything of it.

    Beside Lightning's entries it holds `hyper_parameters`, the plain values of the method's constructor, and
    `wsss`: `method` and `dataset` (names of config options), `dataset_values`, `protocol`, `classes`, `mean`, `std`.
    Of a paper's own only `state_dict`, `hyper_parameters` and `wsss` with `method` are known.

    Args:
        path: the file.
        directories: of configuration beside ours, whose methods may know the file.

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
        return _read_official({str(name): tensor for name, tensor in inner.items()}, path, directories)
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters", "wsss"} <= content.keys():
        raise InputError(f"checkpoint {path} was not written by wsss-train: it lacks what the method was built with")
    return content


def _read_official(state: dict[str, Tensor], path: str, directories: Sequence[str]) -> dict[str, Any]:
    """The checkpoint of a paper's own code, from the method that knows its names."""
    from wsss.methods.base import WSSSModule

    options = method_options(directories)
    classes = dict.fromkeys(class_named(method_option(option, directories)._target_) for option in options)
    for method in classes:
        if issubclass(method, WSSSModule) and (official := method.read_official(state, path)):
            values, origin = official.values, {"method": official.option}
            return {"state_dict": official.state_dict, "hyper_parameters": values, "wsss": origin}
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
        if not is_option_name(name):
            raise InputError(f"checkpoint {given[0]} names the {group} {name!r}, expected the name of an option")
    first = next((i for i, o in enumerate(arguments) if not o.startswith("-") and "=" in o), len(arguments))
    return [*arguments[:first], *(f"{group}={name}" for group, name in names.items()), *arguments[first:]]


def load_method(cfg: DictConfig, checkpoint: Mapping[str, Any], classes: Sequence[str] | None = None) -> "Stage":
    """The method of `cfg.checkpoint`: its class from conf/, its values and weights from the file.

    What the command line gives wins over the file. `classes`, where given, are those of a data set that the checkpoint
    has to agree with.
    """
    values = stored_values(cfg.method, built_with(checkpoint, cfg.method._target_), "method")
    method = restore(cfg.method._target_, values, checkpoint, cfg.checkpoint, classes)
    stored = {} if is_chosen("protocol") else checkpoint["wsss"].get("protocol", {})
    method.protocol = build_protocol(stored_values(cfg.protocol, stored, "protocol"))
    return method


def built_with(checkpoint: Mapping[str, Any], target: str) -> dict[str, Any]:
    """What a method was built with, says its checkpoint; weights come from there, not from where training started."""
    values = {k: v for k, v in checkpoint["hyper_parameters"].items() if k not in ("num_classes", "classes")}
    method = class_named(target)
    known = inspect.signature(method).parameters
    return values | {name: None for name in method.start_arguments if name in known}


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
    # a checkpoint of a paper's own code does not name its classes
    known = tuple(origin.get("classes") or (classes if classes and len(classes) == count else map(str, range(count))))
    if classes is not None and tuple(classes) != known:
        raise InputError(
            f"checkpoint {path} knows {len(known)} classes ({', '.join(known[:3])}, ...), the data set has "
            f"{len(classes)} ({', '.join(classes[:3])}, ...): evaluate it on a data set with the same classes"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*starts from random weights")  # the checkpoint's come next
        method: Stage = instantiate(target, values, "method", num_classes=len(known), classes=known)
    if said := misfit(method.state_dict(), checkpoint["state_dict"]):
        raise InputError(f"checkpoint {path} does not fit {type(method).__name__}: it {said}")
    method.load_state_dict(checkpoint["state_dict"])
    method.mean, method.std = (tuple(origin.get(key, getattr(method, key))) for key in ("mean", "std"))
    if not origin.get("has_background", True):
        method.without_background()
    return method


def quieten() -> None:
    """Lightning's advice and device listing are not results."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers",
        ".*is deprecated, use `isinstance",
        "Total length of `list` across ranks is zero",  # nothing to evaluate on, which we have said
        "You passed in a `val_dataloader` but have no `validation_step`",  # of a stage that evaluates nothing
        "You have overridden `on_before_batch_transfer`",
        "Found .* in eval mode at the start of training",  # a support network is meant to be
        "It is recommended to use .*sync_dist=True",  # torchmetrics has gathered the values already
        "Checkpoint directory .* exists and is not empty",  # a run that goes on
    ):
        warnings.filterwarnings("ignore", message)

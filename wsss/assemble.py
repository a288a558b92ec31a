"""From a configuration or a checkpoint to data, method and trainer."""

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from wsss import InputError, printable
from wsss.config import (
    build,
    call_checked,
    check_arguments,
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
from wsss.data.base import Images, ImageSubset, as_images, inspect_items
from wsss.data.datamodule import DataModule
from wsss.data.doubts import masks_misfit, sample, shared, unseen
from wsss.data.pseudo import FromFolder, PseudoMasks, PseudoScores
from wsss.data.transforms import Transform
from wsss.evaluation.protocol import Protocol
from wsss.networks.weights import misfit
from wsss.refine.crf import dense_crf
from wsss.report.tables import progress
from wsss.stored import Bounded, check_checkpoint, check_tensors, check_values, read_plain

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
    for kind, folder in ((PseudoMasks, cfg.pseudo_masks), (PseudoScores, cfg.pseudo_scores)):
        if folder is not None and train is not None:
            train, unfit = add_pixels(train, kind, folder, cfg.on_bad_image, settings["num_workers"])
            bad += unfit
    data = call_checked(DataModule, settings, "data", train=train, val=val, transform=transform, seed=cfg.seed)
    notes = notes_on(cfg.dataset._target_, values)
    if data.train is not None and data.train.labels is not None:
        notes += unseen(data.train.labels, data.classes)
    if data.train is not None and data.val is not None:
        notes += shared(data.train, data.val)
    for note in notes:
        print(f"note: {printable(note)}")
    return data, [*bad, *more]


def with_classes(target: str, values: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """The values of a data set that is measured with a checkpoint that knows some classes."""
    kind = class_named(target)
    ours = isinstance(kind, type) and issubclass(kind, Images)
    return kind.with_known_classes(dict(values), known) if ours and known else dict(values)


def notes_on(target: str, values: Mapping[str, Any]) -> list[str]:
    """What `wsss-data check` would note of a data set without opening its images."""
    kind = class_named(target)
    return list(kind.inspection(**values).notes) if isinstance(kind, type) and issubclass(kind, Images) else []


def open_images(
    target: str, values: Mapping[str, Any], split: str, on_bad_image: str, num_workers: int, masks: bool = True
) -> tuple[Images | None, list[str]]:
    """A data set by its class and values, None where it holds nothing, and a sentence for each image it leaves out.

    With `on_bad_image=skip` those that cannot be used are left out, else they are met when they are loaded. Without
    `masks` none is opened.
    """
    if on_bad_image not in ("error", "skip"):
        raise InputError(f"on_bad_image is {on_bad_image!r}: expected error or skip")
    images = as_images(instantiate(target, values, "dataset", split=split))
    images = images if masks else images.without_masks()
    bad: list[str] = []
    if on_bad_image == "skip":
        seen, bad = inspect_all(images, split, num_workers)
        if bad and not seen:
            raise InputError(f"none of the {len(bad)} images of {split} can be used: {bad[0]}")
        images = ImageSubset(images, list(seen)) if bad else images
    if split == "val" and as_images(images).has_masks:
        some, _ = inspect_all(sample(as_images(images)), "some masks", num_workers)
        if wrong := masks_misfit(some.values(), images.classes):
            raise InputError(wrong)
    return (images if len(images) else None), bad


def add_pixels(
    images: Images, kind: type[FromFolder], folder: str, on_bad_image: str, num_workers: int
) -> tuple[FromFolder, list[str]]:
    """The images with their pseudo masks or scores, and a sentence for each that is left out for an unfit file.

    Raises:
        InputError: an image has no file; or none of the files can be used.
    """
    supervised = kind(images, folder)
    if on_bad_image != "skip":
        return supervised, []
    seen, bad = inspect_all(supervised, f"{kind.what}s", num_workers)
    if bad and not seen:
        raise InputError(f"none of the {len(bad)} {kind.what}s in {folder} can be used: {bad[0]}")
    return (kind(ImageSubset(images, list(seen)), folder) if bad else supervised), bad


def check_views(method: "Stage", data: DataModule, name: str, transform: str | None) -> None:
    """Whether a training batch holds what a method learns from; `name` and `transform` are what the user chose.

    Raises:
        InputError: it does not; or there are pixels that the method does not learn from.
    """
    given = data.train.setting if isinstance(data.train, FromFolder) else None
    if given not in (None, method.supervision):
        raise InputError(f"{name} has no use for {given}: leave the setting out")
    if given != method.supervision:
        raise InputError(
            f"{name} learns from pixels: add {method.supervision}=FOLDER with a file of every training image, as "
            "wsss-label writes them"
        )
    if missing := [view for view in method.views if view not in data.first_item()]:
        raise InputError(
            f"{name} learns from the views {', '.join(missing)}, which transform={transform} does not make: choose "
            f"another transform, e.g. transform={name}"
        )


def inspect_all(images: Images, what: str, num_workers: int) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Open all of them under a progress bar: by index what is known of a readable one, and why the others are not."""
    if not isinstance(num_workers, int) or num_workers < 0:
        raise InputError(f"num_workers is {num_workers!r}: expected a whole number of at least 0")
    items = list(progress(inspect_items(images, num_workers), len(images), f"opening {what}"))
    seen = {index: item for index, item in enumerate(items) if not isinstance(item, str)}
    return seen, [item for item in items if isinstance(item, str)]


def build_method(cfg: DictConfig, data: DataModule) -> "Stage":
    """The method of a composed configuration, for the classes of a data module, to be trained."""
    from pytorch_lightning.utilities import rank_zero_only

    method: Stage = build(cfg.method, "method", num_classes=data.num_classes, classes=data.classes)
    method.protocol = build_protocol(plain_values(cfg.protocol, "protocol"))
    if not data.has_background:
        method.without_background()
    tell = rank_zero_only(print)
    for weights in method.loaded:
        tell(f"loaded {weights}")
    tell(f"images are normalised with mean {tuple(method.mean)} and standard deviation {tuple(method.std)}")
    return method


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
        for key, count in (("gaussian", 2), ("bilateral", 3)):
            numbers = protocol.crf.get(key, (1,) * count)
            if len(numbers) != count or not all(0 < number < 1e6 for number in numbers):
                raise InputError(f"protocol.crf.{key} is {list(numbers)}: expected {count} positive numbers")
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
    return content


def _read_official(state: dict[str, Tensor], path: str, directories: Sequence[str]) -> dict[str, Any]:
    """The checkpoint of a paper's own code, from the method that knows its names."""
    from wsss.methods.base import WSSSModule

    options = group_options("method", directories)
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
        if name not in (known := group_options(group, given_directories(arguments))):
            raise InputError(f"checkpoint {given[0]} names the {group} {name!r}: known are {', '.join(known)}")
    first = next((i for i, o in enumerate(arguments) if not o.startswith("-") and "=" in o), len(arguments))
    return [*arguments[:first], *(f"{group}={name}" for group, name in names.items()), *arguments[first:]]


def load_method(cfg: DictConfig, checkpoint: Mapping[str, Any], classes: Sequence[str] | None = None) -> "Stage":
    """The method of `cfg.checkpoint`: its class from conf/, its values and weights from the file.

    What the command line gives wins over the file. `classes`, where given, are those of a data set that the checkpoint
    has to agree with.
    """
    values = checked_values(cfg, "method", built_with(checkpoint, cfg.method._target_))
    method = restore(cfg.method._target_, values, checkpoint, cfg.checkpoint, classes)
    stored = {} if is_chosen("protocol") else checkpoint["wsss"].get("protocol", {})
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
    if said := misfit(ours, theirs):
        raise InputError(f"checkpoint {path} does not fit {type(method).__name__}: it {said}")
    if odd := [name for name in ours if ours[name].is_floating_point() != theirs[name].is_floating_point()]:
        raise InputError(f"checkpoint {path} has another kind of numbers in {', '.join(odd[:3])} ({len(odd)} in all)")
    method.load_state_dict(theirs)
    method.mean, method.std = (tuple(origin.get(key, getattr(method, key))) for key in ("mean", "std"))
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

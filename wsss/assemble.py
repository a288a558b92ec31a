"""From a configuration or a checkpoint to data, method and trainer."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig

from wsss import InputError, printable
from wsss.config import (
    build,
    call_checked,
    check_arguments,
    class_named,
    instantiate,
    plain_values,
)
from wsss.data.base import Images, ImageSubset, as_images, digest, inspect_items
from wsss.data.datamodule import DataModule
from wsss.data.doubts import few, masks_misfit, sample, shared, unseen
from wsss.data.features import FeatureImages, FeatureStore, feature_names, fill
from wsss.data.pixels import Normalise, Transform
from wsss.data.pseudo import FromFolder, PseudoMasks, PseudoScores
from wsss.data.worse import Worse
from wsss.evaluation.protocol import EXTRAS, Protocol
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
    worse = plain_values(cfg.worse, "worse")
    if train is not None and (worse["kept"], worse["missing"], worse["wrong"]) != (1, 0, 0):
        train = call_checked(Worse, worse, "worse", source=train)
    for kind, folder in ((PseudoMasks, cfg.pseudo_masks), (PseudoScores, cfg.pseudo_scores)):
        if folder is not None and train is not None:
            train, unfit = add_pixels(train, kind, folder, cfg.on_bad_image, settings["num_workers"])
            bad += unfit
    data = call_checked(DataModule, settings, "data", train=train, val=val, transform=transform, seed=cfg.seed)
    notes = notes_on(cfg.dataset._target_, values)
    if data.train is not None and data.train.labels is not None:
        notes += unseen(data.train.labels, data.classes) + few(data.train.labels, data.classes)
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


def check_supervision(method: "Stage", data: DataModule, name: str) -> None:
    """Whether there are the pixels that a method learns from, and no others; `name` is what the user chose.

    Raises:
        InputError: there are not.
    """
    given = data.train.setting if isinstance(data.train, FromFolder) else None
    if given not in (None, method.supervision):
        raise InputError(f"{name} has no use for {given}: leave the setting out")
    if given != method.supervision:
        raise InputError(
            f"{name} learns from pixels: add {method.supervision}=FOLDER with a file of every training image, as "
            "wsss-label writes them"
        )


def check_views(method: "Stage", data: DataModule, name: str, transform: str | None) -> None:
    """Whether a training batch holds what a method learns from; `name` and `transform` are what the user chose.

    Raises:
        InputError: it does not.
    """
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


def use_features(cfg: DictConfig, method: "Stage", data: DataModule) -> None:
    """Let a method with a frozen network have the features of all images instead, computed now where they are missing.

    Raises:
        InputError: an image that cannot be used, or too little room.
    """
    if method.learns_from == "image":
        return
    sets = {split: images for split in ("train", "val") if (images := getattr(data, split)) is not None}
    names = {split: feature_names(images) for split, images in sets.items()}
    kept = [name for found in names.values() for name in found]
    for split, images in sets.items():
        pooled = split == "train" and method.learns_from == "mean"
        found, bad = with_features(cfg, method, images, names[split], cfg.data.num_workers, kept, pooled)
        if bad:
            raise InputError(bad[0])
        setattr(data, split, found)


def local_device() -> torch.device:
    """The GPU of this process, of those that `torchrun` or `srun` started on this machine; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
    return torch.device("cuda", local % torch.cuda.device_count())


PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""Types of the passes through a network, by the names that Lightning has for them."""


def in_precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """What networks on a device compute in, of `PRECISIONS`.

    Raises:
        InputError: another precision, or half a one on a processor, which knows bfloat16 alone.
    """
    known = [name for name in PRECISIONS if name != "16-mixed" or device.type != "cpu"]
    if precision not in known:
        raise InputError(f"precision is {precision!r}: expected one of {', '.join(known)} here")
    kind = PRECISIONS[precision]
    return torch.autocast(device.type, kind) if kind else nullcontext()


def with_features(
    cfg: DictConfig,
    method: Any,
    images: Images,
    names: Sequence[str],
    num_workers: int,
    kept: Sequence[str] = (),
    pooled: bool = False,
) -> tuple[FeatureImages, list[str]]:
    """`use_features` of one data set, and a sentence for each image that cannot be used."""
    key = digest(method.frozen.key, method.mean, method.std, method.protocol.max_side)[:16]
    store = FeatureStore(cfg.features.folder, key, cfg.features.limit_gb)
    device = local_device()
    method.frozen.to(device)
    made, bad = fill(
        store,
        images,
        names,
        Normalise(method.mean, method.std),
        lambda image: method.frozen(method.sized(image.to(device))),
        num_workers,
        partial(progress, description="features"),
        kept,
    )
    print(f"features of {len(names)} images, {made} of them computed now, in {store.folder}")
    window = round(method.frozen.size / method.frozen.cell)
    return FeatureImages(images, store, names, pooled, window), bad


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
    if isinstance(extras := values.get("extras"), Mapping):  # of the kinds that the protocol itself takes
        others = {field.name for field in fields(Protocol)} - {*EXTRAS}
        check_arguments(Protocol, extras, "protocol.extras", given=others)
    protocol: Protocol = call_checked(Protocol, values, "protocol")
    extras = protocol.extras or {}
    for name, crf in (("protocol.crf", protocol.crf), ("protocol.extras.crf", extras.get("crf"))):
        if crf is not None:
            check_arguments(dense_crf, crf, name, given=("image", "probability"))
            for key, count in (("gaussian", 2), ("bilateral", 3)):
                numbers = crf.get(key, (1,) * count)
                if len(numbers) != count or not all(0 < number < 1e6 for number in numbers):
                    raise InputError(f"{name}.{key} is {list(numbers)}: expected {count} positive numbers")
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

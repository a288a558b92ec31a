"""`wsss-label`: pseudo masks of a data set from the CAMs of a method and the image-level labels."""

import inspect
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from wsss import InputError, __version__
from wsss.commandline import explain_failure, run_command
from wsss.config import (
    absolute_paths,
    check_arguments,
    class_named,
    extra_directories,
    flatten,
    plain_values,
)
from wsss.places import without_secrets
from wsss.runs import sha256

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from wsss.data.base import Images
    from wsss.methods.base import WSSSModule
    from wsss.methods.stage import Stage
    from wsss.outputs.labels import InstanceMap, LabelFolder
    from wsss.refine.pseudo import Refined

    Made = tuple[np.ndarray, dict[int, np.ndarray], list[np.ndarray], InstanceMap]
    """Of one image: mask, maps by id, scores and instances."""
    Opened = tuple[int, tuple[Any, Tensor | None]]
    """The number of an image, and what `open_items` gives."""
    Seen = tuple[Made, np.ndarray | None]
    """What was made of it, and its true mask."""


def label(cfg: DictConfig) -> int:
    """Make what is missing of this process's share, and the manifest once all is there; returns the number of masks."""
    import numpy as np

    from wsss.assemble import in_precision, local_device, quieten
    from wsss.outputs.labels import LabelFolder
    from wsss.report.sweep import ELSEWHERE
    from wsss.report.tables import print_classes
    from wsss.runs import share, shared, write_skipped
    from wsss.writing import write_json

    quieten()
    check_settings(cfg)
    in_precision(cfg.precision, local_device())  # refuses others before anything is read
    rank, world = share(cfg.shards, cfg.shard)
    images, method, origin, skipped = open_all(cfg)
    refine = build_refine(cfg, method)
    origin["settings"] |= flatten(refine.keywords, "refine")
    if refine.args:
        origin["settings"]["refine.affinity_sha256"] = sha256(cfg.refine.affinity)
        origin["loaded"] = list(dict.fromkeys(words for network in (method, *refine.args) for words in network.told))
    optional = {"cams": cfg.cams, "scores": cfg.scores, "overlays": cfg.overlay, "instances": cfg.instances}
    if cfg.output != "files":
        origin["settings"]["output"] = cfg.output
    kinds = ["masks", *(kind for kind in optional if optional[kind])]
    folder = LabelFolder(Path(cfg.out).expanduser(), origin, kinds, cfg.output, cfg.images_per_tar)
    ids = list(images.ids)
    run = HydraConfig.get()
    if run.mode == RunMode.MULTIRUN and folder.out.resolve() != (job := Path(run.runtime.output_dir)).resolve():
        write_json(job / ELSEWHERE, {"out": str(folder.out.resolve())})
    with shared(folder.out):
        folder.begin()
        if rank == 0:
            write_skipped(folder.out, skipped)
        pending = [index for index in range(rank, len(ids), world) if not folder.has(ids[index])]
        source = with_known_features(cfg, method, images, pending)
        began = time.perf_counter()
        try:
            failed = make(source, pending, folder, method, refine, cfg.num_workers, cfg.precision)
        finally:
            folder.store.close()
        seconds = time.perf_counter() - began
        of = f", share {rank} of {world}" if world > 1 else ""
        made = len(pending) - len(failed)
        rate = f", {made / seconds:.1f} images/s" if made else ""
        print(f"{made} masks made{of}{rate} -> {folder.files.made}")
        if failed:
            raise InputError(
                f"{len(failed)} images could not be used and have no mask, so that there is no manifest: "
                f"{'; '.join(failed[:3])}"
            )
        if missing := sum(not folder.has(name) for name in ids):
            print(f"{missing} of {len(ids)} masks are not there yet: who makes the last one writes the manifest")
        else:
            table = folder.finish(ids, np.stack([images.label(index) for index in range(len(ids))]))
            print_classes(str(folder.out), images.classes, **table._asdict())
            measure(images, folder, method, cfg.split)
    return len(pending)


def check_settings(cfg: DictConfig) -> None:
    """Refuse what would fail late.

    Raises:
        InputError: a value of another kind, or scores or instances that the refinement does not give.
    """
    for key in ("cams", "scores", "overlay", "instances"):
        if not isinstance(cfg[key], bool):
            raise InputError(f"{key} is {cfg[key]!r}: expected true or false")
    if not isinstance(cfg.num_workers, int) or cfg.num_workers < 0:
        raise InputError(f"num_workers is {cfg.num_workers!r}: expected a whole number of at least 0")
    if cfg.split not in ("train", "val"):
        raise InputError(f"split is {cfg.split!r}: expected train or val; dataset.train=LIST names other images")
    if cfg.scores and not isinstance(plain_values(cfg.refine, "refine").get("alpha"), list):
        raise InputError("scores=true keeps those of a low and a high alpha: add refine=crf refine.alpha=[4,32]")
    if cfg.instances and "instances" not in inspect.signature(class_named(cfg.refine._target_)).parameters:
        raise InputError(
            "instances=true tells objects apart by the displacements of method=irn: add refine=irn_walk "
            "refine.affinity=FILE, its checkpoint"
        )


def open_all(cfg: DictConfig) -> tuple["Images", "WSSSModule", dict[str, Any], list[str]]:
    """The images, the method, what the masks are made of, and a sentence for each image that is left out.

    Raises:
        InputError: one of them cannot be used, or they do not fit one another.
    """
    from dataclasses import asdict

    from wsss.assemble import fit_sizes, open_images
    from wsss.checkpoints import checked_values, load_method, read_checkpoint
    from wsss.data.base import as_images
    from wsss.methods.base import WSSSModule

    choices = HydraConfig.get().runtime.choices
    checkpoint = read_checkpoint(cfg.checkpoint, extra_directories())
    stored = checkpoint["wsss"]
    same = stored.get("dataset_values", {}) if stored.get("dataset") == choices["dataset"] else {}
    values = checked_values(cfg, "dataset", same)
    how = (cfg.split, cfg.on_bad_image, cfg.num_workers)
    found, skipped = open_images(cfg.dataset._target_, values, *how, masks=False)
    if found is None:
        raise InputError(f"the data set has no images of split={cfg.split}: add dataset.{cfg.split}=LIST")
    images = as_images(found)
    method = load_method(cfg, checkpoint, images.classes)
    if not isinstance(method, WSSSModule):
        raise InputError(
            f"method={choices['method']} makes no class activation maps: give the checkpoint of one that does"
        )
    method.protocol = replace(method.protocol, image_labels="true")  # which are known, whatever an evaluation knew
    if not images.has_background:
        method.without_background()
    if cfg.on_bad_image == "skip":
        images, small = fit_sizes(images, method, cfg.on_bad_image)
        skipped += small
    arguments = {key: value for key, value in method.hparams.items() if key not in ("num_classes", "classes")}
    settings = {group: choices[group] for group in ("method", "dataset", "refine")}
    places = {k: without_secrets(v) if isinstance(v, str) else v for k, v in absolute_paths(values).items()}
    settings |= flatten(arguments, "method") | flatten(places, "dataset")
    settings |= flatten(asdict(method.protocol), "protocol")
    settings |= {key: cfg[key] for key in ("split", "cams", "scores", "overlay", "instances", "precision")}
    checkpoint_path = os.path.abspath(cfg.checkpoint)
    origin = {
        "version": __version__,
        "checkpoint": checkpoint_path,
        "checkpoint_sha256": sha256(checkpoint_path),
        "loaded": method.told,
    }
    origin |= {"fingerprint": images.fingerprint, "classes": images.classes, "settings": settings}
    return images, method, origin, skipped


def with_known_features(cfg: DictConfig, method: "WSSSModule", images: "Images", pending: Sequence[int]) -> "Images":
    """The images, some of them with the features of a method that has a frozen network; one without tells why later."""
    from wsss.assemble import with_features
    from wsss.data.base import ImageSubset
    from wsss.data.features import FeatureImages, feature_names

    if method.learns_from == "image" or not pending:
        return images
    names = feature_names(images)
    some, wanted = ImageSubset(images, pending), [names[index] for index in pending]
    store = with_features(cfg, method, some, wanted, cfg.num_workers)[0].store
    return FeatureImages(images, store, names, pooled=False, window=0)


def build_refine(cfg: DictConfig, method: "WSSSModule") -> "partial[Refined]":
    """The refinement of a configuration, tried once; the threshold of its background is the method's if not given.

    Raises:
        InputError: values that do not fit it, or a background where the method knows none.
    """
    import torch

    from wsss.refine.thresholds import background_scores

    name, values = HydraConfig.get().runtime.choices["refine"], plain_values(cfg.refine, "refine")
    target = class_named(cfg.refine._target_)
    networks = [load_affinity(values.pop("affinity"), cfg.refine._target_)] if "affinity" in values else []
    check_arguments(target, values, "refine", given=("self", "image", "cam", "instances"))
    rule = values["background"] if isinstance(values.get("background"), dict) else {}
    check_arguments(background_scores, rule, "refine.background", given=("cam",))
    from_method = rule.get("rule") == "constant" and rule.get("value") is None
    if from_method:
        rule["value"] = method.background_threshold
    elif not method.has_background:
        raise InputError(
            f"refine={name} labels background, and the classes of these data cover the whole image: use refine=none "
            "with its own background"
        )
    refine = partial(target, *networks, **values | ({"instances": True} if cfg.instances else {}))
    try:
        refine(torch.full((3, 96, 96), 128.0), torch.full((1, 96, 96), 0.5))
    except InputError:
        raise
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"refine={name} does not work with these values ({said}): see conf/refine/{name}.yaml"
        ) from error
    return refine


def load_affinity(path: str, target: str) -> "Stage":
    """The network of refine=walk or irn_walk, a method of whose class is the target.

    Raises:
        InputError: the file cannot be read, or is the checkpoint of another method.
    """
    from wsss.checkpoints import load_stage

    network, expected = load_stage(path, directories=extra_directories()), class_named(target.rpartition(".")[0])
    if not isinstance(network, expected):
        raise InputError(
            f"refine.affinity={path} is of {type(network).__name__}: give a checkpoint of "
            f"method={expected.__name__.lower()}"
        )
    return network


def make(
    images: "Images",
    pending: Sequence[int],
    folder: "LabelFolder",
    method: "WSSSModule",
    refine: "partial[Refined]",
    num_workers: int,
    precision: str,
) -> list[str]:
    """Write the files of some images; returns a sentence for each that cannot be used."""
    from wsss.assemble import local_device
    from wsss.data.base import open_items
    from wsss.data.pixels import Normalise
    from wsss.evaluation.pseudo import count_cam
    from wsss.report.tables import progress
    from wsss.threads import overlapped

    for network in (method, *refine.args):
        network.to(local_device())
    method.eval()
    ids, failed = list(images.ids), []

    def see(opened: "Opened") -> "Seen":
        index, (item, photo) = opened
        if photo is None:
            raise InputError(item)  # why it cannot be used
        made = make_one(method, refine, item, photo, precision)
        try:
            truth = images.truth(index, made[0])
        except InputError:  # `measure` tells of it: masks are made all the same
            truth = None
        return made, truth

    def finish(opened: "Opened", seen: "Seen") -> dict[str, bytes]:
        index, (item, _) = opened
        (mask, cams, scores, instances), truth = seen
        counts = None if truth is None else count_cam(cams, truth, method.background_threshold)
        return folder.encode(ids[index], mask, item["image"], cams, scores, instances, counts)

    loader = open_items(images, pending, Normalise(method.mean, method.std), num_workers)
    results = overlapped(zip(pending, loader, strict=True), see, finish, method.device)
    for (index, (item, photo)), ended in progress(results, len(pending), "labelling"):
        try:
            files = ended.result()
        except InputError as error:  # too small for the network, say
            failed.append(item if photo is None else f"{ids[index]}: {error}")
        except (MemoryError, RuntimeError) as error:
            if explain_failure(error, folder.out) is None:
                raise
            height, width = photo.shape[1:]
            failed.append(f"{ids[index]}: there is not enough memory for its {width}x{height} pixels")
        else:
            folder.store.add(files)
    return failed


def make_one(
    method: "WSSSModule", refine: "partial[Refined]", item: Mapping[str, Any], photo: "Tensor", precision: str
) -> "Made":
    """Mask, maps by id, scores and instances of an item, whose image also comes normalised (3, H, W).

    A larger image is refined at the protocol's `max_side`, which bounds time and memory as it does with the maps.
    """
    import numpy as np
    import torch

    from wsss.assemble import in_precision
    from wsss.cam import reduce, resize, resize_ids, widened
    from wsss.outputs.labels import InstanceMap

    image, label = item["image"], torch.from_numpy(item["label"])
    shown = np.flatnonzero(item["label"])
    size = image.shape[:2]
    if len(shown) == 0:
        mask = np.full(size, 0 if method.has_background else 255, np.uint8)
        return mask, {}, [np.ones((1, *size), np.float32)] * 2, InstanceMap(np.zeros(size, np.uint16), [], [])
    batch = {key: value[None].to(method.device) for key, value in (("image", photo), ("label", label))}
    if "features" in item:
        batch["features"] = torch.from_numpy(item["features"])[None].to(method.device)
    with in_precision(precision, method.device):
        cam = widened(method.infer_batch(batch)["cam"])[:, torch.from_numpy(shown).to(method.device)]
    colours = reduce(torch.from_numpy(image).permute(2, 0, 1)[None], method.protocol.max_side).to(method.device).float()
    refined = refine(colours[0], resize(cam, colours.shape[-2:])[0].float())
    ids = np.arange(256, dtype=np.uint8)
    ids[1 : len(shown) + 1] = shown + 1
    maps = dict(zip((shown + 1).tolist(), resize(cam, size)[0].float().cpu().numpy(), strict=True))
    mask = ids[resize_ids(refined.mask, size).cpu().numpy()]
    scores = [resize(score[None], size)[0].cpu().numpy() for score in refined.scores]
    numbers, owners, certainties = refined.instances or (refined.mask * 0, [], [])
    instances = resize_ids(numbers, size).cpu().numpy().astype(np.uint16)
    return mask, maps, scores, InstanceMap(instances, [int(ids[k + 1]) for k in owners], certainties)


def measure(images: "Images", folder: "LabelFolder", method: "WSSSModule", split: str) -> None:
    """metrics.json and a table: how good the CAMs and the complete masks are, where the data set has true masks."""
    import torch

    from wsss.evaluation.metrics import SegmentationIoU
    from wsss.evaluation.protocol import Measured, extra_supervision, write_figures
    from wsss.evaluation.pseudo import cam_figures
    from wsss.report.tables import print_figures, progress

    figures: dict[str, Any] = {"masks": len(images)}
    notes: dict[str, Measured] = {}
    metric, measured = SegmentationIoU(1 + len(images.classes)), []
    try:
        for index, name in enumerate(progress(images.ids, len(images), "measuring")):
            mask = folder.mask(name)
            if (truth := images.truth(index, mask)) is not None:
                metric.update(torch.from_numpy(mask), torch.from_numpy(truth))
                measured.append(name)
    except InputError as error:
        print(f"the masks are not measured: {error}")
        measured = []
    if measured:
        refinement = {k.partition(".")[2]: v for k, v in folder.origin["settings"].items() if k.startswith("refine.")}
        said = ", ".join(f"{key} {value}" for key, value in refinement.items() if value is not None)
        name = folder.origin["settings"]["refine"]
        figures[f"{split}/mask_miou"] = metric.compute().item()
        method.protocol = replace(method.protocol, threshold="fixed")  # as all of this is made
        notes[f"{split}/mask_miou"] = replace(
            method.describe(f"{split}, {len(measured)} images")["val/cam_miou"],
            extra_supervision=extra_supervision(folder.origin["loaded"]),
            crf=refinement if "crf" in name else None,
            threshold_rule=f"refine={name}" if "crf" in name else f"refine={name} ({said})",
            threshold=None,
            definition="undecided pixels are misses",
        )
        of_classes = zip(("background", *images.classes), metric.iou().tolist(), strict=True)
        figures |= {f"{split}/iou/{name}": value for name, value in of_classes}
        if counted := folder.counted(measured):
            of_cams = cam_figures(folder.counts(counted), len(images.classes), method.background_threshold)
            figures |= {f"{split}/{name}": value for name, value in of_cams.items()}
            said_of_cams = method.describe(f"{split}, {len(counted)} images")
            notes |= {f"{split}/{name}": said_of_cams[f"val/{name}"] for name in ("cam_miou", "cam_best_miou")}
        shown = {key: value for key, value in figures.items() if not key.startswith(f"{split}/iou/")}
        print_figures(shown, notes, f"{folder.out}, compared with true masks that nothing has learnt from")
    else:
        print("there are no true masks of these images: nothing is measured")
    write_figures(folder.out, figures, notes)


def prepare(arguments: list[str]) -> list[str]:
    from wsss.checkpoints import checkpoint_overrides

    return checkpoint_overrides(arguments)


def main() -> None:
    run_command("label", label, prepare)

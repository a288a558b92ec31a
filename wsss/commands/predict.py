"""`wsss-predict`: masks for a folder of photographs."""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from wsss import InputError, __version__, printable
from wsss.commandline import FULL, run_command
from wsss.config import flatten
from wsss.places import without_secrets
from wsss.runs import sha256

if TYPE_CHECKING:
    from wsss.outputs.masks import MaskFolder
    from wsss.places import Readable
    from wsss.predictor import Predictor

Opened = tuple[str, tuple[Any, Any]]
"""The name of a photograph, and what `Photographs` gives: image and size, or why there is none and None."""


def predict(cfg: DictConfig) -> int:
    """Write masks, overlays and, if asked for, CAMs of every image; returns the number of images."""
    from wsss.assemble import in_precision, local_device
    from wsss.checkpoints import load_method, read_checkpoint
    from wsss.config import extra_directories
    from wsss.data.photographs import find_photographs
    from wsss.outputs.masks import MaskFolder, output_names
    from wsss.predictor import Predictor
    from wsss.runs import share, shared

    for key, least in (("max_side", 1), ("num_workers", 0)):
        if not isinstance(cfg[key], int) or cfg[key] < least:
            raise InputError(f"{key} is {cfg[key]!r}: expected a whole number of at least {least}")
    device = local_device()
    in_precision(cfg.precision, device)  # refuses others before anything is read
    rank, world = share(cfg.shards, cfg.shard)
    out = Path(cfg.out).expanduser()
    photographs = find_photographs(cfg.images, out)
    for note in photographs.notes:
        print(f"note: {printable(note)}")
    method: Any = load_method(cfg, read_checkpoint(cfg.checkpoint, extra_directories()))
    predictor = Predictor(method, cfg.class_threshold, cfg.max_side).to(device)
    if cfg.cam:
        predictor.require_cams()
    folder = MaskFolder(out, cfg.output, cfg.images_per_tar)
    names = output_names(photographs.names)
    with shared(out):
        folder.claim(made_of(cfg, method), "wsss-predict")
        folder.write_classes(method.classes)
        pending = [index for index in range(rank, len(names), world) if not folder.has(names[index])]
        began = time.perf_counter()
        try:
            found, failed = make(cfg, predictor, folder, photographs.places, {i: names[i] for i in pending})
        finally:
            folder.store.close()
        seconds = time.perf_counter() - began
    done, mine = len(pending) - len(failed), len(range(rank, len(names), world))
    listed = ", ".join(f"{name} {count}" for name, count in found.most_common()) or "none"
    said = f", share {rank} of {world}" if world > 1 else ""
    said += f", {mine - len(pending)} were there" if mine > len(pending) else ""
    said += f", {done / seconds:.1f} images/s" if done else ""
    print(f"{done} masks{said} -> {folder.made}; images with each class: {listed}")
    if failed:
        raise InputError(f"{len(failed)} of {mine} images could not be used and have no mask: {' '.join(failed[:3])}")
    return done


def make(
    cfg: DictConfig,
    predictor: "Predictor",
    folder: "MaskFolder",
    places: "Sequence[Readable]",
    names: Mapping[int, str],
) -> tuple[Counter[str], list[str]]:
    """Write the files of the images that have a name, by index; how many show each class, and why others have none."""
    import numpy as np
    from torch.utils.data import DataLoader

    from wsss.assemble import in_precision
    from wsss.data.photographs import Photographs
    from wsss.predictor import Prediction
    from wsss.report.tables import progress
    from wsss.threads import overlapped

    loader: DataLoader[Any] = DataLoader(
        Photographs(places, cfg.max_side),
        batch_size=None,
        sampler=list(names),
        collate_fn=tuple,  # keeps the arrays: the default turns them into tensors
        num_workers=cfg.num_workers,
    )
    device, ids = predictor.method.device, {name: c + 1 for c, name in enumerate(predictor.classes)}

    def see(opened: Opened) -> Prediction:
        _, (image, size) = opened
        if size is None:
            raise InputError(image)  # why it could not be read
        with in_precision(cfg.precision, device):
            return predictor.predict_reduced(image, size, cfg.cam)

    def finish(opened: Opened, seen: Prediction) -> tuple[dict[str, bytes], list[str]]:
        name, (image, _) = opened
        cams = None if seen.cams is None else {ids[label]: cam for label, cam in seen.cams.items()}
        files = folder.encode(name, seen.mask, image if cfg.overlay else None, cams)
        return files, [predictor.classes[c - 1] for c in np.unique(seen.mask) if c > 0]

    found: Counter[str] = Counter()
    failed: list[str] = []
    photographs = zip(names.values(), loader, strict=True)
    for (name, (image, size)), ended in progress(
        overlapped(photographs, see, finish, device), len(names), "predicting"
    ):
        try:
            files, shown = ended.result()
            folder.store.add(files)
        except (InputError, MemoryError, OSError, RuntimeError) as error:  # too small for the network, ...
            if isinstance(error, OSError) and error.errno in FULL:
                raise  # nor will the next find room
            said = shorten(str(error) or type(error).__name__, 200)
            failed.append(image if size is None else f"{name}: {said}")
        else:
            found.update(shown)
    return found, failed


def made_of(cfg: DictConfig, method: Any) -> dict[str, Any]:
    """What masks depend on, so that a folder of them goes on only with its own."""
    from dataclasses import asdict

    arguments = {key: value for key, value in method.hparams.items() if key not in ("num_classes", "classes")}
    settings = flatten(arguments, "method") | flatten(asdict(method.protocol), "protocol")
    settings |= {key: cfg[key] for key in ("class_threshold", "max_side", "overlay", "cam", "output", "precision")}
    images = without_secrets(cfg.images) if "://" in cfg.images else os.path.abspath(os.path.expanduser(cfg.images))
    path = os.path.abspath(cfg.checkpoint)
    origin = {"version": __version__, "checkpoint": path, "checkpoint_sha256": sha256(path), "images": images}
    return origin | {"classes": method.classes, "settings": settings}


def prepare(arguments: list[str]) -> list[str]:
    from wsss.checkpoints import checkpoint_overrides

    return checkpoint_overrides(arguments, dataset=False)


def main() -> None:
    run_command("predict", predict, prepare)

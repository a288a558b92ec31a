"""`wsss-predict`: masks for a folder of photographs."""

import os
from collections import Counter
from pathlib import Path
from textwrap import shorten
from typing import Any

from omegaconf import DictConfig

from wsss import InputError, __version__, printable
from wsss.commandline import FULL, run_command
from wsss.config import flatten
from wsss.places import without_secrets
from wsss.runs import sha256


def predict(cfg: DictConfig) -> int:
    """Write masks, overlays and, if asked for, CAMs of every image; returns the number of images."""
    import numpy as np
    from torch.utils.data import DataLoader

    from wsss.assemble import in_precision, local_device
    from wsss.checkpoints import load_method, read_checkpoint
    from wsss.config import extra_directories
    from wsss.data.photographs import Photographs, find_photographs
    from wsss.outputs.masks import MaskFolder, output_names
    from wsss.predictor import Predictor
    from wsss.report.tables import progress
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
    names, ids = output_names(photographs.names), {name: c + 1 for c, name in enumerate(method.classes)}
    failed: list[str] = []
    found: Counter[str] = Counter()
    with shared(out):
        folder.claim(made_of(cfg, method), "wsss-predict")
        folder.write_classes(method.classes)
        pending = [index for index in range(rank, len(names), world) if not folder.has(names[index])]
        loader: DataLoader[Any] = DataLoader(
            Photographs(photographs.places, cfg.max_side),
            batch_size=None,
            sampler=pending,
            collate_fn=tuple,  # keeps the arrays: the default turns them into tensors
            num_workers=cfg.num_workers,
        )
        try:
            shown = progress(zip(pending, loader, strict=True), len(pending), "predicting")
            for name, (image, size) in ((names[index], item) for index, item in shown):
                if size is None:
                    failed.append(image)
                    continue
                try:
                    with in_precision(cfg.precision, device):
                        result = predictor.predict_reduced(image, size, cfg.cam)
                    cams = None if result.cams is None else {ids[label]: cam for label, cam in result.cams.items()}
                    folder.write(name, result.mask, image if cfg.overlay else None, cams)
                except (
                    InputError,
                    MemoryError,
                    OSError,
                    RuntimeError,
                ) as error:  # too small for the network, ...
                    if isinstance(error, OSError) and error.errno in FULL:
                        raise  # nor will the next find room
                    failed.append(f"{name}: {shorten(str(error) or type(error).__name__, 200)}")
                    continue
                found.update(method.classes[c - 1] for c in np.unique(result.mask) if c > 0)
        finally:
            folder.store.close()
    done, mine = len(pending) - len(failed), len(range(rank, len(names), world))
    listed = ", ".join(f"{name} {count}" for name, count in found.most_common()) or "none"
    said = f", share {rank} of {world}" if world > 1 else ""
    said += f", {mine - len(pending)} were there" if mine > len(pending) else ""
    print(f"{done} masks{said} -> {folder.made}; images with each class: {listed}")
    if failed:
        raise InputError(f"{len(failed)} of {mine} images could not be used and have no mask: {' '.join(failed[:3])}")
    return done


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

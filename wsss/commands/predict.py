"""`wsss-predict`: masks for a folder of photographs."""

from collections import Counter
from pathlib import Path
from textwrap import shorten
from typing import Any

from omegaconf import DictConfig

from wsss import InputError, printable
from wsss.commandline import FULL, run_command


def predict(cfg: DictConfig) -> int:
    """Write masks, overlays and, if asked for, CAMs of every image; returns the number of images."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    from wsss.checkpoints import load_method, read_checkpoint
    from wsss.config import extra_directories
    from wsss.data.doubts import contents, left_out
    from wsss.data.finding import find_files
    from wsss.data.folder import Photographs
    from wsss.outputs.masks import MaskFolder, output_names
    from wsss.predictor import Predictor
    from wsss.report.tables import progress

    for key, least in (("max_side", 1), ("num_workers", 0)):
        if not isinstance(cfg[key], int) or cfg[key] < least:
            raise InputError(f"{key} is {cfg[key]!r}: expected a whole number of at least {least}")
    out = Path(cfg.out).expanduser()
    images = Path(cfg.images).expanduser()
    paths, unread = find_files(images, "images", out if out.is_dir() else None)
    for note in (*left_out(images, paths, unread), *contents(paths)):
        print(f"note: {printable(note)}")
    folder = MaskFolder(out)
    method: Any = load_method(cfg, read_checkpoint(cfg.checkpoint, extra_directories()))
    predictor = Predictor(method, cfg.class_threshold, cfg.max_side).to("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.cam:
        predictor.require_cams()
    names, ids = output_names(paths), {name: c + 1 for c, name in enumerate(method.classes)}
    loader: DataLoader[Any] = DataLoader(
        Photographs(list(paths.values()), cfg.max_side),
        batch_size=None,
        collate_fn=tuple,  # keeps the arrays: the default turns them into tensors
        num_workers=cfg.num_workers,
    )
    folder.write_classes(method.classes)
    failed: list[str] = []
    found: Counter[str] = Counter()
    for name, (image, size) in progress(zip(names, loader, strict=True), len(names), "predicting"):
        if size is None:
            failed.append(image)
            continue
        try:
            result = predictor.predict_reduced(image, size, cfg.cam)
            cams = None if result.cams is None else {ids[label]: cam for label, cam in result.cams.items()}
            folder.write(name, result.mask, image if cfg.overlay else None, cams)
        except (InputError, MemoryError, OSError, RuntimeError) as error:  # too small for the network, too large, ...
            if isinstance(error, OSError) and error.errno in FULL:
                raise  # nor will the next find room
            failed.append(f"{name}: {shorten(str(error) or type(error).__name__, 200)}")
            continue
        found.update(method.classes[c - 1] for c in np.unique(result.mask) if c > 0)
    done = len(names) - len(failed)
    listed = ", ".join(f"{name} {count}" for name, count in found.most_common()) or "none"
    print(f"{done} masks -> {folder.masks}; images with each class: {listed}")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(names)} images could not be used and have no mask: {' '.join(failed[:3])}"
        )
    return done


def prepare(arguments: list[str]) -> list[str]:
    from wsss.checkpoints import checkpoint_overrides

    return checkpoint_overrides(arguments, dataset=False)


def main() -> None:
    run_command("predict", predict, prepare)

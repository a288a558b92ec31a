"""`wsss-predict`: masks for a folder of photographs."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from wsss import InputError
from wsss.config import run_command


def predict(cfg: DictConfig) -> int:
    """Write masks, overlays and, if asked for, CAMs of every image; returns the number of images."""
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torch.utils.data import DataLoader

    from wsss.data.folder import Photographs, find_images
    from wsss.evaluate import load_method
    from wsss.refine.cam import cam_to_label, resize
    from wsss.report import colour_map, overlay, progress

    for key, least in (("max_side", 1), ("num_workers", 0)):
        if not isinstance(cfg[key], int) or cfg[key] < least:
            raise InputError(f"{key} is {cfg[key]!r}: expected a whole number of at least {least}")
    out = Path(cfg.out).expanduser()
    paths = find_images(Path(cfg.images).expanduser(), leave_out=out if out.is_dir() else None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be made a folder ({error.strerror}): give another one") from error
    method = load_method(cfg)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    method.to(device).eval()
    names = output_names(paths)
    loader: DataLoader[Any] = DataLoader(
        Photographs(list(paths.values()), method.mean, method.std),
        batch_size=None,
        collate_fn=tuple,  # keeps the arrays: the default turns them into tensors
        num_workers=cfg.num_workers,
    )
    palette = colour_map().tobytes()
    failed: list[str] = []
    found: Counter[str] = Counter()
    for name, (image, tensor) in progress(zip(names, loader, strict=True), len(names), "predicting"):
        if isinstance(image, str):
            failed.append(image)
            continue
        size = image.shape[:2]
        # a long strip keeps enough of its short side for a patch
        work = [max(min(side, 32), round(side * min(1, cfg.max_side / max(size)))) for side in size]
        photo = tensor[None].to(device)
        if max(size) > cfg.max_side:
            photo = F.interpolate(photo, size=work, mode="bilinear", antialias=True)
        try:
            output = method.infer(photo, cams=cfg.cam)
        except InputError as error:  # too small for the network, say
            failed.append(f"{name}: {error}")
            continue
        present = (output["logits"].sigmoid() > cfg.class_threshold).float()  # (1, C)
        if output["seg"] is not None:
            mask = method.segment(photo, work, output["seg"]).argmax(1)
        else:
            mask = cam_to_label(resize(output["cam"], work), present, method.background_threshold)
        picture = Image.fromarray(mask[0].to(torch.uint8).cpu().numpy())
        picture = picture.resize(size[::-1], Image.Resampling.NEAREST)
        ids = np.asarray(picture)
        picture.putpalette(palette)
        save(picture, out / "masks" / f"{name}.png")
        if cfg.overlay:
            save(Image.fromarray(overlay(image, ids)), out / "overlays" / f"{name}.jpg")
        if cfg.cam:
            kept = present[0].nonzero()[:, 0]
            cam = resize(output["cam"][:, kept], size)[0] if len(kept) else output["cam"][0, :0]
            save_arrays(out / "cams" / f"{name}.npz", cam=cam.half().cpu().numpy(), ids=(kept + 1).cpu().numpy())
        found.update(method.classes[c - 1] for c in np.unique(ids) if c > 0)
    done = len(names) - len(failed)
    listed = ", ".join(f"{name} {count}" for name, count in found.most_common()) or "none"
    print(f"{done} masks -> {out / 'masks'}; images with each class: {listed}")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(names)} images could not be used and have no mask: {' '.join(failed[:3])}"
        )
    return done


def output_names(paths: dict[Path, Path]) -> list[str]:
    """Names without suffix, relative to the output folder; files that differ in their suffix alone keep it."""
    stems = Counter(path.with_suffix("") for path in paths)
    return [str(p if stems[p.with_suffix("")] > 1 else p.with_suffix("")) for p in paths]


def save(picture: Any, path: Path) -> None:
    """Write an image whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    picture.save(temporary, format="PNG" if path.suffix == ".png" else "JPEG", quality=90)
    os.replace(temporary, path)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez_compressed(temporary, allow_pickle=False, **arrays)
    os.replace(temporary, path)


def prepare(overrides: list[str]) -> list[str]:
    from wsss.evaluate import from_checkpoint

    return from_checkpoint(overrides, dataset=False)


def main() -> None:
    run_command("predict", predict, prepare)

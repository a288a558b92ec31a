"""A folder of masks, overlays and maps, shared by all commands that make masks."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path, PurePath

import numpy as np
from PIL import Image

from wsss import InputError
from wsss.report.pictures import overlay
from wsss.writing import write_lines, write_mask, write_whole

LONGEST_JPEG = 65_500
"""Side in pixels, of libjpeg."""

SUFFIXES = (".png", ".jpg", ".npz")
"""Of what is written."""

LONGEST_NAME = 255 - 4
"""Bytes of a name that takes such a suffix."""


class MaskFolder:
    """`masks/<name>.png` and, on request, `overlays/<name>.jpg` and `cams/<name>.npz`, each whole or absent.

    Names are relative paths without suffix. Several processes may write to one folder, and a file that is there is
    written again.

    Args:
        out: the folder; made where it is missing.

    Raises:
        InputError: it cannot be made.
    """

    def __init__(self, out: Path) -> None:
        self.masks, self.overlays, self.cams = (out / kind for kind in ("masks", "overlays", "cams"))
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out={out} cannot be made a folder ({error.strerror}): give another one") from error

    def write(
        self,
        name: str,
        mask: np.ndarray,
        image: np.ndarray | None = None,
        cams: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            name: of the image.
            mask: ids, uint8 (H, W).
            image: uint8 of any size (h, w, 3), where an overlay is wanted; a PNG beyond what JPEG can hold.
            cams: where they are wanted, maps (h, w) in [0, 1] by id: `cam` (n, h, w) float16 and `ids` (n,) in the
                file.
        """
        if image is not None:
            suffix, kind = (".jpg", "JPEG") if max(image.shape) <= LONGEST_JPEG else (".png", "PNG")
            with write_whole(self.overlays / f"{name}{suffix}") as file:
                Image.fromarray(overlay(image, mask)).save(file, format=kind, quality=90)
        if cams is not None:
            maps = np.array(list(cams.values()) or np.empty((0, *mask.shape)), np.float16)
            with write_whole(self.cams / f"{name}.npz") as file:
                np.savez_compressed(file, cam=maps, ids=np.array(list(cams), np.int64))
        write_mask(self.masks / f"{name}.png", mask)  # last: where it is, all is

    def write_classes(self, classes: Sequence[str]) -> None:
        """masks/class_names.txt, a line for each class: whoever reads a mask finds them beside it."""
        write_lines(self.masks / "class_names.txt", classes)


def output_names(paths: Iterable[PurePath]) -> list[str]:
    """A name for each relative path: without suffix, or whole where others share the rest.

    Whatever is written under one name is written under no other, and is no folder of another, not even where upper
    and lower case are one. If neither will do, nor is short enough, the name is cut and ends in a hash.
    """
    paths = list(paths)
    if outside := [path for path in paths if ".." in path.parts or path.is_absolute()]:
        raise InputError(f"{outside[0]} is no name below a folder: rename the image in the file that lists it")
    stems, whole = Counter(_key(path.with_suffix("")) for path in paths), Counter(map(_key, paths))
    folders = {_key(folder) for path in paths for folder in path.parents}
    taken = {*stems, *whole}
    names = []
    for path in paths:
        stem = path.with_suffix("")
        own = [stem] if stems[_key(stem)] == 1 and _key(stem) not in whole else []
        own += [path] if whole[_key(path)] == 1 else []
        hashed = (name for number in count() if _key(name := _hashed(path, number)) not in taken)
        name = next(
            name
            for name in chain(own, hashed)
            if len(os.fsencode(name.name)) <= LONGEST_NAME
            and not any(_key(f"{name}{suffix}") in folders for suffix in SUFFIXES)
        )
        taken.add(_key(name))
        names.append(str(name))
    return names


def _key(path: str | PurePath) -> str:
    """Equal for paths that are one somewhere."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _hashed(path: PurePath, number: int) -> PurePath:
    digest = hashlib.sha256(os.fsencode(path) + bytes(number)).hexdigest()[:12]
    return path.with_name(f"{os.fsencode(path.stem)[:200].decode(errors='ignore')}-{digest}")

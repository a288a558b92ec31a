"""A folder of masks, overlays and maps, shared by all commands that make masks."""

import hashlib
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from wsss import InputError
from wsss.outputs.stores import TARS, open_store
from wsss.report.pictures import overlay
from wsss.writing import mask_png, read_object, write_json, write_lines

LONGEST_JPEG = 65_500
"""Side in pixels, of libjpeg."""

SUFFIXES = (".png", ".jpg", ".npz")
"""Of what is written."""

LONGEST_NAME = 255 - 4
"""Bytes of a name that takes such a suffix."""


class MaskFolder:
    """`masks/<name>.png` and, on request, `overlays/<name>.jpg` and `cams/<name>.npz`, each whole or absent.

    Names are relative paths without suffix. Several processes may write to one folder.

    Args:
        out: the folder; made where it is missing.
        output: "files", or "tar" for tar files of them.
        images_per_tar: in each of these.

    Raises:
        InputError: it cannot be made.
    """

    def __init__(self, out: Path, output: str = "files", images_per_tar: int = 1000) -> None:
        self.out = out
        self.masks, self.overlays, self.cams = (out / kind for kind in ("masks", "overlays", "cams"))
        self.store = open_store(out, output, images_per_tar)
        self.made = self.masks if output == "files" else out / TARS

    def claim(self, origin: Mapping[str, Any], command: str) -> dict[str, Any]:
        """Leave `settings.json` in a new folder, compare it with that of one that goes on; returns what it holds.

        Args:
            origin: plain values, what is made of what; `checkpoint`, a path, may change, all else may not.
            command: that makes it.

        Raises:
            InputError: the folder holds something else.
        """
        path, ours = self.out / "settings.json", json.loads(json.dumps(origin))  # tuples become lists
        made = self.masks.exists() or (self.out / TARS).exists()  # before: another process may begin just now
        if not path.exists():
            if made:
                raise InputError(f"{self.out} holds masks that {command} has not made: give another out")
            write_json(path, ours)
            return ours
        stored = read_object(path)
        first, second = (
            {k: v for k, v in one.items() if k not in ("checkpoint", "settings")} | one.get("settings", {})
            for one in (ours, stored)
        )
        different = [key for key in first | second if first.get(key, ...) != second.get(key, ...)]
        if different:
            raise InputError(
                f"{self.out} holds masks that were made otherwise, different are {', '.join(different[:5])}: "
                "repeat their command, or give another out"
            )
        return stored

    def has(self, name: str) -> bool:
        """Whether the mask of an image is there, and all that was asked for with it."""
        return self.store.has(f"masks/{name}.png")

    def encode(
        self,
        name: str,
        mask: np.ndarray,
        image: np.ndarray | None = None,
        cams: Mapping[int, np.ndarray] | None = None,
        more: Mapping[str, bytes] | None = None,
    ) -> dict[str, bytes]:
        """The files of an image by their relative paths, the mask last: where it is, all is.

        Args:
            name: of the image.
            mask: ids, uint8 (H, W).
            image: uint8 of any size (h, w, 3), where an overlay is wanted; a PNG beyond what JPEG can hold.
            cams: where they are wanted, maps (h, w) in [0, 1] by id: `cam` (n, h, w) float16 and `ids` (n,) in the
                file.
            more: further files of the image, by their relative paths.
        """
        files = dict(more or {})
        if image is not None:
            suffix, kind = (".jpg", "JPEG") if max(image.shape) <= LONGEST_JPEG else (".png", "PNG")
            content = io.BytesIO()
            Image.fromarray(overlay(image, mask)).save(content, format=kind, quality=90)
            files[f"overlays/{name}{suffix}"] = content.getvalue()
        if cams is not None:
            maps = np.array(list(cams.values()) or np.empty((0, *mask.shape)), np.float16)
            files[f"cams/{name}.npz"] = packed(cam=maps, ids=np.array(list(cams), np.int64))
        return files | {f"masks/{name}.png": mask_png(mask)}

    def write_classes(self, classes: Sequence[str]) -> None:
        """masks/class_names.txt, a line for each class: whoever reads a mask finds them beside it."""
        write_lines(self.masks / "class_names.txt", classes)


def packed(**arrays: np.ndarray) -> bytes:
    """Arrays as an .npz."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]  # a name may be allow_pickle, for all that numpy knows
    return content.getvalue()


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

"""The image files of a folder, and how names find them."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from wsss import InputError
from wsss.data.files import IMAGE_SUFFIXES, OTHER_SUFFIXES
from wsss.data.words import clean_path
from wsss.places import Place, Url, is_remote, relative

SUFFIXES = tuple(sorted((*IMAGE_SUFFIXES, *OTHER_SUFFIXES)))
UNREAD = {
    ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".hif", ".ico", ".j2k",
    ".jp2", ".jpf", ".jxl", ".jxr", ".nef", ".orf", ".pbm", ".pgm", ".ppm", ".psd", ".raf", ".raw", ".rw2", ".svg",
    ".tga", ".xcf",
}.difference(SUFFIXES)  # fmt: skip
"""Of images that are not read."""


def find_images(folder: Place, key: str = "images", leave_out: Place | None = None) -> dict[PurePath, Place]:
    """Relative path -> place of every image below a folder, in order.

    Hidden files and folders, run directories and the folder `leave_out` are not looked at; links to folders are
    followed, and no folder is entered twice. `key` is what a message calls the folder.
    """
    return find_files(folder, key, leave_out)[0]


def find_files(folder: Place, key: str, leave_out: Place | None = None) -> tuple[dict[PurePath, Place], list[PurePath]]:
    """Like `find_images`, and beside them the relative paths of the images of other kinds."""
    files: list[Any]
    if isinstance(folder, Url):
        hidden = None if leave_out is None else relative(leave_out, folder)
        files = [
            folder / path
            for path in folder.files()
            if hidden not in path.parents and not any(part.startswith(".") for part in path.parts)
        ]
    elif not folder.is_dir():
        raise InputError(f"{key}={folder} is not a folder: give the folder of your photographs")
    else:
        files = sorted(_visible_files(folder, leave_out if isinstance(leave_out, Path) else None))
    images = [path for path in files if path.suffix.lower() in SUFFIXES and (is_remote(path) or path.is_file())]
    unread = [relative(path, folder) for path in files if path.suffix.lower() in UNREAD]
    if not images:
        told = f" (but {len(unread)} of kinds that are not read, {', '.join(kinds(unread))})" if unread else ""
        raise InputError(f"{key}={folder} holds no image{told}: expected files that end in {', '.join(SUFFIXES)}")
    return {relative(path, folder): path for path in images}, unread


def kinds(paths: Iterable[PurePath]) -> list[str]:
    """The suffixes of files, each once."""
    return sorted({path.suffix.lower() for path in paths})


def _visible_files(folder: Path, leave_out: Path | None) -> Iterator[Path]:
    entered = {_identity(leave_out)} if leave_out is not None else set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_closed):
        if _identity(place) in entered:
            folders.clear()
            continue
        entered.add(_identity(place))
        if "run.json" in files:  # what a training or an evaluation has left
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in files if not name.startswith("."))


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _closed(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be opened ({error.strerror}): let yourself read it.") from error


def match(names: Iterable[str], images: Iterable[str], levels: int = 6) -> dict[str, str]:
    """Finds images by name: name -> image, without the names that find none.

    A name is compared by path, by file name, by both without suffix, and by the last two as Label Studio renames
    uploads; `levels` says how many of these count. A comparison that several images or several
    names share finds nothing, and an image found by a surer one is not found again.
    """
    by_key: list[dict[str, list[str]]] = [defaultdict(list) for _ in range(levels)]
    for image in images:
        path, file, bare, stem = _keys(image)
        uploaded = [_valid(key) for key in (file, stem)]
        for found_by, key in zip(by_key, (path, file, bare, stem, *uploaded), strict=False):
            found_by[key].append(image)
    left: dict[str, list[str]] = {}
    for name in names:
        path, file, bare, stem = _keys(name)
        left[name] = [path, file, bare, stem, *(_valid(_without_prefix(key)) for key in (file, stem))]
    found: dict[str, str] = {}
    taken: set[str] = set()
    for level, found_by in enumerate(by_key):
        asking: dict[str, list[str]] = defaultdict(list)
        for name, keys in left.items():
            asking[keys[level]].append(name)
        for key, asked in asking.items():
            candidates = found_by.get(key, [])
            if len(asked) == 1 and len(candidates) == 1 and candidates[0] not in taken:
                found[asked[0]] = candidates[0]
                taken.add(candidates[0])
                del left[asked[0]]
    return found


def _without_prefix(name: str) -> str:
    """A name as it was before Label Studio's upload put eight digits in front."""
    return re.sub(r"\A[0-9a-f]{8}-", "", name)


def _valid(name: str) -> str:
    """A name as Label Studio stores it, which takes letters, digits and `_-.` alone."""
    return re.sub(r"[^-\w.]", "", name.strip().replace(" ", "_"))


def _keys(name: str) -> tuple[str, str, str, str]:
    """Path and file name, and both without the suffix of an image."""
    path = clean_path(name)
    stem, dot, suffix = path.rpartition(".")
    bare = stem if dot + suffix.lower() in {*SUFFIXES, *UNREAD} else path  # IMG_1.HEIC may be IMG_1.jpg by now
    return path, path.rpartition("/")[2], bare, bare.rpartition("/")[2]

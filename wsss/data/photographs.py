"""Photographs to predict masks of: from a folder, a list, a shard or any URL."""

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from torch.utils.data import Dataset

from wsss import InputError, printable
from wsss.data.doubts import contents, left_out
from wsss.data.files import opened, read_image, reading
from wsss.data.finding import SUFFIXES, find_files
from wsss.data.pixels import reduced
from wsss.data.shards import INDEX, Shards
from wsss.places import Place, Readable, Url, place_of

LISTS = (".csv", ".txt")


class Found(NamedTuple):
    """Photographs, and what is to be told of them.

    Attributes:
        names: relative paths, each once.
        places: what they are read from.
    """

    names: Sequence[PurePath]
    places: Sequence[Readable]
    notes: Sequence[str] = ()


def find_photographs(given: str, out: Path) -> Found:
    """What the user calls `images`, see conf/predict.yaml; a folder `out` in it is left out.

    Raises:
        InputError: there is no image, or what should list some cannot be read.
    """
    place = place_of(given)
    if place.name == INDEX:
        root = place.parent.address if isinstance(place, Url) else str(place.parent)
        sets = [Shards(root, split) for split in ("train", "val")]
        # an image that is in both, with val=all say, is predicted once
        parts = {image_id: part for images in sets for image_id, part in zip(images.ids, images.images, strict=True)}
        return Found([PurePosixPath(image_id) for image_id in parts], list(parts.values()))
    kind = place.suffix.lower()
    if kind in LISTS and not (isinstance(place, Path) and place.is_dir()):
        listed = _listed(place, kind)
        return Found(list(listed), list(listed.values()))
    if kind in SUFFIXES and (isinstance(place, Url) or place.is_file()):
        return Found([PurePosixPath(place.name)], [place])
    images, unread = find_files(place, "images", out if out.is_dir() else None)
    return Found(list(images), list(images.values()), [*left_out(place, images, unread), *contents(images)])


def _listed(place: Place, kind: str) -> Mapping[PurePath, Place]:
    """Relative path -> place of the images in a list, those without an address or a root beside the list itself."""
    with reading(place, "a list of images", "give a text in UTF-8 with one image a line"), opened(place) as file:
        lines = io.TextIOWrapper(file, "utf-8-sig", newline="").read().splitlines()
        rows = [row for row in csv.reader(lines, strict=True) if row] if kind == ".csv" else [[one] for one in lines]
    column = rows[0].index("file") if kind == ".csv" and rows and "file" in rows[0] else None
    if column is not None and any(len(row) <= column for row in rows):
        raise InputError(f"{place} has rows without the column file: correct them.")
    names = [row[column or 0].strip() for row in rows[column is not None :]]
    found: dict[PurePath, Place] = {}
    for name in filter(None, names):
        image = place_of(name)
        if isinstance(image, Path) and not image.is_absolute():
            image = place.parent / name
            called: PurePath = PurePosixPath(name)
        else:
            called = _name_of(image)
        if found.setdefault(called, image) != image:
            raise InputError(f"{place} lists two images that would both be called {called}: list them in two files.")
    if not found:
        raise InputError(f"{place} lists no image: write one a line.")
    return found


def _name_of(image: Place) -> PurePath:
    """Host and path of an address, with a hash of what may follow; an absolute path without its root."""
    if isinstance(image, Path):
        return image.relative_to(image.anchor)
    parts = urlsplit(image.address)
    name = PurePosixPath(f"{parts.netloc.rpartition('@')[2]}{unquote(parts.path)}".replace(":", "_"))
    follows = hashlib.sha256(parts.query.encode()).hexdigest()[:12]
    return name.with_name(f"{name.stem}-{follows}{name.suffix}") if parts.query else name


class Photographs(Dataset[tuple[Any, Any]]):
    """Images, reduced where a side is longer than `max_side`, and their own height and width.

    For one that cannot be read, the reason and None.
    """

    def __init__(self, paths: Sequence[Readable], max_side: int) -> None:
        self.paths, self.max_side = paths, max_side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path = self.paths[index]
        try:
            with reading(path, "an image", "make it smaller, or leave it out"):  # there may be no room to reduce it
                image = read_image(path)
                return reduced(image, self.max_side), image.shape[:2]
        except InputError as error:
            return printable(str(error)), None

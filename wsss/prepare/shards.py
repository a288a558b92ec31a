"""Shards of a data set, and an index of shards that others have written."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from wsss import InputError
from wsss.data.base import Images, LabelledImages, check_split, digest
from wsss.data.files import first_names, open_image, reading
from wsss.data.finding import SUFFIXES
from wsss.data.shards import INDEX, OF_SPLIT
from wsss.places import Place, opened, place_of, streamed
from wsss.shards import VERSION, Row, Tar, columns, read_index
from wsss.writing import check_classes, mask_png, write_json

MASK = ".mask.png"
"""What the member of a true mask ends in."""


class Packed(NamedTuple):
    """An image as it goes into a tar file: its bytes, their kind, and a mask where there is one."""

    content: bytes
    suffix: str
    mask: bytes | None


class _Packed(Dataset[Packed]):
    def __init__(self, images: Images) -> None:
        self.images = images
        self.masked = images.has_masks or not isinstance(images, LabelledImages) or bool(images.true_masks())

    def __getitem__(self, index: int) -> Packed:
        images, mask, content = self.images, None, io.BytesIO()
        item = images[index] if self.masked or not images.images else {}
        if self.masked:
            truth = item["mask"] if "mask" in item else images.truth(index, item["image"])
            mask = None if truth is None else mask_png(truth)
        if not images.images:  # drawn ones: a PNG loses nothing
            Image.fromarray(item["image"]).save(content, "png")
            return Packed(content.getvalue(), "png", mask)
        place = images.images[index]
        with reading(place, "an image", "replace it, leave it out, or add on_bad_image=skip"), opened(place) as file:
            data = file.read()
            with open_image(io.BytesIO(data)) as image:
                kind = (image.format or "").lower()
        return Packed(data, "jpg" if kind in ("jpeg", "mpo") else kind, mask)


class Shard(NamedTuple):
    """A tar file to be: its name without suffix, and the images in it."""

    name: str
    images: Images
    indices: range
    of: str


def planned(split: str, images: Images | None, size: int) -> list[Shard]:
    """The shards of a split, which depend on nothing else."""
    if images is None:
        return []
    of = digest(VERSION, images.fingerprint, size)
    ranges = [range(first, min(first + size, len(images))) for first in range(0, len(images), size)]
    return [Shard(f"{split}-{number:06d}", images, indices, of) for number, indices in enumerate(ranges)]


def is_written(out: Path, shard: Shard) -> bool:
    """Whether it is complete.

    Raises:
        InputError: there is one of other images.
    """
    path = out / f"{shard.name}.json"
    if not path.exists():
        return False
    if read_index(path, OF_SPLIT).get("of") != shard.of:
        raise InputError(f"{out} holds shards of other images, or of other sizes: give another out.")
    return (out / f"{shard.name}.tar").is_file()


def write_shard(out: Path, shard: Shard, num_workers: int, progress: Callable[[Any, int], Any]) -> None:
    """`<name>.tar` and its index: of an image <number>.jpg as it is, <number>.json with its name and labels."""
    images, ids = shard.images, shard.images.ids
    loader = DataLoader(_Packed(images), batch_size=None, sampler=shard.indices, num_workers=num_workers)
    pictures, masks, masked = list[Row](), list[Row](), list[int]()
    with Tar(out / f"{shard.name}.tar") as tar:
        labels: list[list[int]] = []
        for index, packed in zip(shard.indices, progress(loader, len(shard.indices)), strict=True):
            key = f"{index:09d}"
            labels.append(np.flatnonzero(images.label(index)).tolist())
            said = {"id": ids[index], "labels": [images.classes[c] for c in labels[-1]]}
            pictures.append(tar.add(f"{key}.{packed.suffix}", packed.content))
            tar.add(f"{key}.json", json.dumps(said, ensure_ascii=False).encode("utf-8", "surrogatepass"))
            if packed.mask is not None:
                masks.append(tar.add(f"{key}{MASK}", packed.mask))
                masked.append(index - shard.indices.start)
        tar.says = {"of": shard.of, "ids": [ids[index] for index in shard.indices], "labels": labels}
        tar.says |= {"images": columns(pictures), "masks": columns(masks), "masked": masked}


def write_list(out: Path, classes: Sequence[str], has_background: bool, splits: dict[str, list[str]]) -> None:
    """The index of all: what is there is complete."""
    content = {"version": VERSION, "classes": list(classes), "has_background": has_background, "splits": splits}
    write_json(out / INDEX, content)


def index_foreign(
    given: str, out: Path, classes: Sequence[str] | None, split: str, progress: Callable[[Any, int], Any]
) -> int:
    """Index tar files that others have written for WebDataset, where they are; returns the number of images.

    An image has one key with its labels: `.cls`, numbers of classes from 0, else `.json` with `labels`, else `.txt`,
    names that semicolons join. One without any of them shows no class. Only the heads of images are passed over,
    nothing is decoded; masks are not taken.

    Args:
        given: path or address; {000..099} stands for numbers, {a,b} for either, as for the webdataset library.
        out: folder of the index.
        classes: names in the order wanted; None takes those of the labels, sorted.
        split: of the images.

    Raises:
        InputError: webdataset is not installed, a tar file cannot be read, labels are none, or the folder has an index.
    """
    check_split(split)
    if (out / INDEX).exists():
        raise InputError(f"{out} has an index already, which would be lost: give another out, or remove its files.")
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise InputError("shards of others need the webdataset library: pip install 'wsss[scale]'") from error
    tars = [place_of(name) for name in expand_urls(given)]
    found = [_read_foreign(tar) for tar in progress(tars, len(tars))]
    known = _known_classes(tars[0], {label for one in found for row in one.labels.values() for label in row}, classes)
    places = {name: c for c, name in enumerate(known)}
    keys = [key for one in found for key in one.pictures]
    unique = len(set(keys)) == len(keys)
    listed = []
    for number, (tar, one) in enumerate(zip(tars, found, strict=True)):
        rows = [sorted({places.get(label, label) for label in one.labels.get(key, ())}) for key in one.pictures]
        ids = [key if unique else f"{number:06d}/{key}" for key in one.pictures]
        table = {"ids": ids, "labels": rows, "images": columns(list(one.pictures.values()))}
        listed.append(f"{split}-{number:06d}")
        where = str(tar.resolve()) if isinstance(tar, Path) else tar.address
        size = tar.stat().st_size if isinstance(tar, Path) else one.end
        says = {"version": VERSION, "bytes": size, "tar": where, "of": digest(table), **table}
        write_json(out / f"{listed[-1]}.json", says)
    write_list(out, known, True, {split: listed})
    return len(keys)


class _Foreign(NamedTuple):
    """A tar file of others: where its last member ends, by key its images, and of those that have any the labels."""

    end: int
    pictures: dict[str, Row]
    labels: dict[str, list[Any]]


def _read_foreign(tar: Place) -> _Foreign:
    """Raises InputError for a tar file without images, or with labels that are none."""
    from webdataset.tariterators import base_plus_ext

    pictures: dict[str, Row] = {}
    labels: dict[str, list[Any]] = {}
    said_by: dict[str, int] = {}
    end = 0
    for member, content in _members(tar):
        key, ending = base_plus_ext(member.name)
        end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        kind = f".{(ending or '').lower()}"
        if key is None or "." in kind[1:]:
            continue
        if kind in SUFFIXES:
            pictures.setdefault(key, Row(member.name, member.offset_data, member.size, None))
        elif (
            kind in READ
            and READ.index(kind) < said_by.get(key, len(READ))
            and (row := _said(f"{tar}: {member.name}", kind, content())) is not None
        ):
            labels[key], said_by[key] = row, READ.index(kind)
    if not pictures:
        raise InputError(f"{tar} holds no image ({end} bytes were passed over): leave it out.")
    return _Foreign(end, pictures, labels)


def _known_classes(tar: Place, said: set[Any], classes: Sequence[str] | None) -> list[str]:
    """The classes that were given, or those of all labels, names or numbers, of `tar` and others.

    Raises:
        InputError: they do not fit one another.
    """
    numbers = {label for label in said if isinstance(label, int)}
    names = sorted(label for label in said if isinstance(label, str))
    known = list(names if classes is None else classes)
    if (numbers and classes is None) or not known:
        raise InputError(f"{tar} and others number their classes, or have none: give classes=[NAME,...] in order.")
    if unknown := [*(set(names) - set(known)), *(str(c) for c in numbers if not 0 <= c < len(known))]:
        raise InputError(f"{tar} and others name classes that are not given ({first_names(unknown)}): add them.")
    check_classes(known)
    return known


READ = (".cls", ".json", ".txt")
"""Members that may hold labels; the first one counts."""


def _members(tar: Place) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """The files in a tar file, and how to read each."""
    advice = "copy it again, or leave it out"
    with (
        reading(tar, "a tar file", advice),
        streamed(tar) as file,
        tarfile.open(fileobj=file, mode="r:") as archive,
    ):
        for member in archive:
            if member.isreg():
                yield member, partial(_content, archive, member)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read(LONGEST_LABELS)


LONGEST_LABELS = 2**20
"""Bytes."""


def _said(where: str, kind: str, content: bytes) -> list[Any] | None:
    """Numbers or names of classes; None of a JSON without labels."""
    with reading(where, "labels", "correct it, or leave the file out"):
        text = content.decode("utf-8")
        if kind == ".cls":
            return [int(word) for word in text.split()]
        if kind == ".txt":
            return [name.strip() for name in text.split(";") if name.strip()]
        found = json.loads(text)
        labels = found.get("labels") if isinstance(found, dict) else found
        if labels is None:
            return None
        if not isinstance(labels, list) or not all(isinstance(label, str | int) for label in labels):
            raise ValueError(f"labels are {labels!r}, expected a list of names or numbers")
        return labels

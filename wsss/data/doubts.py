"""What is likely a mistake in a data set although it can be read, each as a sentence that says what to do."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

import numpy as np

from wsss import InputError
from wsss.data.base import Images, ImageSubset
from wsss.data.files import AVIF, first_names, open_image, reading
from wsss.data.finding import kinds
from wsss.places import Place, state

T = TypeVar("T")
LOOKED_AT, DECODED = 500, 100
"""Files whose heads are looked at, and whose colours are counted."""
COMPARED_BYTES = 2**29
"""Of files of equal size, how much is read to tell whether they are the same."""
FEW_COLOURS = 64
LOSSLESS = (".bmp", ".gif", ".png", ".tif", ".tiff")


# Labels


def unseen(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Of the classes that no image (N, C) shows."""
    missing = [name for name, count in zip(classes, labels.sum(0), strict=True) if not count]
    return [f"no training image shows {name}: nothing can be learnt about it" for name in missing]


FEW = 30
"""Images of a class below which what is learnt about it differs much from one choice of images to another."""


def few(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """A warning where some classes are shown by few images (N, C)."""
    found = {name: int(n) for name, n in zip(classes, labels.sum(0).tolist(), strict=True) if 0 < n < FEW}
    if not found:
        return []
    least = sorted(found, key=lambda name: found[name])[:3]
    said = ", ".join(f"{name} ({found[name]})" for name in least)
    return [
        f"{len(found)} classes have fewer than {FEW} training images, {said}{', ...' if len(found) > 3 else ''}: "
        "expect masks to correct rather than to use; photographs of these classes help most"
    ]


# Masks against labels


def masks_misfit(items: Iterable[Mapping[str, Any]], classes: Sequence[str], tolerated: float = 0.5) -> str | None:
    """Why the masks are not of these labels, where they are not.

    Fewer are how people annotate; many are ids in another order than the classes, or white for one class.

    Args:
        items: of images their `id`, `label` (C,) and the ids `shown` by the mask.
        classes: names.
        tolerated: share of the masks that may show a class that the labels do not name; half may besides show none of
            those they do.
    """
    white, foreign, lacking = [], [], []
    count = positives = 0
    for item in items:
        shown, present = set(item["shown"].tolist()), set((np.flatnonzero(item["label"]) + 1).tolist())
        seen = shown - {0, 255}
        count += bool(shown)
        positives += bool(shown and present)
        if extra := sorted(seen - present):
            foreign.append(f"{item['id']} shows {classes[extra[0] - 1]}")
        elif shown and present and not seen & present:
            lacking.append(f"{item['id']} shows no {classes[min(present) - 1]}")
            white += [item["id"]] if 255 in shown else []
    order = ", ".join(f"{c} {name}" for c, name in enumerate(classes[:5], 1)) + (", ..." if len(classes) > 5 else "")
    if len(white) * 2 > positives:
        return (
            f"{len(white)} of {positives} masks hold only 0 and 255 although their images are labelled "
            f"({first_names(white)}): 255 is ignored in all figures, save the id of the class instead ({order})"
        )
    if len(foreign) <= tolerated * count and 2 * len(foreign + lacking) <= count:
        return None
    return (
        f"{len(foreign + lacking)} of {count} masks show a class that the image's labels do not name, or none of "
        f"theirs ({first_names([*foreign, *lacking])}): the ids in the masks have to follow the order of the classes "
        f"({order}), set dataset.classes or write class_names.txt"
    )


def sample(images: Images, most: int = 64) -> Images:
    """Some of the items, evenly spread."""
    return ImageSubset(images, _spread(range(len(images)), most))


# Files


def shared(train: Images, val: Images) -> list[str]:
    """A sentence where images to evaluate on are trained on too: the same files, links to them, or copies."""
    files = [[path for path in images.images if isinstance(path, Path)] for images in (train, val)]
    sides = [{path: path.stat() for path in paths} for paths in files]
    places = {(status.st_dev, status.st_ino) for status in sides[0].values()}
    again: set[Any] = {path for path, status in sides[1].items() if (status.st_dev, status.st_ino) in places}
    sides[1] = {path: status for path, status in sides[1].items() if path not in again}
    sizes = [{status.st_size for status in side.values()} for side in sides]
    alike = [(s.st_size, p, n) for n in (0, 1) for p, s in sides[n].items() if s.st_size in sizes[1 - n]]
    known: list[dict[bytes, list[Path]]] = [defaultdict(list), defaultdict(list)]
    left: int = COMPARED_BYTES
    for size, path, side in sorted(alike):
        if (left := left - size) >= 0:
            with suppress(OSError):  # one that cannot be read is said when it is loaded
                known[side][hashlib.sha256(path.read_bytes()).digest()].append(path)
    again |= {path for key in known[0].keys() & known[1].keys() for path in known[1][key]}
    others = [
        {state(place): place for place in images.images if not isinstance(place, Path)} for images in (train, val)
    ]
    again |= {others[1][key] for key in others[0].keys() & others[1].keys()}
    part = f" (of files of equal size {COMPARED_BYTES >> 20} MB were compared, not all)" if left < 0 else ""
    if not again:
        return [f"no image to evaluate on was found among those trained on{part}"] if part else []
    return [
        f"{len(again)} of {len(val)} images to evaluate on{part} are trained on too, the same files or copies "
        f"({first_names(sorted(map(str, again)))}): figures on them do not tell how new images fare"
    ]


def left_out(root: Place, images: Collection[PurePath], unread: Sequence[PurePath], folders: bool = False) -> list[str]:
    """On image files of kinds that are not read, by relative paths; `folders` where each folder is a class."""
    if not unread:
        return []
    count = Counter(path.suffix.lower() for path in unread)
    listed = ", ".join(f"{count[kind]} {kind}" for kind in kinds(unread))
    vanished = sorted({path.parts[0] for path in unread} - {path.parts[0] for path in images}) if folders else []
    lost = f"; no image is left of the class {first_names(vanished)}" if vanished else ""
    newer = " (.avif: or install pillow>=11.3)" if not AVIF and ".avif" in count else ""
    return [
        f"{root}: {len(unread)} images of kinds that are not read are left out, {listed} "
        f"({first_names([path.as_posix() for path in unread])}){lost}: convert them to JPEG or PNG{newer}"
    ]


class _Head(NamedTuple):
    size: tuple[int, int]
    mode: str
    frames: int
    raw: str  # what a pixel is in the file, as Pillow calls it


def _head(path: Path) -> _Head | None:
    """What a picture says of itself; None where it cannot be read, which others say."""
    try:
        with reading(path, "an image", "replace it"), open_image(path) as image:
            raw = str(image.tile[0][3]) if image.tile else ""
            return _Head(image.size, image.mode, getattr(image, "n_frames", 1), raw)
    except InputError:
        return None


def contents(images: Mapping[PurePath, Place]) -> list[str]:
    """On frames that are not read, on more than 8 bits a pixel, and on masks among photographs: relative path -> path.

    Looks at so many files at most, evenly spread, so that a large folder does not take long.
    """
    files = {relative: path for relative, path in images.items() if isinstance(path, Path)}  # others take a request
    looked = [path for path in files.values() if path.suffix.lower() not in (".jpg", ".jpeg", ".jpe", ".jfif", ".bmp")]
    of = f" (of {LOOKED_AT} looked at)" if len(looked) > LOOKED_AT else ""
    heads = {path: head for path in _spread(looked, LOOKED_AT) if (head := _head(path))}
    notes = []
    if several := [path for path, head in heads.items() if head.frames > 1]:
        others = sum(heads[path].frames - 1 for path in several)
        notes.append(
            f"{len(several)} files{of} have several frames or pages ({first_names(list(map(str, several)))}): only the "
            f"first is read, not the other {others}"
        )
    if deep := [str(path) for path, head in heads.items() if head.mode.startswith("I")]:
        notes.append(
            f"{len(deep)} files{of} have more than 8 bits of grey ({first_names(deep)}): each is scaled by the "
            "smallest range of 8, 10, 12, 14 or 16 bits that holds its brightest pixel"
        )
    if deep := [str(path) for path, head in heads.items() if head.mode.startswith("RGB") and "16" in head.raw]:
        notes.append(f"{len(deep)} files{of} have 16 bits a colour ({first_names(deep)}): the high 8 of them are read")
    return notes + _masks_among(files)


def _spread(items: Sequence[T], most: int) -> Sequence[T]:
    """So many at most, evenly spread."""
    return items[:: max(1, -(-len(items) // most))]


def _masks_among(images: Mapping[PurePath, Path]) -> list[str]:
    """Pictures of few colours that have the size of a photograph and its name, or that with a word before or after."""
    by_stem: dict[str, list[PurePath]] = defaultdict(list)
    for relative in images:
        by_stem[relative.stem].append(relative)
    pairs = []
    for relative in images:
        if relative.suffix.lower() in LOSSLESS:
            names = _shorter(relative.stem)
            pairs.append((relative, [p for name in names for p in by_stem.get(name, ()) if p != relative]))
    candidates = [(relative, partners) for relative, partners in pairs if partners]
    found = [
        relative
        for relative, partners in _spread(candidates, DECODED)
        if any(_is_mask_of(images[relative], images[partner]) for partner in partners[:3])
    ]
    if not found:
        return []
    of = f" (of {DECODED} looked at)" if len(candidates) > DECODED else ""
    folders = first_names(sorted({relative.parent.as_posix() for relative in found}))
    return [
        f"{len(found)} images{of} look like masks of others, of few colours and the same name and size "
        f"({first_names([relative.as_posix() for relative in found])}), and are taken for photographs: move them out "
        f"of dataset.root, or name their folder ({folders}) as dataset.masks if it holds nothing else"
    ]


def _shorter(stem: str) -> list[str]:
    """The stem itself, then without words at its end or start: im_1_mask -> im_1_mask, im_1, im, 1_mask, mask."""
    cuts = [found.start() for found in re.finditer(r"[_\-. ]+", stem)]
    return [stem, *(stem[:cut] for cut in reversed(cuts)), *(stem[cut:].lstrip("_-. ") for cut in cuts)]


def _is_mask_of(path: Path, partner: Path) -> bool:
    own, other = _head(path), _head(partner)
    if own is None or other is None or other.size not in (own.size, own.size[::-1]) or not _few_colours(path):
        return False
    return partner.suffix.lower() not in LOSSLESS or not _few_colours(partner)


def _few_colours(path: Path) -> bool:
    """Whether a picture has few colours, or few but for the pixels of blurred edges."""
    try:
        with reading(path, "an image", "replace it"), open_image(path) as image:
            flat = image.convert("L") if image.mode[0] in "IF" else image
            counts = sorted((count for count, _ in flat.getcolors(2**16) or ()), reverse=True)
    except InputError:
        return False
    return bool(counts) and (len(counts) <= FEW_COLOURS or sum(counts[:8]) >= 0.95 * sum(counts))

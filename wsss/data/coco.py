"""COCO 2014, whose masks wsss-data coco draws beforehand."""

import os
import re
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from wsss import InputError
from wsss.data.base import LabelledImages, check_split, pick
from wsss.data.files import (
    IMAGE_SUFFIXES,
    files_by_stem,
    find_given,
    load_label_dict,
    read_lines,
    read_list,
)
from wsss.data.instances import annotation_keys, read_elements, read_head
from wsss.writing import write_whole

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
LAYOUT = (
    "train2014, val2014, annotations/instances_{train,val}2014.json and, to evaluate, masks/{train,val}2014, "
    "which wsss-data coco makes"
)


class COCO(LabelledImages):
    """COCO 2014's photographs with image-level labels; masks only outside of training.

    An id's own prefix (COCO_train2014_, COCO_val2014_) says which folder of images and masks it is in, whatever the
    split; an id without one is in the split's. Raises InputError for whatever does not fit: list, labels and the
    presence of every file are checked at once, image and mask when opened.

    The field's lists (82,081 and 40,137 lines) leave out images without any object, the JSON (82,783 and 40,504) has
    them; an image without labels that is listed is kept, as a negative.

    Args:
        root: folder with train2014, val2014, annotations and what the other arguments name.
        split: "train" or "val": which of the two lists below is read.
        train: list to train on, ids alone or the field's `id index index ...` with classes 0..79, in root or
            anywhere; None takes every image of the split that `labels` has.
        val: list to evaluate on, likewise.
        labels: image-level labels: a `cls_labels*.npy`, a list with labels (.txt) or an instances JSON, in root or
            anywhere; None takes the list's own, else root/annotations/instances_{train,val}2014.json. A JSON is
            read once: its labels are kept beside it as <name>.labels.txt where that can be written.
        masks: folder that holds train2014 and val2014, or the masks themselves, in root or anywhere; None takes
            root/masks, which `wsss-data coco` makes.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        train: str | None = None,
        val: str | None = None,
        labels: str | None = None,
        masks: str | None = None,
    ) -> None:
        check_split(split)
        self.root, self.folder = Path(root).expanduser(), f"{split}2014"
        self.mask_folder = find_given(self.root, masks or "masks")
        ids, rows = self._listed(train if split == "train" else val, labels)
        images = self._files(ids, self.root, IMAGE_SUFFIXES, "image")
        truth: list[Path] | None = None
        if split != "train":
            truth = self._files(ids, self.mask_folder, (".png",), "mask")
        super().__init__(COCO_CLASSES, ids, images, rows, truth)

    def _folder(self, image_id: str) -> str:
        own = re.match(r"COCO_((train|val)2014)_", image_id)
        return own[1] if own else self.folder

    def _listed(self, given: str | None, labels: str | None) -> tuple[list[str], np.ndarray]:
        """Ids and labels, float32 (N, 80), of the list and the labels that the user gave."""
        ids, rows = _read_label_list(find_given(self.root, given)) if given else ([], np.zeros((0, len(COCO_CLASSES))))
        if labels is None and rows.any():
            return ids, rows
        folders = sorted({self._folder(image_id) for image_id in ids} or {self.folder})
        annotations = self.root / "annotations"
        sources = (
            [find_given(self.root, labels)] if labels else [annotations / f"instances_{name}.json" for name in folders]
        )
        found: dict[str, np.ndarray] = {}
        for source in sources:
            if not source.is_file():
                advice = "give it, or pass labels=<cls_labels*.npy or a list with labels>"
                raise InputError(f"{source}, which holds the image-level labels, does not exist: {advice}.")
            found |= _load_labels(source)
        ids = ids or [image_id for image_id in found if self._folder(image_id) == self.folder]
        if not ids:
            raise InputError(f"{sources[0]} has no image of {self.folder}: name other labels, or give a list.")
        return ids, np.stack(pick(ids, found, f"label in {' or '.join(map(str, sources))}"))

    def true_masks(self) -> dict[str, Path]:
        folders = filter(Path.is_dir, self._folders(self.ids, self.mask_folder, "mask").values())
        return {i: path for folder in folders for i, path in files_by_stem(folder, (".png",), LAYOUT).items()}

    def _folders(self, ids: Sequence[str], parent: Path, what: str) -> dict[str, Path]:
        """Where the images of these ids have their files."""
        folders = {name: parent / name for name in sorted(set(map(self._folder, ids)))}
        if what == "mask":
            folders = {name: path if path.is_dir() else parent for name, path in folders.items()}
        return folders

    def _files(self, ids: Sequence[str], parent: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
        """The file of every id, from one listing of each folder."""
        found: dict[str, Path] = {}
        folders = self._folders(ids, parent, what)
        for folder in dict.fromkeys(folders.values()):
            found |= files_by_stem(folder, suffixes, LAYOUT)
        return pick(ids, found, f"{what} in {' or '.join(map(str, dict.fromkeys(folders.values())))}")


def _read_label_list(path: Path) -> tuple[list[str], np.ndarray]:
    """Reads the field's `id index index ...`: ids and float32 (N, 80); a line without indices has no object."""
    ids = read_list(path)
    rows = np.zeros((len(ids), len(COCO_CLASSES)), np.float32)
    column = {str(index): index for index in range(len(COCO_CLASSES))}
    for row, image_id, line in zip(rows, ids, read_lines(path), strict=True):
        for word in line.split()[1:]:
            if word not in column:
                found = f"{path} gives {image_id} the class {reprlib.repr(word)}, expected 0 to {len(column) - 1}"
                raise InputError(f"{found}: write an id and its class indices a line, or ids alone.")
            row[column[word]] = 1
    return ids, rows


def _load_labels(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".json":
        return _json_labels(path)
    if path.suffix == ".txt":
        return dict(zip(*_read_label_list(path), strict=True))
    labels = load_label_dict(path)
    length = len(next(iter(labels.values())))
    if length != len(COCO_CLASSES):
        raise InputError(f"{path} has vectors of {length} classes, expected {len(COCO_CLASSES)}: give COCO's labels.")
    return labels


def _json_labels(path: Path) -> dict[str, np.ndarray]:
    """Labels of every image of an instances JSON: the categories of its annotations, crowds included."""
    cache = path.with_suffix(".labels.txt")
    written = path.stat().st_mtime_ns
    if cache.exists() and cache.stat().st_mtime_ns == written:
        return dict(zip(*_read_label_list(cache), strict=True))
    photos, values, names = read_head(path)
    if names != COCO_CLASSES:
        differ = next(
            (f"{a!r} for {b!r}" for a, b in zip(names, COCO_CLASSES, strict=False) if a != b), "only the first"
        )
        found = f"{len(names)} categories ({differ})"
        raise InputError(f"{path} has {found}, expected the {len(COCO_CLASSES)} of COCO: give COCO's own file.")
    rows = {image: row for row, image in enumerate(photos)}
    labels = np.zeros((len(photos), len(names)), np.float32)
    for number, annotation in enumerate(read_elements(path, "annotations")):
        _, image, value = annotation_keys(path, number, annotation, photos, values)
        labels[rows[image], value - 1] = 1
    ids = [photo.name for photo in photos.values()]
    if not all(re.fullmatch(r"\w+", image_id) for image_id in ids):  # a list would not give such names back
        return dict(zip(ids, labels, strict=True))
    lines = (" ".join([i, *map(str, np.flatnonzero(row))]) for i, row in zip(ids, labels, strict=True))
    with suppress(OSError):  # a root that cannot be written to works as well, only slower
        with write_whole(cache) as file:
            file.writelines(f"{line}\n".encode() for line in lines)
        os.utime(cache, ns=(written, written))  # so that another file, an older one too, is told from this one
    return dict(zip(ids, labels, strict=True))

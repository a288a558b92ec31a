"""Shards: a data set in tar files, read at random by an index."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from wsss import InputError
from wsss.data.base import Inspection, LabelledImages, both_splits, check_split, digest
from wsss.places import Part, Place, Url, place_of
from wsss.shards import Parts, check_size, read_index

INDEX = "index.json"
"""Written last: where it is, all is."""

OF_SPLIT = {"bytes": int, "ids": list, "labels": list, "images": dict}
"""What the index of a tar file holds."""


class Shards(LabelledImages):
    """The images and labels of tar files that `wsss-data shards` has written, or indexed, on a disk or at a URL.

    The same items as those of the files they were made of, and the same order, so that batches are equal and a training
    goes on where it was interrupted. An image is read by one request, and compared with the checksum of its index.
    Nothing of a file is executed, and no name of an image is taken for a path. Of files elsewhere an index that
    `wsss-data index` has written names tar files; one at a URL names none of this machine.

    Args:
        root: folder of the shards, or its address.
        split: "train" or "val"; the latter is empty where there was nothing to evaluate on.

    Raises:
        InputError: a tar file or an index is missing, damaged or of another version.
    """

    def __init__(self, root: str, split: str = "train") -> None:
        check_split(split)
        self.root = place_of(root)
        whole = read_index(self.root / INDEX, {"classes": list, "has_background": bool, "splits": dict})
        classes, listed = whole["classes"], whole["splits"].get(split, [])
        known = isinstance(listed, list) and all(isinstance(name, str) for name in (*classes, *listed))
        if not known or len(set(listed)) < len(listed) or any("/" in name for name in listed):
            raise InputError(f"{self.root / INDEX} lists what are no names, each once: make the shards again.")
        tars, tables = list[Place](), list[dict[str, Any]]()
        for name in listed:
            tables.append(read_index(self.root / f"{name}.json", OF_SPLIT))
            elsewhere = tables[-1].get("tar")  # of a foreign one
            tars.append(self.root / f"{name}.tar" if elsewhere is None else place_of(str(elsewhere)))
            if isinstance(self.root, Url) and not isinstance(tars[-1], Url):
                raise InputError(
                    f"{self.root}: an index there names {tars[-1]}, a file of this machine: index the addresses of the "
                    "tar files instead."
                )
            check_size(tars[-1], tables[-1]["bytes"])
        ids = [image_id for table in tables for image_id in table["ids"]]
        sizes = [table["bytes"] for table in tables]
        images = Parts(tars, sizes, [table["images"] for table in tables], self.root)
        labels = _multi_hot([row for table in tables for row in table["labels"]], len(classes), self.root)
        if bad := next((name for name in ids if not _is_name(name)), None):
            raise InputError(f"{self.root}: an index calls an image {bad!r}, which is no name below a folder: mend it.")
        if not all(len(t["ids"]) == len(t["labels"]) == len(t["images"]["offset"]) for t in tables):
            raise InputError(f"{self.root}: the indices name and label different images: make the shards again.")
        masks: dict[str, Part] = {}
        first = 0
        for tar, table in zip(tars, tables, strict=True):
            numbers, rows = table.get("masked", []), table.get("masks", {"offset": [], "length": [], "crc32": []})
            parts = Parts([tar], [table["bytes"]], [rows], self.root)
            known = isinstance(numbers, list) and len(numbers) == len(parts)
            if not known or not all(isinstance(n, int) and 0 <= n < len(table["ids"]) for n in numbers):
                raise InputError(f"{self.root}: an index has masks of what is no image: make the shards again.")
            masks |= {ids[first + number]: part for number, part in zip(numbers, parts, strict=True)}
            first += len(table["ids"])
        self._known_masks = masks
        measured = split == "val" and len(masks) == len(ids) > 0
        super().__init__(classes, ids, images, labels, [masks[name] for name in ids] if measured else None)
        self.has_background = whole["has_background"]
        self._made_of = [table.get("of") for table in tables]

    def true_masks(self) -> Mapping[str, Part]:
        return self._known_masks

    @property
    def fingerprint(self) -> str:
        return digest(self.classes, len(self), self._made_of)

    @classmethod
    def inspection(cls, **values: Any) -> Inspection:
        return both_splits(cls, values)


def _is_name(name: Any) -> bool:
    """Whether files can be called by it, which stay below their folder."""
    sound = isinstance(name, str) and name != "" and "\0" not in name and not name.startswith("/")
    return sound and (".." not in name or ".." not in name.split("/"))


def _multi_hot(rows: list[Any], classes: int, source: Place) -> np.ndarray:
    """(N, C) float32 of lists of class numbers."""
    labels = np.zeros((len(rows), classes), np.float32)
    try:
        for row, present in enumerate(rows):
            if any(not 0 <= c < classes for c in present):
                raise ValueError
            labels[row, present] = 1
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{source}: an index has the labels {json.dumps(rows[row])[:80]}, expected numbers of classes "
            f"from 0 to {classes - 1}: make the shards again."
        ) from error
    return labels

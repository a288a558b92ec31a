"""A folder of the pseudo masks of a data set: made image by image, perhaps by several processes, listed at the end."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from wsss import InputError
from wsss.outputs.masks import MaskFolder, packed
from wsss.report.tables import progress
from wsss.writing import json_bytes, read_object, write_json

SUFFIXES = {
    "masks": (".png",),
    "cams": (".npz",),
    "scores": (".npz",),
    "overlays": (".jpg",),
    "instances": (".png", ".json"),
}
"""Of the files of an image, by the name of their folder."""


COUNTS = ("ids", "pixels", "targets")
"""Arrays of `wsss.evaluation.pseudo.count_cam`."""


class InstanceMap(NamedTuple):
    """The instances of an image.

    Attributes:
        numbers: uint16 (H, W), 0 where none is, else from 1 on.
        ids: of the class of each.
        scores: of each, in [0, 1].
    """

    numbers: np.ndarray
    ids: Sequence[int]
    scores: Sequence[float]


class ClassTable(NamedTuple):
    """What the masks of C classes show; row 0 is the background.

    Attributes:
        labelled: (1 + C,) images that have the class among their labels; those without any label.
        shown: (1 + C,) images whose mask shows it.
        pixels: (1 + C,) its share of all pixels.
        undecided: (1 + C,) share of undecided pixels in the images that have it among their labels.
        ignored: share of undecided pixels in all images.
    """

    labelled: np.ndarray
    shown: np.ndarray
    pixels: np.ndarray
    undecided: np.ndarray
    ignored: float


class LabelFolder:
    """`masks/<id>.png` and, on request, further files of each image, all of the same settings.

    `settings.json` says from the beginning what they are made of, and nothing else may be added to them.
    `manifest.json`, the same and size and sha256 of every mask, and sha256 of its instances, is there when all of them
    are, as are `metrics.json` and `tags.json`. Where an image has a true mask, `counts/<id>.npz` holds what the figures
    of its CAMs are made of. Nothing in the folder depends on how many processes have made it, nor on how often they
    were interrupted, and no mask on true ones.

    Args:
        out: the folder; made where it is missing.
        origin: plain values: what the masks are made of, by name, and `settings`, a mapping. `checkpoint`, a path, may
            change, all else may not.
        kinds: of files that an image has, among SUFFIXES.
        output, images_per_tar: see `MaskFolder`.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(
        self,
        out: Path,
        origin: Mapping[str, Any],
        kinds: Sequence[str],
        output: str = "files",
        images_per_tar: int = 1000,
    ) -> None:
        self.out, self.kinds, self.origin = out, kinds, dict(origin)
        self.files = MaskFolder(out, output, images_per_tar)
        self.store = self.files.store

    def begin(self) -> None:
        """Leave the settings in a new folder, compare them with those of one that goes on.

        Raises:
            InputError: it holds something else.
        """
        self.origin = self.files.claim(self.origin, "wsss-label")

    def has(self, name: str) -> bool:
        """Whether all files of an image are there; each is whole."""
        return all(self.store.has(file) for kind in self.kinds for file in self._names(kind, name))

    def _names(self, kind: str, name: str) -> list[str]:
        return [f"{kind}/{name}{suffix}" for suffix in SUFFIXES[kind]]

    def encode(
        self,
        name: str,
        mask: np.ndarray,
        image: np.ndarray,
        cams: Mapping[int, np.ndarray],
        scores: Sequence[np.ndarray] = (),
        instances: InstanceMap | None = None,
        counts: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, bytes]:
        """The files of an image, of the kinds that were asked for, by their relative paths, the mask last.

        Args:
            name: of the image.
            mask: ids, uint8 (H, W).
            image: uint8 (H, W, 3).
            cams: by id the maps (H, W) of the classes of the image.
            scores: the low and the high (1 + n, H, W).
            instances: a 16-bit PNG of numbers, and a JSON that lists `number`, `class`, `id` and `score` of each.
            counts: those of `wsss.evaluation.pseudo.count_cam`, where there is a true mask.
        """
        files: dict[str, bytes] = {}
        if counts is not None:
            files[f"counts/{name}.npz"] = packed(**{key: counts[key] for key in COUNTS})
        if "instances" in self.kinds and instances is not None:
            picture, table = self._names("instances", name)
            rows = [
                {"number": number, "class": self.origin["classes"][c - 1], "id": c, "score": score}
                for number, (c, score) in enumerate(zip(instances.ids, instances.scores, strict=True), 1)
            ]
            files[table], content = json_bytes({"instances": rows}), io.BytesIO()
            Image.fromarray(instances.numbers).save(content, "png")
            files[picture] = content.getvalue()
        if "scores" in self.kinds:
            low, high = (np.asarray(score, np.float16) for score in scores)
            files[f"scores/{name}.npz"] = packed(low=low, high=high, ids=np.array(list(cams), np.int64))
        shown = image if "overlays" in self.kinds else None
        return self.files.encode(name, mask, shown, cams if "cams" in self.kinds else None, files)

    def counted(self, names: Iterable[str]) -> list[str]:
        """Names of the images that have counts."""
        return [name for name in names if self.store.has(f"counts/{name}.npz")]

    def counts(self, names: Iterable[str]) -> Iterator[dict[str, np.ndarray]]:
        """Those of images, one after the other.

        Raises:
            InputError: a file of them is damaged.
        """
        for path in (f"counts/{name}.npz" for name in names):
            try:
                with np.load(io.BytesIO(self.store.read(path)), allow_pickle=False) as file:
                    one = {key: file[key] for key in COUNTS}
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                where = self.store.where(path)
                raise InputError(f"{where} is damaged: remove it and the mask of this name, and run again") from error
            yield one

    def mask(self, name: str) -> np.ndarray:
        """That of an image, uint8 (H, W)."""
        with Image.open(io.BytesIO(self.store.read(f"masks/{name}.png")), formats=["PNG"]) as picture:
            return np.array(picture)

    def finish(self, ids: Sequence[str], labels: np.ndarray) -> ClassTable:
        """Write the manifest of a complete folder, or compare with the one that is there.

        Args:
            ids: of all images, in the order of the data set.
            labels: (N, C) of zeros and ones.

        Raises:
            InputError: a mask cannot be read, or a file is not the one that the manifest lists.
        """
        path = self.out / "manifest.json"
        listed = read_object(path).get("masks", {}) if path.exists() else {}
        known = [*range(labels.shape[1] + 1), 255]
        found: dict[str, dict[str, Any]] = {}
        counts = np.zeros((len(ids), len(known)), np.int64)
        for index, name in enumerate(progress(ids, len(ids), "listing")):
            content, mask = self.store.read(f"masks/{name}.png"), self.store.where(f"masks/{name}.png")
            try:
                with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
                    pixels, size = np.asarray(picture), list(picture.size)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise InputError(f"{mask} is damaged: remove it and run again") from error
            counts[index] = np.bincount(pixels.ravel(), minlength=256)[known]
            if counts[index].sum() != pixels.size:
                raise InputError(f"{mask} holds ids of no class: remove it and run again")
            found[name] = {"size": size, "sha256": hashlib.sha256(content).hexdigest()}
            files = self._names("instances", name) if "instances" in self.kinds else []
            if files:
                found[name]["instances_sha256"] = [hashlib.sha256(self.store.read(f)).hexdigest() for f in files]
            if listed and listed.get(name) != found[name]:
                shown = " or ".join([mask, *map(self.store.where, files)])
                raise InputError(f"{shown} is not the one that {path} lists: remove both and run again")
        if not listed:
            write_json(path, self.origin | {"masks": found})
        return count_classes(counts, labels)


def count_classes(counts: np.ndarray, labels: np.ndarray) -> ClassTable:
    """counts: (N, 1 + C + 1) pixels of the background, the classes and 255 in every mask; labels: (N, C)."""
    present = np.concatenate([labels.sum(1, keepdims=True) == 0, labels > 0], axis=1)  # (N, 1 + C)
    ids, ignored, total = counts[:, :-1], counts[:, -1], counts.sum()
    around = present.T @ counts.sum(1)  # pixels of the images that have the class
    undecided = (present.T @ ignored) / np.maximum(around, 1)
    return ClassTable(present.sum(0), (ids > 0).sum(0), ids.sum(0) / total, undecided, float(ignored.sum() / total))

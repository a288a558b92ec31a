"""Pixel supervision: what an earlier stage made of image-level labels, and nothing else, may train a network."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss import InputError
from wsss.data.base import Images, PlainImages, as_images, digest
from wsss.data.files import first_names, read_truth, reading
from wsss.pairs import affinity_labels

PIXELS = "pseudo_mask"
"""The key of an item, a view and a training batch."""
SCORES = "affinity_scores"
"""The key of an item and a view: float32 (H, W, 2 (1 + n)), the channels of `low`, then those of `high`."""
CELLS = "affinity_label"
"""The key of a training batch: what the scores say about cells of 8 x 8 pixels."""


class FromFolder(Images):
    """Training images of a data set, each with a file of its id from a folder.

    Items hold no true mask. The presence of every file is checked at once, its content when it is opened.

    Args:
        source: the images to train on.
        folder: of the files.

    Raises:
        InputError: no such folder, or an image without a file.
    """

    has_masks = False
    setting: str  # of wsss-train that names the folder
    suffix: str
    what: str  # the files are, for people

    def __init__(self, source: PlainImages, folder: str) -> None:
        self.source, self.folder = as_images(source), Path(folder).expanduser()
        self.classes, self.has_background = self.source.classes, self.source.has_background
        self.images, self.labels = self.source.images, self.source.labels
        self._ids = list(self.source.ids)
        if missing := [image_id for image_id in self.ids if not self._path(image_id).is_file()]:
            raise InputError(
                f"{len(missing)} of {len(self)} images have no {self.what} in {self.folder} ({first_names(missing)}): "
                "make them for this data set and split"
            )

    @property
    def ids(self) -> list[str]:
        return self._ids

    def __len__(self) -> int:
        return len(self.source)

    def _item(self, index: int) -> dict[str, Any]:
        item = self.source[index]
        return {key: item[key] for key in ("image", "label", "id")}

    def _path(self, image_id: str) -> Path:
        return self.folder / f"{image_id}{self.suffix}"

    @property
    def loaded(self) -> list[str]:
        """From which weights the network behind the files started, as `wsss-label` says; nothing where it does not.

        Raises:
            InputError: what it has written is damaged.
        """
        path = self.folder.parent / "settings.json"
        if not path.is_file():
            return []
        try:
            told = json.loads(path.read_bytes()).get("loaded", [])
            return [str(words) for words in told]
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(f"{path} is damaged: put it back, or remove it") from error

    @property
    def fingerprint(self) -> str:
        status = [self._path(image_id).stat() for image_id in self.ids]
        return digest(self.source.fingerprint, [(one.st_size, one.st_mtime_ns) for one in status])


class PseudoMasks(FromFolder):
    """Training images with pseudo masks, PNGs named <id>.png, as `wsss-label` and `wsss-predict` write
    them to `masks`.

    An item is the data set's own without any true mask, and `pseudo_mask` uint8 (H, W): 0 background, c + 1 for class
    c, 255 undecided. Size and ids of a mask are checked when it is opened.
    """

    setting, suffix, what = "pseudo_masks", ".png", "pseudo mask"

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._item(index)
        return item | {PIXELS: read_truth(self._path(self._ids[index]), item["image"], len(self.classes))}


class PseudoScores(FromFolder):
    """Training images with scores for two strengths of the background, which PSA's affinity network learns from.

    Files are named <id>.npz and hold floats in [0, 1] `low` and `high` (1 + n, H, W), the background first: the
    probabilities that a CRF gives for (1 - max cam) ** alpha with a low and a high alpha; and `ids` (n,), c + 1 of
    their classes. An item is the data set's own without any true mask, `affinity_scores` float32 (H, W, 2 (1 + n)),
    and `ids`. A file is checked when it is opened.
    """

    setting, suffix, what = "pseudo_scores", ".npz", "score file"

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._item(index)
        scores, ids = read_scores(self._path(self._ids[index]), item["image"], len(self.classes))
        return item | {SCORES: scores, "ids": ids}


def read_scores(path: Path, image: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """`affinity_scores` and `ids` of a score file; see `PseudoScores`.

    Raises:
        InputError: it cannot be read, or is not of this image and these classes.
    """
    advice = "make the scores of this data set again"
    with reading(path, "a file of scores", advice), np.load(path, allow_pickle=False) as file:
        if missing := {"low", "high", "ids"} - set(file.files):
            raise InputError(f"{path} lacks the arrays {', '.join(sorted(missing))}: {advice}.")
        low, high, ids = (file[key] for key in ("low", "high", "ids"))
    expected = (1 + ids.size, *image.shape[:2])
    if ids.ndim != 1 or low.shape != expected or high.shape != expected:
        found = f"low {low.shape} and high {high.shape} for ids {ids.shape}, expected {expected} for its image"
        raise InputError(f"{path} holds {found}: {advice}.")
    known = ids.dtype.kind in "iu" and set(ids.tolist()) <= set(range(1, num_classes + 1))
    if not known or len(set(ids.tolist())) < ids.size:
        raise InputError(f"{path} holds ids {ids.tolist()}, expected different ones of 1 to {num_classes}: {advice}.")
    if low.dtype.kind != "f" or high.dtype.kind != "f" or not all(a.min() >= 0 and a.max() <= 1 for a in (low, high)):
        raise InputError(f"{path} holds scores outside 0..1: {advice}.")
    return np.concatenate([low, high]).transpose(1, 2, 0).astype(np.float32, order="C"), ids.astype(np.int64)


def pixel_views(images: Images, item: dict[str, Any]) -> dict[str, np.ndarray]:
    """What of an item is cut and mirrored together with the image."""
    return {key: item[key] for key in (PIXELS, SCORES) if isinstance(images, FromFolder) and key in item}


def pixel_tensors(images: Images, item: dict[str, Any], views: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """What of the views a training batch holds as supervision, 0 background, c + 1 for class c, 255 undecided.

    `pseudo_mask` (H, W) long, or of scores `affinity_label` (ceil(H / 8), ceil(W / 8)) long.
    """
    if isinstance(images, PseudoMasks):
        return {PIXELS: torch.from_numpy(views[PIXELS].astype(np.int64))}
    if isinstance(images, PseudoScores):
        low, high = torch.from_numpy(views[SCORES]).permute(2, 0, 1)[None].chunk(2, dim=1)
        ids = torch.full((256,), 255)
        ids[: 1 + len(item["ids"])] = torch.tensor([0, *item["ids"]])
        return {CELLS: ids[affinity_labels(low, high)[0]]}
    return {}

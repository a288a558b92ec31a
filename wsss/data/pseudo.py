"""Pixel supervision: masks that an earlier stage made of image-level labels, and nothing else, may train a network."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wsss import InputError
from wsss.data.base import Images, PlainImages, as_images, digest
from wsss.data.files import first_names, read_truth

PIXELS = "pseudo_mask"
"""The key of an item, a view and a training batch."""


class PseudoMasks(Images):
    """Training images of a data set, each with its pseudo mask from a folder: the only way of pixels into a batch.

    An item is the data set's own without any true mask, and `pseudo_mask` uint8 (H, W): 0 background, c + 1 for class
    c, 255 undecided. The presence of every mask is checked at once, its size and ids when it is opened.

    Args:
        source: the images to train on.
        folder: PNGs named <id>.png, as `wsss-label` and `wsss-predict` write them to `masks`.

    Raises:
        InputError: no such folder, or an image without a mask.
    """

    has_masks = False

    def __init__(self, source: PlainImages, folder: str) -> None:
        self.source, self.folder = as_images(source), Path(folder).expanduser()
        self.classes, self.has_background = self.source.classes, self.source.has_background
        self.images, self.labels = self.source.images, self.source.labels
        self._ids = list(self.source.ids)
        if missing := [image_id for image_id in self.ids if not self._path(image_id).is_file()]:
            raise InputError(
                f"{len(missing)} of {len(self)} images have no pseudo mask in {self.folder} ({first_names(missing)}): "
                "make them for this data set and split"
            )

    @property
    def ids(self) -> list[str]:
        return self._ids

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.source[index]
        mask = read_truth(self._path(self._ids[index]), item["image"], len(self.classes))
        return {key: item[key] for key in ("image", "label", "id")} | {PIXELS: mask}

    def _path(self, image_id: str) -> Path:
        return self.folder / f"{image_id}.png"

    @property
    def fingerprint(self) -> str:
        status = [self._path(image_id).stat() for image_id in self.ids]
        return digest(self.source.fingerprint, [(one.st_size, one.st_mtime_ns) for one in status])


def pixel_views(images: Images, item: dict[str, Any]) -> dict[str, np.ndarray]:
    """What of an item is cut and mirrored together with the image."""
    return {PIXELS: item[PIXELS]} if isinstance(images, PseudoMasks) else {}


def pixel_tensors(images: Images, views: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """What of the views a training batch holds as supervision: `pseudo_mask` (H, W) long."""
    return {PIXELS: torch.from_numpy(views[PIXELS].astype(np.int64))} if isinstance(images, PseudoMasks) else {}

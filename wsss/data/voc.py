"""PASCAL VOC, and any data set in its layout."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from wsss import InputError
from wsss.data.files import IMAGE_SUFFIXES, load_label_dict, read_image, read_lines, read_list, read_mask

T = TypeVar("T")
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LAYOUT = "JPEGImages, ImageSets/Segmentation/<list>.txt, cls_labels*.npy and, to evaluate, SegmentationClassAug"


class VOC(Dataset[dict[str, Any]]):
    """Photographs with image-level labels; masks only outside of training.

    An item is a dict: `image` uint8 (H, W, 3), `label` float32 (C,), `id` str and, unless split is "train",
    `mask` uint8 (H, W), 0 background, c+1 for class c, 255 ignore. Raises InputError for whatever does not
    fit: list, labels and the presence of every file are checked at once, image and mask when opened.

    Args:
        root: folder with JPEGImages/<id>.jpg and what the other arguments name.
        split: "train" or "val": which of the two lists below is read.
        train: list to train on, a name in ImageSets/Segmentation or a .txt file; None takes train_aug, else train.
        val: list to evaluate on, likewise.
        labels: the .npy of image-level labels, in root or anywhere; None takes root's only cls_labels*.npy.
        masks: folder of masks, in root or anywhere; None takes SegmentationClassAug, else SegmentationClass.
        classes: foreground class names; None reads root's class_names.txt, else takes VOC's.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        train: str | None = None,
        val: str = "val",
        labels: str | None = None,
        masks: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        if split not in ("train", "val"):
            raise InputError(f"split is {split!r}, expected 'train' or 'val': pass one of them.")
        self.root = Path(root).expanduser()
        image_folder = self.root / "JPEGImages"
        images = _files(image_folder, IMAGE_SUFFIXES)
        if train is None:
            train = "train_aug" if (self.root / "ImageSets/Segmentation/train_aug.txt").is_file() else "train"
        self.ids = read_list(self._list_path(train if split == "train" else val))
        self.images = self._pick(images, f"image in {image_folder}")
        self.classes = self._class_names(classes)
        label_path = self._label_path(labels)
        self.labels = np.stack(self._pick(load_label_dict(label_path), f"label in {label_path}"))  # (N, C)
        if self.labels.shape[1] != len(self.classes):
            raise InputError(
                f"{label_path} has vectors of {self.labels.shape[1]} classes, expected {len(self.classes)}"
                f" ({self.classes[0]}, ...): give the class names in class_names.txt or as classes."
            )
        self.masks: list[Path] | None = None
        if split != "train":
            augmented = (self.root / "SegmentationClassAug").is_dir()
            folder = self._find(masks or ("SegmentationClassAug" if augmented else "SegmentationClass"))
            self.masks = self._pick(_files(folder, (".png",)), f"mask in {folder}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = read_image(self.images[index])
        item = {"image": image, "label": self.labels[index].copy(), "id": self.ids[index]}
        if self.masks is not None:
            item["mask"] = self._mask(self.masks[index], image)
        return item

    def _mask(self, path: Path, image: np.ndarray) -> np.ndarray:
        mask, count = read_mask(path), len(self.classes)
        if mask.shape != image.shape[:2]:
            sizes = f"height and width {mask.shape}, its upright image {image.shape[:2]}"
            raise InputError(f"{path} has {sizes}, expected one size: make the mask again.")
        unknown = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[count + 1 : 255]) + count + 1
        if unknown.size:
            found = f"the ids {unknown.tolist()}, expected 0 to {count} or 255 (ignore)"
            raise InputError(f"{path} holds {found}: correct the mask or give all class names.")
        return mask

    def _find(self, given: str) -> Path:
        """A path that the user gave: in root where it exists there, else as it stands."""
        path = Path(given).expanduser()
        return self.root / path if (self.root / path).exists() else path

    def _list_path(self, name: str) -> Path:
        folder = self.root / "ImageSets" / "Segmentation"
        path = self._find(name) if name.endswith(".txt") else folder / f"{name}.txt"
        if not path.is_file():
            present = ", ".join(sorted(file.stem for file in folder.glob("*.txt"))) or "none"
            raise InputError(f"{path} does not exist: name a list of {folder} ({present}) or give a .txt file.")
        return path

    def _label_path(self, given: str | None) -> Path:
        found = [self._find(given)] if given else sorted(self.root.glob("cls_labels*.npy"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise InputError(f"{self.root} must hold one cls_labels*.npy, found {names}: pass labels=<file>.")
        return found[0]

    def _class_names(self, given: Sequence[str] | None) -> tuple[str, ...]:
        path = self.root / "class_names.txt"
        names = tuple(given or (read_lines(path) if path.exists() else VOC_CLASSES))
        if len(set(names)) < max(len(names), 1):
            raise InputError(f"The class names ({', '.join(names)}) must be distinct: correct {path} or classes.")
        return names

    def _pick(self, found: Mapping[str, T], what: str) -> list[T]:
        missing = [image_id for image_id in self.ids if image_id not in found]
        if missing:
            first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            count = f"{len(missing)} of {len(self.ids)} listed ids"
            raise InputError(f"{count} have no {what} ({first}): add them or shorten the list.")
        return [found[image_id] for image_id in self.ids]


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files of a folder by stem, from one listing; of a.png and a.jpg a.jpg is taken."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}: give a root that holds {LAYOUT}.")
    names = sorted(map(Path, os.listdir(folder)), reverse=True)
    return {name.stem: folder / name for name in names if name.suffix.lower() in suffixes}

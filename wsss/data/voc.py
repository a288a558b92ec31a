"""PASCAL VOC, and any data set in its layout."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wsss import InputError
from wsss.data.base import LabelledImages, check_split, pick
from wsss.data.files import IMAGE_SUFFIXES, annotation_labels, files_by_stem, find_given, load_label_dict, read_list
from wsss.data.words import distinct, listed_classes

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LAYOUT = (
    "JPEGImages, ImageSets/Segmentation/<list>.txt, cls_labels*.npy or Annotations and, to evaluate, "
    "SegmentationClassAug"
)


class VOC(LabelledImages):
    """Photographs with image-level labels; masks only outside of training.

    A list named test of which no image has a mask is evaluated without masks. Raises InputError for whatever does not
    fit: list, labels and the presence of every file are checked at once, image and mask when opened.

    Args:
        root: folder with JPEGImages/<id>.jpg and what the other arguments name.
        split: "train" or "val": which of the two lists below is read.
        train: list to train on, a name in ImageSets/Segmentation or a .txt file; None takes train_aug, else train.
        val: list to evaluate on, likewise.
        labels: the .npy of image-level labels, or a folder of VOC's XML files, in root or anywhere; None takes
            root's only cls_labels*.npy, else root's Annotations.
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
        check_split(split)
        self.root = Path(root).expanduser()
        folder = self.root / "JPEGImages"
        found = files_by_stem(folder, IMAGE_SUFFIXES, LAYOUT)
        if train is None:
            train = "train_aug" if (self.root / "ImageSets/Segmentation/train_aug.txt").is_file() else "train"
        list_path = self._list_path(train if split == "train" else val)
        ids = read_list(list_path)
        hidden = split == "val" and list_path.stem == "test"  # VOC keeps labels and masks of this list to itself
        images = pick(ids, found, f"image in {folder}")
        names = tuple(distinct(classes) if classes else listed_classes(self.root) or VOC_CLASSES)
        augmented = (self.root / "SegmentationClassAug").is_dir()
        self.mask_folder = find_given(
            self.root, masks or ("SegmentationClassAug" if augmented else "SegmentationClass")
        )
        truth = None if split == "train" else self._masks(masks, ids, hidden)
        super().__init__(names, ids, images, self._labels(labels, ids, names, list_path if hidden else None), truth)

    def _labels(self, given: str | None, ids: Sequence[str], classes: Sequence[str], hidden: Path | None) -> np.ndarray:
        """(N, C) float32; `hidden` is a list of images whose labels perhaps nobody has."""
        path = self._label_path(given)
        known = annotation_labels(path, ids, classes) if path.is_dir() else load_label_dict(path)
        if hidden and known.keys().isdisjoint(ids):
            raise InputError(
                f"{path} labels none of the {len(ids)} images of {hidden}, and VOC's test has no public labels: "
                "predict its masks with wsss-predict, or pass labels=<file>."
            )
        labels = np.stack(pick(ids, known, f"label in {path}"))
        if labels.shape[1] != len(classes):
            raise InputError(
                f"{path} has vectors of {labels.shape[1]} classes, expected {len(classes)} ({classes[0]}, ...): give "
                "the class names in class_names.txt or as classes."
            )
        return labels

    def true_masks(self) -> dict[str, Path]:
        return files_by_stem(self.mask_folder, (".png",), LAYOUT) if self.mask_folder.is_dir() else {}

    def _masks(self, given: str | None, ids: Sequence[str], hidden: bool) -> list[Path] | None:
        folder = self.mask_folder
        found = {} if hidden and not given and not folder.is_dir() else files_by_stem(folder, (".png",), LAYOUT)
        return None if hidden and found.keys().isdisjoint(ids) else pick(ids, found, f"mask in {folder}")

    def _list_path(self, name: str) -> Path:
        folder = self.root / "ImageSets" / "Segmentation"
        path = find_given(self.root, name) if name.endswith(".txt") else folder / f"{name}.txt"
        if not path.is_file():
            present = ", ".join(sorted(file.stem for file in folder.glob("*.txt"))) or "none"
            raise InputError(f"{path} does not exist: name a list of {folder} ({present}) or give a .txt file.")
        return path

    def _label_path(self, given: str | None) -> Path:
        found = [find_given(self.root, given)] if given else sorted(self.root.glob("cls_labels*.npy"))
        if not found and (self.root / "Annotations").is_dir():
            found = [self.root / "Annotations"]
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            expected = "one cls_labels*.npy, or Annotations"
            raise InputError(f"{self.root} must hold {expected}, found {names}: pass labels=<file or folder>.")
        return found[0]

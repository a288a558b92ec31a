"""PASCAL VOC, and any data set in its layout."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from xml.etree.ElementTree import TreeBuilder
from xml.parsers import expat

import numpy as np
from torch.utils.data import Dataset

from wsss import InputError
from wsss.data.files import (
    IMAGE_SUFFIXES,
    PathLike,
    files_by_stem,
    find_given,
    load_label_dict,
    read_image,
    read_lines,
    read_list,
    read_truth,
    reading,
)

T = TypeVar("T")
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LAYOUT = (
    "JPEGImages, ImageSets/Segmentation/<list>.txt, cls_labels*.npy or Annotations and, to evaluate, "
    "SegmentationClassAug"
)


class VOC(Dataset[dict[str, Any]]):
    """Photographs with image-level labels; masks only outside of training.

    An item is a dict: `image` uint8 (H, W, 3), `label` float32 (C,), `id` str and, unless split is "train",
    `mask` uint8 (H, W), 0 background, c+1 for class c, 255 ignore. A list named test of which no image has a
    mask is evaluated without masks. Raises InputError for whatever does not fit: list, labels and the presence
    of every file are checked at once, image and mask when opened.

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
        if split not in ("train", "val"):
            raise InputError(f"split is {split!r}, expected 'train' or 'val': pass one of them.")
        self.root = Path(root).expanduser()
        image_folder = self.root / "JPEGImages"
        images = files_by_stem(image_folder, IMAGE_SUFFIXES, LAYOUT)
        if train is None:
            train = "train_aug" if (self.root / "ImageSets/Segmentation/train_aug.txt").is_file() else "train"
        list_path = self._list_path(train if split == "train" else val)
        self.ids = read_list(list_path)
        hidden = split == "val" and list_path.stem == "test"  # VOC keeps labels and masks of this list to itself
        self.images = self._pick(images, f"image in {image_folder}")
        self.classes = self._class_names(classes)
        label_path = self._label_path(labels)
        if label_path.is_dir():
            known = annotation_labels(label_path, self.ids, self.classes)
        else:
            known = load_label_dict(label_path)
        if hidden and known.keys().isdisjoint(self.ids):
            raise InputError(
                f"{label_path} labels none of the {len(self.ids)} images of {list_path}, and VOC's test has no public "
                "labels: predict its masks with wsss-predict, or pass labels=<file>."
            )
        self.labels = np.stack(self._pick(known, f"label in {label_path}"))  # (N, C)
        if self.labels.shape[1] != len(self.classes):
            raise InputError(
                f"{label_path} has vectors of {self.labels.shape[1]} classes, expected {len(self.classes)}"
                f" ({self.classes[0]}, ...): give the class names in class_names.txt or as classes."
            )
        self.masks: list[Path] | None = None
        if split != "train":
            augmented = (self.root / "SegmentationClassAug").is_dir()
            folder = find_given(self.root, masks or ("SegmentationClassAug" if augmented else "SegmentationClass"))
            found = {} if hidden and not masks and not folder.is_dir() else files_by_stem(folder, (".png",), LAYOUT)
            if not (hidden and found.keys().isdisjoint(self.ids)):
                self.masks = self._pick(found, f"mask in {folder}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = read_image(self.images[index])
        item = {"image": image, "label": self.labels[index].copy(), "id": self.ids[index]}
        if self.masks is not None:
            item["mask"] = read_truth(self.masks[index], image, len(self.classes))
        return item

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


def read_annotation(path: PathLike) -> tuple[str, ...]:
    """Reads the names of the objects of one VOC XML file, each once, difficult ones too; not those of their parts.

    Raises:
        InputError: no such file, no XML, another root than <annotation>, an object without a name, a DTD.
    """
    with reading(path, "an XML file of VOC", "correct it, or take it out of the list"), open(path, "rb") as file:
        tree = TreeBuilder()
        parser = expat.ParserCreate()
        parser.StartElementHandler, parser.EndElementHandler = tree.start, tree.end
        parser.CharacterDataHandler = tree.data
        parser.StartDoctypeDeclHandler = _refuse_dtd
        parser.ParseFile(file)
        root = tree.close()
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>, expected <annotation>")
        names = [(found.findtext("name") or "").strip() for found in root.findall("object")]
        if not all(names):
            raise ValueError("it has an object without a name")
    return tuple(dict.fromkeys(names))


def _refuse_dtd(*declaration: object) -> None:
    raise ValueError("it declares a document type, which an annotation does not need")  # no DTD, no entities


def annotation_labels(
    folder: Path, ids: Sequence[str], classes: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> dict[str, np.ndarray]:
    """Image-level labels, id -> float32 (C,) of zeros and ones, of those images that have an XML file in a folder.

    Raises:
        InputError: a file cannot be read or names an object that is none of the classes.
    """
    columns = {name: column for column, name in enumerate(classes)}
    files = files_by_stem(folder, (".xml",), LAYOUT)
    labels: dict[str, np.ndarray] = {}
    present = [image_id for image_id in ids if image_id in files]
    for done, image_id in enumerate(present, start=1):
        names = read_annotation(files[image_id])
        if unknown := [name for name in names if name not in columns]:
            known = f"none of the classes ({', '.join(classes)})"
            raise InputError(f"{files[image_id]} names {unknown[0]!r}, {known}: correct it or give all class names.")
        labels[image_id] = np.zeros(len(columns), np.float32)
        labels[image_id][[columns[name] for name in names]] = 1
        if progress:
            progress(done, len(present))
    return labels

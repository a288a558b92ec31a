"""Folders of photographs: any for prediction, and one's own with image-level labels as a data set."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import numpy as np

from wsss import InputError
from wsss.data.base import Images, Inspection, LabelledImages, check_split, digest
from wsss.data.doubts import contents, left_out
from wsss.data.drawn import DrawnMask, is_export, read_drawn
from wsss.data.exports import foreign_tool
from wsss.data.files import first_names, read_lines
from wsss.data.finding import SUFFIXES, find_files, find_images, match
from wsss.data.labels import Labels, folder_labels, read_labels
from wsss.data.words import clean_path, listed_classes
from wsss.places import Place, Url, place_of, relative, state


@dataclass(frozen=True)
class Survey:
    """Images and labels of a folder side by side, before anything of them is refused. No image is opened.

    Attributes:
        root: the folder.
        source: file or folder of the labels; root where the class folders are the labels.
        classes: foreground class names.
        images: id -> path of every image, in the order of the ids.
        present: id -> indices of the classes, of every image with an entry; none of them: a negative.
        split: id -> "train", "val" or "test", where the labels say so.
        missing: names of entries that find no image.
        notes: what is left out, or taken in another way than it is written.
    """

    root: Place
    source: Place
    classes: tuple[str, ...]
    images: Mapping[str, Place]
    present: Mapping[str, tuple[int, ...]]
    split: Mapping[str, str]
    missing: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """The ids of images without an entry."""
        return tuple(image_id for image_id in self.images if image_id not in self.present)

    @property
    def negatives(self) -> tuple[str, ...]:
        """The ids of images whose entry names no class."""
        return tuple(image_id for image_id, present in self.present.items() if not present)

    def multi_hot(self, ids: Sequence[str]) -> np.ndarray:
        """(N, C) float32 labels; an image without an entry has none."""
        labels = np.zeros((len(ids), len(self.classes)), np.float32)
        for row, image_id in enumerate(ids):
            labels[row, list(self.present.get(image_id, ()))] = 1
        return labels


def survey(
    root: str, labels: str | None = None, masks: str | None = None, classes: Sequence[str] | None = None
) -> Survey:
    """Finds images and labels; arguments as those of `Folder`.

    Raises:
        InputError: no image, no labels or labels that cannot be read; not that the two leave out one another.
    """
    place = place_of(root)
    classes = listed_classes(place) if classes is None else classes
    if isinstance(place, Url) and place.is_web:  # which lists nothing: the labels name the images
        said = read_labels(place / "labels.csv" if labels is None else _find(place, labels), classes)
        images, unread = _named(place, said), list[PurePath]()
        ids = _ids(place, [path.as_posix() for path in images])  # path -> id
    else:
        images, unread = find_files(place, "dataset.root", None if masks is None else _masks_folder(place, masks))
        ids = _ids(place, [path.as_posix() for path in images])
        said = _labels(place, labels, ids, classes)
    found = match(said.entries, ids)
    present = {ids[found[name]]: indices for name, indices in said.entries.items() if name in found}
    order = sorted((image_id, path) for image_id, path in zip(ids.values(), images.values(), strict=True))
    return Survey(
        root=place,
        source=said.path,
        classes=said.classes,
        images=dict(order),
        present={image_id: present[image_id] for image_id, _ in order if image_id in present},
        split={ids[found[name]]: split for name, split in said.split.items() if name in found},
        missing=tuple(name for name in said.entries if name not in found),
        notes=(*said.notes, *left_out(place, images, unread, folders=said.path == place)),
    )


def _find(root: Place, given: str) -> Place:
    """Like `find_given`; a place of either kind."""
    path = place_of(given)
    if isinstance(path, Url) or path.is_absolute():
        return path
    return root / path if (root / path).exists() else path


def _named(root: Url, said: Labels) -> dict[PurePath, Place]:
    """Relative path -> address of the images that labels name."""
    if bare := [name for name in said.entries if PurePosixPath(name).suffix.lower() not in SUFFIXES]:
        raise InputError(
            f"{said.path} names images without the suffix of one ({first_names(bare)}), and {root} cannot be listed to "
            "find them: write whole names, as they follow that address."
        )
    return {PurePosixPath(name): root / name for name in said.entries}


def _ids(root: Place, paths: Sequence[str]) -> dict[str, str]:
    """Relative path -> id: without suffix, unless another image would have the same id."""
    clean = {path: clean_path(path) for path in paths}
    if outside := [path for path, name in clean.items() if ".." in name.split("/")]:
        raise InputError(f"{root}: {first_names(outside)} is no name below a folder: correct it in the labels.")
    names = Counter(clean.values())
    if twins := [name for name, times in names.items() if times > 1]:
        raise InputError(
            f"{root} has {len(twins)} names twice in different Unicode forms ({first_names(twins)}): rename one."
        )
    bare = {path: name.rpartition(".")[0] for path, name in clean.items()}
    times = Counter(bare.values())
    return {path: name if times[bare[path]] > 1 or bare[path] in names else bare[path] for path, name in clean.items()}


def _labels(root: Place, given: str | None, paths: Iterable[str], classes: Sequence[str] | None) -> Labels:
    """The labels that the user named, else the only ones in root, else its class folders."""
    if given is not None:
        source = _find(root, given)
        folders = source == root
        if isinstance(source, Path) and isinstance(root, Path):
            folders = source.is_dir() and source.samefile(root) and not any(root.glob("*.xml"))
        return folder_labels(root, paths, classes) if folders else read_labels(source, classes)
    if isinstance(root, Url):
        source = root / "labels.csv"
        return read_labels(source, classes) if source.exists() else folder_labels(root, paths, classes)
    patterns = ("labels.csv", "[!.]*.json", "cls_labels*.npy", "Annotations")
    found = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    if len(found) > 1:
        tool = foreign_tool(root) or ""
        raise InputError(
            f"{root} holds several labels ({first_names([path.name for path in found])}){tool}: pass labels=<one>."
        )
    return read_labels(found[0], classes) if found else folder_labels(root, paths, classes)


def _masks_folder(root: Place, given: str) -> Place:
    folder = _find(root, given)
    if isinstance(folder, Url):
        return folder
    if folder.is_file() and is_export(folder):
        return folder
    if not folder.is_dir() or (isinstance(root, Path) and folder.samefile(root)):
        raise InputError(
            f"masks={given} is neither a folder of masks alone nor an export of Label Studio or CVAT: give one in "
            f"{root} or anywhere else."
        )
    return folder


class Folder(LabelledImages):
    """One's own photographs with image-level labels; masks, if there are any, only outside of training.

    An id is the path in root without suffix. Raises InputError for whatever does not fit: labels, lists and the
    presence of every file are checked at once, image and mask when opened.

    Every image needs an entry of the labels and every entry an image, unless lists alone choose the images; see
    `match` for how they find one another. An image is a negative only if its entry says so.

    Args:
        root: folder with images in any nesting.
        split: "train" or "val"; the latter is empty where nothing says what to evaluate on.
        labels: labels.csv, COCO or Label Studio JSON, a folder of VOC XML or a .npy, in root or anywhere; None takes
            the only one in root, else the first folder below root is the class, as it is for labels=".".
        train: .txt of the images to train on, one path or id a line; None takes all that val does not take.
        val: .txt of the images to evaluate on, a fraction of those not in train, "all" for every image, or None for
            no evaluation. With neither list a column `split` of labels.csv decides.
        seed: of the fraction.
        masks: folder of .png with the path or the file name of the image, or corrected masks as `read_drawn` takes
            them from Label Studio or CVAT, in root or anywhere; None for none.
        classes: foreground class names in the order wanted, that of the ids in the masks; None takes the lines of
            root's class_names.txt, else those of the labels.
        has_background: False where the classes cover the whole image: then 0 in a mask is ignored.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        labels: str | None = None,
        train: str | None = None,
        val: str | float | None = None,
        seed: int = 0,
        masks: str | None = None,
        classes: Sequence[str] | None = None,
        has_background: bool = True,
    ) -> None:
        check_split(split)
        found = survey(root, labels, masks, classes)
        chosen, everything = choose(found, train, val, seed)
        used = [*chosen["train"], *chosen["val"]]
        _refuse_gaps(
            found,
            found.unlabelled if everything else [image_id for image_id in used if image_id not in found.present],
            found.missing if everything else (),
        )
        ids = chosen[split]
        if split == "train" and not ids:
            raise InputError(f"{found.root} has no image left to train on: name a list as train or another val.")
        truth = None if split == "train" or masks is None else _find_masks(_masks_folder(found.root, masks), found, ids)
        super().__init__(found.classes, ids, [found.images[i] for i in ids], found.multi_hot(ids), truth)
        self.root, self.has_background = found.root, has_background
        self.survey, self.mask_folder = found, None if masks is None else _masks_folder(found.root, masks)

    def true_masks(self) -> Mapping[str, Place | DrawnMask]:
        return {} if self.mask_folder is None else _masks_found(self.mask_folder, self.survey)

    def truth(self, index: int, image: np.ndarray) -> np.ndarray | None:
        mask = super().truth(index, image)
        return mask if mask is None or self.has_background else np.where(mask == 0, np.uint8(255), mask)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if "mask" in item and not self.has_background:
            item["mask"][item["mask"] == 0] = 255
        return item

    @property
    def fingerprint(self) -> str:
        masks = [mask.source if isinstance(mask, DrawnMask) else mask for mask in self.masks or ()]
        return digest(super().fingerprint, [state(place) for place in (*self.images, *masks)])

    @classmethod
    def with_known_classes(cls, values: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
        if values.get("classes") is not None:
            return values
        found = survey(values["root"], values.get("labels"), values.get("masks"))
        if not set(found.classes) < set(known) or listed_classes(found.root) is not None:
            return values
        print(f"{found.source} shows {len(found.classes)} of the checkpoint's classes, taken as dataset.classes")
        return {**values, "classes": list(known)}

    @classmethod
    def inspection(cls, **values: Any) -> Inspection:
        """All images where labels and files do not fit, since the data set would refuse them."""
        found = survey(values["root"], *(values.get(key) for key in ("labels", "masks", "classes")))
        note = (
            f"{found.root}: {len(found.images)} images, {len(found.classes)} classes, labels from {found.source}; "
            f"{len(found.negatives)} images without any class"
        )
        train, val = values.get("train"), values.get("val")
        chosen, everything = choose(found, train, val, values.get("seed", 0))
        used = {*chosen["train"], *chosen["val"]}
        problems = [f"the image {i} has no entry in the labels" for i in found.unlabelled if everything or i in used]
        if everything:
            problems += [f"the labels name {name}, which is no image" for name in found.missing]
        sets: Mapping[str, Callable[[], Images]] = super().inspection(**values).sets
        if problems:
            ids = list(found.images)
            paths = list(found.images.values())
            sets = {"all": lambda: LabelledImages(found.classes, ids, paths, found.multi_hot(ids))}
        elif val == "all" and train is None:  # as in an evaluation
            sets = {"val": sets["val"]}
        notes = [note, *found.notes, *contents({relative(path, found.root): path for path in found.images.values()})]
        if values.get("masks") and all(name.isdecimal() for name in found.classes):
            order = first_names([f"{c} in a mask is class {name}" for c, name in enumerate(found.classes, 1)])
            notes.append(f"the classes are numbers, and masks count them in their order: {order}")
        return Inspection(sets, notes, problems)


def _masks_found(folder: Place, found: Survey) -> dict[str, Place | DrawnMask]:
    """Those that there are, by id."""
    if isinstance(folder, Path) and is_export(folder):
        drawn = read_drawn(folder, found.classes)
        files = {relative(path, found.root).as_posix(): image_id for image_id, path in found.images.items()}
        return {files[file]: drawn[name] for name, file in match(drawn, files).items()}
    pngs = {p: path for p, path in find_images(folder, "dataset.masks").items() if p.suffix.lower() == ".png"}
    known = {p.with_suffix("").as_posix(): path for p, path in pngs.items()}
    return {image_id: known[name] for name, image_id in match(known, found.images, levels=2).items()}


def _find_masks(folder: Place, found: Survey, ids: Sequence[str]) -> list[Place | DrawnMask]:
    masks = _masks_found(folder, found)
    if missing := [image_id for image_id in ids if image_id not in masks]:
        raise InputError(
            f"{len(missing)} of {len(ids)} images to evaluate on have no mask in {folder} ({first_names(missing)}): "
            "add masks of the same path or of a file name that one image alone has, or list fewer images as val."
        )
    return [masks[image_id] for image_id in ids]


def choose(found: Survey, train: str | None, val: str | float | None, seed: int) -> tuple[dict[str, list[str]], bool]:
    """The ids to train and to evaluate on, and whether they are chosen from all images rather than listed.

    A fraction depends on the ids and the seed alone, not on the order in which the file system lists them.
    """
    ids = list(found.images)
    if train is None and val is None and found.split:
        return {name: [i for i in ids if found.split.get(i) == name] for name in ("train", "val")}, True
    listed = None if train is None else _listed(found, train, "train")
    taken = set(listed or ())
    rest = [i for i in ids if i not in taken]
    share = _fraction(val)
    if isinstance(val, str) and val.endswith(".txt"):
        chosen = _listed(found, val, "val")
    elif share is None:
        chosen = ids if val == "all" else []
    else:
        most = len(rest) - (listed is None)  # one stays to train on
        if most < 1:
            raise InputError(f"val={val} of {len(rest)} images is none: add images, or name lists as train and val.")
        # hashes decide: the same in every version of numpy, and little changes when images are added
        drawn = sorted(rest, key=lambda i: hashlib.sha256(f"{seed} {i}".encode("utf-8", "surrogatepass")).digest())
        chosen = sorted(drawn[: min(max(round(share * len(rest)), 1), most)])
    if listed is not None:
        return {"train": listed, "val": chosen}, share is not None or val == "all"
    taken = set(chosen)
    return {"train": [i for i in ids if i not in taken], "val": chosen}, True


def _fraction(val: str | float | None) -> float | None:
    """The fraction that `val` is, in whatever form it arrives; None where it is not one."""
    if val is None or val == "all" or (isinstance(val, str) and val.endswith(".txt")):
        return None
    try:
        share = float(val)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise InputError(f"val is {val!r}, expected a .txt list, a fraction between 0 and 1, all or null: give one.")
    return share


def _listed(found: Survey, given: str, key: str) -> list[str]:
    """The ids of the images that a list names, in its order."""
    path = _find(found.root, given)
    if path.suffix != ".txt":
        raise InputError(f"{key} is {given!r}, expected a .txt list of images: give one, a line for each image.")
    names = read_lines(path)
    repeated, times = Counter(names).most_common(1)[0] if names else ("no image", 0)
    if times != 1:
        raise InputError(f"{path} lists {first_names([repeated])} {times} times, expected each once: correct the list.")
    by_path = {relative(path, found.root).as_posix(): image_id for image_id, path in found.images.items()}
    images = {name: by_path[image] for name, image in match(names, by_path).items()}
    if missing := [name for name in names if name not in images]:
        raise InputError(
            f"{path} lists {len(missing)} of {len(names)} names that find no image in {found.root} "
            f"({first_names(missing)}): correct them, or take them out of the list."
        )
    return [images[name] for name in names]


def _refuse_gaps(found: Survey, unlabelled: Collection[str], missing: Collection[str]) -> None:
    """Refuse images without an entry and entries without an image."""
    gaps = []
    if unlabelled:
        gaps.append(f"{len(unlabelled)} of {len(found.images)} images have no entry ({first_names(unlabelled)})")
    if missing:
        gaps.append(f"{len(missing)} entries find no image ({first_names(missing)})")
    if gaps:
        raise InputError(
            f"{found.source} and the images in {found.root} do not fit, {' and '.join(gaps)}: correct the labels (an "
            "entry without a class is a negative; names match by path, or by a file name that one image alone has), "
            "list the images as train and val, or name the folder of masks as masks."
        )

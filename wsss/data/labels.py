"""Readers of image-level labels.

The format is found from the content. What cannot be used raises InputError with one sentence, never anything else.
"""

import codecs
import csv
import io
import json
import re
import reprlib
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from wsss import InputError
from wsss.data.files import PathLike, first_names, load_label_dict, read_annotation, read_lines, reading

FORMATS = "a labels.csv in UTF-8, COCO or Label Studio JSON, a folder of VOC XML or cls_labels.npy"
NOT_CLASSES = {"annotations", "images", "labels", "masks", "test", "train", "val", "valid"}

CLASS_NAMES = "class_names.txt"

Entries = Mapping[str, Collection[str]]


@dataclass(frozen=True)
class Labels:
    """What a source of labels says.

    Attributes:
        path: the file or folder.
        classes: foreground class names; an index counts from 0.
        entries: name of an image, see `clean_path` -> indices of the classes present, ascending; an empty tuple
            says that the image is a negative.
        split: name of an image -> "train" or "val", where a labels.csv has that column.
    """

    path: Path
    classes: tuple[str, ...]
    entries: Mapping[str, tuple[int, ...]]
    split: Mapping[str, str]


def read_labels(path: PathLike, classes: Sequence[str] | None = None) -> Labels:
    """Reads image-level labels: labels.csv, COCO or Label Studio JSON, a folder of VOC XML, cls_labels*.npy.

    Classes come in the order of the 0/1 columns, of COCO's categories or of the class_names.txt beside a .npy,
    else sorted.

    Args:
        path: file, or folder of *.xml or with a folder Annotations.
        classes: their order, which must hold every class that an image shows; a .npy without class_names.txt
            needs it.
    """
    path = Path(path)
    if path.is_dir():
        return _finish(path, _read_xml(path), classes)
    with reading(path, "image-level labels", f"give {FORMATS}"):
        data = path.read_bytes()
    if data.startswith(b"\x93NUMPY"):
        return _read_npy(path, classes)
    head = data.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1]
    if head == b"<":
        raise InputError(f"{path} is a single XML file, expected {FORMATS}: give the folder of all VOC XML files.")
    return (_read_json if head in (b"{", b"[") else _read_csv)(path, data, classes)


def folder_labels(root: Path, images: Iterable[str], classes: Sequence[str] | None = None) -> Labels:
    """The labels of images (paths relative to root) that lie in one folder per class."""
    entries: dict[str, list[str]] = {}
    loose = []
    for image in images:
        folder, inside, _ = image.partition("/")
        if inside:
            entries[image] = [_class_name(folder, f"{root / folder}")]
        else:
            loose.append(image)
    if not entries:
        raise InputError(f"{root} has neither a label file nor a folder for each class: add {FORMATS}.")
    if loose:
        raise InputError(
            f"{root} has {len(loose)} images beside its class folders ({first_names(loose)}): move them into the "
            f"folder of their class, or give labels: {FORMATS}."
        )
    if general := sorted({name for names in entries.values() for name in names if name.lower() in NOT_CLASSES}):
        raise InputError(
            f"{root} has no label file and its folder {general[0]} does not look like a class: name every folder "
            f"after its class, or give labels: {FORMATS}."
        )
    return _finish(root, entries, classes)


def clean_path(name: str) -> str:
    """A path as it is compared: NFC, slashes, not absolute."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/").lstrip("/")
    return name.removeprefix("./")


def _class_name(value: str, where: str) -> str:
    name = " ".join(unicodedata.normalize("NFC", value).split())
    if not name:
        raise InputError(f"{where} has an empty class name: write the name, or nothing at all for a negative.")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise InputError(f"{where} has the class name {reprlib.repr(name)}, expected text: correct the name.")
    return name


def _enter(entries: dict[str, Any], name: str, labels: Collection[str], where: str) -> str:
    """Adds the entry of an image; returns the name it got."""
    path = clean_path(name)
    if not path.strip() or path.endswith("/"):
        raise InputError(f"{where} names no file ({reprlib.repr(name)}), expected that of an image: add it.")
    if path in entries:
        raise InputError(f"{where} names {first_names([path])} again, expected each image once: remove the repeats.")
    entries[path] = labels
    return path


def _finish(
    path: Path,
    entries: Entries,
    given: Sequence[str] | None,
    order: Sequence[str] | None = None,
    split: Mapping[str, str] | None = None,
) -> Labels:
    """Labels with indices; `order` is that of the source, `given` the user's."""
    used = {name for names in entries.values() for name in names}
    known = list(order) if order is not None else sorted(used)
    if not entries or not known:
        raise InputError(f"{path} labels no image, expected at least one that shows a class: add labels.")
    classes = distinct(given) if given is not None else known
    if unknown := sorted(used.difference(classes)):
        raise InputError(
            f"{path} names {len(unknown)} classes ({first_names(unknown)}) that are not among the {len(classes)} "
            f"given as classes ({first_names(classes)}): add them or correct the labels."
        )
    index = {name: c for c, name in enumerate(classes)}
    found = {image: tuple(sorted({index[name] for name in names})) for image, names in entries.items()}
    return Labels(path, tuple(classes), found, split or {})


def distinct(names: Sequence[str], where: str = "classes") -> list[str]:
    """Class names, each once and at least one."""
    clean = [_class_name(name, where) for name in names]
    if len(set(clean)) < max(len(clean), 1):
        raise InputError(
            f"{where} holds {len(clean)} names ({first_names(clean)}), expected distinct ones: correct them."
        )
    return clean


def listed_classes(folder: Path) -> list[str] | None:
    """The class names that a folder's class_names.txt lists, one a line; None where there is no such file."""
    path = folder / CLASS_NAMES
    return distinct(read_lines(path), str(path)) if path.exists() else None


def _read_npy(path: Path, given: Sequence[str] | None) -> Labels:
    """The field's file, with the names of its columns in class_names.txt beside it or given."""
    names = listed_classes(path.parent) or (None if given is None else distinct(given))
    if names is None:
        listed = path.parent / CLASS_NAMES
        raise InputError(f"{path} does not name its classes: add {listed} with one name a line, or give classes.")
    entries: dict[str, list[str]] = {}
    for image, vector in load_label_dict(path).items():
        if len(vector) != len(names):
            raise InputError(
                f"{path} has vectors of {len(vector)} classes, expected {len(names)} ({first_names(names)}): correct "
                "class_names.txt or classes."
            )
        _enter(entries, image, [names[c] for c in vector.nonzero()[0]], str(path))
    return _finish(path, entries, given, names)


def _read_json(path: Path, data: bytes, given: Sequence[str] | None) -> Labels:
    """COCO's object or Label Studio's list."""
    with reading(path, "JSON", "export it again"):
        content = json.loads(data.decode("utf-8-sig"))
    if isinstance(content, list):
        return _finish(path, _label_studio(path, content), given)
    order, entries = _coco(path, content)
    return _finish(path, entries, given, order)


def _read_csv(path: Path, data: bytes, given: Sequence[str] | None) -> Labels:
    """A table with the columns file and labels, or file and one of 0/1 per class; split may stand in both."""
    with reading(path, "image-level labels", f"give {FORMATS}"):
        text = data.decode("utf-8-sig")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    rows: list[tuple[str, list[str]]] = []  # with where they stand
    try:
        for row in reader:
            if row:
                rows.append((f"{path} line {reader.line_num}", row))
    except csv.Error as error:
        where = f"{path} line {reader.line_num}"
        raise InputError(f"{where} cannot be read as CSV ({error}): correct its quotes and commas.") from error
    if not rows:
        raise InputError(f"{path} is empty, expected a header such as file,labels: write a row for each image.")
    columns = _header(*rows.pop(0))
    listed = "labels" in columns
    names = [] if listed else [column for column in columns if column not in ("file", "split")]
    entries: dict[str, list[str]] = {}
    split: dict[str, str] = {}
    for where, row in rows:
        if len(row) != len(columns):
            raise InputError(
                f"{where} has {len(row)} fields, expected {len(columns)} ({first_names(columns)}): separate columns by "
                "commas and several labels by semicolons."
            )
        cells = {column: cell if column == "file" else cell.strip() for column, cell in zip(columns, row, strict=True)}
        for name in names:
            if cells[name] not in ("0", "1"):
                raise InputError(f"{where} has {reprlib.repr(cells[name])} for {name}, expected 0 or 1: correct it.")
        if not listed:
            present = [name for name in names if cells[name] == "1"]
        else:
            present = [_class_name(label, where) for label in cells["labels"].split(";")] if cells["labels"] else []
        image = _enter(entries, cells["file"], present, where)
        if "split" in cells:
            if cells["split"] not in ("train", "val"):
                found = reprlib.repr(cells["split"])
                raise InputError(f"{where} has the split {found}, expected train or val: correct it.")
            split[image] = cells["split"]
    return _finish(path, entries, given, None if listed else names, split)


def _header(where: str, row: list[str]) -> list[str]:
    """The names of the columns of a labels.csv."""
    expected = "expected file,labels or file and one column for each class, and perhaps split"
    if delimiter := next((d for d in ";\t" if d in row[0]), None):
        raise InputError(f"{where} has {delimiter!r} between its columns, {expected}: separate them by commas.")
    columns = [_class_name(cell, where) for cell in row]
    if "file" not in columns or len(set(columns) - {"split"}) < 2:
        raise InputError(f"{where} has the columns {first_names(columns)}, {expected}: add what is missing.")
    if len(set(columns)) < len(columns):
        raise InputError(f"{where} has a column twice ({', '.join(columns)}), {expected}: rename or remove it.")
    unknown = [column for column in columns if column not in ("file", "labels", "split")]
    if "labels" in columns and unknown:
        raise InputError(f"{where} has labels and further columns ({first_names(unknown)}), {expected}: remove them.")
    return columns


def _get(node: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A value of a JSON object, of the kind it must have."""
    value = node.get(key) if isinstance(node, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{where} has {reprlib.repr(value)} as {key}, expected {kinds}: export the file again.")
    return value


def _coco(path: Path, content: Any) -> tuple[list[str], Entries]:
    """Class names and entries; an image without annotations is a negative."""
    names: dict[int | str, str] = {}
    images: dict[int | str, set[str]] = {}
    entries: dict[str, set[str]] = {}
    for n, category in enumerate(_get(content, "categories", list, str(path))):
        where = f"{path} categories[{n}]"
        key, name = _get(category, "id", (int, str), where), _get(category, "name", str, where)
        if key in names:
            raise InputError(
                f"{where} has the id {first_names([str(key)])} again, expected each once: export the file again."
            )
        names[key] = _class_name(name, where)
    for n, image in enumerate(_get(content, "images", list, str(path))):
        where = f"{path} images[{n}]"
        key = _get(image, "id", (int, str), where)
        if key in images:
            raise InputError(
                f"{where} has the id {first_names([str(key)])} again, expected each once: export the file again."
            )
        images[key] = set()
        _enter(entries, _get(image, "file_name", str, where), images[key], where)
    for n, annotation in enumerate(_get(content, "annotations", list, str(path))):
        where = f"{path} annotations[{n}]"
        image, category = (_get(annotation, key, (int, str), where) for key in ("image_id", "category_id"))
        if image not in images or category not in names:
            raise InputError(
                f"{where} has the image {first_names([str(image)])} and the category "
                f"{first_names([str(category)])}, expected ids listed in images and categories: export the file again."
            )
        images[image].add(names[category])
    return distinct(list(names.values()), f"{path} categories"), entries


def _label_studio(path: Path, tasks: list[Any]) -> Entries:
    """Entries of an export; a task that nobody has finished has none, one finished without a label is a negative."""
    entries: dict[str, set[str]] = {}
    for n, task in enumerate(tasks):
        where = f"{path} task {n + 1}"
        name = _file_of(_get(_get(task, "data", dict, where), "image", str, where))
        annotations = _get(task, "annotations", list, where)
        done = [one for one in annotations if not (isinstance(one, dict) and one.get("was_cancelled"))]
        present: set[str] = set()
        for result in (result for one in done for result in _get(one, "result", list, where)):
            kind = _get(result, "type", str, where)
            if kind == "choices" or kind.endswith("labels"):  # rectanglelabels, brushlabels, ...
                for label in _get(_get(result, "value", dict, where), kind, list, where):
                    if not isinstance(label, str):
                        found = reprlib.repr(label)
                        raise InputError(f"{where} has the label {found}, expected a name: export the file again.")
                    present.add(_class_name(label, where))
        if done:
            _enter(entries, name, present, where)
    return entries


def _file_of(url: str) -> str:
    """The path in what Label Studio gives as image: a path, a URL, /data/upload/... or /data/local-files/?d=..."""
    if url.startswith("/data/local-files/"):
        return unquote(url.partition("?d=")[2])
    if url.startswith("/data/") or "://" in url:
        return unquote(re.sub(r"[?#].*", "", url, flags=re.DOTALL))
    return url


def _read_xml(folder: Path) -> Entries:
    """Entries of VOC's XML files, named after them: that is how VOC's own tools find the image."""
    inner = folder / "Annotations"
    place = inner if inner.is_dir() else folder
    paths = {path.relative_to(place): path for path in sorted(place.rglob("*")) if path.suffix.lower() == ".xml"}
    entries: dict[str, list[str]] = {}
    for relative, path in paths.items():
        if not any(part.startswith(".") for part in relative.parts):
            present = [_class_name(name, str(path)) for name in read_annotation(path)]
            _enter(entries, relative.with_suffix("").as_posix(), present, str(path))
    if not entries:
        raise InputError(f"{folder} holds no XML file, expected {FORMATS}: give one of them.")
    return entries

"""Readers of image-level labels.

The format is found from the content. What cannot be used raises InputError with one sentence, never anything else.
"""

import codecs
import csv
import io
import os
import re
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsss import InputError
from wsss.data.exports import FORMATS, foreign_tool, read_export
from wsss.data.files import first_names, load_label_dict, read_annotation, reading
from wsss.data.words import (
    CLASS_NAMES,
    class_name,
    distinct,
    enter,
    in_order,
    listed_classes,
    refuse_background,
    refuse_twins,
    refuse_unclear,
)
from wsss.places import Place, Url, opened

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
NOT_CLASSES = {"annotations", "images", "labels", "masks", *SPLITS}

Entries = Mapping[str, Collection[str]]


@dataclass(frozen=True)
class Labels:
    """What a source of labels says.

    Attributes:
        path: the file or folder.
        classes: foreground class names; an index counts from 0.
        entries: name of an image, see `clean_path` -> indices of the classes present, ascending; an empty tuple
            says that the image is a negative.
        split: name of an image -> "train", "val" or, left out of both, "test", where a column or folders say so.
        notes: what was left out or taken in another way than it is written.
    """

    path: Place
    classes: tuple[str, ...]
    entries: Mapping[str, tuple[int, ...]]
    split: Mapping[str, str]
    notes: tuple[str, ...] = ()


def read_labels(path: str | os.PathLike[str] | Url, classes: Sequence[str] | None = None) -> Labels:
    """Reads image-level labels: labels.csv, COCO or Label Studio JSON, a folder of VOC XML, cls_labels*.npy.

    Classes come in the order of the 0/1 columns, of COCO's categories or of the class_names.txt beside a .npy,
    else sorted, numbers by their value.

    Args:
        path: file, or folder of *.xml or with a folder Annotations.
        classes: their order, which must hold every class that an image shows; a .npy without class_names.txt
            needs it.
    """
    path = path if isinstance(path, Url) else Path(path)
    if isinstance(path, Path) and path.is_dir():
        return _finish(path, _read_xml(path), classes)
    with reading(path, "image-level labels", f"give {FORMATS}"):
        data = opened(path).read()
    if data.startswith(b"\x93NUMPY"):
        return _read_npy(path, classes)
    head = data.lstrip(codecs.BOM_UTF8 + b" \t\r\n")[:1]
    if head == b"<":
        raise InputError(f"{path} is a single XML file, expected {FORMATS}: give the folder of all VOC XML files.")
    if head not in (b"{", b"["):
        return _read_csv(path, data, classes)
    export = read_export(path, data, classes)
    return _finish(path, export.entries, classes, export.order, notes=export.notes)


def folder_labels(root: Place, images: Iterable[str], classes: Sequence[str] | None = None) -> Labels:
    """The labels of images (paths relative to root) that lie in one folder per class.

    Where all first folders are called after a split (Training, Testing), those below are the classes.
    """
    parts = {image: image.split("/") for image in images}
    firsts = in_order({folders[0] for folders in parts.values() if len(folders) > 1})
    splits = {name: SPLITS[name.casefold()] for name in firsts if name.casefold() in SPLITS}
    depth = int(len(splits) == len(firsts) and any(len(folders) > 2 for folders in parts.values()))
    if not firsts:
        raise InputError(f"{root} has neither a label file nor a folder for each class: add {FORMATS}.")
    if loose := [image for image, folders in parts.items() if len(folders) < depth + 2]:
        raise InputError(
            f"{root} has {len(loose)} images beside its class folders ({first_names(loose)}): move them into the "
            f"folder of their class, or give labels: {FORMATS}."
        )
    if general := [name for name in firsts if not depth and name.casefold() in NOT_CLASSES]:
        tool = (foreign_tool(root / "labels") if isinstance(root, Path) else None) or ""
        raise InputError(
            f"{root} has no label file{tool} and its folder {general[0]} does not look like a class: name every folder "
            f"after its class, or give labels: {FORMATS}."
        )
    entries = {image: [class_name(folders[depth], f"{root}")] for image, folders in parts.items()}
    refuse_unclear(str(root), {name for names in entries.values() for name in names}, classes or ())
    if not depth:
        return _finish(root, entries, classes)
    if "val" not in splits.values():  # the usual two: what is called test is evaluated on
        splits = {name: split.replace("test", "val") for name, split in splits.items()}
    read = ", ".join(f"{name} as {split.replace('test', 'a test set, left out')}" for name, split in splits.items())
    note = f"{root}: the folders below are classes, {read} unless dataset.train or dataset.val say otherwise"
    return _finish(root, entries, classes, None, {i: splits[folders[0]] for i, folders in parts.items()}, [note])


def _finish(
    path: Place,
    entries: Entries,
    given: Sequence[str] | None,
    order: Sequence[str] | None = None,
    split: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Labels:
    """Labels with indices; `order` is that of the source, `given` the user's."""
    used = {name for names in entries.values() for name in names}
    known = list(order) if order is not None else in_order(used)
    if not entries or not known:
        raise InputError(f"{path} labels no image, expected at least one that shows a class: add labels.")
    refuse_background(str(path), known)
    if given is None:
        refuse_twins(str(path), known)
    classes = distinct(given) if given is not None else known
    if unknown := sorted(used.difference(classes)):
        raise InputError(
            f"{path} names {len(unknown)} classes ({first_names(unknown)}) that are not among the {len(classes)} "
            f"given as classes ({first_names(classes)}): add them or correct the labels."
        )
    index = {name: c for c, name in enumerate(classes)}
    found = {image: tuple(sorted({index[name] for name in names})) for image, names in entries.items()}
    return Labels(path, tuple(classes), found, split or {}, tuple(notes))


def _read_npy(path: Place, given: Sequence[str] | None) -> Labels:
    """The field's file, with the names of its columns in class_names.txt beside it or given."""
    names = listed_classes(path.parent) or (None if given is None else distinct(given))
    if names is None:
        listed = path.parent / CLASS_NAMES
        raise InputError(f"{path} does not name its classes: add {listed} with one name a line, or give classes.")
    entries: dict[str, set[str]] = {}
    for image, vector in load_label_dict(path).items():
        if len(vector) != len(names):
            raise InputError(
                f"{path} has vectors of {len(vector)} classes, expected {len(names)} ({first_names(names)}): correct "
                "class_names.txt or classes."
            )
        enter(entries, image, [names[c] for c in vector.nonzero()[0]], str(path))
    return _finish(path, entries, given, names)


def _read_csv(path: Place, data: bytes, given: Sequence[str] | None) -> Labels:
    """A table with the columns file and labels, or file and one of 0/1 per class; split may stand in both.

    Rows of one image are joined. A first column without a name is left out if it counts the rows, as pandas writes it,
    and so are empty fields at the ends of rows.
    """
    rows = list(_rows(path, data))
    if rows and re.fullmatch(r"sep=.?", rows[0][1][0], re.IGNORECASE):  # Excel's own first line
        del rows[0]
    if not rows:
        raise InputError(f"{path} is empty, expected a header such as file,labels: write a row for each image.")
    columns, rows, notes = _header(*rows[0], rows[1:])
    listed = "labels" in columns
    names = [] if listed else [column for column in columns if column not in ("file", "split")]
    entries: dict[str, set[str]] = {}
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
            present = [class_name(label, where) for label in cells["labels"].split(";")] if cells["labels"] else []
        image = enter(entries, cells["file"], present, where)
        if "split" in cells:
            if cells["split"] not in ("train", "val") or split.get(image, cells["split"]) != cells["split"]:
                found = reprlib.repr(cells["split"]) + (", and another one further up" if image in split else "")
                raise InputError(f"{where} has the split {found}, expected train or val: correct it.")
            split[image] = cells["split"]
    if listed:
        refuse_unclear(str(path), {name for present in entries.values() for name in present}, given or ())
    if joined := len(rows) - len(entries):
        notes.append(f"{path}: {joined} rows name an image that another one names too, the labels of both are its own")
    return _finish(path, entries, given, None if listed else names, split, notes)


def _rows(path: Place, data: bytes) -> Iterator[tuple[str, list[str]]]:
    """Where a row stands, and its fields; blank lines are passed over."""
    with reading(path, "image-level labels", f"give {FORMATS}"):
        text = data.decode("utf-8-sig")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        for row in reader:
            if row:
                yield f"{path} line {reader.line_num}", row
    except csv.Error as error:
        where = f"{path} line {reader.line_num}"
        raise InputError(f"{where} cannot be read as CSV ({error}): correct its quotes and commas.") from error


def _header(
    where: str, row: list[str], rows: list[tuple[str, list[str]]]
) -> tuple[list[str], list[tuple[str, list[str]]], list[str]]:
    """The names of the columns of a labels.csv, its rows without what has no name, and a note on that."""
    expected = "expected file,labels or file and one column for each class, and perhaps split"
    if delimiter := next((d for d in ";\t" if d in row[0]), None):
        raise InputError(f"{where} has {delimiter!r} between its columns, {expected}: separate them by commas.")
    width, notes = len(_without_end(row, 0)), []
    rows = [(place, _without_end(cells, width)) for place, cells in rows]
    if width > 1 and re.fullmatch(r"|Unnamed: \d+", row[0].strip()):
        counted = [cells[0].strip() for _, cells in rows]
        if not all(cell.isdecimal() for cell in counted) or len(set(counted)) < len(counted):
            raise InputError(
                f"{where} has no name for its first column, whose cells are no pandas index: name or remove it."
            )
        notes.append(f"{where}: the first column has no name and counts the rows (a pandas index), it is left out")
        row, width, rows = row[1:], width - 1, [(place, cells[1:]) for place, cells in rows]
    if unnamed := [n + 1 for n, cell in enumerate(row[:width]) if not cell.strip()]:
        raise InputError(f"{where} has no name for column {unnamed[0]}, {expected}: name or remove it.")
    columns = [class_name(cell, where) for cell in row[:width]]
    if "file" not in columns or len(set(columns) - {"split"}) < 2:
        raise InputError(f"{where} has the columns {first_names(columns)}, {expected}: add what is missing.")
    if len(set(columns)) < len(columns):
        raise InputError(f"{where} has a column twice ({', '.join(columns)}), {expected}: rename or remove it.")
    unknown = [column for column in columns if column not in ("file", "labels", "split")]
    if "labels" in columns and unknown:
        raise InputError(f"{where} has labels and further columns ({first_names(unknown)}), {expected}: remove them.")
    return columns, rows, notes


def _without_end(row: list[str], width: int) -> list[str]:
    """A row without empty fields at its end beyond a width."""
    while len(row) > width and not row[-1].strip():
        row = row[:-1]
    return row


def _read_xml(folder: Path) -> Entries:
    """Entries of VOC's XML files, named after them: that is how VOC's own tools find the image."""
    inner = folder / "Annotations"
    place = inner if inner.is_dir() else folder
    paths = {path.relative_to(place): path for path in sorted(place.rglob("*")) if path.suffix.lower() == ".xml"}
    entries: dict[str, set[str]] = {}
    for relative, path in paths.items():
        if not any(part.startswith(".") for part in relative.parts):
            present = [class_name(name, str(path)) for name in read_annotation(path)]
            enter(entries, relative.with_suffix("").as_posix(), present, str(path))
    if not entries:
        raise InputError(
            f"{folder} holds no XML file{foreign_tool(folder) or ''}, expected {FORMATS}: give one of them."
        )
    return entries

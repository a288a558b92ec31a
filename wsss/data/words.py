"""Names of classes and of images as labels write them: brought to one form, or refused for what they would mean."""

import re
import reprlib
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

from wsss import InputError
from wsss.data.files import first_names, read_lines
from wsss.places import Place

CLASS_NAMES = "class_names.txt"
NO_OBJECTS = {"background", "bg", "ignore", "nan", "none", "null", "unlabeled", "unlabelled", "void"}
ANSWERS = (("0", "1"), ("false", "true"), ("n", "y"), ("no", "yes"))


def clean_path(name: str) -> str:
    """A path as it is compared: NFC, slashes, not absolute."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/").lstrip("/")
    return name.removeprefix("./")


def class_name(value: str, where: str) -> str:
    name = " ".join(unicodedata.normalize("NFC", value).split())
    if not name:
        raise InputError(f"{where} has an empty class name: write the name, or nothing at all for a negative.")
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise InputError(f"{where} has the class name {reprlib.repr(name)}, expected text: correct the name.")
    return name


def enter(entries: dict[str, set[str]], name: str, labels: Iterable[str], where: str) -> str:
    """Adds labels to the entry of an image; returns the name it got."""
    path = clean_path(name)
    if not path.strip() or path.endswith("/"):
        raise InputError(f"{where} names no file ({reprlib.repr(name)}), expected that of an image: add it.")
    entries.setdefault(path, set()).update(labels)
    return path


def distinct(names: Sequence[str], where: str = "classes") -> list[str]:
    """Class names, each once and at least one, none of which is the background."""
    clean = [class_name(name, where) for name in names]
    if len(set(clean)) < max(len(clean), 1):
        raise InputError(
            f"{where} holds {len(clean)} names ({first_names(clean)}), expected distinct ones: correct them."
        )
    refuse_background(where, clean)
    return clean


def listed_classes(folder: Place) -> list[str] | None:
    """The class names that a folder's class_names.txt lists, one a line; None where there is no such file."""
    path = folder / CLASS_NAMES
    return distinct(read_lines(path), str(path)) if path.exists() else None


def is_background(name: str) -> bool:
    """Whether a name says that nothing is there, as `_background_` does."""
    return name.casefold().strip("_ ") in NO_OBJECTS


def refuse_background(where: str, names: Iterable[str]) -> None:
    if found := [name for name in names if is_background(name)]:
        raise InputError(
            f"{where} has the class {first_names(found[:1])}, expected classes of objects: take it out, as 0 in a mask "
            "is the background already and 255 ignored; an image that shows no class is a row of labels.csv without "
            "labels."
        )


def refuse_twins(where: str, names: Iterable[str]) -> None:
    """Refuse names that differ in case, spaces, hyphens or underscores alone."""
    by_letters: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        by_letters[re.sub(r"[\s_-]+", "", name.casefold())].append(name)
    if twins := next((found for found in by_letters.values() if len(found) > 1), None):
        raise InputError(
            f"{where} has the classes {first_names(twins)}, which differ in case or spaces alone: write one of them, "
            "or list both in dataset.classes to keep them apart."
        )


def refuse_unclear(where: str, names: Collection[str], given: Collection[str] = ()) -> None:
    """Refuse cells and folders that are no class's name: several labels in one, or the answer to a question.

    What the user has `given` as a class is one.
    """
    known = {*names, *given}
    for name in sorted(set(names).difference(given)):
        parts = [part for part in re.split(r"[\s_/\\+&:.-]+", name) if part]
        if re.search(r"[|,;\[{]", name) or (len(parts) > 1 and known.issuperset(parts)):
            raise InputError(
                f"{where} has the label {name!r}, which reads as several: separate labels by semicolons in labels.csv, "
                "or list it in dataset.classes if it is the name of one class."
            )
    folded = {name.casefold() for name in known}
    if not given and any(folded <= {no, yes} and no in folded for no, yes in ANSWERS):
        raise InputError(
            f"{where} has only {' and '.join(sorted(names))} as labels, expected names of classes: for a yes/no "
            "problem write a labels.csv with a column that is called after the class and holds 0 or 1 (file,lesion)."
        )


def in_order(names: Collection[str]) -> list[str]:
    """Sorted; numbers by their value: 2 before 10."""
    numbers = all(re.fullmatch(r"[0-9]{1,9}", name) for name in names)
    return sorted(names, key=lambda name: (int(name) if numbers else 0, name))

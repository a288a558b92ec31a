"""Instances JSON of COCO's format, read as a stream."""

import reprlib
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TypeVar

import ijson

from wsss import InputError
from wsss.data.files import reading

T = TypeVar("T")
SECTIONS = ("images", "annotations", "categories")
MAX_DEPTH = 16  # of a JSON; COCO's has 5
MAX_PIXELS = 2**26  # of an image: a mask takes as many bytes
ADVICE = "give a whole instances_*.json of COCO's format"


class Photo(NamedTuple):
    name: str  # without suffix
    height: int
    width: int


def read_elements(path: Path, section: str) -> Iterator[Any]:
    """The elements of a list of the JSON, one at a time."""
    with reading(path, f"the {section} of COCO", ADVICE), open(path, "rb") as file:
        yield from ijson.items(file, f"{section}.item", use_float=True)


def _check_structure(path: Path) -> None:
    """Refuses what is not whole JSON with one list of each section.

    `read_elements` relies on it: it would give nothing for a section that is no list, and ijson's memory grows with the
    square of the depth.
    """
    seen: set[str] = set()
    depth, key, field, last = 0, "", "", "the start"
    with reading(path, "COCO instances", ADVICE), open(path, "rb") as file:
        try:
            for event, value in ijson.basic_parse(file, use_float=True):
                if event == "number":
                    if depth == 3 and field == "id":
                        last = f"id {value} of its {key}"
                elif event == "map_key":
                    if depth == 1:
                        key = value
                    field = value
                elif event in ("start_map", "start_array"):
                    if depth == 1 and event == "start_array" and key in SECTIONS:
                        if key in seen:
                            raise InputError(f"{path} has the key {key} twice, expected one list: {ADVICE}.")
                        seen.add(key)
                    depth += 1
                    if depth > MAX_DEPTH:
                        raise InputError(f"{path} is nested more than {MAX_DEPTH} deep after {last}: {ADVICE}.")
                elif event in ("end_map", "end_array"):
                    depth -= 1
        except ijson.JSONError as error:
            found = textwrap.shorten(str(error.args[0] if error.args else error), 120)
            raise InputError(f"{path} is not whole JSON after {last} ({found}): download it again.") from error
    missing = ", ".join(key for key in SECTIONS if key not in seen)
    if missing:
        raise InputError(f"{path} has no list of {missing}, expected {', '.join(SECTIONS)}: {ADVICE}.")


def _required(path: Path, what: str, element: Any, key: str, kind: type[T]) -> T:
    """The value of a key that an element must have, of this type."""
    value = element.get(key) if isinstance(element, dict) else None
    if type(value) is not kind or (isinstance(value, int) and abs(value) >= 2**63):  # more than SQLite takes
        found = f"{path} has the {key} {reprlib.repr(value)} in {what}, expected {kind.__name__}"
        raise InputError(f"{found}: correct or remove it.")
    return value


def read_head(path: Path) -> tuple[dict[int, Photo], dict[int, int], tuple[str, ...]]:
    """Photographs by id, the mask value 1, 2, ... by category id, and the class names in that order.

    Reads and checks the whole file but for its annotations, which `read_elements` gives afterwards.
    """
    _check_structure(path)
    categories: dict[int, str] = {}
    for number, element in enumerate(read_elements(path, "categories")):
        category = _required(path, f"category number {number}", element, "id", int)
        if category in categories:
            raise InputError(f"{path} has category {category} twice, expected distinct ids: {ADVICE}.")
        categories[category] = _required(path, f"category {category}", element, "name", str)
    if not 1 <= len(categories) <= 254:
        raise InputError(f"{path} has {len(categories)} categories, expected 1 to 254: {ADVICE}.")
    photos: dict[int, Photo] = {}
    names: dict[str, int] = {}
    for number, element in enumerate(read_elements(path, "images")):
        image = _required(path, f"image number {number}", element, "id", int)
        what = f"image {image}"
        file = _required(path, what, element, "file_name", str)
        height, width = (_required(path, what, element, key, int) for key in ("height", "width"))
        if min(height, width) < 1 or height * width > MAX_PIXELS:
            found = f"{path} has height {height} and width {width} in {what}"
            raise InputError(f"{found}, expected 1 or more and {MAX_PIXELS} pixels at most: correct or remove it.")
        if not file or not file.isprintable() or PureWindowsPath(file).name != file:
            found = f"the file_name {reprlib.repr(file)} in {what}, expected a name without folders"
            raise InputError(f"{path} has {found}: correct or remove it.")
        name = PureWindowsPath(file).stem
        if image in photos or name in names:
            found = f"{what} twice" if image in photos else f"images {names[name]} and {image} both named {name}"
            raise InputError(f"{path} has {found}, expected distinct ids and names: remove one.")
        photos[image] = Photo(name, height, width)
        names[name] = image
    if not photos:
        raise InputError(f"{path} has no image, expected at least one: {ADVICE}.")
    order = sorted(categories)
    return photos, {c: value for value, c in enumerate(order, 1)}, tuple(categories[c] for c in order)


def annotation_keys(
    path: Path, number: int, annotation: Any, photos: Mapping[int, Photo], values: Mapping[int, int]
) -> tuple[int, int, int]:
    """Id, image id and mask value of the annotation at a place in the file."""
    key = _required(path, f"annotation number {number}", annotation, "id", int)
    what = f"annotation {key}"
    image = _required(path, what, annotation, "image_id", int)
    category = _required(path, what, annotation, "category_id", int)
    for name, found, known in (("image_id", image, photos), ("category_id", category, values)):
        if found not in known:
            raise InputError(f"{path} has an unknown {name} {found} in {what}: correct or remove it.")
    return key, image, values[category]

"""JSON that annotation tools export: COCO's and Label Studio's are read, others are told by name."""

import base64
import json
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from wsss import InputError
from wsss.data.files import IMAGE_SUFFIXES, OTHER_SUFFIXES, first_names, reading
from wsss.data.words import class_name, distinct, enter, is_background
from wsss.places import Place

FORMATS = "a labels.csv in UTF-8, COCO or Label Studio JSON, a folder of VOC XML or cls_labels.npy"
TOOLS: tuple[tuple[set[str], str, str], ...] = (
    ({"shapes", "imagePath"}, "labelme", "convert its files to COCO or VOC XML"),
    ({"_via_img_metadata"}, "VIA (VGG Image Annotator)", "export its annotations as COCO"),
    ({"filename", "regions"}, "VIA (VGG Image Annotator)", "export its annotations as COCO"),
    ({"items", "categories"}, "Datumaro", "export as COCO"),
    ({"objects", "size"}, "Supervisely", "export as COCO"),
    ({"task", "result"}, "a single annotation of Label Studio", "export the project as JSON"),
    ({"annotation_id"}, "Label Studio's JSON-MIN", "export as JSON, not as JSON-MIN"),
    ({"annotator"}, "Label Studio's JSON-MIN", "export as JSON, not as JSON-MIN"),
    ({"image", "annotations"}, "CreateML", "export as COCO"),
    ({"image_id", "category_id"}, "results on COCO", "give the instances file, which names images and classes"),
    ({"data_row"}, "Labelbox", "convert it to COCO"),
)


class Export(NamedTuple):
    """What a file says: the labels of images, the order of the classes where it has one, and what it is told of it."""

    entries: Mapping[str, set[str]]
    order: list[str] | None
    notes: list[str]


def read_export(path: Place, data: bytes, given: Sequence[str] | None) -> Export:
    """COCO's object, Label Studio's list of tasks, or one task alone; `given` are the user's classes, if any."""
    with reading(path, "JSON", "export it again"):
        content = json.loads(data.decode("utf-8-sig"))
    if isinstance(content, dict) and {"data", "annotations"} <= content.keys():
        content = [content]
    if known := _tool(content):
        raise InputError(f"{path} is JSON of {known[0]}, expected that of COCO or Label Studio: {known[1]}.")
    if isinstance(content, list):
        return _label_studio(path, content, given)
    if "categories" not in content:
        raise InputError(
            f"{path} is neither COCO (images, annotations and categories) nor Label Studio (a list of tasks), it has "
            f"{first_names(list(content)) or 'nothing'}: give {FORMATS}."
        )
    return _coco(path, content)


def _tool(content: Any) -> tuple[str, str] | None:
    """The tool that wrote something else than is read, and what to do."""
    samples = [content[0] if isinstance(content, list) and content else content]
    if isinstance(content, dict) and len(content) and "categories" not in content:
        samples.append(next(iter(content.values())))  # VIA keeps images by name
    for sample in samples:
        keys = sample.keys() if isinstance(sample, dict) else set()
        if {"images", "annotations", "categories"} <= keys or "data" in keys:
            continue
        for wanted, tool, advice in TOOLS:
            if wanted <= keys:
                return tool, advice
    return None


def foreign_tool(folder: Path) -> str | None:
    """A clause on annotations in a folder that a known tool has written and that are not read; None without any."""
    texts = sorted(folder.glob("*.txt")) or sorted(folder.glob("*/*.txt"))
    with reading(folder, "annotations", "let yourself read it"):
        number = r"-?\d+(\.\d+)?([eE]-?\d+)?"
        for path in texts[:3]:
            line = path.read_bytes()[:500].partition(b"\n")[0].decode("latin-1").strip()
            if re.fullmatch(rf"\d+( {number}){{4,}}", line):
                return f" ({path} is of YOLO, without names of classes: export as COCO or VOC XML)"
        for path in sorted(folder.glob("*.json"))[:1]:
            if known := _tool(json.loads(path.read_bytes())):
                return f" ({path} is of {known[0]}: {known[1]})"
    return None


def get(node: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A value of a JSON object, of the kind it must have."""
    value = node.get(key) if isinstance(node, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{where} has {reprlib.repr(value)} as {key}, expected {kinds}: export the file again.")
    return value


def _coco(path: Place, content: Any) -> Export:
    """An image without annotations is a negative; see `_empty_categories` for what is no class."""
    names: dict[int | str, str] = {}
    images: dict[int | str, set[str]] = {}
    entries: dict[str, set[str]] = {}
    categories = get(content, "categories", list, str(path))
    for n, category in enumerate(categories):
        where = f"{path} categories[{n}]"
        key, name = get(category, "id", (int, str), where), get(category, "name", str, where)
        if key in names:
            raise InputError(
                f"{where} has the id {first_names([str(key)])} again, expected each once: export the file again."
            )
        names[key] = class_name(name, where)
    for n, image in enumerate(get(content, "images", list, str(path))):
        where = f"{path} images[{n}]"
        key = get(image, "id", (int, str), where)
        if key in images:
            raise InputError(
                f"{where} has the id {first_names([str(key)])} again, expected each once: export the file again."
            )
        images[key] = entries[enter(entries, get(image, "file_name", str, where), (), where)]
    used = set()
    for n, annotation in enumerate(get(content, "annotations", list, str(path))):
        where = f"{path} annotations[{n}]"
        image, category = (get(annotation, key, (int, str), where) for key in ("image_id", "category_id"))
        if image not in images or category not in names:
            raise InputError(
                f"{where} has the image {first_names([str(image)])} and the category "
                f"{first_names([str(category)])}, expected ids listed in images and categories: export the file again."
            )
        images[image].add(names[category])
        used.add(category)
    empty = [key for key in _empty_categories(categories) if key not in used]
    order = distinct([name for key, name in names.items() if key not in empty], f"{path} categories")
    left_out = first_names([names[key] for key in empty])
    note = f"{path}: the category {left_out} is a heading that no annotation uses, it is left out"
    return Export(entries, order, [note] if empty else [])


def _empty_categories(categories: Sequence[Any]) -> Iterator[Any]:
    """The ids of those that are no class if nothing uses them: the background, and the root above all others.

    Roboflow's exports begin with the name of the project, the supercategory of the classes.
    """
    above = {
        category.get("supercategory") for category in categories if category["name"] != category.get("supercategory")
    }
    for category in categories:
        root = category["name"] in above and category.get("supercategory") in (None, "", "none")
        if root or is_background(category["name"]):
            yield category["id"]


def _label_studio(path: Place, tasks: list[Any], given: Sequence[str] | None) -> Export:
    """A task that nobody has finished has no entry, one finished without a label is a negative."""
    entries: dict[str, set[str]] = {}
    said: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # control -> label -> names of images
    unread: Counter[str] = Counter()
    for n, task in enumerate(tasks):
        where = f"{path} task {n + 1}"
        name = image_of(get(task, "data", dict, where), where)
        annotations = get(task, "annotations", list, where)
        done = [one for one in annotations if not (isinstance(one, dict) and one.get("was_cancelled"))]
        results = [result for one in done for result in get(one, "result", list, where)]
        image = enter(entries, name, (), where) if done else ""
        for result in results:
            labels = _labels_of(result, where)
            for label in labels or ():
                said[str(result.get("from_name", ""))[:80]][label].add(image)
            if labels is None and result["type"] != "relation":
                unread[result["type"]] += 1
    left_out = _other_controls(path, said, given)
    for control, labels_of in said.items():
        for label, images in labels_of.items():
            for image in images if control not in left_out else ():
                entries[image].add(label)
    notes = [f"{path}: {unread.total()} results of type {first_names(list(unread))} are not read"] if unread else []
    if left_out:
        notes.append(f"{path}: the labels of {first_names(left_out)} are not among dataset.classes and are left out")
    return Export(entries, None, notes)


def _labels_of(result: Any, where: str) -> list[str] | None:
    """The class names of one result, of a taxonomy those of the last level; None where it has none by its type."""
    kind = get(result, "type", str, where)
    if kind not in ("choices", "taxonomy") and not kind.endswith("labels"):  # rectanglelabels, brushlabels, ...
        return None
    found = get(get(result, "value", dict, where), kind, list, where)
    if kind == "taxonomy":
        found = [path[-1] if isinstance(path, list) and path else path for path in found]
    for label in found:
        if not isinstance(label, str):
            raise InputError(f"{where} has the label {reprlib.repr(label)}, expected a name: export the file again.")
    return [class_name(label, where) for label in found]


def _other_controls(path: Place, said: Mapping[str, Mapping[str, set[str]]], given: Sequence[str] | None) -> list[str]:
    """The controls of a labelling interface whose values are not the classes.

    Raises:
        InputError: there are controls without a value in common, and the user has not said what the classes are.
    """
    if given is not None:
        return [control for control, labels in said.items() if len(said) > 1 and labels.keys().isdisjoint(given)]
    for control, labels in said.items():
        others = {label for other, found in said.items() if other != control for label in found}
        if others and others.isdisjoint(labels):
            listed = "; ".join(f"{name} ({first_names(sorted(found))})" for name, found in list(said.items())[:3])
            raise InputError(
                f"{path} has labels of {len(said)} controls, {listed}, expected one whose values are the classes: give "
                "these as dataset.classes, those of the others are left out then."
            )
    return []


def image_of(data: dict[str, Any], where: str) -> str:
    """The file of a task: what its key image holds, or the only key that holds the name of an image."""
    if "image" in data:
        return _file_of(get(data, "image", str, where))
    files = {key: _file_of(value) for key, value in data.items() if isinstance(value, str)}
    suffixes = (*IMAGE_SUFFIXES, *OTHER_SUFFIXES)
    found = [key for key, file in files.items() if file.lower().endswith(suffixes)]
    if len(found) != 1:
        raise InputError(
            f"{where} has no image under data ({first_names(list(data)) or 'nothing'}) but {len(found)} keys with the "
            "name of one, expected the key image or one alone: export with one image a task."
        )
    return files[found[0]]


ADDRESS = re.compile(r"[^?#]*://|/data/|(/[^?#]*)?/(data/(upload|local-files)|tasks/\d+/(presign|resolve))/")


def _file_of(url: str) -> str:
    """The path in what Label Studio gives as image: a path or a URL, .../data/upload/..., ...?d=... or ?fileuri=..."""
    if not ADDRESS.match(url):
        return url
    path, _, query = url.partition("#")[0].partition("?")
    values = dict(part.partition("=")[::2] for part in query.split("&"))
    if "fileuri" in values:
        with suppress(ValueError):
            return _file_of(base64.urlsafe_b64decode(unquote(values["fileuri"]) + "==").decode())
    return unquote(values.get("d", "") if path.endswith("/local-files/") else path)

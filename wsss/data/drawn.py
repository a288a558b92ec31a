"""Masks that somebody has drawn or corrected: what Label Studio and CVAT export is read as it is."""

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from pycocotools import mask as coco_mask

from wsss import InputError
from wsss.data.exports import get, image_of
from wsss.data.files import first_names, open_image, reading, refuse_dtd_in
from wsss.data.words import class_name, clean_path, is_background

ADVICE = "export it again"
LABELMAP, COLOURED = "labelmap.txt", "SegmentationClass"
"""Of CVAT's segmentation masks 1.1: the colours of the classes, and the folder of PNGs."""


class Region(NamedTuple):
    """Pixels of a class: its id, `brush`, `polygon` or `runs`, and what these are in the export."""

    value: int
    kind: str
    shape: Any


class DrawnMask(NamedTuple):
    """The mask of an image in an export.

    Attributes:
        source: the file or folder.
        name: of the image there.
        size: height and width that the export tells; None where it tells none.
        regions: later ones lie above earlier ones; what none covers is background.
        colours: of a PNG in colours, id by colour; None of regions.
    """

    source: Path
    name: str
    size: tuple[int, int] | None
    regions: Sequence[Region] = ()
    colours: Mapping[tuple[int, ...], int] | None = None

    def draw(self, size: Sequence[int]) -> np.ndarray:
        """Ids, uint8 (H, W), of an image of this size.

        Raises:
            InputError: the export tells another size, or is damaged.
        """
        where = f"{self.source} ({first_names([self.name])})"
        painted: np.ndarray | None = None
        if self.colours is not None:
            with reading(where, "a mask in colours", ADVICE):
                painted = self._uncoloured(self.colours)
        told = self.size if painted is None else painted.shape
        if told is not None and told != tuple(size):
            raise InputError(
                f"{where} has height and width {told}, its upright image {tuple(size)}, expected one size: "
                "correct the very image that is in the data set."
            )
        if painted is not None:
            return painted
        with reading(where, "a drawn mask", ADVICE):
            mask = np.zeros(size, np.uint8)
            for region in self.regions:
                mask[DRAW[region.kind](region.shape, *size)] = region.value
            return mask

    def _uncoloured(self, colours: Mapping[tuple[int, ...], int]) -> np.ndarray:
        with open_image(io.BytesIO(_files(self.source)(self.name))) as picture:
            pixels = np.asarray(picture.convert("RGB"), np.int64) @ (1 << 16, 1 << 8, 1)
        found, places = np.unique(pixels, return_inverse=True)
        shown = [(int(value) >> 16, int(value) >> 8 & 255, int(value) & 255) for value in found]
        if unknown := [colour for colour in shown if colour not in colours]:
            raise InputError(
                f"{self.source} has the colour {unknown[0]} in {self.name}, which {LABELMAP} does not list."
            )
        return np.array([colours[colour] for colour in shown], np.uint8)[places].reshape(pixels.shape)


def is_export(path: Path) -> bool:
    """Whether a path looks like what `read_drawn` reads, rather than a folder of PNGs of ids."""
    return (path.is_file() and path.suffix.lower() in (".json", ".xml", ".zip")) or (path / COLOURED).is_dir()


def read_drawn(path: Path, classes: Sequence[str]) -> dict[str, DrawnMask]:
    """The masks of an export by the names of their images; pixels are read when one is drawn.

    Label Studio's JSON (brushes and polygons; a task without a finished annotation has no mask), CVAT's XML for images
    (masks and polygons), alone or in its zip, or CVAT's segmentation masks, a zip or a folder.

    Raises:
        InputError: it is something else, has other classes, or shapes that are no masks.
    """
    ids = {name: c for c, name in enumerate(classes, 1)}
    if path.is_dir():
        return _segmentation_masks(path, ids)
    with reading(path, "an export of Label Studio or CVAT", ADVICE):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                content = archive.read("annotations.xml") if "annotations.xml" in names else b""
            return _cvat(path, content, ids) if content else _segmentation_masks(path, ids)
        content = path.read_bytes()
        if content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
            return _cvat(path, content, ids)
        tasks = json.loads(content.decode("utf-8-sig"))
    if not isinstance(tasks, list) or not all(isinstance(task, dict) and "data" in task for task in tasks):
        raise InputError(
            f"{path} is no JSON of Label Studio (a list of tasks): give that, or CVAT for images (XML), or CVAT's "
            "segmentation masks (zip)."
        )
    return _label_studio(path, tasks, ids)


def _id(label: Any, ids: Mapping[str, int], where: str) -> int:
    name = class_name(label, where) if isinstance(label, str) else repr(label)
    if name not in ids:
        raise InputError(
            f"{where} has the class {first_names([name])}, expected one of {', '.join(ids)}: correct it, or "
            "give classes."
        )
    return ids[name]


def _label_studio(path: Path, tasks: list[Any], ids: Mapping[str, int]) -> dict[str, DrawnMask]:
    drawn: dict[str, DrawnMask] = {}
    for number, task in enumerate(tasks, 1):
        where = f"{path} task {number}"
        annotations = [one for one in get(task, "annotations", list, where) if isinstance(one, dict)]
        done = [one for one in annotations if not one.get("was_cancelled")]
        if len(done) > 1:
            raise InputError(f"{where} has {len(done)} annotations, expected one: delete all but the best.")
        if not done:
            continue
        name = clean_path(image_of(get(task, "data", dict, where), where))
        size: tuple[int, int] | None = None
        found = []
        for result in get(done[0], "result", list, where):
            kind = get(result, "type", str, where)
            if not kind.endswith("labels"):  # choices of the whole image, texts, relations
                continue
            value = get(result, "value", dict, where)
            if kind not in ("brushlabels", "polygonlabels"):
                raise InputError(f"{where} has {kind}, which are no masks: draw with the brush or polygons.")
            size = (get(result, "original_height", int, where), get(result, "original_width", int, where))
            shape = get(value, *(("rle", list) if kind == "brushlabels" else ("points", list)), where)
            labels = get(value, kind, list, where)
            if len(labels) != 1:
                raise InputError(f"{where} has {len(labels)} classes for one region, expected one: correct it.")
            shape = shape if kind == "brushlabels" else [(x * size[1] / 100, y * size[0] / 100) for x, y in shape]
            found.append(Region(_id(labels[0], ids, where), kind.removesuffix("labels"), shape))
        drawn[_once(name, drawn, where)] = DrawnMask(path, name, size, found)
    return drawn


def _cvat(path: Path, content: bytes, ids: Mapping[str, int]) -> dict[str, DrawnMask]:
    drawn: dict[str, DrawnMask] = {}
    refuse_dtd_in(content)
    root = ElementTree.fromstring(content)
    if root.tag != "annotations" or root.find("track") is not None:
        raise InputError(f"{path} is not CVAT's XML for images: export the task as CVAT for images 1.1.")
    for image in root.iter("image"):
        name = clean_path(image.get("name", ""))
        where = f"{path} image {first_names([name])}"
        found: list[tuple[int, Region]] = []
        for shape in image:
            if shape.tag == "tag":  # of the whole image
                continue
            if shape.tag not in ("mask", "polygon"):
                raise InputError(f"{where} has a {shape.tag}, which is no mask: draw with the brush or polygons.")
            if shape.tag == "polygon":
                points: Any = [tuple(map(float, point.split(","))) for point in shape.attrib["points"].split(";")]
            else:
                box = [int(shape.attrib[key]) for key in ("left", "top", "width", "height")]
                points = [int(run) for run in shape.attrib["rle"].split(",")], *box
            value, kind = _id(shape.get("label"), ids, where), "polygon" if shape.tag == "polygon" else "runs"
            found.append((int(shape.get("z_order", 0)), Region(value, kind, points)))
        ordered = [region for _, region in sorted(found, key=lambda pair: pair[0])]
        size = int(image.attrib["height"]), int(image.attrib["width"])
        drawn[_once(name, drawn, where)] = DrawnMask(path, name, size, ordered)
    return drawn


def _once(name: str, drawn: Mapping[str, DrawnMask], where: str) -> str:
    if name in drawn:
        raise InputError(f"{where} names {first_names([name])} again, expected each image once: {ADVICE}.")
    return name


def _files(path: Path) -> Callable[[str], bytes]:
    """What gives the bytes of a file, by its relative path, of a folder or a zip."""
    if path.is_dir():
        return lambda name: (path / name).read_bytes()

    def unpacked(name: str) -> bytes:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)

    return unpacked


def _segmentation_masks(path: Path, ids: Mapping[str, int]) -> dict[str, DrawnMask]:
    with reading(path, "segmentation masks 1.1 of CVAT", ADVICE):
        rows = [row.split(":") for row in _files(path)(LABELMAP).decode().splitlines() if row and row[0] != "#"]
        colours: dict[tuple[int, ...], int] = {}
        for label, colour, *_ in rows:
            value = _void(label) if is_background(label) else _id(label, ids, f"{path} {LABELMAP}")
            colours[tuple(map(int, colour.split(",")))] = value
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in sorted((path / COLOURED).rglob("*.png"))]
        else:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.startswith(COLOURED) and name.endswith(".png")]
    bare = {name.removeprefix(f"{COLOURED}/").removesuffix(".png"): name for name in names}
    return {clean_path(name): DrawnMask(path, file, None, (), colours) for name, file in bare.items()}


def _void(label: str) -> int:
    return 255 if label.casefold().strip("_ ") in ("ignore", "void") else 0


def _polygon(points: list[tuple[float, float]], height: int, width: int) -> np.ndarray:
    if len(points) < 3:
        raise ValueError(f"a polygon of {len(points)} corners")
    flat = [float(value) for point in points for value in point]
    return coco_mask.decode(coco_mask.frPyObjects([flat], height, width))[..., 0].astype(bool)


def _runs(shape: tuple[list[int], int, int, int, int], height: int, width: int) -> np.ndarray:
    """Of a box, row by row, beginning with what lies outside."""
    lengths, left, top, w, h = shape
    if min(lengths) < 0 or sum(lengths) != w * h or min(left, top) < 0 or left + w > width or top + h > height:
        raise ValueError(f"runs of {sum(lengths)} pixels for a box of {w}x{h} at {left}, {top}")
    mask = np.zeros((height, width), bool)
    box = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    mask[top : top + h, left : left + w] = box.reshape(h, w)
    return mask


def _brush(packed: list[int], height: int, width: int) -> np.ndarray:
    """What `@thi.ng/rle-pack` made of the four channels of a layer: where the last one, opacity, is not 0."""
    bits = np.unpackbits(np.array(packed, np.uint8))
    text = "".join(map(str, bits.tolist()))
    place = 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        return int(text[place - count : place], 2)

    total, depth = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    if total != 4 * height * width or depth != 8:
        raise ValueError(f"{total} values of {depth} bits for an image of {width}x{height}")
    values = np.zeros(total, np.uint8)
    filled = 0
    while filled < total:
        repeated, length = take(1), take(sizes[take(2)]) + 1
        if repeated:
            values[filled : filled + length] = take(8)
        else:
            literal = np.packbits(bits[place : place + 8 * length])
            values[filled : filled + length] = literal[: total - filled]
            place += 8 * length
        filled += length
    return values.reshape(height, width, 4)[..., 3] > 0


DRAW: dict[str, Callable[..., np.ndarray]] = {"brush": _brush, "polygon": _polygon, "runs": _runs}

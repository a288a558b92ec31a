"""COCO's masks, drawn from an instances JSON: polygons, run lengths and crowds by one of three rules."""

import hashlib
import re
import reprlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle

from wsss import InputError
from wsss.data.files import PathLike, read_mask
from wsss.data.instances import ADVICE, Photo, annotation_keys, read_elements, read_head
from wsss.writing import explain_refusal, write_mask

MAX_OUTLINE = 10**6  # pixels along a polygon, and the largest coordinate: pycocotools takes 120 bytes a pixel


@dataclass(frozen=True)
class MaskReport:
    """What `build_masks` made.

    `sha256` is over all masks in the order of their file names: the name in UTF-8, a zero byte, "<height> <width>" in
    ASCII, a zero byte, then the ids row by row, one byte a pixel. It depends neither on PNG compression nor, but for
    the rule file_order, on the order of the JSON.
    """

    rule: str
    classes: tuple[str, ...]  # mask value c+1 is classes[c]
    masks: int
    written: int  # by this run; the others were there
    without_annotations: int
    annotations: int
    crowds: int
    sha256: str


class Region(NamedTuple):
    """One annotation, drawn; `area` counts its pixels, `runs` is pycocotools' compressed RLE."""

    id: int
    value: int
    crowd: int
    runs: bytes
    area: int


Painting = list[tuple[Region, int]]


def _wsss(regions: list[Region]) -> Painting:
    """Crowds are 255 and lie below all objects, which are drawn from large to small, so that the smallest is on top.

    Area is counted in drawn pixels; of equal areas the higher annotation id is on top. A pure function of the set of
    annotations.
    """
    return [(r, 255 if r.crowd else r.value) for r in sorted(regions, key=lambda r: (not r.crowd, -r.area, r.id))]


def _file_order(regions: list[Region]) -> Painting:
    """Annotations in the order of the file, later over earlier, crowds as objects.

    What a loop over pycocotools' annToMask gives. COCO's own files list crowds last, so that they cover objects.
    """
    return [(r, r.value) for r in regions]


def _crowd_as_object(regions: list[Region]) -> Painting:
    """As wsss, but a crowd is drawn as an object of its category, at its area's place in the order: no 255."""
    return [(r, r.value) for r in sorted(regions, key=lambda r: (-r.area, r.id))]


RULES = {"wsss": _wsss, "file_order": _file_order, "crowd_as_object": _crowd_as_object}


def build_masks(
    annotations_json: PathLike,
    out_folder: PathLike,
    rule: str = "wsss",
    progress: Callable[[int, int], None] | None = None,
) -> MaskReport:
    """Draws the annotations of a COCO instances JSON as one uint8 PNG an image, <image name>.png in VOC's colours.

    Category ids become 1, 2, ... in their order (COCO's 90 with gaps become 80), the rest is 0, also all of an image
    without annotations; crowds and overlaps go by the rule. The whole file is checked before the first mask is
    written. An interrupted run is finished by the next one: what is there is compared, not written again, and a mask
    that differs is refused rather than replaced. Memory grows with the number of images (about 0.4 kB each), not with
    the file: annotations wait in a temporary file of SQLite.

    Args:
        rule: "wsss", "file_order" or "crowd_as_object": see the docstrings in `RULES`.
        progress: called with the number of masks done and of all masks, after each.

    Raises:
        InputError: the JSON cannot be used, or a mask or the temporary file cannot be written.
    """
    if rule not in RULES:
        raise InputError(f"rule is {rule!r}, expected one of {', '.join(RULES)}: pass one of them.")
    path, out = Path(annotations_json).expanduser(), Path(out_folder).expanduser()
    photos, values, names = read_head(path)
    try:
        with closing(sqlite3.connect("")) as index:  # a temporary file that ends with the connection
            index.execute("CREATE TABLE region (image, id, value, crowd, runs)")
            index.executemany("INSERT INTO region VALUES (?, ?, ?, ?, ?)", _regions(path, photos, values))
            repeated = index.execute("SELECT id FROM region GROUP BY id HAVING count(*) > 1").fetchone()
            if repeated:
                raise InputError(f"{path} has annotation {repeated[0]} twice, expected distinct ids: {ADVICE}.")
            index.execute("CREATE INDEX by_image ON region (image)")
            annotations, crowds = index.execute("SELECT count(*), total(crowd) FROM region").fetchone()
            digest, written, empty = hashlib.sha256(), 0, 0
            for done, (image, photo) in enumerate(sorted(photos.items(), key=lambda item: f"{item[1].name}.png"), 1):
                query = "SELECT id, value, crowd, runs FROM region WHERE image = ? ORDER BY rowid"
                rows = index.execute(query, (image,)).fetchall()
                mask = _draw(photo, rule, rows)
                name = f"{photo.name}.png"
                digest.update(f"{name}\0{photo.height} {photo.width}\0".encode() + mask.tobytes())
                written += _write_or_compare(out / name, mask, f"the rule {rule} makes of {path}")
                empty += not rows
                if progress is not None:
                    progress(done, len(photos))
    except sqlite3.Error as error:
        advice = "set SQLITE_TMPDIR to a folder with as much free space as the file has bytes"
        raise InputError(f"The temporary index of {path} cannot be written ({error}): {advice}.") from error
    return MaskReport(rule, names, len(photos), written, empty, annotations, int(crowds), digest.hexdigest())


def _draw(photo: Photo, rule: str, rows: list[tuple[int, int, int, bytes]]) -> np.ndarray:
    size = [photo.height, photo.width]
    regions = [Region(*row, int(rle.area({"counts": row[3], "size": size}))) for row in rows]
    mask = np.zeros(size, np.uint8, order="F")  # as pycocotools decodes
    for region, value in RULES[rule](regions):
        mask[rle.decode({"counts": region.runs, "size": size}).view(bool)] = value
    return np.ascontiguousarray(mask)


def _write_or_compare(path: Path, mask: np.ndarray, expected: str) -> bool:
    """Writes a mask; where there is one, compares and returns False."""
    if path.exists():
        if not np.array_equal(read_mask(path), mask):
            raise InputError(f"{path} is there and is not what {expected}: remove it, or give another folder.")
        return False
    with explain_refusal(path):
        write_mask(path, mask)
    return True


def _regions(
    path: Path, photos: Mapping[int, Photo], values: Mapping[int, int]
) -> Iterator[tuple[int, int, int, int, bytes]]:
    """Rows of the index: image id, annotation id, mask value, crowd or not, compressed RLE."""
    for number, annotation in enumerate(read_elements(path, "annotations")):
        key, image, value = annotation_keys(path, number, annotation, photos, values)
        crowd = annotation.get("iscrowd", 0)
        if type(crowd) is not int or crowd not in (0, 1):
            found = f"the iscrowd {reprlib.repr(crowd)} in annotation {key}, expected 0 or 1"
            raise InputError(f"{path} has {found}: correct or remove it.")
        try:
            runs = _encode(annotation.get("segmentation"), photos[image])
        except ValueError as error:
            raise InputError(f"{path} has {error} in annotation {key}: correct or remove it.") from error
        yield image, key, value, crowd, runs


def _encode(shape: Any, photo: Photo) -> bytes:
    """A segmentation as pycocotools' compressed RLE; ValueError says what is wrong with it.

    All is checked here, since pycocotools trusts what it gets: short runs leave pixels unset, far points overflow.
    """
    height, width = photo.height, photo.width
    if isinstance(shape, list) and shape:
        for polygon in shape:
            _check_polygon(polygon)
        runs: bytes = rle.merge(rle.frPyObjects(shape, height, width))["counts"]
        return runs
    if not isinstance(shape, dict):
        raise ValueError(f"the segmentation {reprlib.repr(shape)}, expected polygons or an RLE,")
    if shape.get("size") != [height, width]:
        found = f"an RLE of size {reprlib.repr(shape.get('size'))}"
        raise ValueError(f"{found}, expected its image's [{height}, {width}],")
    counts = shape.get("counts")
    if isinstance(counts, str):
        counts = _run_lengths(counts)
    if not isinstance(counts, list) or not set(map(type, counts)) <= {int} or min(counts, default=-1) < 0:
        raise ValueError(f"the RLE {reprlib.repr(counts)}, expected lengths of runs,")
    if sum(counts) != height * width:
        raise ValueError(f"an RLE of {sum(counts)} pixels, expected its image's {height * width},")
    runs = rle.frPyObjects({"counts": counts, "size": [height, width]}, height, width)["counts"]
    return runs


def _check_polygon(points: Any) -> None:
    numbers = isinstance(points, list) and set(map(type, points)) <= {int, float}
    if not numbers or len(points) < 6 or len(points) % 2:
        raise ValueError(f"the polygon {reprlib.repr(points)}, expected x and y of three points or more,")
    xy = np.array(points, np.float64).reshape(-1, 2) if all(abs(p) <= MAX_OUTLINE for p in points) else None
    if xy is None or np.abs(xy - np.roll(xy, 1, 0)).max(1).sum() > MAX_OUTLINE:
        raise ValueError(f"the polygon {reprlib.repr(points)}, expected finite points, {MAX_OUTLINE} pixels at most,")


def _run_lengths(text: str) -> list[int]:
    """Decodes a compressed RLE: base 32, low digits first, from the fourth on the difference to the last but one."""
    if not re.fullmatch("(?:[P-o]{0,5}[0-O])+", text):
        raise ValueError(f"the compressed RLE {reprlib.repr(text)}, expected pycocotools' characters,")
    counts: list[int] = []
    value = shift = 0
    for digit in (ord(character) - 48 for character in text):
        value |= (digit & 31) << shift
        shift += 5
        if digit < 32:  # the last digit of a number, signed
            value -= (digit >> 4) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts

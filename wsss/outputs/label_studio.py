"""Label Studio: tasks whose predictions are to be corrected, and the labelling interface they need."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from wsss.outputs.regions import Labelled, colour, polygons, regions, runs
from wsss.writing import palette, write_lines, write_whole

SIZES = (3, 4, 8, 16)
"""Bits that tell the length of a run."""
FILES = "/data/local-files/?d="
"""Where Label Studio serves the files below LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT."""


def write_label_studio(out: Path, items: Iterable[Labelled], classes: Sequence[str], as_polygons: bool = False) -> None:
    """tasks.json and label_config.xml in a folder.

    A region of a class is a brush stroke, or polygons along its pixels' sides. Both hold every pixel and every hole: a
    region with a hole is cut into polygons without.
    """
    kind, tag = ("polygonlabels", "PolygonLabels") if as_polygons else ("brushlabels", "BrushLabels")
    tasks: list[dict[str, Any]] = []
    for item in items:
        height, width = item.mask.shape
        results: list[dict[str, Any]] = []
        for c, region in regions(item.mask):
            values: list[dict[str, Any]] = [{"format": "rle", "rle": encode_brush(region)}]
            if as_polygons:
                corners = [(100 * polygon / (width, height)).tolist() for polygon in polygons(region)]
                values = [{"points": points, "closed": True} for points in corners]
            for value in values:
                size = {"original_width": width, "original_height": height, "image_rotation": 0}
                names = {"id": f"{c + 1}-{len(results)}", "type": kind, "from_name": "label", "to_name": "image"}
                results.append(names | size | {"value": value | {kind: [classes[c]]}})
        predictions = [{"model_version": "wsss", "result": results}]
        tasks.append({"data": {"image": FILES + quote(item.file)}, "predictions": predictions})
    with write_whole(out / "tasks.json") as file:
        file.write(json.dumps(tasks).encode())
    colours = palette()
    labels = [
        f"    <Label value={quoteattr(name)} background={quoteattr(colour(c, colours))}/>"
        for c, name in enumerate(classes)
    ]
    head = ["<View>", '  <Image name="image" value="$image" zoom="true"/>', f'  <{tag} name="label" toName="image">']
    write_lines(out / "label_config.xml", [*head, *labels, f"  </{tag}>", "</View>"])


def encode_brush(region: np.ndarray) -> list[int]:
    """The bytes of a region, bool (H, W), as Label Studio packs its four equal channels (@thi.ng/rle-pack).

    After the number of values (32 bits), the bits of a value less 1 (5) and of each of SIZES less 1 (4 each) come runs:
    a 1, which of SIZES tells the length (2 bits), the length less 1, the value.
    """
    bits = [f"{4 * region.size:032b}{8 - 1:05b}", *(f"{size - 1:04b}" for size in SIZES)]
    for number, length in enumerate(runs(region.ravel()).tolist()):
        left, value = 4 * length, f"{255 * (number % 2):08b}"
        while left:
            part = min(left, 2 ** SIZES[-1])
            which = next(index for index, size in enumerate(SIZES) if part <= 2**size)
            bits.append(f"1{which:02b}{part - 1:0{SIZES[which]}b}{value}")
            left -= part
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8))

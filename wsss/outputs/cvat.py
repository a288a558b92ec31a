"""CVAT's XML for images (1.1), which its `Upload annotations` takes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from wsss.outputs.regions import Labelled, colour, regions, runs
from wsss.writing import palette, write_whole


def write_cvat(out: Path, items: Iterable[Labelled], classes: Sequence[str]) -> None:
    """A mask for each class of an image, which holds every pixel and every hole: runs of its box, row by row."""
    root, colours = ElementTree.Element("annotations"), palette()
    ElementTree.SubElement(root, "version").text = "1.1"
    task = ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task")
    labels = ElementTree.SubElement(task, "labels")
    for c, name in enumerate(classes):
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = name
        ElementTree.SubElement(label, "color").text = colour(c, colours)
        ElementTree.SubElement(label, "attributes")
    for number, item in enumerate(items):
        height, width = map(str, item.mask.shape)
        image = ElementTree.SubElement(root, "image", id=str(number), name=item.file, width=width, height=height)
        for c, region in regions(item.mask):
            rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
            box = region[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            place = {"left": columns[0], "top": rows[0], "width": box.shape[1], "height": box.shape[0]}
            told = {"label": classes[c], "source": "auto", "occluded": "0", "z_order": "0"}
            told |= {key: str(value) for key, value in place.items()}
            told["rle"] = ", ".join(map(str, runs(box.ravel()).tolist()))
            ElementTree.SubElement(image, "mask", told)
    ElementTree.indent(root)
    with write_whole(out) as file:
        ElementTree.ElementTree(root).write(file, encoding="utf-8", xml_declaration=True)

"""YOLO's labels for segmentation: a text for each image, a line for each polygon."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import cv2
import numpy as np

from wsss.outputs.regions import Labelled, pieces, regions
from wsss.writing import write_lines


def write_yolo(out: Path, items: Iterable[Labelled], classes: Sequence[str]) -> None:
    """`labels/<name>.txt` and data.yaml in a folder, to which `images` with the photographs is to be added.

    Class c has the number c. Polygons run through the centres of the outermost pixels, as OpenCV fills them, by which
    YOLO's files are read: together those of a class give its very pixels. YOLO knows no holes and one polygon an
    object: a region with holes is cut into several.
    """
    for item in items:
        lines = []
        for c, region in regions(item.mask):
            for piece, row, column in pieces(region):
                found, _ = cv2.findContours(piece.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
                points = (found[0][:, 0] + (column, row)) / item.mask.shape[::-1]
                points = np.concatenate([points, *[points[-1:]] * (3 - len(points))])  # of fewer nothing is read
                lines.append(" ".join([str(c), *(f"{value:.6f}" for value in points.ravel())]))
        write_lines(out / "labels" / f"{item.name}.txt", lines)
    names = [f"  {c}: {json.dumps(name, ensure_ascii=False)}" for c, name in enumerate(classes)]
    write_lines(out / "data.yaml", ["path: .", "train: images", "val: images # split them", "names:", *names])

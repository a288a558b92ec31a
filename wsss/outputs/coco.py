"""COCO's instances JSON: one annotation for each class of an image."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from wsss.outputs.regions import Labelled, polygons, regions
from wsss.writing import write_whole


def write_coco(out: Path, items: Iterable[Labelled], classes: Sequence[str], as_polygons: bool = False) -> None:
    """Category c + 1 is class c. A region is a compressed RLE, or polygons along its pixels' sides.

    Both hold every pixel and every hole: a region with a hole is cut into polygons without.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, item in enumerate(items, 1):
        height, width = item.mask.shape
        images.append({"id": number, "file_name": item.file, "height": height, "width": width})
        for c, region in regions(item.mask):
            rle = coco_mask.encode(np.asfortranarray(region.astype(np.uint8)))
            shape: Any = {"size": [height, width], "counts": rle["counts"].decode()}
            if as_polygons:
                shape = [polygon.ravel().tolist() for polygon in polygons(region)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": c + 1,
                    "segmentation": shape,
                    "area": int(region.sum()),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": c, "name": name} for c, name in enumerate(classes, 1)]
    with write_whole(out) as file:
        file.write(json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode())

"""Small files of COCO's format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

LEFT = [0, 0, 2, 0, 2, 4, 0, 4]  # the left two columns of a 4x5 image
CATEGORIES = {3: "cat", 90: "dog", 7: "hot dog"}  # values 1, 3 and 2


def lengths(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, zeros first."""
    values = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(values, prepend=0))
    return np.diff([0, *edges, values.size]).tolist()


def segment(mask: np.ndarray, compressed: bool = False) -> dict[str, Any]:
    counts = rle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode() if compressed else lengths(mask)
    return {"counts": counts, "size": list(mask.shape)}


def photo(number: int, height: int = 4, width: int = 5) -> dict[str, Any]:
    return {"id": number, "file_name": f"photo_{number}.jpg", "height": height, "width": width}


def region(number: int, image: int, category: int, shape: Any, crowd: int = 0) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "segmentation": shape, "iscrowd": crowd}


def box(rows: slice, columns: slice) -> dict[str, Any]:
    mask = np.zeros((4, 5), bool)
    mask[rows, columns] = True
    return segment(mask)


def content(images: list[Any], annotations: list[Any], categories: dict[int, str] = CATEGORIES) -> dict[str, Any]:
    return {
        "info": {"year": 2014},
        "images": images,
        "licenses": [],
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": "thing"} for i, name in categories.items()],
    }


def save(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def small() -> dict[str, Any]:
    """Three images: two objects and a crowd that overlap, a polygon, nothing."""
    annotations = [
        region(12, 1, 3, box(slice(0, 2), slice(0, 4))),
        region(11, 1, 90, box(slice(0, 4), slice(0, 3))),
        region(13, 1, 7, box(slice(1, 4), slice(2, 5)), crowd=1),
        region(14, 2, 7, [LEFT]),
    ]
    return content([photo(1), photo(2), photo(3)], annotations)

"""VOC 2012 and SBD in small: their files, with a mask of its own for every image."""

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from PIL import Image
from scipy.io import savemat

from wsss.data.voc import VOC_CLASSES
from wsss.writing import palette

TRAIN, VAL = ("2007_000032", "2007_000039"), ("2007_000033", "2007_000042")
SBD_TRAIN, SBD_VAL = ("2008_000002", "2007_000039"), ("2007_000033", "2008_000007")
EXTRA = ("2008_000002", "2008_000007")
IDS = sorted({*TRAIN, *VAL, *EXTRA})
SIZE = (6, 8)


def ids_of(name: str, number: int) -> np.ndarray:
    """Another mask for every image, VOC's with 255."""
    mask = np.full(SIZE, IDS.index(name) + 1, np.uint8)
    mask[number] = 0
    return mask


def png(mask: np.ndarray, mode: str = "P") -> bytes:
    picture, buffer = Image.fromarray(mask), io.BytesIO()
    if mode == "P":
        picture.putpalette(palette().tobytes())
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def mat(mask: Any, compress: bool = False) -> bytes:
    boundaries = np.empty((20, 1), object)
    boundaries[:] = [[scipy.sparse.csc_matrix(np.eye(3))]] * 20
    content = {"Boundaries": boundaries, "Segmentation": mask, "CategoriesPresent": [1, 2]}
    buffer = io.BytesIO()
    savemat(buffer, {"before": 1, "GTcls": content, "after": 2}, do_compression=compress)
    return buffer.getvalue()


def xml(*names: str) -> bytes:
    objects = "".join(f"<object><name>{name}</name><part><name>head</name></part></object>" for name in names)
    return f"<annotation><filename>x.jpg</filename>{objects}</annotation>".encode()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE[::-1]).save(buffer, "JPEG")
    return buffer.getvalue()


def voc_files() -> dict[str, bytes]:
    files = {f"JPEGImages/{name}.jpg": jpeg() for name in IDS}
    files |= {f"Annotations/{name}.xml": xml("cat", VOC_CLASSES[n]) for n, name in enumerate(IDS)}
    files |= {f"SegmentationClass/{name}.png": png(ids_of(name, 0)) for name in (*TRAIN, *VAL)}
    files |= {
        f"ImageSets/Segmentation/{name}.txt": "".join(f"{i}\n" for i in ids).encode()
        for name, ids in (("train", TRAIN), ("val", VAL), ("trainval", TRAIN + VAL))
    }
    return files


def sbd_files() -> dict[str, bytes]:
    files = {f"cls/{name}.mat": mat(ids_of(name, 1)) for name in (*SBD_TRAIN, *SBD_VAL)}
    files |= {f"{name}.txt": "\n".join(ids).encode() for name, ids in (("train", SBD_TRAIN), ("val", SBD_VAL))}
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Hashes of files, targets of links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found

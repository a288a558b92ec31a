"""SBD's masks, read from MATLAB 5 files."""

import struct
import zlib
from collections.abc import Iterator

import numpy as np

from wsss import InputError
from wsss.data.files import PathLike, reading
from wsss.data.voc import VOC_CLASSES

# The part of MATLAB 5's format that SBD needs. scipy.io.loadmat crashes the interpreter on some damaged files and
# spends most of its time on the boundaries of all objects.
MATRIX, COMPRESSED = 14, 15  # types of elements
STRUCT, NUMERIC = 2, range(6, 16)  # classes of arrays
MOST = 1 << 28  # bytes that a compressed array may hold
NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
Element = tuple[int, bytes]
"""Type and content."""


def read_segmentation(path: PathLike) -> np.ndarray:
    """Reads SBD's class ids, uint8 (H, W), from a file of its cls folder: 0 to 20 and 255 (ignore).

    Raises:
        InputError: no such file, no MATLAB 5 file with GTcls.Segmentation, another shape, other ids.
    """
    expected = "a .mat file of SBD with GTcls.Segmentation"
    with reading(path, expected, "unpack SBD again"), open(path, "rb") as file:
        mask = _numbers(_struct_field(_variable(file.read(), "GTcls"), "Segmentation"))
        if mask.ndim != 2 or not mask.size:
            raise ValueError(f"its shape is {mask.shape}, expected (H, W)")
    unknown = np.setdiff1d(mask, [*range(len(VOC_CLASSES) + 1), 255])
    if unknown.size:
        found = f"the ids {unknown[:5].tolist()}, expected 0 to {len(VOC_CLASSES)} or 255 (ignore)"
        raise InputError(f"{path} holds {found}: unpack SBD again.")
    return mask.astype(np.uint8)


def _elements(data: bytes) -> Iterator[Element]:
    position = 0
    while position < len(data):
        kind, size = struct.unpack_from("<II", data, position)
        start = position + 8
        if kind >> 16:  # the content of up to four bytes is a part of the tag
            kind, size, start = kind & 0xFFFF, min(kind >> 16, 4), position + 4
        position = max(start + size, position + 8)
        if position > len(data):
            raise ValueError("it ends early")
        yield kind, data[start : start + size]
        if kind != COMPRESSED:
            position += -position % 8  # contents start at multiples of eight


def _variable(data: bytes, name: str) -> Element:
    if data[124:128] != b"\0\1IM":
        raise ValueError("it is no MATLAB 5 file")
    for kind, content in _elements(data[128:]):
        if kind == COMPRESSED:
            stream = zlib.decompressobj()
            content = stream.decompress(content, MOST)
            if not stream.eof:
                raise ValueError(f"it is damaged or holds more than {MOST} bytes")
            kind, content = next(_elements(content))
        if kind == MATRIX and _matrix(content)[2] == name.encode():
            return kind, content
    raise ValueError(f"it has no {name}")


def _matrix(content: bytes) -> tuple[int, list[int], bytes, Iterator[Element]]:
    """Class, shape, name and further elements of an array."""
    parts = _elements(content)
    flags, shape, name = next(parts)[1], next(parts)[1], next(parts)[1]
    return flags[0], np.frombuffer(shape, "<i4").tolist(), name, parts


def _struct_field(array: Element, name: str) -> Element:
    kind, shape, _, parts = _matrix(array[1])
    if kind != STRUCT or shape != [1, 1]:
        raise ValueError(f"it has no single struct with {name}")
    length, names = int.from_bytes(next(parts)[1], "little"), next(parts)[1]
    fields = [names[i : i + length].partition(b"\0")[0] for i in range(0, len(names), length)]
    return list(parts)[fields.index(name.encode())]


def _numbers(array: Element) -> np.ndarray:
    kind, shape, _, parts = _matrix(array[1])
    if kind not in NUMERIC:
        raise ValueError(f"it holds an array of class {kind}, expected numbers")
    stored, raw = next(parts)
    return np.frombuffer(raw, NUMBERS[stored]).reshape(shape, order="F")

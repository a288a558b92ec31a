"""Readers of foreign files: what cannot be used raises InputError with one sentence, never anything else."""

import io
import os
import pickle
import re
import reprlib
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO
from xml.etree.ElementTree import TreeBuilder
from xml.parsers import expat

import numpy as np
from numpy.lib import format as npy
from PIL import Image, ImageFile, ImageOps, features

from wsss import InputError
from wsss.pickles import PlainUnpickler, check_key
from wsss.places import Part, Url, is_remote, opened

PathLike = str | os.PathLike[str]
Source = PathLike | Url | Part
MASK_IDS = "0 (background), c+1 (class c) and 255 (ignore)"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
AVIF = "avif" in features.modules and bool(features.check("avif"))
OTHER_SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".tif", ".tiff", ".webp", *((".avif",) if AVIF else ()))
PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", *(("AVIF",) if AVIF else ()))
"""All that Pillow may read a file as, whatever its name: for some others it starts a program."""
DEPTHS = (8, 10, 12, 14, 16)
"""Bits of a brightness, of cameras and of X-rays."""


@contextmanager
def reading(path: Source, expected: str, advice: str) -> Iterator[None]:
    """Parsers of foreign bytes raise nearly everything (struct.error, SyntaxError, MemoryError, ...)."""
    try:
        with warnings.catch_warnings():
            # Pillow refuses twice as many pixels, some 180 million, by itself; cameras have 100 million
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except Exception as error:
        found = getattr(error, "strerror", None) or str(error) or type(error).__name__
        found = textwrap.shorten(found, 200)  # and on one line
        raise InputError(f"{path} cannot be read as {expected} ({found}): {advice}.") from error


def open_image(file: PathLike | BinaryIO) -> ImageFile.ImageFile:
    """A picture of which Pillow has read the head."""
    return Image.open(file, formats=PILLOW_FORMATS)


def read_image(path: Source) -> np.ndarray:
    """Reads a photograph upright as RGB, uint8 (H, W, 3).

    EXIF orientation is applied and transparency is laid on white. Of several frames or pages the first is read. Grey
    of more than 8 bits is scaled by the smallest range of 8, 10, 12, 14 or 16 bits that holds the brightest pixel: the
    same for photographs of one device, unless one is dark throughout. Floats are taken as 0..1, or as 0..255 if any is
    above 1.
    """
    advice = "replace it, leave it out, or train with on_bad_image=skip"
    # a file object keeps Pillow from mapping the file, which scrambles an uncompressed TIFF that lies on its side
    with reading(path, "an image", advice), opened(path) as file, open_image(file) as found:
        image: Image.Image = found
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            grey >>= next(bits for bits in DEPTHS if grey.max() < 2**bits) - 8
        elif image.mode == "F":
            grey = np.asarray(image)
            if not (grey.min() >= 0 and grey.max() <= 255):
                raise InputError(f"{path} holds floats outside 0..255: save it as an 8-bit image.")
            grey = (grey * (255 if grey.max() <= 1 else 1)).round()
        else:
            if "A" in image.getbands() or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def image_size(path: Source) -> tuple[int, int] | None:
    """Width and height as stored, from the file's header; None where that cannot be read, or not without a request."""
    if is_remote(path):
        return None
    try:
        with reading(path, "an image", "replace it"), opened(path) as file, open_image(file) as image:
            return image.size
    except InputError:  # reading the whole image will say it
        return None


def read_mask(path: Source) -> np.ndarray:
    """Reads class ids, uint8 (H, W), from a palette or grey image of 1, 8 or 16 bits; colours are refused."""
    with (
        reading(path, "a mask", "replace it, or take it out of the list"),
        opened(path) as file,
        open_image(file) as image,
    ):
        if image.format == "JPEG" or not (image.mode in ("1", "L", "P") or image.mode.startswith("I")):
            found = f"a {image.format} of mode {image.mode}, expected a palette or grey PNG of class ids"
            raise InputError(f"{path} is {found}: map its colours to {MASK_IDS} and save those.")
        mask = np.array(image)
    if mask.min() < 0 or mask.max() > 255:
        found = f"values from {mask.min()} to {mask.max()}, expected class ids"
        raise InputError(f"{path} holds {found}: save {MASK_IDS}.")
    return mask.astype(np.uint8)


def read_truth(path: Source, image: np.ndarray, num_classes: int) -> np.ndarray:
    """Reads the mask of an image, uint8 (H, W); ids above `num_classes` but 255 and another size are refused."""
    mask = read_mask(path)
    if mask.shape != image.shape[:2]:
        sizes = f"height and width {mask.shape}, its upright image {image.shape[:2]}"
        raise InputError(f"{path} has {sizes}, expected one size: make the mask again.")
    unknown = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)[num_classes + 1 : 255]) + num_classes + 1
    if unknown.size:
        found = f"the ids {unknown.tolist()}, expected 0 to {num_classes} or 255 (ignore)"
        raise InputError(f"{path} holds {found}: correct the mask or give all class names.")
    return mask


def read_lines(path: Source) -> list[str]:
    """Reads the lines of a UTF-8 text that are not blank, stripped."""
    with reading(path, "text", "give an existing file in UTF-8"), opened(path) as file:
        return [line.strip() for line in io.TextIOWrapper(file, "utf-8-sig") if line.strip()]


def read_list(path: PathLike) -> list[str]:
    """Reads image ids, one a line: `2007_000032`, or `/JPEGImages/2007_000032.jpg /SegmentationClassAug/...`.

    Only the first word of a line counts. An empty list and a repeated id are refused.
    """
    names = [PureWindowsPath(line.split()[0]) for line in read_lines(path)]  # takes / and \ alike
    ids = [name.stem if name.suffix.lower() in IMAGE_SUFFIXES else name.name for name in names]
    if not all(ids):
        raise InputError(f"{path} has a line that starts with a bare folder: write one image id a line.")
    if not ids:
        raise InputError(f"{path} is empty, expected one image id a line: fill it or name another list.")
    repeated, times = Counter(ids).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path} lists {repeated} {times} times, expected each id once: remove the repeats.")
    return ids


class _Dtype:
    """Stands in for numpy.dtype, which gets its code ("f4") first and its byte order as state."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """Stands in for numpy.ndarray; `value` is the array, or the list of an object array."""

    value: Any = None

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, _, raw = state[-4:]
        code = dtype.order + dtype.code
        if code[1] == "O" and isinstance(raw, list):
            self.value = raw
        elif re.fullmatch(r"[<>|=][biufSU]\d{1,4}", code):
            raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as str
            self.value = np.frombuffer(raw, code).reshape(shape)
        else:
            raise pickle.UnpicklingError(f"it holds an array of type {code}")


class _Scalar(_Array):
    def __init__(self, dtype: _Dtype, raw: bytes | str) -> None:
        self.__setstate__(((), dtype, False, raw))


def _mapping(items: Sequence[tuple[Any, Any]] = ()) -> dict[Any, Any]:
    """Stands in for OrderedDict, to which Python 2 gave its items."""
    for key, _ in items:
        check_key(key)
    return dict(items)


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for codecs.encode, by which protocol 2 writes bytes as text."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it holds text to be written as {reprlib.repr(encoding)}")
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): _mapping,
    ("_codecs", "encode"): _encode,
}


class _LabelUnpickler(PlainUnpickler):
    """Builds containers, numbers, strings and the stand-ins above; imports nothing.

    numpy's own classes stay out too: a forged dtype state makes them take raw bytes for object pointers.
    """

    def find_class(self, module: str, name: str) -> Any:
        key = module.replace("numpy._core", "numpy.core"), name
        if key not in _STAND_INS:
            raise pickle.UnpicklingError(f"it holds a pickled {module}.{name}, expected only arrays and strings")
        return _STAND_INS[key]


def _unpickle(data: bytes) -> Any:
    return _LabelUnpickler(io.BytesIO(data), encoding="latin1").load()


def _image_id(key: Any) -> Any:
    key = key.value.item() if isinstance(key, _Scalar) else key
    key = key.decode() if isinstance(key, bytes) else key
    if isinstance(key, int) and 10**9 <= key < 10**10:  # 2007000032, as IRN writes 2007_000032
        return f"{key // 10**6}_{key % 10**6:06d}"
    return key


def load_label_dict(path: Source) -> dict[str, np.ndarray]:
    """Reads image-level labels, id -> float32 (C,) of zeros and ones, from the field's `cls_labels*.npy`.

    Such a file is a pickled dict in a 0-d object array; nothing that it names is run. Ids may be str, bytes
    or VOC numbers (2007000032 becomes 2007_000032).
    """
    advice = "save a dict of id -> vector of zeros and ones with np.save"
    with reading(path, "image-level labels", advice), opened(path) as file:
        read_header = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}
        shape, _, dtype = read_header[npy.read_magic(file)[0]](file)
        if shape != () or not dtype.hasobject:
            raise InputError(f"{path} holds an array of {dtype} {shape}, expected a pickled dict: {advice}.")
        (entries,) = _unpickle(file.read()).value
        if not isinstance(entries, dict) or not entries:
            raise InputError(f"{path} holds {reprlib.repr(entries)}, expected a filled dict: {advice}.")
        labels: dict[str, np.ndarray] = {}
        length = 0
        for key, value in entries.items():
            name, shown = _image_id(key), reprlib.repr(_image_id(key))
            if not isinstance(name, str) or name in labels:
                raise InputError(f"{path} has the key {shown}, expected image ids, each once: {advice}.")
            vector = value.value if isinstance(value, _Array) else value
            vector = vector.tolist() if isinstance(vector, np.ndarray) else vector
            fits = isinstance(vector, list) and vector and len(vector) == (length or len(vector))
            if not fits or any(x not in (0, 1) for x in vector):
                found, count = f"{reprlib.repr(vector)} for {shown}", length or "only"
                raise InputError(f"{path} has {found}, expected {count} zeros and ones: {advice}.")
            length = len(vector)
            labels[name] = np.array(vector, np.float32)
        return labels


def files_by_stem(folder: Path, suffixes: tuple[str, ...], layout: str) -> dict[str, Path]:
    """Files of a folder by stem, from one listing; of a.png and a.jpg a.jpg is taken."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}: give a root that holds {layout}.")
    names = sorted(map(Path, os.listdir(folder)), reverse=True)
    return {name.stem: folder / name for name in names if name.suffix.lower() in suffixes}


def find_given(root: Path, given: str) -> Path:
    """A path that the user gave: in root where it exists there, else as it stands."""
    path = Path(given).expanduser()
    return root / path if (root / path).exists() else path


def first_names(names: Collection[str]) -> str:
    """The first three names on one line."""
    shown = [repr(name)[1:-1][:120] for name in list(names)[:3]]  # repr escapes what is not printable
    return ", ".join(shown + ["..."] * (len(names) > 3))


def read_annotation(path: PathLike) -> tuple[str, ...]:
    """Reads the names of the objects of one VOC XML file, each once, difficult ones too; not those of their parts.

    Raises:
        InputError: no such file, no XML, another root than <annotation>, an object without a name, a DTD.
    """
    with reading(path, "an XML file of VOC", "correct it, or take it out of the list"), open(path, "rb") as file:
        tree = TreeBuilder()
        parser = expat.ParserCreate()
        parser.StartElementHandler, parser.EndElementHandler = tree.start, tree.end
        parser.CharacterDataHandler = tree.data
        parser.StartDoctypeDeclHandler = _refuse_dtd
        parser.ParseFile(file)
        root = tree.close()
        if root.tag != "annotation":
            raise ValueError(f"its root is <{root.tag}>, expected <annotation>")
        names = [(found.findtext("name") or "").strip() for found in root.findall("object")]
        if not all(names):
            raise ValueError("it has an object without a name")
    return tuple(dict.fromkeys(names))


def _refuse_dtd(*declaration: object) -> None:
    raise ValueError("it declares a document type, which an annotation does not need")  # no DTD, no entities


def refuse_dtd_in(content: bytes) -> None:
    """Raises ValueError for XML with a document type, whose entities may be without end."""
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse_dtd
    parser.Parse(content, True)


def annotation_labels(
    folder: Path, ids: Sequence[str], classes: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> dict[str, np.ndarray]:
    """Image-level labels, id -> float32 (C,) of zeros and ones, of those images that have an XML file in a folder.

    Raises:
        InputError: a file cannot be read or names an object that is none of the classes.
    """
    columns = {name: column for column, name in enumerate(classes)}
    files = files_by_stem(folder, (".xml",), "Annotations with VOC's XML files")
    labels: dict[str, np.ndarray] = {}
    present = [image_id for image_id in ids if image_id in files]
    for done, image_id in enumerate(present, start=1):
        names = read_annotation(files[image_id])
        if unknown := [name for name in names if name not in columns]:
            known = f"none of the classes ({', '.join(classes)})"
            raise InputError(f"{files[image_id]} names {unknown[0]!r}, {known}: correct it or give all class names.")
        labels[image_id] = np.zeros(len(columns), np.float32)
        labels[image_id][[columns[name] for name in names]] = 1
        if progress:
            progress(done, len(present))
    return labels

"""Files that appear whole or not at all, and masks in VOC's colours."""

import hashlib
import io
import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from wsss import InputError


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` at the end: whole, or as before if anything fails.

    Its folder is made. The temporary name is short whatever the name, and of this call alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]
    temporary = path.with_name(f".{digest}-{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """NaN and infinity are written as null."""
    with write_whole(path) as file:
        file.write(json_bytes(content))


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """NaN and infinity become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    return f"{json.dumps(finite, indent=2)}\n".encode()


def read_object(path: Path, advice: str = "give another out") -> dict[str, Any]:
    """What `write_json` has written.

    Raises:
        InputError: it is something else; `advice` says what helps where it cannot be put back.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: put it back, or {advice}")
    return content


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """A text in UTF-8."""
    with write_whole(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)


def check_classes(classes: Sequence[str]) -> None:
    """Refuses classes that masks, of 8 bits, or figures by name cannot tell apart.

    Raises:
        InputError: more than 254, or one that has the name of what is none of them.
    """
    if len(classes) > 254:
        raise InputError(
            f"there are {len(classes)} classes, but a mask of 8 bits holds 254 (0 is background, 255 ignore): "
            "leave some out or join some"
        )
    if "background" in classes:
        raise InputError(
            "a class is called background, as what belongs to no class already is: leave it out of the classes (an "
            "image without any is a negative), or give it another name"
        )


def write_mask(path: Path, mask: np.ndarray) -> None:
    """Writes ids, uint8 (H, W), as a PNG with VOC's palette."""
    with write_whole(path) as file:
        file.write(mask_png(mask))


def mask_png(mask: np.ndarray) -> bytes:
    """Ids, uint8 (H, W), as a PNG with VOC's palette."""
    picture, content = Image.fromarray(mask), io.BytesIO()
    picture.putpalette(palette().tobytes())
    picture.save(content, "png")
    return content.getvalue()


def palette() -> np.ndarray:
    """VOC's colours, (256, 3) uint8: the bits of an id spread over the channels."""
    bits = np.arange(8)[:, None]
    shifts = 3 * bits + np.arange(3)  # (8, 3)
    return (((np.arange(256)[:, None, None] >> shifts & 1) << (7 - bits)).sum(1)).astype(np.uint8)


@contextmanager
def explain_refusal(path: Path) -> Iterator[None]:
    """Raises InputError for what the system refuses to write, on a full disk for instance."""
    try:
        yield
    except OSError as error:
        found = error.strerror or error
        raise InputError(f"{path} cannot be written ({found}): make room or choose another folder.") from error

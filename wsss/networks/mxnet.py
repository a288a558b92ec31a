"""Parameter files of MXNet (`.params`), read without MXNet."""

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from wsss import InputError

LIST_MAGIC = 0x112
ARRAY_V1, ARRAY_V2 = 0xF993FAC8, 0xF993FAC9
MAX_AXES = 32
DENSE = 0
DTYPES = (torch.float32, torch.float64, torch.float16, torch.uint8, torch.int32, torch.int8, torch.int64)
"""By MXNet's type flag."""


def read_params(path: str) -> dict[str, Tensor]:
    """The arrays of a `.params` file by name (`arg:...`, `aux:...`), of the stored types.

    Little-endian, 64-bit: magic 0x112, reserved, number of arrays, the arrays, number of names, the names, each
    with its length before it. An array is its magic (V1, V2), in V2 its storage type, number of axes (32 bits) and
    their sizes (64 bits), two words for the device, type flag, values. The oldest files have the number of axes in
    place of the magic and sizes of 32 bits. Nothing is allocated beyond the size of the file.

    Raises:
        InputError: the file is missing, damaged, no such file, or holds sparse, empty or unnamed arrays.
    """
    if not Path(path).is_file():
        raise InputError(f"weights file {path} does not exist")
    try:
        return _Reader(bytearray(Path(path).read_bytes())).named_arrays()
    except (OSError, ValueError) as error:
        raise InputError(
            f"weights file {path} cannot be read as a .params file of MXNet: {error}; download it again and compare "
            "its checksum"
        ) from error


class _Reader:
    """Reads forward through `data`; a ValueError says what was expected and what was found."""

    def __init__(self, data: bytearray) -> None:
        self.data, self.position = data, 0

    def skip(self, size: int, what: str) -> int:
        """Where the next `size` bytes start."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise ValueError(f"expected {what} of {size} bytes at byte {start}, but the file has {len(self.data)}")
        return start

    def numbers(self, layout: str, what: str) -> tuple[int, ...]:
        return struct.unpack_from(f"<{layout}", self.data, self.skip(struct.calcsize(f"<{layout}"), what))

    def named_arrays(self) -> dict[str, Tensor]:
        magic, _, count = self.numbers("3Q", "a header")
        if magic != LIST_MAGIC:
            raise ValueError(f"expected it to start with {LIST_MAGIC:#x}, found {magic:#x}")
        arrays = [self.array() for _ in range(count)]
        (named,) = self.numbers("Q", "the number of names")
        if named != count:
            raise ValueError(f"expected a name for each of {count} arrays, found {named}")
        params = {self.name(): array for array in arrays}
        if len(params) < count:
            raise ValueError(f"expected {count} different names, found {len(params)}")
        return params

    def array(self) -> Tensor:
        start = self.position
        (magic,) = self.numbers("I", "an array")
        if magic == ARRAY_V2:
            (storage,) = self.numbers("i", "a storage type")
            if storage != DENSE:
                raise ValueError(f"expected dense arrays, found one of storage type {storage} at byte {start}")
        versioned = magic in (ARRAY_V1, ARRAY_V2)
        axes = self.numbers("I", "a number of axes")[0] if versioned else magic
        if not 1 <= axes <= MAX_AXES:
            raise ValueError(f"expected an array of 1 to {MAX_AXES} axes at byte {start}, found {axes}")
        shape = self.numbers(f"{axes}{'q' if versioned else 'I'}", "a shape")
        _, _, flag = self.numbers("3i", "a device and a type")
        if min(shape) < 1 or not 0 <= flag < len(DTYPES):
            raise ValueError(f"expected numbers at byte {start}, found shape {shape} of type {flag}")
        count = math.prod(shape)
        values = self.skip(count * DTYPES[flag].itemsize, f"an array of shape {shape}")
        # a copy, since the values may lie at any byte
        return torch.frombuffer(self.data, dtype=DTYPES[flag], count=count, offset=values).clone().view(shape)

    def name(self) -> str:
        (size,) = self.numbers("Q", "the length of a name")
        start = self.skip(size, "a name")
        return self.data[start : self.position].decode("ascii")

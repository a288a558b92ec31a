"""Tar files with an index: what WebDataset reads in order can be read at random as well."""

import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, overload

import numpy as np

from wsss import InputError
from wsss.places import Part, Place, Url, forget_handles, opened
from wsss.writing import write_json, write_whole

VERSION = 1
"""Of what the indices hold."""

BLOCK = tarfile.BLOCKSIZE


class Row(NamedTuple):
    """A member of a tar file."""

    name: str
    offset: int
    length: int
    checksum: int | None  # crc32


class Tar:
    """A tar file that appears whole at the end of the context, or not at all, and then `<stem>.json`, its index.

    Equal members make an equal file: dates and owners are left out.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[Row]()
        self.says: dict[str, Any] = {}  # what the index says besides

    def __enter__(self) -> "Tar":
        self._open = ExitStack()
        self._file = self._open.enter_context(write_whole(self.path))
        self._archive = self._open.enter_context(tarfile.open(fileobj=self._file, mode="w"))
        return self

    def add(self, name: str, content: bytes) -> Row:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._archive.addfile(member, BytesIO(content))
        offset = self._file.tell() - -(-len(content) // BLOCK) * BLOCK
        self.rows.append(Row(name, offset, len(content), zlib.crc32(content)))
        return self.rows[-1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)
        if kind is None:
            write_index(self.path, self.says)


def write_index(tar: Path, says: Mapping[str, Any]) -> None:
    """That of a complete tar file, which it makes count."""
    write_json(tar.with_suffix(".json"), {"version": VERSION, "bytes": tar.stat().st_size, **says})


def columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Of an index."""
    names = ("offset", "length", "crc32")
    return {name: [row[1 + place] for row in rows] for place, name in enumerate(names)}


def read_index(place: Place, expected: Mapping[str, type]) -> dict[str, Any]:
    """An index, which has to hold some keys with values of some kinds.

    Raises:
        InputError: there is none, it is damaged, or of another version.
    """
    try:
        with opened(place) as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise InputError(
            f"{place} does not exist: give a folder of shards whose writing has come to its end."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place} is damaged: copy it again, or remove it and make it again.") from error
    found = content.get("version") if isinstance(content, dict) else None
    if found != VERSION:
        raise InputError(f"{place} is an index of version {found!r}, expected {VERSION}: remove it and make it again.")
    if wrong := [key for key, kind in expected.items() if not isinstance(content.get(key), kind)]:
        raise InputError(f"{place} has no {wrong[0]} as an index has it: remove it and make it again.")
    return content


def check_size(tar: Place, expected: Any) -> None:
    """Raises InputError for a tar file here that is missing, or was cut or added to; one elsewhere is met when read."""
    if isinstance(tar, Url):
        return
    forget_handles()
    found = f"{tar.stat().st_size} bytes" if tar.is_file() else "no file"
    if found != f"{expected} bytes":
        advice = f"copy it again, or remove its index {tar.stem}.json and make it again"
        raise InputError(f"{tar}: expected {expected} bytes, found {found}: {advice}.")


class Parts(Sequence[Part]):
    """Members of tar files, made when they are asked for: an image takes 28 bytes.

    Args:
        tars: the files.
        sizes: of each, its bytes.
        tables: of each the columns of its members, see `columns`.
        source: of the tables, for messages.

    Raises:
        InputError: a table that is none, or lists what is beyond the end of its file.
    """

    def __init__(
        self, tars: Sequence[Place], sizes: Sequence[int], tables: Sequence[Mapping[str, Any]], source: Place
    ) -> None:
        self.tars = tars
        try:
            kinds = {"offset": np.int64, "length": np.int64, "crc32": np.int64}
            arrays = {
                name: [np.array([-1 if v is None else v for v in table[name]], kind) for table in tables]
                for name, kind in kinds.items()
            }
            self.offset, self.length, self.checksum = (
                np.concatenate([np.empty(0, np.int64), *arrays[name]]) for name in kinds
            )
            counts = [len(array) for array in arrays["offset"]]
            self.tar = np.repeat(np.arange(len(tars), dtype=np.int32), counts)
            sound = len({len(a) for a in (self.tar, self.offset, self.length, self.checksum)}) == 1
            ends = np.array(sizes, np.int64)[self.tar]
            sound &= bool((self.offset >= 0).all() and (self.length >= 0).all())
            sound &= bool((self.length <= ends - self.offset).all())
        except (KeyError, TypeError, ValueError, OverflowError, IndexError):
            sound = False
        if not sound:
            raise InputError(f"{source} lists members that cannot be: make the shards again.")

    def __len__(self) -> int:
        return len(self.tar)

    @overload
    def __getitem__(self, index: int) -> Part: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Part]: ...

    def __getitem__(self, index: int | slice) -> Part | Sequence[Part]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        checksum = int(self.checksum[index])
        place = self.tars[self.tar[index]]
        return Part(place, int(self.offset[index]), int(self.length[index]), None if checksum < 0 else checksum)

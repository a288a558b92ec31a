"""Where bytes are: a file, a URL that fsspec knows, or a part of either."""

import io
import os
import re
import textwrap
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

from wsss import InputError

WEB = ("http", "https")
"""Protocols that list no folder, and whose addresses are quoted."""

OPEN_FILES = 32
"""Shards that a process holds open."""


def place_of(given: str) -> "Path | Url":
    """What the user calls a file or a folder."""
    try:
        parts = urlsplit(given) if "://" in given else None
        if parts is None or parts.scheme == "file":
            return Path(given if parts is None else url2pathname(parts.path)).expanduser()
    except (ValueError, RuntimeError) as error:  # a host without its bracket, ~ of nobody
        raise InputError(f"{without_secrets(given)} is no place ({error}): correct it.") from error
    return Url(given)


def without_secrets(text: str) -> str:
    """Text in which addresses have no user, password, signature or token: messages and records are passed on."""
    text = re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
    return re.sub(r"(?i)(?<=[?&])([\w-]*(?:sig|token|key|secret|passw|credential)[\w-]*)=[^&\s'\")]+", r"\1=***", text)


@dataclass(frozen=True, order=True)
class Url:
    """A place of any protocol that fsspec knows (http, https, s3, gs, ...), as far as it is used like a path.

    What is read is read whole, in one request. A query, a token say, goes along to what lies below and above. Every
    method raises InputError with one sentence that names the URL, as `str` does, without secrets.
    """

    address: str

    def __str__(self) -> str:
        return without_secrets(self.address)

    def __truediv__(self, name: str | PurePath) -> "Url":
        below, (path, query) = PurePosixPath(name).as_posix(), self.split
        return Url(f"{path.rstrip('/')}/{quote(below) if self.is_web else below}{query}")

    @property
    def split(self) -> tuple[str, str]:
        """The address up to its path, and its query; names of other protocols may hold a question mark."""
        path, mark, query = self.address.partition("?") if self.is_web else (self.address, "", "")
        return path, mark + query

    @property
    def is_web(self) -> bool:
        return self.address.partition("://")[0] in WEB

    @property
    def name(self) -> str:
        path = self.address.partition("://")[2]
        return (unquote(urlsplit(f"//{path}").path) if self.is_web else path).rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        path, query = self.split
        return Url(path.rpartition("/")[0] + query)

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """Its bytes, or those from one to another, in one request."""
        with self._asked() as (system, path):
            content: bytes = system.cat_file(path, start, end)
        return content

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.read())

    def stream(self) -> BinaryIO:
        with self._asked() as (system, path):
            file: BinaryIO = system.open(path, "rb")
        return file

    def exists(self) -> bool:
        """Where the web refuses it there is nothing either: some hosts say so of what is not there."""
        if not self.is_web:
            with self._asked() as (system, path):
                return bool(system.exists(path))
        try:
            self.read(0, 1)
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError) or getattr(error.__cause__, "status", None) == 403:
                return False
            raise
        return True

    def files(self) -> list[PurePosixPath]:
        """Relative paths of all that lies below, in order; of a protocol that lists."""
        if self.is_web:
            raise InputError(
                f"{self} cannot be listed, as no address of the web can: give a list of its images, or shards"
            )
        with self._asked() as (system, path):
            found = system.find(path)
        root = path.rstrip("/")
        return sorted(PurePosixPath(name.removeprefix(root).lstrip("/")) for name in found)

    @contextmanager
    def _asked(self) -> Iterator[tuple[Any, str]]:
        """The file system, which fsspec keeps for each process, and the path in it."""
        from fsspec.core import url_to_fs

        try:
            yield url_to_fs(self.address)
        except FileNotFoundError as error:
            raise InputError(f"{self} does not exist: correct the address, or leave it out.") from error
        except ImportError as error:
            raise InputError(f"{self} needs a package that is not here ({error}): install it.") from error
        except Exception as error:  # of aiohttp, botocore, gcsfs, ...
            found = textwrap.shorten(without_secrets(str(error)) or type(error).__name__, 200)
            advice = "correct the address, see to network and credentials, then run again"
            raise InputError(f"{self} cannot be read ({found}): {advice}.") from error


class Part(NamedTuple):
    """Some bytes of a file, such as an image in a shard."""

    shard: Path | Url
    offset: int
    length: int
    checksum: int | None  # crc32, where it is known

    def __str__(self) -> str:
        return f"{self.shard} at byte {self.offset}"

    def read(self) -> bytes:
        """Raises InputError for other bytes than those that were listed."""
        if isinstance(self.shard, Url):
            content = self.shard.read(self.offset, self.offset + self.length)
        else:
            try:  # one handle for all processes: each read says where
                file = _handle(str(self.shard))  # held, so that no other thread closes it
                content = os.pread(file.fileno(), self.length, self.offset)
            except OSError as error:
                raise InputError(
                    f"{self.shard} cannot be read ({error.strerror}): put it back, or make it again."
                ) from error
        if len(content) != self.length or self.checksum not in (None, zlib.crc32(content)):
            ranges = ", from a server that answers ranges" if isinstance(self.shard, Url) else ""
            raise InputError(
                f"{self} does not hold the {self.length} bytes that its index lists: the shard was cut or changed, "
                f"copy it again{ranges}, or make it again."
            )
        return content

    def open(self, mode: str = "rb") -> BinaryIO:
        return io.BytesIO(self.read())


def forget_handles() -> None:
    """Files may have been replaced."""
    _handle.cache_clear()


@lru_cache(OPEN_FILES)
def _handle(path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


Place = Path | Url
Readable = Path | Url | Part
"""What an image or a mask is read from."""


def relative(place: Place, root: Place) -> PurePath:
    """The path of a place below another."""
    if isinstance(place, Path) and isinstance(root, Path):
        return place.relative_to(root)
    whole, above = (one.split[0] if isinstance(one, Url) else str(one) for one in (place, root))
    below = whole.removeprefix(f"{above.rstrip('/')}/")
    return PurePosixPath(unquote(below) if isinstance(place, Url) and place.is_web else below)


def is_remote(place: Any) -> bool:
    """Whether to look at it takes a request."""
    return isinstance(place, Url) or (isinstance(place, Part) and isinstance(place.shard, Url))


def opened(place: str | os.PathLike[str] | Url | Part) -> BinaryIO:
    return place.open() if isinstance(place, Url | Part) else open(place, "rb")


def streamed(place: Place) -> BinaryIO:
    """To be read from place to place; of a URL in requests as they are needed."""
    return place.stream() if isinstance(place, Url) else open(place, "rb")


def state(place: Readable) -> tuple[Any, ...]:
    """Plain values that differ where the content differs, as far as is known without reading it."""
    if isinstance(place, Path):
        status = place.stat()
        return status.st_size, status.st_mtime_ns
    return (place.length, place.checksum) if isinstance(place, Part) else (place.address,)

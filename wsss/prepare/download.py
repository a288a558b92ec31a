"""Files from the network, resumed where they broke off, and archives unpacked safely: whole or not at all."""

import hashlib
import http.client
import os
import posixpath
import re
import shutil
import stat
import tarfile
import time
import urllib.error
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO
from urllib import request

from wsss import InputError, __version__
from wsss.data.files import PathLike, reading
from wsss.writing import explain_refusal

Progress = Callable[[int, int | None], None]
"""Called with what is done and, where known, the total; whatever it raises ends the work, which can go on later."""

CHUNK = 1 << 20
PAUSE = 1.0  # seconds before the next attempt, twice as many after each that brought nothing
RETRIED = (408, 425, 429)  # the client errors that pass; those of the server (5xx) may, too
HANDLERS = (  # of http, https and file URLs and nothing else, wherever a server redirects to
    *(request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler, request.FileHandler),
    *(request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler, request.HTTPErrorProcessor),
)
BLOCK = 4096  # bytes that the smallest file takes on disk
LIMIT = 100 << 30


class _DroppedError(Exception):
    """The connection failed or ended early: the next one may go on."""

    def __init__(self, error: object) -> None:
        reason = getattr(error, "reason", error)
        super().__init__(getattr(reason, "strerror", None) or str(reason) or type(reason).__name__)


@dataclass
class _Served:
    """What this process has heard of the server's file, to tell it from a later one under the same URL."""

    validator: str | None = None  # as If-Range takes it
    size: int | None = None


def fetch(
    url: str,
    path: PathLike,
    sha256: str | None = None,
    md5: str | None = None,
    progress: Progress | None = None,
    timeout: float = 30.0,
    attempts: int = 5,
) -> None:
    """Downloads a file of an http, https or file URL; `path` appears whole and with the right checksum.

    What came is kept in `<path>.part` and resumed by the next attempt, unless the server's file has changed or the
    server only sends whole files. The next process resumes it where a checksum is given, and starts over if the result
    does not have it; without one it starts anew, since ETag and Last-Modified are not remembered and nothing tells
    whether the rest fits. A file that is there is checked and kept. One process at a time.

    Args:
        url: where the file is.
        path: where it goes; its folder is made.
        sha256, md5: hexadecimal checksums; a file without one is checked by its size alone.
        progress: gets the bytes that are there and all bytes, None where the server does not tell.
        timeout: seconds without an answer after which a connection is given up.
        attempts: connections in a row that bring nothing new before the download is given up.

    Raises:
        InputError: another kind of URL, a refusal such as 404, too many attempts, a wrong checksum (the part is
            removed), a full disk.
    """
    path, expected = Path(path), {k: v.lower() for k, v in (("sha256", sha256), ("md5", md5)) if v}
    scheme = _known_scheme(url)
    if path.exists():
        if wrong := _wrong_checksum(path, expected):
            raise InputError(f"{path} has {wrong}: remove it to fetch it again, or correct the checksum.")
        return
    part = path.with_name(f"{path.name}.part")
    with explain_refusal(part):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not expected:
            part.unlink(missing_ok=True)
    served, resumed, stalled, most = _Served(), part.exists(), 0, _size(part)
    while True:
        try:
            _transfer(url, part, served, progress, timeout)
        except _DroppedError as error:
            stalled = 0 if _size(part) > most else stalled + 1
            most = max(most, _size(part))
            if stalled >= (1 if scheme == "file" else attempts):
                kept = f"what came is kept in {part}" if part.exists() else f"or put the file at {path}"
                raise InputError(f"{url} cannot be fetched ({error}): try again later, {kept}.") from error
            if not expected and served == _Served():  # nothing could tell whether the rest fits
                part.unlink(missing_ok=True)
            time.sleep(PAUSE * 2**stalled)
            continue
        if not (wrong := _wrong_checksum(part, expected)):
            break
        part.unlink()
        if not resumed:
            raise InputError(f"{url} has {wrong}: its download was removed, try again or give another URL or checksum.")
        resumed = False
    os.replace(part, path)


def _known_scheme(url: str) -> str:
    scheme = url.partition(":")[0].lower()
    if scheme not in ("http", "https", "file"):
        raise InputError(f"{url} cannot be fetched: give a URL that starts with https://, http:// or file://.")
    return scheme


def _transfer(url: str, part: Path, served: _Served, progress: Progress | None, timeout: float) -> None:
    """Completes `part` over one connection, or raises _DroppedError."""
    offset = _size(part)
    with _open(url, part, offset, served.validator, timeout) as response:
        if response.status == 416 and served == _Served():
            return  # another process may have had all of it: the checksum tells
        tag, length = response.headers.get("ETag"), response.headers.get("Content-Length", "")
        found = _Served(tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified"))
        if offset and response.status in (206, 416):
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            found.size = int(span[2]) if span and span[2] != "*" else None
            # a server may honour Range and know nothing of If-Range
            pairs = (served.validator, found.validator), (served.size, found.size)
            if not span or int(span[1]) != offset or any(a and b and a != b for a, b in pairs):
                part.unlink()
                served.validator = served.size = None
                return _transfer(url, part, served, progress, timeout)
        elif response.status in (None, 200):  # a file URL has no status
            part.unlink(missing_ok=True)
            offset, served.validator = 0, None
            served.size = int(length) if length.isdecimal() else None
        else:
            raise _DroppedError(f"{response.status} {response.reason}")
        served.validator, served.size = found.validator or served.validator, found.size or served.size
        if served.size is not None and served.size - offset > (free := shutil.disk_usage(part.parent).free):
            raise InputError(f"{url} needs {served.size - offset} bytes more, {part.parent} has {free}: make room.")
        with explain_refusal(part), open(part, "ab") as file:
            while True:
                try:
                    chunk = response.read1(CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise _DroppedError(error) from error
                if not chunk:
                    break
                offset += file.write(chunk)
                if progress:
                    progress(offset, served.size)
    if served.size is not None and offset != served.size:
        if offset > served.size:
            part.unlink()
        raise _DroppedError(f"the connection ended after {offset} of {served.size} bytes")


def _open(url: str, part: Path, offset: int, validator: str | None, timeout: float) -> Any:
    """The server's answer from `offset` on; its status is 416 where its file is not that long."""
    headers = {"User-Agent": f"wsss/{__version__}"}
    if offset:
        headers |= {"Range": f"bytes={offset}-"} | ({"If-Range": validator} if validator else {})
    opener = request.OpenerDirector()
    for handler in HANDLERS:
        opener.add_handler(handler())
    try:
        return opener.open(request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:
            return error
        error.close()
        reason = " ".join(f"{error.code} {error.reason}".split())
        if error.code in RETRIED or error.code >= 500:
            raise _DroppedError(reason) from error
        path = part.with_suffix("")
        raise InputError(f"{url} cannot be fetched ({reason}): give another URL or put the file at {path}.") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise InputError(f"{url} is no valid URL ({error}): correct it.") from error
    except (OSError, http.client.HTTPException) as error:
        raise _DroppedError(error) from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _wrong_checksum(path: Path, expected: dict[str, str]) -> str | None:
    for name, checksum in expected.items():
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, name).hexdigest()
        if found != checksum:
            return f"the {name} {found}, expected {checksum}"
    return None


def unpack(archive: PathLike, folder: PathLike, progress: Progress | None = None, limit: int = LIMIT) -> None:
    """Unpacks a tar (compressed or not) or zip archive; `folder` appears whole or not at all. One process at a time.

    Only files and folders are made: a link is unpacked as a copy of the file of the archive that it names.

    Args:
        archive: the file.
        folder: takes the content; must be absent or empty.
        progress: gets the bytes of the archive that were read and its size.
        limit: bytes that the content may take, where so many are free on the disk.

    Raises:
        InputError: no archive or a damaged one; a member that would lie outside of the folder, a device, a link
            to what is no file of the archive; content beyond the limit; a folder that is filled or cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} is there already: remove it to unpack {archive} again.")
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed process
    try:
        for done, total in _extract(archive, scratch, limit):
            if progress:
                progress(done, total)
        with explain_refusal(folder):
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _extract(archive: Path, scratch: Path, limit: int) -> Iterator[tuple[int, int]]:
    """Makes a folder of an archive; gives how many of its bytes were read, and their number, after each member."""
    with reading(archive, "a tar or zip archive", "remove it and fetch it again"), open(archive, "rb") as file:
        members = _tar_members if tarfile.is_tarfile(file) else _zip_members
        total = file.seek(0, os.SEEK_END)
        file.seek(0)
        with explain_refusal(scratch):
            scratch.mkdir(parents=True)
        left = min(free := shutil.disk_usage(scratch).free, limit)
        for name, size, extract in members(file, archive):
            given = PureWindowsPath(name)  # takes / and \ alike and knows drives
            if given.anchor or ".." in given.parts:
                found = f"{archive} holds {name!r}, which would lie outside of its folder"
                raise InputError(f"{found}: do not use this file.")
            left -= BLOCK + size
            if left < 0:
                allowed = f"{limit} bytes are allowed" if limit <= free else f"{free} bytes are free: make room"
                raise InputError(f"{archive} holds too much, only {allowed}.")
            try:
                extract(scratch)
            except OSError as error:
                if error.errno is None:  # so gzip and bz2 say that the archive is damaged
                    raise
                with explain_refusal(scratch / name):
                    raise
            yield min(file.tell(), total), total


Members = Iterator[tuple[str, int, Callable[[Path], object]]]
"""Names, bytes at most, and what extracts them into a folder."""


class _Header(tarfile.TarInfo):
    """Of an archive that has to end as tar says: tarfile itself takes damage, or the end of the file, for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the block of zeros that ends an archive
                raise
            raise tarfile.ReadError("it is damaged or ends early") from error


def _tar_members(file: BinaryIO, archive: Path) -> Members:
    """Links come last, each as the file that it leads to: one on disk could lead what follows out of the folder."""
    with tarfile.open(fileobj=file, tarinfo=_Header) as tar:
        named: dict[str, tarfile.TarInfo] = {}
        for member in tar:
            named[posixpath.normpath(member.name)] = member
            if member.isfile() or member.isdir():
                yield member.name, member.size, partial(tar.extract, member, set_attrs=False, filter="data")
            elif not (member.issym() or member.islnk()):
                raise InputError(f"{archive} holds {member.name!r}, a device or pipe: do not use this file.")
        for link in (member for member in tar if member.issym() or member.islnk()):
            found: tarfile.TarInfo | None = link
            for _ in range(40):  # as many as Linux follows
                if found and (found.issym() or found.islnk()):
                    folder = posixpath.dirname(found.name) if found.issym() else ""
                    found = named.get(posixpath.normpath(posixpath.join(folder, found.linkname)))
            if not found or not found.isfile():
                target = f"a link to {link.linkname!r}, which is no file of the archive"
                raise InputError(f"{archive} holds {link.name!r}, {target}: do not use this file.")
            copy = found.replace(name=link.name, deep=False)
            yield copy.name, copy.size, partial(tar.extract, copy, set_attrs=False, filter="data")


def _zip_members(file: BinaryIO, archive: Path) -> Members:
    with zipfile.ZipFile(file) as opened:
        for member in opened.infolist():
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise InputError(f"{archive} holds {member.filename!r}, a link or device: do not use this file.")
            name = member.filename
            member.filename = name.replace("\\", "/")  # some of Windows' tools write \
            yield name, member.file_size, partial(opened.extract, member)

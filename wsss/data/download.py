"""Files from the network, resumed where they broke off, and archives unpacked safely: whole or not at all."""

import hashlib
import http.client
import json
import os
import re
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PureWindowsPath
from typing import IO, Any, BinaryIO

from wsss import InputError, __version__
from wsss.data.files import PathLike, reading, writing

Progress = Callable[[int, int | None], None]
"""Called with what is done and, where known, the total; whatever it raises ends the work, which can go on later."""

CHUNK = 1 << 20
PAUSE = 1.0  # seconds between attempts
RETRIED = (408, 425, 429)  # the client errors that pass; those of the server (5xx) may, too
BLOCK = 4096  # bytes that the smallest file takes on disk
LIMIT = 100 << 30


class _DroppedError(Exception):
    """The connection failed or ended early: the next one may go on."""


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

    What came is kept in `<path>.part` and resumed by the next attempt or process, unless the server's file has
    changed or the server only sends whole files. A file that is there is checked and kept. One process at a time.

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
    scheme = url.partition(":")[0].lower()
    if scheme not in ("http", "https", "file"):
        raise InputError(f"{url} cannot be fetched: give a URL that starts with https://, http:// or file://.")
    if path.exists():
        if wrong := _wrong_checksum(path, expected):
            raise InputError(f"{path} has {wrong}: remove it to fetch it again, or correct the checksum.")
        return
    part = path.with_name(f"{path.name}.part")
    with writing(part):
        path.parent.mkdir(parents=True, exist_ok=True)
    stalled, most = 0, _size(part)
    while True:
        try:
            _transfer(url, part, progress, timeout)
            break
        except _DroppedError as error:
            stalled = 0 if _size(part) > most else stalled + 1
            most = max(most, _size(part))
            if stalled >= (1 if scheme == "file" else attempts):
                kept = f"what came is kept in {part}" if part.exists() else f"or put the file at {path}"
                raise InputError(f"{url} cannot be fetched ({error}): try again later, {kept}.") from error
        time.sleep(PAUSE)
    if wrong := _wrong_checksum(part, expected):
        _discard(part)
        raise InputError(f"{url} has {wrong}: its download was removed, try again or give another URL or checksum.")
    os.replace(part, path)
    _discard(part)


def _transfer(url: str, part: Path, progress: Progress | None, timeout: float) -> None:
    """Completes `part` over one connection, or raises _DroppedError."""
    known = _read_note(part, url)
    if not (known.get("validator") or known.get("size")):  # no one could tell whether the rest fits what is there
        _discard(part)
    offset, size = _size(part), known.get("size")
    if part.exists() and offset == size:
        return
    response = _open(url, offset, known.get("validator"), part, timeout)
    if response is None:
        _discard(part)
        return _transfer(url, part, progress, timeout)
    with response:
        note: dict[str, Any] = {"url": url, "validator": _validator(response.headers), "size": None}
        if response.status == 206 and offset:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
            note["size"] = int(span[2]) if span and span[2] != "*" else None
            # a server may honour Range and know nothing of If-Range
            changed = any(known[k] and note[k] and known[k] != note[k] for k in ("validator", "size"))
            if not span or int(span[1]) != offset or changed:
                _discard(part)
                return _transfer(url, part, progress, timeout)
            size = size or note["size"]
        elif response.status in (None, 200):  # a file URL has no status
            _discard(part)
            length = response.headers.get("Content-Length", "")
            note["size"] = size = int(length) if length.isdecimal() else None
            offset = 0
            with writing(part):
                _note(part).write_text(json.dumps(note))
        else:
            raise _DroppedError(f"{response.status} {response.reason}")
        if size is not None and size - offset > (free := shutil.disk_usage(part.parent).free):
            raise InputError(f"{url} needs {size - offset} bytes more, {part.parent} has {free}: make room.")
        with writing(part):
            file = open(part, "ab" if offset else "wb", buffering=0)  # noqa: SIM115
        with file:
            while True:
                with _connecting():
                    chunk = response.read1(CHUNK)
                if not chunk:
                    break
                offset += len(chunk)
                with writing(part):
                    while chunk:  # a disk that is nearly full takes a part
                        chunk = chunk[file.write(chunk) :]
                if progress:
                    progress(offset, size)
    if size is not None and offset != size:
        if offset > size:
            _discard(part)
        raise _DroppedError(f"the connection ended after {offset} of {size} bytes")


def _open(url: str, offset: int, validator: str | None, part: Path, timeout: float) -> Any:
    """The server's answer from `offset` on; None where its file is not that long."""
    headers = {"User-Agent": f"wsss/{__version__}"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if validator:
            headers["If-Range"] = validator
    try:
        with _connecting():
            return _opener().open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:
            return None
        reason = " ".join(f"{error.code} {error.reason}".split())
        if error.code in RETRIED or error.code >= 500:
            raise _DroppedError(reason) from error
        path = part.with_suffix("")
        raise InputError(f"{url} cannot be fetched ({reason}): give another URL or put the file at {path}.") from error
    except (ValueError, http.client.InvalidURL) as error:
        raise InputError(f"{url} is no valid URL ({error}): correct it.") from error


def _opener() -> urllib.request.OpenerDirector:
    """Opens http, https and file URLs and nothing else, wherever a server redirects to."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.FileHandler,
    ):
        opener.add_handler(handler())
    return opener


@contextmanager
def _connecting() -> Iterator[None]:
    try:
        yield
    except (urllib.error.HTTPError, http.client.InvalidURL):
        raise
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise _DroppedError(str(getattr(reason, "strerror", None) or reason) or type(reason).__name__) from error


def _validator(headers: Any) -> str | None:
    """What tells one version of the server's file from the next, as If-Range takes it."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path, url: str) -> dict[str, Any]:
    """What the part is of: url, validator and size; empty where that is unknown or another URL's."""
    try:
        note = json.loads(_note(part).read_bytes())
    except (OSError, ValueError):  # none yet, or the disk was full when it was written
        return {}
    return note if isinstance(note, dict) and note.keys() == {"url", "validator", "size"} and note["url"] == url else {}


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


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
        with _opening(archive), open(archive, "rb") as file:
            read_members = _tar_members if tarfile.is_tarfile(file) else _zip_members
        with writing(scratch):
            scratch.mkdir(parents=True)
        with open(archive, "rb") as file:
            _write_members(read_members(file, archive), archive, file, scratch, progress, limit)
        with writing(folder):
            os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _opening(archive: Path) -> AbstractContextManager[None]:
    return reading(archive, "a tar or zip archive", "remove it and fetch it again")


Members = Iterator[tuple[str, IO[bytes] | None]]
"""Names and contents; a folder has none."""


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
    with tarfile.open(fileobj=file, tarinfo=_Header) as tar:
        for member in tar:
            if not (member.isdir() or member.isfile() or member.issym() or member.islnk()):
                raise InputError(f"{archive} holds {member.name!r}, a device or pipe: do not use this file.")
            try:
                source = tar.extractfile(member)  # of a link what it names, never from outside of the archive
            except (KeyError, RecursionError):
                source = None
            if source is None and not member.isdir():
                raise InputError(
                    f"{archive} holds {member.name!r}, a link to {member.linkname!r}, which is no file of the archive: "
                    "do not use this file."
                )
            yield member.name, source


def _zip_members(file: BinaryIO, archive: Path) -> Members:
    with zipfile.ZipFile(file) as opened:
        for member in opened.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise InputError(f"{archive} holds {member.filename!r}, a link or device: do not use this file.")
            yield member.filename, None if member.is_dir() else opened.open(member)


def _write_members(
    members: Members, archive: Path, file: BinaryIO, scratch: Path, progress: Progress | None, limit: int
) -> None:
    free, size = shutil.disk_usage(scratch).free, archive.stat().st_size
    left = min(free, limit)
    while True:
        with _opening(archive):
            name, source = next(members, (None, None))
        if name is None:
            return
        given = PureWindowsPath(name)  # takes / and \ alike and knows drives
        if given.anchor or ".." in given.parts or "\0" in name:
            raise InputError(f"{archive} holds {name!r}, which would lie outside of its folder: do not use this file.")
        path = scratch.joinpath(*given.parts)
        left -= BLOCK
        with writing(path):
            (path if source is None else path.parent).mkdir(parents=True, exist_ok=True)
            if source is not None:
                with source, open(path, "wb") as target:
                    for chunk in _chunks(source, archive):
                        left -= len(chunk)
                        if left < 0:
                            break
                        target.write(chunk)
        if left < 0:
            allowed = f"{limit} bytes are allowed" if limit <= free else f"{free} bytes are free: make room"
            raise InputError(f"{archive} holds too much, only {allowed}.")
        if progress:
            progress(min(file.tell(), size), size)


def _chunks(source: IO[bytes], archive: Path) -> Iterator[bytes]:
    while True:
        with _opening(archive):
            chunk = source.read(CHUNK)
        if not chunk:
            return
        yield chunk

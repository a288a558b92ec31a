"""A web server with the faults of real ones and archives with those of hostile ones, shared by the tests."""

import io
import re
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

CONTENT = bytes(range(256)) * 2000


class Server:
    """A file at `url`, served as the attributes say."""

    content = CONTENT
    drop: int | None = None  # bytes after which a connection is closed
    ranges = True
    if_range = True
    tag: str | None = '"1"'
    extra = 0  # what Content-Length says too much
    length = True
    codes: tuple[int, ...] = ()  # answers of the first requests
    location: str | None = None

    def __init__(self) -> None:
        self.seen: list[str | None] = []  # the Range of every request
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/a.bin"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        span = request.headers["Range"]
        self.seen.append(span)
        if self.location:
            request.send_response(302)
            request.send_header("Location", self.location)
            request.end_headers()
            return
        if len(self.seen) <= len(self.codes):
            request.send_error(self.codes[len(self.seen) - 1])
            return
        start = int(re.findall(r"\d+", span)[0]) if span and self.ranges else 0
        if self.if_range and request.headers["If-Range"] not in (None, self.tag):
            start = 0
        if start >= len(self.content) and start:
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.tag:
            request.send_header("ETag", self.tag)
        if self.length:
            request.send_header("Content-Length", str(len(self.content) - start + self.extra))
        request.end_headers()
        stop = None if self.drop is None else start + self.drop
        request.wfile.write(self.content[start:stop])


class FolderServer:
    """The files of a folder below `url`, whole or in ranges, and 404 for what is not there; nothing is listed."""

    ranges = True
    broken: tuple[str, ...] = ()  # names that are answered by 500

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seen: list[tuple[str, str | None]] = []  # path and Range of every request
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def do_HEAD(self) -> None:
                server.answer(self)

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name, span = unquote(request.path.lstrip("/")), request.headers["Range"]
        self.seen.append((name, span))
        path = self.root / name
        if name in self.broken or not path.is_file():
            request.send_error(500 if name in self.broken else 404)
            return
        content, size = path.read_bytes(), path.stat().st_size
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", span) if span and self.ranges else None
        if part:
            start, end = int(part[1]), min(int(part[2] or size - 1), size - 1)
            content = content[start : end + 1]
            if not content:
                request.send_error(416)
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        else:
            request.send_response(200)
        if self.ranges:
            request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(content)


def make_tar(path: Path, members: dict[str, Any], mode: str = "w") -> Path:
    """Names and contents: bytes, None for a folder, "->target" for a symbolic link, "=>target" for a hard one."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type = tarfile.SYMTYPE if content.startswith("->") else tarfile.LNKTYPE
                info.linkname = content[2:]
            elif isinstance(content, bytes):
                info.size = len(content)
            else:
                info.type = content[0]
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path

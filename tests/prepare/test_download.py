import hashlib
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from served import CONTENT, Server, make_tar

from wsss import InputError
from wsss.prepare import download
from wsss.prepare.download import fetch, unpack

MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    server = Server()
    yield server
    server.close()


def kill_after(count: int) -> Callable[[int, int | None], None]:
    def progress(done: int, total: int | None) -> None:
        if done >= count:
            raise KeyboardInterrupt

    return progress


def refused(*words: str, call: Callable[..., Any] = fetch, args: tuple[Any, ...] = (), **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_whole_file_with_progress(server: Server, tmp_path: Path) -> None:
    path, calls = tmp_path / "deep" / "a.bin", []
    fetch(server.url, path, hashlib.sha256(CONTENT).hexdigest(), progress=lambda *call: calls.append(call))
    assert path.read_bytes() == CONTENT
    assert calls[-1] == (len(CONTENT), len(CONTENT))
    assert calls == sorted(calls)
    assert os.listdir(path.parent) == ["a.bin"]
    fetch(server.url, path, md5=MD5.upper())
    assert server.seen == [None]


def test_dropped_connections_are_resumed(server: Server, tmp_path: Path) -> None:
    server.drop = 60_000
    fetch(server.url, tmp_path / "a.bin", attempts=1)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(server.seen) == 9  # each brought something new
    assert server.seen[:3] == [None, "bytes=60000-", "bytes=120000-"]


def test_killed_processes_are_resumed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch(server.url, tmp_path / "a.bin", progress=kill_after(1))
    size = (tmp_path / "a.bin.part").stat().st_size
    assert 0 < size < len(CONTENT)
    assert not (tmp_path / "a.bin").exists()
    fetch(server.url, tmp_path / "a.bin", md5=MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.seen == [None, f"bytes={size}-"]
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_complete_part_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fetch(server.url, tmp_path / "a.bin", progress=kill_after(len(CONTENT)))
    fetch(server.url, tmp_path / "a.bin", md5=MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert server.seen == [None, f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("size", [9, len(CONTENT), len(CONTENT) + 9])
def test_a_part_that_does_not_fit_is_fetched_anew(server: Server, tmp_path: Path, size: int) -> None:
    """Another URL's, for instance: without a checksum it is not used, with one it is found out."""
    for md5, requests in ((None, [None]), (MD5, [f"bytes={size}-", None])):
        (tmp_path / "a.bin").unlink(missing_ok=True)
        (tmp_path / "a.bin.part").write_bytes(bytes(size))
        server.seen.clear()
        fetch(server.url, tmp_path / "a.bin", md5=md5)
        assert (tmp_path / "a.bin").read_bytes() == CONTENT
        assert server.seen == requests
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("tags", [('"1"', '"2"'), (None, None)])
@pytest.mark.parametrize("length", [100, len(CONTENT) + 3])
def test_a_changed_file_starts_over(
    server: Server, tmp_path: Path, if_range: bool, ranges: bool, tags: tuple[str | None, str | None], length: int
) -> None:
    server.if_range, server.ranges, server.tag, server.drop = if_range, ranges, tags[0], 60_000

    def change(done: int, total: int | None) -> None:
        server.content, server.tag, server.drop = bytes(length), tags[1], None

    fetch(server.url, tmp_path / "a.bin", progress=change)
    assert (tmp_path / "a.bin").read_bytes() == bytes(length)
    assert len(server.seen) >= 2
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_server_that_ignores_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.ranges, server.drop = False, 60_000
    refused("60000 of 512000", "a.bin.part", "again later", args=(server.url, tmp_path / "a.bin"), attempts=3)
    assert len(server.seen) == 4  # the first brought something
    server.drop = None
    fetch(server.url, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_unknown_length(server: Server, tmp_path: Path) -> None:
    server.length = False
    totals = set()
    fetch(server.url, tmp_path / "a.bin", progress=lambda _, total: totals.add(total))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert totals == {None}


def test_wrong_length(server: Server, tmp_path: Path) -> None:
    server.extra = 5  # more than comes: cannot be told from a dropped connection
    refused("512000 of 512005", args=(server.url, tmp_path / "a.bin"), attempts=2)
    (tmp_path / "a.bin.part").unlink()
    server.extra = -5  # less
    refused("md5", "removed", args=(server.url, tmp_path / "a.bin"), md5=MD5)
    assert not list(tmp_path.iterdir())


def test_wrong_checksum_removes_the_part(server: Server, tmp_path: Path) -> None:
    refused("sha256", "0" * 64, server.url, args=(server.url, tmp_path / "a.bin"), sha256="0" * 64)
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.bin").write_bytes(b"mine")
    refused("a.bin has the md5", "remove it", args=(server.url, tmp_path / "a.bin"), md5="0" * 32)
    assert (tmp_path / "a.bin").read_bytes() == b"mine"


def test_temporary_errors_are_waited_out(server: Server, tmp_path: Path) -> None:
    server.codes = (503, 429, 500)
    fetch(server.url, tmp_path / "a.bin", attempts=4)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("code", [403, 404, 410])
def test_refusals_are_one_sentence(server: Server, tmp_path: Path, code: int) -> None:
    server.codes = (code,)
    refused(str(code), server.url, str(tmp_path / "a.bin"), args=(server.url, tmp_path / "a.bin"))
    assert len(server.seen) == 1


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/a"])
def test_redirections_stay_on_http(server: Server, tmp_path: Path, target: str) -> None:
    server.location = target
    refused(server.url, args=(server.url, tmp_path / "a.bin"), attempts=1)
    assert not list(tmp_path.iterdir())


def test_redirections_are_followed(server: Server, tmp_path: Path) -> None:
    other = Server()
    other.location = server.url
    fetch(other.url, tmp_path / "a.bin")
    other.close()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_no_server(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    server.close()
    refused("Connection refused", "try again", args=(server.url, tmp_path / "a.bin"), attempts=3)
    assert len(pauses) == 2


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/a"
        refused("timed out", args=(url, tmp_path / "a"), attempts=1, timeout=0.1)


def test_files_are_copied(tmp_path: Path) -> None:
    (tmp_path / "a b").write_bytes(CONTENT)
    fetch((tmp_path / "a b").as_uri(), tmp_path / "b", md5=MD5)
    assert (tmp_path / "b").read_bytes() == CONTENT
    refused("No such file", args=((tmp_path / "none").as_uri(), tmp_path / "c"))


@pytest.mark.parametrize(
    "url", ["ftp://host/a", "a.tar", "", "data:,x", "http://[bad", "http://host:x/", "http://ho st/a", "http:///a"]
)
def test_other_urls_are_refused(tmp_path: Path, url: str) -> None:
    refused(url, args=(url, tmp_path / "a"), attempts=1)


def test_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused("a.bin.part", "cannot be written", "make room", args=(server.url, tmp_path / "a.bin"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.bin.part").stat().st_size == 100_000
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda _: Usage(7))
        refused("412000 bytes more", "has 7", args=(server.url, tmp_path / "a.bin"), md5=MD5)
    fetch(server.url, tmp_path / "a.bin", md5=MD5)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    refused("cannot be written", args=(server.url, tmp_path / "a.bin" / "b"))


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free


# Archives


def make_zip(path: Path, members: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            opened.writestr(info, content)
    return path


GOOD = {"a/b.txt": b"b", "a/c/d.bin": CONTENT, "e.txt": b""}


def tree(folder: Path) -> dict[str, bytes]:
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "zip"])
def test_archives_are_unpacked(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.archive"
    if mode == "zip":
        make_zip(path, {**GOOD, "empty/": b""})
    else:
        make_tar(path, {**GOOD, "./empty": None}, mode)
    calls: list[tuple[int, int | None]] = []
    unpack(path, tmp_path / "deep/out", lambda *call: calls.append(call))
    assert tree(tmp_path / "deep/out") == GOOD
    assert (tmp_path / "deep/out/empty").is_dir()
    assert os.listdir(tmp_path / "deep") == ["out"]
    assert all(0 < done <= total == path.stat().st_size for done, total in calls if total)
    refused("there already", "remove it", call=unpack, args=(path, tmp_path / "deep/out"))


def test_backslashes_in_a_zip_are_folders(tmp_path: Path) -> None:
    unpack(make_zip(tmp_path / "a.zip", {"a\\b": b"1", "a/c": b"2"}), tmp_path / "out")
    assert tree(tmp_path / "out") == {"a/b": b"1", "a/c": b"2"}


def test_links_become_copies(tmp_path: Path) -> None:
    links = {"a/l": "->b.txt", "a/c/n": "->../l", "early": "->z"}
    unpack(make_tar(tmp_path / "a.tar", {**links, **GOOD, "z": b"z", "hard": "=>a/b.txt"}), tmp_path / "out")
    copies = {"a/l": b"b", "a/c/n": b"b", "early": b"z", "hard": b"b"}
    assert tree(tmp_path / "out") == {**GOOD, **copies, "z": b"z"}


@pytest.mark.parametrize(
    "name", ["/etc/x", "../x", "a/../../x", "a/..", "..", "C:\\x", "a\\..\\..\\x", "\\\\host\\share\\x", "\\x"]
)
def test_members_outside_are_refused(tmp_path: Path, name: str) -> None:
    before = set(tmp_path.parent.rglob("*"))
    for path in (make_tar(tmp_path / "a.tar", {"ok": b"1", name: b"2"}), make_zip(tmp_path / "a.zip", {name: b"2"})):
        refused(repr(name), "outside", path.name, call=unpack, args=(path, tmp_path / "out"))
    assert set(tmp_path.parent.rglob("*")) - before == {tmp_path / "a.tar", tmp_path / "a.zip"}


@pytest.mark.parametrize(
    ("members", "word"),
    [
        ({"l": "->/etc/passwd"}, "/etc/passwd"),
        ({"l": "->../../x"}, "../../x"),
        ({"l": "=>/etc/passwd"}, "/etc/passwd"),
        ({"l": "->l"}, "no file of the archive"),
        ({"l": "->m", "m": "->l"}, "no file of the archive"),
        ({"d": None, "l": "->d"}, "no file of the archive"),
        ({"l": (tarfile.CHRTYPE,)}, "device"),
        ({"l": (tarfile.BLKTYPE,)}, "device"),
        ({"l": (tarfile.FIFOTYPE,)}, "pipe"),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, members: dict[str, Any], word: str) -> None:
    path = make_tar(tmp_path / "a.tar", {"ok": b"1", **members})
    refused("'l'", word, "a.tar", call=unpack, args=(path, tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a.tar"]


def test_links_in_a_zip_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"l": b"/etc/passwd"}, stat.S_IFLNK | 0o777)
    refused("'l'", "link", call=unpack, args=(path, tmp_path / "out"))
    unpack(make_zip(tmp_path / "b.zip", {"l": b"1"}, stat.S_IFREG | 0o644), tmp_path / "out")
    assert tree(tmp_path / "out") == {"l": b"1"}


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = {f"{i}": b"" for i in range(300)}
    for path in (
        make_zip(tmp_path / "a.zip", {"bomb": bytes(3_000_000)}),
        make_tar(tmp_path / "a.tgz", {"bomb": bytes(3_000_000)}, "w:gz"),
        make_zip(tmp_path / "b.zip", many),
    ):
        refused("too much", "1000000 bytes are allowed", call=unpack, args=(path, tmp_path / "out"), limit=1_000_000)
        with monkeypatch.context() as patch:
            patch.setattr(download.shutil, "disk_usage", lambda _: Usage(1_000_000))
            refused("too much", "1000000 bytes are free", call=unpack, args=(path, tmp_path / "out"))
        unpack(path, tmp_path / f"{path.name}.out", limit=3_100_000)
        path.unlink()
    assert sorted(os.listdir(tmp_path)) == ["a.tgz.out", "a.zip.out", "b.zip.out"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "zip"])
def test_damaged_archives_leave_nothing(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a"
    if mode == "zip":
        make_zip(path, GOOD)
    else:
        make_tar(path, GOOD, mode)
    whole = path.read_bytes()
    cuts = [whole[: len(whole) * part // 10] for part in range(0, 9)]
    if mode == "w":
        cuts += [whole[:1024], whole[: 1024 + 100], whole[:1024] + b"x" * 512 + whole[1536:]]  # at the second member
    if mode == "zip":
        flipped = bytearray(whole)
        flipped[100] ^= 255  # within the second member's data
        cuts.append(bytes(flipped))
    for cut in cuts:
        path.write_bytes(cut)
        refused(str(path), "tar or zip archive", "fetch it again", call=unpack, args=(path, tmp_path / "out"))
        assert os.listdir(tmp_path) == ["a"]
    refused("No such file", call=unpack, args=(tmp_path / "none", tmp_path / "out"))


def test_names_that_clash_are_refused(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", {"x": b"1", "x/y": b"2"})
    refused("cannot be written", call=unpack, args=(path, tmp_path / "out"))
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_killed_unpacking_leaves_nothing(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tgz", GOOD, "w:gz")
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "left by a process that was ended").touch()
    with pytest.raises(KeyboardInterrupt):
        unpack(path, tmp_path / "out", kill_after(1))
    assert os.listdir(tmp_path) == ["a.tgz"]
    (tmp_path / "out").mkdir()
    unpack(path, tmp_path / "out")
    assert tree(tmp_path / "out") == GOOD

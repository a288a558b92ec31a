"""Where the files of many images go: into folders, one each, or into tar files that hold a thousand of them."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from wsss import InputError
from wsss.places import Part
from wsss.shards import Parts, Tar, check_size, columns, read_index
from wsss.writing import write_whole

OUTPUTS = ("files", "tar")
TARS = "tars"
"""The folder of tar files."""


class Store(ABC):
    """Files by their relative path, each whole or absent; several processes may write to one.

    Args:
        out: the folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out

    @abstractmethod
    def add(self, files: Mapping[str, bytes]) -> None:
        """Those of an image, the last of which is there only if all are."""

    @abstractmethod
    def has(self, name: str) -> bool: ...

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Raises InputError where it is not what was written."""

    @abstractmethod
    def where(self, name: str) -> str:
        """It is, for people."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was begun, and look at what other processes have finished; more may follow."""


class Files(Store):
    """Each by itself."""

    def add(self, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            with write_whole(self.out / name) as file:
                file.write(content)

    def has(self, name: str) -> bool:
        return (self.out / name).is_file()

    def read(self, name: str) -> bytes:
        return (self.out / name).read_bytes()

    def where(self, name: str) -> str:
        return str(self.out / name)

    def close(self) -> None: ...


class Tars(Store):
    """`tars/<hash>.tar` with an index each, named after its first file; unpacked in `out` they are what `Files` writes.

    What counts is in a complete tar file: of one that was begun nothing is left when a process is killed.

    Args:
        size: images in a tar file.
    """

    def __init__(self, out: Path, size: int) -> None:
        super().__init__(out)
        self.size, self.begun = size, 0
        self.open: Tar | None = None
        self.known: dict[str, Part] = {}
        self.seen: set[str] = set()
        self.close()

    def add(self, files: Mapping[str, bytes]) -> None:
        if self.open is None:
            digest = hashlib.sha256(os.fsencode(next(iter(files)))).hexdigest()[:16]
            self.open, self.begun = Tar(self.out / TARS / f"{digest}.tar").__enter__(), 0
        try:
            for name, content in files.items():
                self.open.add(name, content)
        except BaseException as error:  # half an image is in it
            broken, self.open = self.open, None
            broken.__exit__(type(error), error, error.__traceback__)
            raise
        self.begun += 1
        if self.begun == self.size:
            self.close()

    def close(self) -> None:
        if self.open is not None:
            finished, self.open = self.open, None
            finished.says = {"names": [row.name for row in finished.rows], "members": columns(finished.rows)}
            finished.__exit__(None, None, None)
        for index in sorted((self.out / TARS).glob("*.json")):
            if index.name not in self.seen:
                content = read_index(index, {"bytes": int, "names": list, "members": dict})
                tar = index.with_suffix(".tar")
                check_size(tar, content["bytes"])
                names, parts = content["names"], Parts([tar], [content["bytes"]], [content["members"]], index)
                if len(names) != len(parts) or not all(isinstance(name, str) for name in names):
                    raise InputError(f"{index} names other members than it lists: remove it, and run again.")
                self.known |= zip(names, parts, strict=True)
                self.seen.add(index.name)

    def has(self, name: str) -> bool:
        return name in self.known

    def read(self, name: str) -> bytes:
        return self.known[name].read()

    def where(self, name: str) -> str:
        return f"{name} in {self.known[name].shard}"


def open_store(out: Path, output: str, size: int) -> Store:
    """One of the kind that the user chose, in a folder that is made where it is missing.

    Raises:
        InputError: an unknown kind, a size that is none, or a folder that cannot be made.
    """
    if output not in OUTPUTS:
        raise InputError(f"output is {output!r}: expected {' or '.join(OUTPUTS)}")
    if not isinstance(size, int) or size < 1:
        raise InputError(f"images_per_tar is {size!r}: expected a whole number of at least 1")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be made a folder ({error.strerror}): give another one") from error
    return Files(out) if output == "files" else Tars(out, size)

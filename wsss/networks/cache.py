"""What frozen towers have seen, kept for images that come again."""

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from wsss import InputError
from wsss.networks.clip import Seen
from wsss.writing import write_whole


class FeatureCache:
    """What a tower saw in images that come again, in memory and in files; the least recently used go first.

    With a limit every image is looked at alone, so that what is found does not depend on what is kept. The files are
    named after all that it depends on, the tower, and the pixels that the transform has left of the image, so that
    later runs find them; each is written whole or not at all, and processes may share them.

    Args:
        key: that tells the tower from others: its weights, and what else its output depends on.
        limit_gb: that all of it may take in memory; None or 0 keeps nothing there.
        folder: of the files; None keeps none.
        folder_gb: that all files in it may take.

    Raises:
        InputError: a limit that is no number; a folder that cannot be made.
    """

    def __init__(self, key: str, limit_gb: float | None, folder: str | None = None, folder_gb: float = 20.0) -> None:
        for name, value, least in (("cache_features", limit_gb or 0, 0), ("cache_folder_gb", folder_gb, 1e-9)):
            if not isinstance(value, int | float) or not value >= least:
                raise InputError(f"{name} is {value!r}: expected a number of GB{', or null' if least == 0 else ''}")
        self.limit = (limit_gb or 0.0) * 1e9
        self.kept: OrderedDict[str, Seen] = OrderedDict()
        self.size = self.hits = 0
        self.key, self.folder_limit = key, folder_gb * 1e9
        self.folder = None if folder is None else Path(folder).expanduser()
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cache_folder={folder} cannot be made: {error.strerror}; give another") from error

    @property
    def keeps(self) -> bool:
        return bool(self.limit) or self.folder is not None

    def __call__(self, image: Tensor, look: Callable[[Tensor], Seen]) -> Seen:
        """What `look` gives for images (B, 3, H, W)."""
        if not self.keeps:
            return look(image)
        found = [self._one(one[None], look) for one in image]
        blocks, attention = (torch.cat([getattr(seen, name) for seen in found], 1) for name in ("blocks", "attention"))
        return Seen(blocks.to(image.device), attention.to(image.device), found[0].size)

    def _one(self, image: Tensor, look: Callable[[Tensor], Seen]) -> Seen:
        array, kind = image.cpu().contiguous().numpy(), image.device.type
        # another precision sees something else
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else image.dtype
        told = hashlib.sha256(f"{self.key} {kind} {precision}".encode()).hexdigest()[:32]
        key = f"{told}/{hashlib.sha256(array.tobytes() + str(array.shape).encode()).hexdigest()}"
        if key in self.kept:
            self.kept.move_to_end(key)
            self.hits += 1
            return self.kept[key]
        path = None if self.folder is None else self.folder / f"{key}.safetensors"
        seen = None if path is None else read_seen(path)
        if seen is None:
            seen = look(image)
            seen = Seen(seen.blocks.cpu(), seen.attention.cpu(), seen.size)
            if path is not None:
                self._write(path, seen)
        else:
            self.hits += 1
        self.kept[key] = seen
        self.size += _bytes(seen)
        while self.size > self.limit:
            self.size -= _bytes(self.kept.popitem(last=False)[1])
        return seen

    def _write(self, path: Path, seen: Seen) -> None:
        """A file, after room was made for it; none where it would not fit even alone."""
        content = save({"blocks": seen.blocks, "attention": seen.attention, "size": torch.tensor(seen.size)})
        if len(content) > self.folder_limit:
            return
        files = []
        assert self.folder is not None
        for file in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):  # another process has made room
                status = file.stat()
                if file.suffix == ".safetensors" or time.time() - status.st_mtime > STALE:
                    files.append((status.st_mtime, file, status.st_size))
        excess = len(content) + sum(size for _, _, size in files) - self.folder_limit
        for _, file, size in sorted(files):
            if excess <= 0:
                break
            file.unlink(missing_ok=True)
            excess -= size
        try:
            with write_whole(path) as opened:
                opened.write(content)
        except OSError as error:
            raise InputError(
                f"{path} cannot be written: {error.strerror}; set method.cache_folder_gb lower, or another cache_folder"
            ) from error


STALE = 3600.0
"""Seconds after which a file that is not finished belongs to a process that was killed."""


def read_seen(path: Path) -> Seen | None:
    """What a file of `FeatureCache` holds, which is used by that; None where there is none, or a damaged one."""
    try:
        tensors = load(path.read_bytes())
        seen = Seen(tensors["blocks"], tensors["attention"], (int(tensors["size"][0]), int(tensors["size"][1])))
        with suppress(PermissionError):  # of another user, whose file ages then
            os.utime(path)
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, IndexError):
        path.unlink(missing_ok=True)
        return None
    return seen


def _bytes(seen: Seen) -> int:
    return seen.blocks.nbytes + seen.attention.nbytes

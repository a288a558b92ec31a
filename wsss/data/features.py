"""Features of a frozen network: computed once for each image, and kept on disk."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor

from wsss import InputError
from wsss.data.base import Images, digest, open_items
from wsss.data.pixels import UNDECIDED, resize_all
from wsss.data.pseudo import PIXELS, FromFolder
from wsss.places import state
from wsss.writing import write_whole

FINER = 4
"""So many times finer than the features is the mask that a decoder learns from."""


class FeatureStore:
    """`stages` (D, h, w) and `mean` (K,), float16, a file for each image, in a folder for each network and size.

    Files are written whole or not at all, so that it can be interrupted and shared by processes; `fill` marks those of
    a data set as used, and the least recently used of all networks go first where room is needed.

    Args:
        root: of the folders of all networks.
        key: of the network, see `FrozenNetwork.key`.
        limit_gb: that all files in `root` may take.
    """

    def __init__(self, root: str | Path, key: str, limit_gb: float) -> None:
        if not isinstance(limit_gb, int | float) or not limit_gb > 0:
            raise InputError(f"features.limit_gb is {limit_gb!r}: expected a number above 0")
        self.root, self.limit = Path(root).expanduser(), limit_gb * 1e9
        self.folder = self.root / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"features.folder={self.root} cannot be made: {error.strerror}; give another") from error

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def read(self, name: str, array: str) -> np.ndarray:
        """`stages` or `mean` of an image.

        Raises:
            InputError: the file is gone or damaged, which a new run mends.
        """
        path = self.path(name)
        try:
            with np.load(path, allow_pickle=False) as file:
                features: np.ndarray = file[array]
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            if not isinstance(error, OSError):  # damaged, and not out of reach
                path.unlink(missing_ok=True)
            advice = "repeat the command, they are made anew"
            raise InputError(f"the features in {path} cannot be read any more: {advice}") from error
        return features

    def write(self, name: str, stages: np.ndarray, mean: np.ndarray) -> None:
        with write_whole(self.path(name)) as file:
            np.savez(file, stages=stages, mean=mean)

    def make_room(self, names: Sequence[str], size: int) -> None:
        """Remove files of other images, the least recently used first, until so many more bytes fit.

        Raises:
            InputError: they would not fit even alone.
        """
        kept = {self.path(name) for name in names}
        files = []
        for path in self.root.glob("*/*.npz"):
            with suppress(FileNotFoundError):  # another process has made room
                files.append((path, path.stat()))
        own = sum(status.st_size for path, status in files if path in kept)
        if own + size > self.limit:
            raise InputError(
                f"the features of {len(names)} images take {(own + size) / 1e9:.1f} GB and features.limit_gb="
                f"{self.limit / 1e9:g}: set it higher, or method.size lower"
            )
        others = sorted(((status.st_mtime, path, status.st_size) for path, status in files if path not in kept))
        excess = own + size + sum(entry[2] for entry in others) - self.limit
        for _, path, length in others:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= length


def feature_names(images: Images) -> list[str]:
    """Under which the features of each image are kept: its file, as it is now; of drawn ones their pixels."""
    if not images.images:
        return [hashlib.sha256(images[index]["image"].tobytes()).hexdigest() for index in range(len(images))]
    places = (place.resolve() if isinstance(place, Path) else place for place in images.images)
    return [digest(str(place), *state(place)) for place in places]


def fill(
    store: FeatureStore,
    images: Images,
    names: Sequence[str],
    normalise: Callable[[np.ndarray], Tensor],
    compute: Callable[[Tensor], tuple[Tensor, Tensor]],
    num_workers: int,
    progress: Callable[[Any, int], Any],
    kept: Sequence[str] = (),
) -> tuple[int, list[str]]:
    """Compute what the store lacks; returns how many that were, and a sentence for each image that cannot be used.

    Args:
        images: their true masks are not opened.
        names: see `feature_names`.
        normalise: an image uint8 (H, W, 3) -> (3, H, W).
        compute: a normalised image (1, 3, H, W) -> its stages (1, D, h, w) and final maps (1, K, h, w).
        progress: shows an iterable of so many entries while it passes.
        kept: names of other images that are needed at the same time.

    Raises:
        InputError: too little room.
    """
    there = {path.name for path in store.folder.iterdir()}
    missing = [index for index, name in enumerate(names) if f"{name}.npz" not in there]
    for name in set(names) - {names[index] for index in missing}:
        with suppress(OSError):
            os.utime(store.path(name))  # used
    opened, bad = open_items(images.without_masks(), missing, normalise, num_workers), list[str]()
    for count, (item, image) in enumerate(progress(opened, len(missing))):
        if image is None:
            bad.append(item)
            continue
        stages, final = (maps[0].cpu() for maps in compute(image[None]))
        arrays = stages.half().numpy(), final.mean(dim=(-2, -1)).half().numpy()
        if count == len(bad):  # the first one
            store.make_room([*names, *kept], sum(array.nbytes for array in arrays) * len(missing))
        store.write(names[missing[count]], *arrays)
    return len(missing) - len(bad), bad


class FeatureImages(Images):
    """A data set with the features of its images, for those who learn from these alone.

    Items are the data set's own with `features` float16 (D, h, w), those of the stages. `training_item` is what a batch
    is made of.

    Args:
        source: the images.
        store: with the features of all of them.
        names: see `feature_names`.
        pooled: train on the mean of the final features (K,) of an image, which are kept in memory.
        window: cells of the longer side of a map.
    """

    def __init__(self, source: Images, store: FeatureStore, names: Sequence[str], pooled: bool, window: int) -> None:
        self.source, self.store, self.names, self.window = source, store, names, window
        self.classes, self.images, self.labels = source.classes, source.images, source.labels
        self.has_masks, self.has_background = source.has_masks, source.has_background
        self.means: np.ndarray | None = None
        if pooled:
            self.means = np.stack([store.read(name, "mean").astype(np.float32) for name in names])

    @property
    def ids(self) -> Sequence[str]:
        return self.source.ids

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[index] | {"features": self.store.read(self.names[index], "stages")}

    def label(self, index: int) -> np.ndarray:
        return self.source.label(index)

    def truth(self, index: int, like: np.ndarray) -> np.ndarray | None:
        return self.source.truth(index, like)

    def too_small(self, side: int) -> dict[int, str]:
        return self.source.too_small(side)

    @property
    def has_labels(self) -> bool:
        return self.source.has_labels

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def training_item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """`mean` (K,), `label`, `id`, and unless pooled `features` (D, window, window), 0 around smaller maps.

        With pseudo masks also `pseudo_mask`, `FINER` times finer than the features, 255 around. Maps are mirrored at
        random; their place in the window is drawn too.
        """
        item = {"label": torch.from_numpy(self.label(index)), "id": self.ids[index]}
        if self.means is not None:
            return item | {"mean": torch.from_numpy(self.means[index])}
        features, mean = (self.store.read(self.names[index], array) for array in ("stages", "mean"))
        (height, width), turned = features.shape[1:], bool(rng.integers(2))
        top, left = (int(rng.integers(free + 1)) for free in (self.window - height, self.window - width))
        canvas = np.zeros((len(features), self.window, self.window), np.float16)
        canvas[:, top : top + height, left : left + width] = features[:, :, ::-1] if turned else features
        item |= {"features": torch.from_numpy(canvas), "mean": torch.from_numpy(mean.astype(np.float32))}
        if isinstance(self.source, FromFolder):
            mask = resize_all(
                {PIXELS: self.source[index][PIXELS]}, (FINER * height, FINER * width), Resampling.NEAREST
            )[PIXELS]
            around = np.full((FINER * self.window, FINER * self.window), UNDECIDED)
            rows, columns = slice(FINER * top, FINER * (top + height)), slice(FINER * left, FINER * (left + width))
            around[rows, columns] = mask[:, ::-1] if turned else mask
            item[PIXELS] = torch.from_numpy(around.astype(np.int64))
        return item

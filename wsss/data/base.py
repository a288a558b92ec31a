"""What a data set is: images with labels and, where there are any, masks to evaluate with."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset

from wsss import InputError, printable
from wsss.data.drawn import DrawnMask
from wsss.data.files import first_names, image_size, read_image, read_truth
from wsss.places import Readable
from wsss.writing import check_classes

T = TypeVar("T")


class Inspection(NamedTuple):
    """What `wsss-data check` looks at before any training."""

    sets: Mapping[str, Callable[[], "Images"]]  # by the name of the split; making one may raise InputError
    notes: Sequence[str] = ()  # to be told
    problems: Sequence[str] = ()  # to be mended


class Images(Dataset[dict[str, Any]], ABC):
    """Base of the data sets.

    An item is a dict of `image` uint8 (H, W, 3), `label` float32 (C,) of zeros and ones, `id` str and, for evaluation
    where `has_masks`, `mask` uint8 (H, W): 0 background, c + 1 for class c, 255 ignore.

    Attributes:
        classes: names of the C foreground classes.
        has_masks: whether items have a mask; to be False in training.
        has_background: False where the classes cover the whole image.
        images: what the images of all items are read from, where they are files or parts of some.
        labels: float32 (N, C) of all items, where they are known without opening any.
    """

    classes: tuple[str, ...]
    has_masks: bool = True
    has_background: bool = True
    images: Sequence[Readable] = ()
    labels: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @property
    def ids(self) -> Sequence[str]:
        """Of all items, known without opening any: numbers, unless a data set says otherwise."""
        return [str(index) for index in range(len(self))]

    def too_small(self, side: int) -> dict[int, str]:
        """By index a sentence about each image with a side of fewer pixels, as far as files tell without decoding."""
        return {}

    def label(self, index: int) -> np.ndarray:
        """That of an item, float32 (C,), if possible without opening its image."""
        return self[index]["label"]

    def without_masks(self) -> "Images":
        """The same items as in training, whatever the split; masks in files are not opened."""
        return _Unmasked(self, range(len(self)))

    def truth(self, index: int, image: np.ndarray) -> np.ndarray | None:
        """The true mask of an item, uint8 (H, W), in training too, to measure what was made; None where there is none.

        Items of a training set hold none, and nothing may learn from this one. `image` (H, W, ...) is that of the item.

        Raises:
            InputError: it cannot be used.
        """
        return self[index].get("mask")

    @property
    def has_labels(self) -> bool:
        """Whether any image shows a class, as far as that is known without opening them."""
        return True

    @property
    def fingerprint(self) -> str:
        """Tells these classes, images and labels from others, so that a run goes on only with its own."""
        return digest(self.classes, list(self.ids))

    @classmethod
    def with_known_classes(cls, values: dict[str, Any], known: Sequence[str]) -> dict[str, Any]:
        """A configuration's values beside a checkpoint that knows these classes; images may show only some of them."""
        return values

    @classmethod
    def inspection(cls, **values: Any) -> Inspection:
        """What there is to look at in the data set that a configuration's values describe."""
        return both_splits(cls, values)


def both_splits(target: Callable[..., Any], values: Mapping[str, Any]) -> Inspection:
    """A data set as it is trained on and evaluated."""
    return Inspection({split: partial(target, split=split, **values) for split in ("train", "val")})


class LabelledImages(Images):
    """Image files with image-level labels and, to evaluate, mask files; opened one at a time.

    Args:
        classes: names of the C foreground classes.
        ids: of the N images.
        images: their files.
        labels: float32 (N, C).
        masks: their masks, files or drawn ones; None in training and where there are none.
    """

    labels: np.ndarray

    def __init__(
        self,
        classes: Sequence[str],
        ids: Sequence[str],
        images: Sequence[Readable],
        labels: np.ndarray,
        masks: Sequence[Readable | DrawnMask] | None = None,
    ) -> None:
        self.classes, self._ids = tuple(classes), list(ids)
        self.images, self.labels, self.masks = images, labels, masks
        self.has_masks = masks is not None
        self._truths: Mapping[str, Readable | DrawnMask] | None = (
            None if masks is None else dict(zip(ids, masks, strict=True))
        )

    @property
    def ids(self) -> list[str]:
        return self._ids

    def true_masks(self) -> Mapping[str, Readable | DrawnMask]:
        """The files of true masks that there are, by id, where the items have none."""
        return {}

    def truth(self, index: int, image: np.ndarray) -> np.ndarray | None:
        if self._truths is None:
            self._truths = self.true_masks()
        mask = self._truths.get(self.ids[index])
        return None if mask is None else self._open_mask(mask, image)

    def _open_mask(self, mask: Readable | DrawnMask, image: np.ndarray) -> np.ndarray:
        return mask.draw(image.shape[:2]) if isinstance(mask, DrawnMask) else read_truth(mask, image, len(self.classes))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises InputError for an image or a mask that cannot be used, with its name."""
        image = read_image(self.images[index])
        item = {"image": image, "label": self.labels[index].copy(), "id": self.ids[index]}
        if self.masks is not None:
            item["mask"] = self._open_mask(self.masks[index], image)
        return item

    def label(self, index: int) -> np.ndarray:
        return self.labels[index]

    def without_masks(self) -> "Images":
        plain = copy(self)
        plain.masks, plain.has_masks = None, False
        return plain

    def too_small(self, side: int) -> dict[int, str]:
        sizes = {index: image_size(path) for index, path in enumerate(self.images)} if side > 1 else {}
        return {
            index: f"{self.images[index]} has {size[0]}x{size[1]} pixels, and the network takes no side below {side}"
            for index, size in sizes.items()
            if size is not None and min(size) < side
        }

    @property
    def has_labels(self) -> bool:
        return bool(self.labels.any())

    @property
    def fingerprint(self) -> str:
        return digest(self.classes, self.ids, self.labels.tolist())


class PlainImages(Protocol):
    """The least that a data set from elsewhere has to have."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class ImageSubset(Images):
    """Some items of a data set, by index; of one from elsewhere all that `Images` asks for."""

    def __init__(self, source: PlainImages, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.classes = source.classes
        if isinstance(source, Images):
            self.has_masks, self.has_background = source.has_masks, source.has_background
            self.images = [source.images[index] for index in indices] if source.images else ()
            self.labels = None if source.labels is None else source.labels[list(indices)]

    @property
    def ids(self) -> list[str]:
        known = self.source.ids if isinstance(self.source, Images) else range(len(self.source))
        return [str(known[index]) for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.indices[index]]

    def label(self, index: int) -> np.ndarray:
        source, place = self.source, self.indices[index]
        return source.label(place) if isinstance(source, Images) else source[place]["label"]

    def truth(self, index: int, image: np.ndarray) -> np.ndarray | None:
        source, place = self.source, self.indices[index]
        return source.truth(place, image) if isinstance(source, Images) else source[place].get("mask")

    def without_masks(self) -> Images:
        if not isinstance(self.source, Images):
            return super().without_masks()
        plain = copy(self)  # with all that a class of its own has changed
        plain.source, plain.has_masks = self.source.without_masks(), False
        return plain

    def too_small(self, side: int) -> dict[int, str]:
        found = self.source.too_small(side) if isinstance(self.source, Images) else {}
        return {place: found[index] for place, index in enumerate(self.indices) if index in found}

    @property
    def has_labels(self) -> bool:
        source = self.source
        return bool(source.labels[self.indices].any()) if isinstance(source, LabelledImages) else True

    @property
    def fingerprint(self) -> str:
        own = super().fingerprint
        return digest(self.source.fingerprint, own) if isinstance(self.source, Images) else own


class _Unmasked(ImageSubset):
    """Items with their masks taken away."""

    def __init__(self, source: PlainImages, indices: Sequence[int]) -> None:
        super().__init__(source, indices)
        self.has_masks = False

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {key: item[key] for key in ("image", "label", "id")}


def as_images(source: PlainImages) -> Images:
    """A torch `Dataset` with `classes` as `Images`, which our own are.

    Raises:
        InputError: classes that masks cannot hold.
    """
    check_classes(source.classes)
    return source if isinstance(source, Images) else ImageSubset(source, range(len(source)))


def pick(ids: Sequence[str], found: Mapping[str, T], what: str) -> list[T]:
    """What was found for every id, in their order.

    Raises:
        InputError: something is missing; `what` says of what kind and where.
    """
    if missing := [image_id for image_id in ids if image_id not in found]:
        raise InputError(
            f"{len(missing)} of {len(ids)} ids have no {what} ({first_names(missing)}): add them or shorten the list."
        )
    return [found[image_id] for image_id in ids]


def check_split(split: str) -> None:
    if split not in ("train", "val"):
        raise InputError(f"split is {split!r}, expected 'train' or 'val': pass one of them.")


def digest(*content: Any) -> str:
    """A hash of plain values."""
    return hashlib.sha256(repr(content).encode("utf-8", "surrogatepass")).hexdigest()


class _Inspected(Dataset[dict[str, Any] | str]):
    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any] | str:
        try:
            item = self.images[index]
        except InputError as error:
            return printable(str(error))
        shown = np.unique(item["mask"]) if "mask" in item else np.empty(0, np.uint8)
        return {"id": item["id"], "size": item["image"].shape[:2], "label": item["label"], "shown": shown}


class _Opened(Dataset[tuple[Any, Any]]):
    def __init__(self, images: Images, normalise: Callable[[np.ndarray], Any]) -> None:
        self.images, self.normalise = images, normalise

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        try:
            item = self.images[index]
        except InputError as error:
            return str(error), None
        return item, self.normalise(item["image"])


def open_items(
    images: Images, indices: Sequence[int], normalise: Callable[[np.ndarray], Any], num_workers: int
) -> DataLoader[tuple[Any, Any]]:
    """Some items in the order given, each with its image normalised; for one that fails the reason, and None."""
    how: dict[str, Any] = {"batch_size": None, "num_workers": num_workers, "collate_fn": _as_is}
    return DataLoader(_Opened(images, normalise), sampler=indices, **how)


def inspect_items(images: Images, num_workers: int) -> DataLoader[dict[str, Any] | str]:
    """Opens every item in order: its `id`, `size` (H, W), `label` and the ids `shown` by its mask, or why it fails."""
    return DataLoader(_Inspected(images), batch_size=None, num_workers=num_workers, collate_fn=_as_is)


def _as_is(item: T) -> T:
    return item  # the default would make tensors of numbers

"""One DataModule for every data set."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from wsss import InputError
from wsss.data.base import Images, PlainImages, as_images, digest
from wsss.data.features import FeatureImages
from wsss.data.pixels import Normalise, Transform
from wsss.data.pseudo import pixel_tensors, pixel_views


class EndlessSampler(Sampler[tuple[int, int]]):
    """Positions and indices of an endless shuffled training order that is a pure function of (seed, position).

    Every pass over the data is a new permutation. Sharded by `rank` of `world`; `start` is the first position.
    """

    def __init__(self, length: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        self.length, self.seed, self.start, self.rank, self.world = length, seed, start, rank, world

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self.start + self.rank
        current, order = -1, np.empty(0, np.int64)
        while True:
            epoch, place = divmod(position, self.length)
            if epoch != current:
                current, order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(self.length)
            yield position, int(order[place])
            position += self.world


class _TrainItems(Dataset[dict[str, Any]]):
    """Transformed training items by (position, index): what is drawn depends on seed and position alone."""

    def __init__(self, source: Images, module: "DataModule") -> None:
        from wsss.data.transforms import FlipCrop  # what training alone needs is slow to import

        self.source, self.transform = source, module.transform or FlipCrop()
        self.seed, self.normalise = module.seed, module.normalise

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, index = key
        item = self.source[index]
        pixels = pixel_views(self.source, item)
        views = self.transform({"image": item["image"]} | pixels, np.random.default_rng([self.seed, 1, position]))
        tensors = {
            name: self.normalise(view) if view.ndim == 3 else torch.from_numpy(view)
            for name, view in views.items()
            if name not in pixels
        }
        # nothing else of the item is passed on: a training batch never holds a mask
        supervision = pixel_tensors(self.source, item, views)
        return tensors | supervision | {"label": torch.from_numpy(item["label"]), "id": item["id"]}


class _FeatureItems(Dataset[dict[str, Any]]):
    """Training items without images, by (position, index)."""

    def __init__(self, source: FeatureImages, seed: int) -> None:
        self.source, self.seed = source, seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, index = key
        return self.source.training_item(index, np.random.default_rng([self.seed, 1, position]))


class _EvalItems(Dataset[dict[str, Any]]):
    """Whole images with their masks, where the data set has masks."""

    def __init__(self, source: Images, module: "DataModule") -> None:
        self.source, self.normalise = source, module.normalise

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.source[index]
        tensors = {
            "image": self.normalise(item["image"]),
            "label": torch.from_numpy(item["label"]),
            "id": item["id"],
        }
        if "mask" in item:
            tensors["mask"] = torch.from_numpy(item["mask"].astype(np.int64))
        if "features" in item:
            tensors["features"] = torch.from_numpy(item["features"])
        return tensors


class DataModule(pl.LightningDataModule):
    """Serves a training and an evaluation data set as batches of the library's contract.

    A batch is a dict: `image` (B, 3, H, W) float, normalised; `label` (B, C) float multi-hot; `id` list of str;
    in training the further views of the transform, in evaluation `mask` (B, H, W) long with 0 background, c + 1
    for class c and 255 ignore. A training batch has no `mask`. The training loader is endless.

    Args:
        train: data set to train on, see `wsss.data.base.Images`, or any torch `Dataset` of such items with `classes`;
            None to evaluate only.
        val: likewise, to evaluate on; None for training without evaluation.
        transform: of training images, see `wsss.data.transforms`; None crops and mirrors.
        batch_size: training images a step and device.
        eval_batch_size: evaluation images a step; 1 unless all of them have one size.
        num_workers: loader processes.
        seed: decides the order of the images and what transforms draw.
    """

    def __init__(
        self,
        train: PlainImages | None,
        val: PlainImages | None = None,
        transform: Transform | None = None,
        batch_size: int = 2,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise InputError(f"data.{name} is {value}: expected at least {least}")
        self.train, self.val = (None if images is None else as_images(images) for images in (train, val))
        first = self.val if self.train is None else self.train
        if first is None:
            raise InputError("a DataModule needs a data set to train on or one to evaluate on")
        self.transform = transform
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed = seed
        self.classes, self.has_background = first.classes, first.has_background
        self.num_classes = len(self.classes)
        self.mean: Sequence[float] = (0.485, 0.456, 0.406)
        self.std: Sequence[float] = (0.229, 0.224, 0.225)

    def setup(self, stage: str) -> None:
        if self.trainer is not None:  # the method says how it wants its images
            method: Any = self.trainer.lightning_module
            self.mean, self.std = method.mean, method.std

    @property
    def normalise(self) -> Callable[[np.ndarray], Tensor]:
        return Normalise(self.mean, self.std)

    @property
    def has_masks(self) -> bool:
        """Whether there is anything to compare a segmentation with."""
        return self.val is not None and self.val.has_masks

    @property
    def fingerprint(self) -> str:
        """Tells these images, classes and labels from others, so that a run goes on only with its own."""
        return digest([images and images.fingerprint for images in (self.train, self.val)])

    @property
    def train_size(self) -> int:
        return len(self.train) if self.train is not None else 0

    @property
    def val_name(self) -> str:
        """What is evaluated, for people."""
        return f"val, {len(self.val) if self.val is not None else 0} images"

    def first_item(self) -> dict[str, Any]:
        """A training item as the loader makes it."""
        if self.train is None:
            raise InputError("this DataModule has no data set to train on")
        return self._training_items(self.train)[0, 0]

    def _training_items(self, source: Images) -> Dataset[dict[str, Any]]:
        return _FeatureItems(source, self.seed) if isinstance(source, FeatureImages) else _TrainItems(source, self)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        if self.train is None:
            raise InputError("this DataModule has no data set to train on")
        start, rank, world = 0, 0, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            start = self.trainer.global_step * self.trainer.accumulate_grad_batches * self.batch_size * world
        return self._loader(
            self._training_items(self.train),
            self.batch_size,
            sampler=EndlessSampler(len(self.train), self.seed, start, rank, world),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        if self.val is None:
            return []
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        shard = range(rank, len(self.val), world)
        return self._loader(_EvalItems(self.val, self), self.eval_batch_size, sampler=shard)

    def examples(self, count: int, smallest_side: int = 1) -> Iterator[dict[str, Any]]:
        """Batches of one whole image to look at, no smaller: the first of the evaluation, else of the training."""
        shown = self.train if self.val is None else self.val
        assert shown is not None  # the constructor has seen to it
        items = _EvalItems(shown, self)
        whole = (collate([items[index]]) for index in range(len(items)))
        return islice((batch for batch in whole if min(batch["image"].shape[-2:]) >= smallest_side), count)

    def _loader(self, items: Dataset[dict[str, Any]], batch_size: int, **order: Any) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            items,
            batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=collate,
            worker_init_fn=_one_thread,
            **order,
        )


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors, lists ids.

    Raises:
        InputError: images of different sizes in one evaluation batch.
    """
    shapes = {tuple(item["image"].shape[1:]) for item in items if "image" in item}
    if len(shapes) > 1:
        raise InputError(
            f"images of sizes {', '.join(f'{w}x{h}' for h, w in sorted(shapes))} cannot share a batch: "
            "set data.eval_batch_size=1"
        )
    return {
        name: torch.stack([item[name] for item in items]) if isinstance(value, Tensor) else [i[name] for i in items]
        for name, value in items[0].items()
    }


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)  # a worker is one of several: OpenCV's own threads would only compete

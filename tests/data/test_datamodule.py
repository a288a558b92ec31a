"""The batch contract, the training order, and the promise that no training batch carries a mask."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_voc

from wsss import InputError
from wsss.data.datamodule import DataModule, EndlessSampler, collate
from wsss.data.shapes import Shapes
from wsss.data.transforms import FlipCrop, ToCoViews, random_crop, scale_image
from wsss.data.voc import VOC


def shapes(workers: int = 0, **arguments: Any) -> DataModule:
    train, val = (Shapes(split, train_size=6, val_size=4) for split in ("train", "val"))
    return DataModule(train, val, ToCoViews(64), batch_size=4, eval_batch_size=2, num_workers=workers, **arguments)


def test_training_batches_hold_no_mask(tmp_path: Path) -> None:
    voc = make_voc(tmp_path)
    modules = [shapes(), DataModule(VOC(str(voc), "train"), VOC(str(voc), "val"), FlipCrop(32), num_workers=0)]
    for module in modules:
        for batch in islice(module.train_dataloader(), 3):
            assert not any("mask" in key for key in batch)
        assert "mask" in next(iter(module.val_dataloader()))


def test_a_data_set_that_offers_masks_in_training_is_not_heard() -> None:
    module = DataModule(Shapes("val", val_size=4), transform=FlipCrop(32), num_workers=0)
    assert "mask" in module.train[0]
    assert next(iter(module.train_dataloader())).keys() == {"image", "image_box", "label", "id"}


def test_batch_contract() -> None:
    module = shapes()
    batch = next(iter(module.train_dataloader()))
    for view in ("image", "global_view", "local_source"):
        assert batch[view].shape == (4, 3, 64, 64)
        assert batch[view].dtype == torch.float32
    assert batch["label"].shape == (4, 8)
    assert batch["image_box"].shape == (4, 4)
    assert all(isinstance(name, str) for name in batch["id"])
    batch = next(iter(module.val_dataloader()))
    assert (batch["mask"].shape, batch["mask"].dtype) == ((2, 64, 64), torch.long)
    image = torch.from_numpy(module.val[0]["image"]).permute(2, 0, 1).float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (module.mean, module.std))
    assert torch.equal(batch["image"][0], (image / 255 - mean) / std)


def test_order_is_a_function_of_seed_and_position() -> None:
    first = list(islice(EndlessSampler(10, seed=1), 25))
    assert first == list(islice(EndlessSampler(10, seed=1), 25))
    assert first != list(islice(EndlessSampler(10, seed=2), 25))
    assert first[7:] == list(islice(EndlessSampler(10, seed=1, start=7), 18))
    for epoch in (first[:10], first[10:20]):
        assert sorted(index for _, index in epoch) == list(range(10))
    shards = [list(islice(EndlessSampler(10, seed=1, rank=rank, world=2), 10)) for rank in range(2)]
    assert sorted(shards[0] + shards[1]) == sorted(first[:20])


def test_workers_change_nothing() -> None:
    alone, helped = (list(islice(shapes(n).train_dataloader(), 3)) for n in (0, 2))
    for ours, theirs in zip(alone, helped, strict=True):
        assert ours["id"] == theirs["id"]
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != "id")


def test_images_of_one_batch_have_one_size() -> None:
    items = [{"image": torch.zeros(3, 4, side)} for side in (5, 6)]
    with pytest.raises(InputError, match="eval_batch_size=1"):
        collate(items)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"num_workers": -1}])
def test_bad_numbers(arguments: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        DataModule(Shapes(), **arguments)


def photograph(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, (height, width, 3), np.uint8)


def test_crops_know_where_the_photograph_is() -> None:
    boxes = set()
    for seed in range(200):
        image = photograph(20, 50)
        cut = random_crop({"image": image}, 32, np.random.default_rng(seed))
        window, box = cut["image"], cut["image_box"]
        inside = np.zeros((32, 32), bool)
        inside[box[0] : box[1], box[2] : box[3]] = True
        assert ((window > 0).all(-1) == inside).all()
        assert (box[1] - box[0], box[3] - box[2]) == (20, 32)
        boxes.add(int(box[0]))
    assert boxes == set(range(13))  # every place occurs


@pytest.mark.parametrize("released", [False, True])
def test_views_share_their_mirror_unless_released(released: bool) -> None:
    views = ToCoViews(32, (1.0, 1.0), blur=(0, 0, 0), jitter=0, released_behaviour=released)
    for compose in (views.main, views.local):
        for transform in compose.transforms:
            transform.p = 0.0
    image = photograph(20, 24)
    equal, box_fits = 0, 0
    for seed in range(200):
        result = views({"image": image}, np.random.default_rng(seed))
        equal += np.array_equal(result["image"], result["local_source"])
        box = result["image_box"]
        outside = np.ones((32, 32), bool)
        outside[box[0] : box[1], box[2] : box[3]] = False
        box_fits += not result["image"][outside].any()
    assert (equal, box_fits) == (200, 200) if not released else 70 < equal < 130 and 80 < box_fits < 140


def test_views_depend_on_the_generator_alone() -> None:
    views, image = ToCoViews(32), photograph(40, 50)
    first = views({"image": image}, np.random.default_rng(3))
    views({"image": image}, np.random.default_rng(4))
    again = views({"image": image}, np.random.default_rng(3))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert all(first[key].shape == (32, 32, 3) for key in ("image", "global_view", "local_source"))


def test_scaling_floors_the_size() -> None:
    assert scale_image(photograph(70, 50), 1.689).shape == (118, 84, 3)


@pytest.mark.parametrize("scale", [(0, 1), (2, 1), (1,)])
def test_bad_scale(scale: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"transform\.scale"):
        FlipCrop(scale=scale)

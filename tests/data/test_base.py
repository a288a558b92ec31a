"""What data sets share: subsets, foreign data sets, fingerprints, and pixel supervision by pseudo masks alone."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_voc
from torch.utils.data import Dataset

from wsss import InputError
from wsss.data.base import Images, ImageSubset, as_images
from wsss.data.datamodule import DataModule
from wsss.data.folder import Folder
from wsss.data.pseudo import PseudoMasks, PseudoScores
from wsss.data.shapes import Shapes
from wsss.data.transforms import (
    CoSAViews,
    FlipCrop,
    JitterCrop,
    LongSideCrop,
    RandAugmentCrop,
    ScaleCrop,
    ToCoViews,
    Views,
)
from wsss.data.voc import VOC


class Foreign(Dataset[dict[str, Any]]):
    """The least that is asked for, and everything that must not be heard."""

    classes = ("cat", "dog")

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = np.full((20, 24, 3), 50 * index, np.uint8)
        mask = np.ones((20, 24), np.uint8)
        label = np.eye(2, dtype=np.float32)[index % 2]
        return {"image": image, "label": label, "id": f"x{index}", "mask": mask, "pseudo_mask": mask, "scores": mask}


def test_a_plain_data_set_is_enough() -> None:
    module = DataModule(Foreign(), Foreign(), FlipCrop(16), num_workers=0)
    assert next(iter(module.train_dataloader())).keys() == {"image", "image_box", "label", "id"}
    assert next(iter(module.val_dataloader()))["mask"].shape == (1, 20, 24)
    assert (module.has_masks, module.has_background, module.num_classes) == (True, True, 2)
    assert as_images(Foreign()).ids == ["0", "1", "2"]


def test_subsets_keep_what_their_source_says(tmp_path: Path) -> None:
    source = VOC(str(make_voc(tmp_path / "voc")), "val")
    part = ImageSubset(source, [1])
    assert (len(part), part.ids, part.classes, part.has_masks) == (1, source.ids[1:], source.classes, True)
    assert part[0]["id"] == source.ids[1]
    assert part.fingerprint != source.fingerprint
    assert not ImageSubset(VOC(str(tmp_path / "voc"), "train"), [0]).has_masks


def test_items_without_their_masks(tmp_path: Path) -> None:
    source = VOC(str(make_voc(tmp_path / "voc")), "val")
    for path in (tmp_path / "voc/SegmentationClassAug").iterdir():
        path.unlink()
    for images in (source, ImageSubset(source, [1]), as_images(Foreign()), Shapes("val", val_size=2, size=32)):
        plain = images.without_masks()
        assert (plain.has_masks, len(plain), list(plain.ids)) == (False, len(images), list(images.ids))
        item = plain[0]
        assert item.keys() == {"image", "label", "id"}
        assert np.array_equal(plain.label(0), item["label"])
    assert source.has_masks


def test_fingerprints_tell_labels(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "voc")
    before = VOC(str(root)).fingerprint
    assert VOC(str(root)).fingerprint == before
    np.save(root / "cls_labels_onehot.npy", {name: np.ones(2) for name in VOC(str(root)).ids}, allow_pickle=True)
    assert VOC(str(root)).fingerprint != before
    assert Shapes().fingerprint != Shapes(num_classes=5).fingerprint


def test_fingerprints_of_a_folder_tell_files(photographs: Path) -> None:
    before = Folder(str(photographs), masks="masks").fingerprint
    labels = photographs / "labels.csv"
    text = labels.read_text(encoding="utf-8")
    labels.write_text(text.replace("cat;dog", "dog"), encoding="utf-8")
    assert Folder(str(photographs), masks="masks").fingerprint != before
    labels.write_text(text, encoding="utf-8")
    assert Folder(str(photographs), masks="masks").fingerprint == before
    os.utime(next(photographs.rglob("*.JPG")), ns=(1, 1))
    assert Folder(str(photographs), masks="masks").fingerprint != before


# pixels


@pytest.fixture
def pseudo(tmp_path: Path) -> PseudoMasks:
    """Images whose upper left quarter is bright, and pseudo masks that say so."""
    root = make_voc(tmp_path / "voc")
    source = VOC(str(root))
    for index in range(len(source)):
        image = np.full((40, 48, 3), 20, np.uint8)
        image[:20, :24] = 220
        Image.fromarray(image).save(source.images[index], quality=100)
        mask = np.zeros((40, 48), np.uint8)
        mask[:20, :24] = 1
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{source.ids[index]}.png")
    return PseudoMasks(source, str(tmp_path / "masks"))


def test_items_hold_the_pseudo_mask_and_no_true_one(pseudo: PseudoMasks) -> None:
    assert pseudo[0].keys() == {"image", "label", "id", "pseudo_mask"}
    assert isinstance(pseudo, Images)
    assert (pseudo.has_masks, pseudo.classes, len(pseudo)) == (False, ("cat", "dog"), 2)
    for index in range(3):  # ids are known without opening anything, whatever the items say
        Image.fromarray(np.full((20, 24), index, np.uint8)).save(pseudo.folder / f"{index}.png")
    assert [np.unique(item["pseudo_mask"]).tolist() for item in PseudoMasks(Foreign(), str(pseudo.folder))] == [
        [0],
        [1],
        [2],
    ]
    with_truth = PseudoMasks(VOC(str(pseudo.folder.parent / "voc"), train="train_aug"), str(pseudo.folder))
    assert "mask" not in with_truth[0]


def test_the_weights_behind_pseudo_masks_are_known(pseudo: PseudoMasks) -> None:
    assert pseudo.loaded == []  # drawn by hand, or by wsss-predict
    settings = pseudo.folder.parent / "settings.json"
    settings.write_text('{"loaded": ["timm weights a.in21k"]}')
    assert pseudo.loaded == ["timm weights a.in21k"]
    for damaged in ("[", "[]", '{"loaded": 3}'):
        settings.write_text(damaged)
        with pytest.raises(InputError, match=r"settings\.json is damaged"):
            _ = pseudo.loaded


@pytest.mark.parametrize(
    "transform",
    [FlipCrop(64), LongSideCrop(64, (40, 90), (0, 0, 0, 0)), ScaleCrop(64, (0.8, 2.0))],
    ids=["flip", "long", "scale"],
)
def test_pixels_follow_the_image(pseudo: PseudoMasks, transform: Any) -> None:
    module = DataModule(pseudo, transform=transform, batch_size=1, num_workers=0)
    loader = iter(module.train_dataloader())
    for _ in range(20):
        batch = next(loader)
        assert batch.keys() == {"image", "image_box", "label", "id", "pseudo_mask"}
        mask, image = batch["pseudo_mask"], batch["image"].mean(1)
        assert (mask.dtype, mask.shape) == (torch.long, (1, 64, 64))
        top, bottom, left, right = batch["image_box"][0].tolist()
        inside = torch.zeros(1, 64, 64, dtype=torch.bool)
        inside[:, top:bottom, left:right] = True
        assert (mask[~inside] == 255).all()
        assert set(mask[inside].unique().tolist()) <= {0, 1}
        assert ((image > 0) == (mask == 1))[inside].double().mean() > 0.9  # all but the border between them


@pytest.mark.parametrize("transform", [FlipCrop(30, (1.0, 1.0)), ScaleCrop(30, (1.0, 1.0))], ids=["flip", "scale"])
def test_scores_follow_too(transform: Any) -> None:
    ramp = np.linspace(0, 1, 48, dtype=np.float32)[None, :, None].repeat(40, 0)
    views: Views = {"image": (255 * ramp).repeat(3, 2).astype(np.uint8), "scores": ramp}
    found = transform(views, np.random.default_rng(1))
    assert found["scores"].shape == (30, 30, 1)
    assert np.abs(found["scores"][..., 0] - found["image"][..., 0] / 255).max() < 0.01


def test_around_an_image_is_nothing_or_as_released_background() -> None:
    views: Views = {"image": np.full((10, 12, 3), 200, np.uint8), "pseudo_mask": np.ones((10, 12), np.uint8)}
    for padding in (255, 0):
        found = ScaleCrop(16, (1.0, 1.0), padding)(dict(views), np.random.default_rng(0))
        assert found["image_box"].tolist() == [0, 10, 0, 12]
        assert (found["pseudo_mask"][10:] == padding).all()
        assert (found["pseudo_mask"][:10, :12] == 1).all()
        assert np.allclose(found["image"][:, 12:] / 255, ScaleCrop.mean)
    with pytest.raises(InputError, match=r"transform\.padding is 3"):
        ScaleCrop(padding=3)


@pytest.mark.parametrize(
    "transform", [ToCoViews(32), CoSAViews(32), RandAugmentCrop(32)], ids=["toco", "cosa", "randaugment"]
)
def test_transforms_that_pixels_cannot_follow_refuse_them(pseudo: PseudoMasks, transform: Any) -> None:
    module = DataModule(pseudo, transform=transform, num_workers=0)
    with pytest.raises(InputError, match="pseudo_mask could not follow"):
        next(iter(module.train_dataloader()))


def test_bad_pseudo_masks(pseudo: PseudoMasks, tmp_path: Path) -> None:
    path = pseudo.folder / f"{pseudo.ids[0]}.png"
    before = pseudo.fingerprint
    Image.new("L", (5, 5)).save(path)
    assert pseudo.fingerprint != before
    with pytest.raises(InputError, match=f"{pseudo.ids[0]}.png has height and width"):
        pseudo[0]
    Image.new("L", (48, 40), 7).save(path)
    with pytest.raises(InputError, match=r"holds the ids \[7\]"):
        pseudo[0]
    path.unlink()
    with pytest.raises(InputError, match=f"1 of 2 images have no pseudo mask in .*{pseudo.ids[0]}"):
        PseudoMasks(pseudo.source, str(pseudo.folder))


@pytest.fixture
def scored(pseudo: PseudoMasks, tmp_path: Path) -> PseudoScores:
    """The same images with scores: in their bright quarter the class 2, elsewhere background, not sure in one row."""
    (tmp_path / "scores").mkdir()
    low = np.zeros((2, 40, 48), np.float16)
    low[1, :20, :24] = 1
    low[0] = 1 - low[1]
    high = low.copy()
    high[:, :8] = np.array([0.4, 0.6])[:, None, None]  # where the low one says background, too
    for image_id in pseudo.ids:
        np.savez(tmp_path / "scores" / f"{image_id}.npz", low=low, high=high, ids=np.array([2]))
    return PseudoScores(pseudo.source, str(tmp_path / "scores"))


@pytest.mark.parametrize(
    "transform", [FlipCrop(64, (1, 1)), JitterCrop(64, (0, 0, 0, 0)), LongSideCrop(64, (40, 90), (0, 0, 0, 0))]
)
def test_labels_of_cells_follow_the_image(scored: PseudoScores, transform: Any) -> None:
    assert scored[0].keys() == {"image", "label", "id", "affinity_scores", "ids"}
    module = DataModule(scored, transform=transform, batch_size=1, num_workers=0)
    loader = iter(module.train_dataloader())
    seen = set()
    for _ in range(20):
        batch = next(loader)
        assert batch.keys() == {"image", "image_box", "label", "id", "affinity_label"}
        label, image = batch["affinity_label"][0], batch["image"].mean(1)[0]
        assert (label.dtype, label.shape) == (torch.long, (8, 8))
        top, bottom, left, right = batch["image_box"][0].tolist()
        inside = torch.zeros(64, 64)
        inside[top:bottom, left:right] = 1
        inside, bright = (x.unflatten(0, (8, 8)).unflatten(2, (8, 8)).mean((1, 3)) for x in (inside, image.double()))
        assert (label[inside == 0] == 255).all()
        sure = (inside == 1) & (label != 255) & (bright.abs() > 1)  # not on the border between them
        assert torch.equal(label[sure], torch.where(bright > 0, 2, 0)[sure])
        seen |= set(label[inside == 1].tolist())
    assert seen == {0, 2, 255}


def test_scores_without_a_class(scored: PseudoScores) -> None:
    ones = np.ones((1, 40, 48), np.float16)
    for image_id in scored.ids:
        np.savez(scored.folder / f"{image_id}.npz", low=ones, high=ones, ids=np.empty(0, np.int64))
    batch = next(iter(DataModule(scored, transform=JitterCrop(32), num_workers=0).train_dataloader()))
    assert (batch["affinity_label"] == 0).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"low": None}, "lacks the arrays low"),
        ({"high": np.zeros((2, 40, 47))}, r"high \(2, 40, 47\) for ids \(1,\), expected \(2, 40, 48\) for its image"),
        ({"ids": np.array([1, 2])}, r"expected \(3, 40, 48\)"),
        ({"ids": np.array([3])}, r"holds ids \[3\], expected different ones of 1 to 2"),
        ({"ids": np.array([0])}, r"holds ids \[0\]"),
        ({"ids": np.array([1.0])}, r"holds ids \[1.0\]"),
        ({"low": np.full((2, 40, 48), 1.5)}, r"scores outside 0\.\.1"),
        ({"low": np.full((2, 40, 48), np.nan)}, r"scores outside 0\.\.1"),
        ({"low": np.ones((2, 40, 48), int)}, r"scores outside 0\.\.1"),
        ({"low": np.array([object()])}, "cannot be read as a file of scores"),
        ({}, "cannot be read as a file of scores"),
    ],
)
def test_bad_scores(scored: PseudoScores, change: dict[str, Any], said: str) -> None:
    path = scored.folder / f"{scored.ids[0]}.npz"
    with np.load(path) as file:
        arrays = {key: array for key, array in (dict(file) | change).items() if array is not None}
    before = scored.fingerprint
    np.savez(path, **arrays)
    if not change:
        path.write_bytes(b"no zip")
    assert scored.fingerprint != before
    with pytest.raises(InputError, match=said) as refused:
        scored[0]
    assert scored.ids[0] in str(refused.value)


def test_missing_scores(scored: PseudoScores) -> None:
    (scored.folder / f"{scored.ids[1]}.npz").unlink()
    with pytest.raises(InputError, match=f"1 of 2 images have no score file in .*{scored.ids[1]}"):
        PseudoScores(scored.source, str(scored.folder))

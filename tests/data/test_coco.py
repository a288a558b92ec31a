import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instances import content, photo, region, save
from PIL import Image

import wsss.data.base
import wsss.data.coco
from wsss import InputError
from wsss.data.coco import COCO, COCO_CLASSES
from wsss.data.files import read_lines
from wsss.prepare.coco import build_masks

GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
CATEGORIES = dict(zip(sorted(set(range(1, 91)) - GAPS), COCO_CLASSES, strict=True))
TRAIN, VAL = ([f"COCO_{split}2014_{number:012d}" for number in (9, 25, 30)] for split in ("train", "val"))


def instances(names: list[str]) -> dict[str, Any]:
    """A person and a toothbrush in the first image, a crowd of stop signs in the second, nothing in the third."""
    square = [[1, 1, 3, 1, 3, 3, 1, 3]]
    annotations = [region(3, 1, 90, square), region(1, 0, 1, square), region(2, 0, 90, square)]
    annotations[0] |= {"category_id": 13, "iscrowd": 1}
    images = [photo(number) | {"file_name": f"{name}.jpg"} for number, name in enumerate(names)]
    return content(images, annotations, CATEGORIES)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images a split, the second of training grey, with instances and masks."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split, names in (("train2014", TRAIN), ("val2014", VAL)):
        (root / split).mkdir()
        for number, name in enumerate(names):
            mode = "L" if name == TRAIN[1] else "RGB"
            Image.new(mode, (5, 4), 9 if mode == "L" else (number, 9, 9)).save(root / split / f"{name}.jpg")
        path = save(root / f"annotations/instances_{split}.json", instances(names))
        os.utime(path, (10**9, 10**9))  # as an archive leaves it: older than what is made of it
        build_masks(path, root / "masks" / split)
    return root


def present(data: COCO) -> dict[str, list[int]]:
    assert data.labels.shape == (len(data), 80)
    return {name: np.flatnonzero(row).tolist() for name, row in zip(data.ids, data.labels, strict=True)}


def refused(*words: str, **arguments: Any) -> None:
    with pytest.raises(InputError) as caught:
        COCO(**arguments)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_training_items_have_no_mask(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wsss.data.base, "read_truth", None)
    (root / "masks").rename(root / "elsewhere")
    data = COCO(str(root))
    assert data.classes == COCO_CLASSES
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 80
    assert present(data) == {TRAIN[0]: [0, 79], TRAIN[1]: [11], TRAIN[2]: []}  # crowds count, the last is a negative
    item = data[1]
    assert set(item) == {"image", "label", "id"}
    assert item["id"] == TRAIN[1]
    assert item["image"].shape == (4, 5, 3)  # grey became RGB
    assert item["image"].dtype == np.uint8
    assert item["label"].dtype == np.float32
    item["label"][:] = 0
    assert data[1]["label"].sum() == 1


def test_evaluation_items_have_a_mask(root: Path) -> None:
    data = COCO(str(root), "val")
    assert data.ids == VAL
    masks = [data[i]["mask"] for i in range(3)]
    assert all(mask.dtype == np.uint8 and mask.shape == (4, 5) for mask in masks)
    assert [np.unique(mask).tolist() for mask in masks] == [[0, 80], [0, 255], [0]]
    (root / "masks").rename(root / "mine")
    refused("no folder", "masks", root=str(root), split="val")
    assert len(COCO(str(root), "val", masks="mine")) == 3
    assert len(COCO(str(root), "val", masks=str(root / "mine/val2014"))) == 3
    (root / f"mine/val2014/{VAL[1]}.png").unlink()
    refused("1 of 3", VAL[1], "mask", root=str(root), split="val", masks="mine")


def test_lists_with_and_without_labels(root: Path) -> None:
    (root / "labelled.txt").write_text(f"{TRAIN[2]} 79 0 79\n\n{TRAIN[0]}\n")
    (root / "ids.txt").write_text(f"train2014/{TRAIN[1]}.jpg\n{TRAIN[2]}\n")
    assert present(COCO(str(root), train="ids.txt")) == {TRAIN[1]: [11], TRAIN[2]: []}
    for path in (root / "annotations").iterdir():
        path.unlink()
    assert present(COCO(str(root), train="labelled.txt")) == {TRAIN[2]: [0, 79], TRAIN[0]: []}
    assert present(COCO(str(root), labels="labelled.txt")) == {TRAIN[2]: [0, 79], TRAIN[0]: []}
    (root / "ids.txt").write_text(TRAIN[0])
    assert present(COCO(str(root), train="ids.txt", labels="labelled.txt")) == {TRAIN[0]: []}
    refused("instances_train2014.json", "does not exist", "labels=", root=str(root), train="ids.txt")


def test_labels_of_both_splits_in_one_npy(root: Path) -> None:
    np.save(root / "cls_labels.npy", {name: np.eye(80)[i] for i, name in enumerate([*TRAIN, *VAL])})
    assert present(COCO(str(root), labels="cls_labels.npy")) == {name: [i] for i, name in enumerate(TRAIN)}
    assert list(present(COCO(str(root), "val", labels="cls_labels.npy"))) == VAL
    np.save(root / "cls_labels.npy", {TRAIN[0]: np.ones(20)})
    refused("20 classes, expected 80", root=str(root), labels="cls_labels.npy")
    np.save(root / "cls_labels.npy", {TRAIN[0]: np.ones(80)})
    refused("no image of val2014", root=str(root), split="val", labels="cls_labels.npy")


def test_the_prefix_of_an_id_says_its_folder(root: Path) -> None:
    Image.new("RGB", (5, 4)).save(root / "val2014" / "mine.jpg")
    (root / "val.txt").write_text(f"{VAL[0]} 1\n{TRAIN[0]} 2\nmine 3")
    (root / "masks/val2014/mine.png").write_bytes((root / f"masks/val2014/{VAL[2]}.png").read_bytes())
    data = COCO(str(root), "val", val="val.txt")
    assert [str(path.parent.relative_to(root)) for path in data.images] == ["val2014", "train2014", "val2014"]
    assert data.masks is not None
    assert [path.parent.name for path in data.masks] == ["val2014", "train2014", "val2014"]
    (root / "val.txt").write_text(f"{VAL[1]}\n{TRAIN[0]}")
    assert present(COCO(str(root), "val", val="val.txt")) == {VAL[1]: [11], TRAIN[0]: [0, 79]}  # from both JSONs


def test_labels_of_a_json_are_kept_beside_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = root / "annotations/instances_train2014.json", root / "annotations/instances_train2014.labels.txt"
    first = present(COCO(str(root)))
    assert cache.read_text().splitlines() == [f"{TRAIN[0]} 0 79", f"{TRAIN[1]} 11", TRAIN[2]]
    assert {file.name for file in cache.parent.iterdir()} == {path.name, cache.name, "instances_val2014.json"}
    with monkeypatch.context() as patch:
        patch.setattr(wsss.data.coco, "read_head", None)
        assert present(COCO(str(root))) == first
    changed = instances(TRAIN)
    changed["annotations"][0]["category_id"] = 2
    save(path, changed)
    os.utime(cache, (10**9, 10**9))
    assert present(COCO(str(root)))[TRAIN[1]] == [1]  # it is another file's
    cache.write_text(f"{TRAIN[0]} 80")
    os.utime(cache, ns=(path.stat().st_mtime_ns,) * 2)
    refused("labels.txt", "'80'", root=str(root))


def test_names_that_no_list_can_hold_are_not_kept(root: Path) -> None:
    (root / f"train2014/{TRAIN[0]}.jpg").rename(root / "train2014/a 1.jpg")
    save(root / "annotations/instances_train2014.json", instances(["a 1", *TRAIN[1:]]))
    for _ in range(2):
        assert present(COCO(str(root)))["a 1"] == [0, 79]


def test_a_root_that_cannot_be_written_to(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", closed)
    assert len(COCO(str(root))) == 3
    assert not [path for path in (root / "annotations").iterdir() if path.suffix != ".json"]


def break_categories(data: dict[str, Any]) -> None:
    data["categories"][5]["name"] = "coach"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (break_categories, ("80 categories ('coach' for 'bus')",)),
        (lambda data: data.update(categories=data["categories"][:79], annotations=[]), ("79 categories",)),
        (lambda data: data["annotations"][1].update(image_id=7), ("unknown image_id 7 in annotation 1",)),
        (lambda data: data["annotations"][1].update(category_id=12), ("unknown category_id 12 in annotation 1",)),
        (lambda data: data.pop("images"), ("no list of images",)),
    ],
)
def test_bad_json(root: Path, change: Callable[[dict[str, Any]], object], words: tuple[str, ...]) -> None:
    data = instances(TRAIN)
    change(data)
    save(root / "annotations/instances_train2014.json", data)
    refused("instances_train2014.json", *words, root=str(root))
    assert not (root / "annotations/instances_train2014.labels.txt").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (f"{TRAIN[0]} 80", (TRAIN[0], "'80'", "0 to 79")),
        (f"{TRAIN[0]} -1", ("'-1'",)),
        (f"{TRAIN[0]} 1.0", ("'1.0'",)),
        (f"{TRAIN[0]} " + "9" * 5000, ("999",)),
        (f"/train2014/{TRAIN[0]}.jpg /masks/{TRAIN[0]}.png", ("'/masks",)),
        (f"{TRAIN[0]} 1\n{TRAIN[0]} 2", (TRAIN[0], "2 times")),
        ("\n", ("is empty",)),
    ],
)
def test_bad_lists(root: Path, lines: str, words: tuple[str, ...]) -> None:
    (root / "mine.txt").write_text(lines)
    refused("mine.txt", *words, root=str(root), train="mine.txt")


def test_bad_arguments(root: Path) -> None:
    good = str(root)
    refused("'test'", root=good, split="test")
    refused("missing.txt", root=good, train="missing.txt")
    refused("missing.npy", "does not exist", root=good, labels="missing.npy")
    refused("none", "does not exist", root=f"{good}/none")
    (root / "mine.txt").write_text(f"{TRAIN[0]} 1\nCOCO_train2014_a 1\nCOCO_train2014_b 1")
    refused("2 of 3", "image in", "train2014", "(COCO_train2014_a, COCO_train2014_b)", root=good, train="mine.txt")
    (root / "mine.txt").write_text(f"{TRAIN[0]}\nCOCO_train2014_a")
    refused("1 of 2", "label in", "instances_train2014.json", "COCO_train2014_a", root=good, train="mine.txt")
    (root / "train2014").rename(root / "photographs")
    refused("no folder", "train2014", "annotations", root=good)


def test_masks_that_do_not_fit(root: Path) -> None:
    data, path = COCO(str(root), "val"), root / f"masks/val2014/{VAL[0]}.png"
    for mask, words in (
        (np.zeros((5, 4), np.uint8), ("(5, 4)", "(4, 5)")),
        (np.array([[0, 81, 254, 255, 80]] * 4, np.uint8), ("[81, 254]", "0 to 80")),
    ):
        Image.fromarray(mask).save(path)
        with pytest.raises(InputError) as caught:
            data[0]
        assert all(word in str(caught.value) for word in (path.name, *words))


@pytest.mark.parametrize(
    ("name", "count", "empty", "first"),
    [("train", 82_081, 0, (9, [45, 49, 50])), ("val", 40_137, 0, (42, [16]))],
)
def test_the_lists_of_the_field(
    tmp_path: Path, real_data: Path, name: str, count: int, empty: int, first: tuple[int, list[int]]
) -> None:
    path = real_data / f"lists/coco14/{name}.txt"
    lines = read_lines(path)
    for folder in (f"{name}2014", f"masks/{name}2014"):
        (tmp_path / folder).mkdir(parents=True)
    for line in lines[:3]:
        image_id = line.split()[0]
        (tmp_path / f"{name}2014/{image_id}.jpg").touch()
        (tmp_path / f"masks/{name}2014/{image_id}.png").touch()
    (tmp_path / "short.txt").write_text("\n".join(lines[:3]))
    shown = present(COCO(str(tmp_path), name, **{name: "short.txt"}))
    assert next(iter(shown.items())) == (f"COCO_{name}2014_{first[0]:012d}", first[1])
    refused(f"{count - 3} of {count} ids have no image", root=str(tmp_path), split=name, **{name: str(path)})
    ids, rows = wsss.data.coco._read_label_list(path)
    assert len(ids) == count
    assert (rows.sum(1) == 0).sum() == empty
    assert (rows.sum(0) > 0).all()


def test_the_names_of_coco(real_data: Path) -> None:
    assert read_lines(real_data / "lists/coco14/classes.txt") == list(COCO_CLASSES)

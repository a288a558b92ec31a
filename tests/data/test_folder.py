"""One's own photographs: which images are found, what labels and masks belong to them, and who is evaluated."""

import io
import json
import os
import random
import unicodedata
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import wsss.data.base
from wsss import InputError
from wsss.data.datamodule import DataModule
from wsss.data.files import read_image
from wsss.data.finding import find_images, match
from wsss.data.folder import Folder, survey
from wsss.data.photographs import Photographs
from wsss.data.transforms import FlipCrop

DATA = os.environ.get("WSSS_TEST_DATA")
real = pytest.mark.skipif(not DATA, reason="set WSSS_TEST_DATA to the folder of real data")
NAMES = ("a.jpg", "b c.PNG", "sub/d\xe4.jpeg", "sub/deep/e.v2.webp", "sub/f.bmp", "g.TIFF")
IDS = ["a", "b c", "g", "sub/deep/e.v2", "sub/d\xe4", "sub/f"]
LABELS = "file,labels\na.jpg,cat\nb c.PNG,cat;dog\nd\xe4.jpeg,\nsub/deep/e.v2.webp,dog\nf,dog\nG.tiff.old/g.TIFF,cat\n"


def draw(path: Path, size: tuple[int, int] = (5, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 9, 9)).save(path)
    return path


def draw_mask(path: Path, values: Any = ((0, 1, 2, 255, 0),) * 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images of two classes, one of them a negative, and what must not be found."""
    root = tmp_path / "photos"
    for name in NAMES:
        draw(root / name)
    for name in (".hidden/x.jpg", "sub/.y.jpg", "sub/._a.jpg"):
        draw(root / name)
    (root / "sub/note.txt").write_text("no image")
    (root / "labels.csv").write_text(LABELS)
    return root


def refused(root: Path, *words: str, **arguments: Any) -> None:
    with pytest.raises(InputError) as caught:
        Folder(str(root), **arguments)
    assert len(str(caught.value).splitlines()) == 1
    for word in words:
        assert word in str(caught.value)


# Items


def test_items(root: Path) -> None:
    data = Folder(str(root))
    assert data.classes == ("cat", "dog")
    assert data.has_background
    assert data.ids == IDS
    assert data.labels.tolist() == [[1, 0], [1, 1], [1, 0], [0, 1], [0, 0], [0, 1]]
    item = data[1]
    assert set(item) == {"image", "label", "id"}
    assert (item["image"].shape, item["image"].dtype) == ((4, 5, 3), np.uint8)
    assert (item["label"].dtype, item["id"]) == (np.float32, "b c")
    item["label"][:] = 0
    assert data[1]["label"].tolist() == [1, 1]


@pytest.mark.parametrize("count", [1, 2, 20, 200])
@pytest.mark.parametrize("val", [None, 0.4])
def test_training_holds_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, val: float | None) -> None:
    """From one class to two hundred, with negatives, and with masks lying there."""
    classes = [f"class {c}" for c in range(count)]
    rows = ["file,labels"]
    for n in range(12):
        draw(tmp_path / f"{n}.jpg", (40, 36))
        draw_mask(tmp_path / "masks" / f"{n}.png", np.full((36, 40), n % (count + 1)))
        rows.append(f"{n}.jpg,{';'.join(classes[n % 3 :: 3]) if n % 4 else ''}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    assert "mask" in Folder(str(tmp_path), "val", val=0.4, masks="masks", classes=classes)[0]
    monkeypatch.setattr(wsss.data.base, "read_truth", None)
    data = Folder(str(tmp_path), val=val, masks="masks", classes=classes)
    assert all(set(data[i]) == {"image", "label", "id"} for i in range(len(data)))
    assert data.masks is None
    assert data.labels.shape == (12 if val is None else 7, count)
    assert 0 < (data.labels.sum(1) == 0).sum() < len(data)  # negatives
    for batch in islice(DataModule(data, transform=FlipCrop(32), num_workers=0).train_dataloader(), 3):
        assert batch["label"].shape == (2, count)
        assert not any("mask" in key for key in batch)


# Images


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_letters_have_one_form(tmp_path: Path, written: Any, stored: Any) -> None:
    """As macOS unpacks a folder, and as a spreadsheet writes its names."""
    name, label = "Gr\xfc\xdfe/\xc5ngstr\xf6m 1.jpg", "K\xe4fer"
    draw(tmp_path / unicodedata.normalize(stored, name))
    (tmp_path / "labels.csv").write_text(unicodedata.normalize(written, f"file,labels\n{name},{label}\n"), "utf-8")
    data = Folder(str(tmp_path))
    assert (data.ids, data.classes) == ([name.removesuffix(".jpg")], (label,))
    assert data[0]["image"].shape == (4, 5, 3)


def test_two_forms_of_one_name_are_refused(tmp_path: Path) -> None:
    draw(tmp_path / "c/\xe4.jpg")
    draw(tmp_path / "c/a\u0308.jpg")
    if len(os.listdir(tmp_path / "c")) == 2:  # not so on macOS
        refused(tmp_path, "1 names twice", "Unicode")


def test_an_id_tells_images_apart(tmp_path: Path) -> None:
    for name in ("c/a.jpg", "c/a.png", "c/b.jpg", "d/b.jpg", "d/x", "d/x.jpg", "d/x.jpg.png"):
        draw(tmp_path / name) if "." in name else (tmp_path / name).touch()
    assert Folder(str(tmp_path)).ids == ["c/a.jpg", "c/a.png", "c/b", "d/b", "d/x", "d/x.jpg.png"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    draw(tmp_path / "elsewhere/a.jpg")
    (tmp_path / "root/c").mkdir(parents=True)
    (tmp_path / "root/c/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "root")
    (tmp_path / "root/c/dangling.jpg").symlink_to(tmp_path / "none.jpg")
    assert list(find_images(tmp_path / "root")) == [Path("c/link/a.jpg")]


def test_a_folder_that_cannot_be_opened_is_not_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    refused(root, "deep", "Permission denied")


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    for folder, key, words in (
        (tmp_path / "none", "images", "images="),
        (tmp_path, "dataset.root", "holds no image"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            find_images(folder, key)
        assert f"{key}={folder}" in str(caught.value)


def test_photographs_for_prediction(root: Path) -> None:
    (root / "a.jpg").write_bytes(b"no image")
    paths = find_images(root)
    assert [str(path) for path in paths] == sorted(map(str, map(Path, NAMES)), key=lambda name: Path(name))
    data = Photographs(list(paths.values()), max_side=4)
    reason, nothing = data[0]
    assert "a.jpg" in reason
    assert nothing is None
    image, size = data[1]
    assert (image.shape, size) == ((4, 5, 3), (4, 5))  # of so few pixels none is lost
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)).save(root / "a.png")
    image, size = Photographs([root / "a.png"], max_side=60)[0]
    assert (image.shape, image.dtype, size) == ((60, 40, 3), np.uint8, (300, 200))
    assert image.std() < 40  # noise of 74 without the antialiasing


# Labels


@pytest.mark.parametrize(
    ("names", "images", "found"),
    [
        (["x/a.jpg"], ["x/a.jpg", "y/a.jpg"], {"x/a.jpg": "x/a.jpg"}),
        (["a.jpg"], ["x/a.jpg", "y/a.jpg"], {}),
        (["old/a.jpg"], ["y/a.jpg"], {"old/a.jpg": "y/a.jpg"}),
        (["x/a.jpg", "y/a.jpg"], ["y/a.jpg"], {"y/a.jpg": "y/a.jpg"}),  # the file of the first is gone
        (["x/a.jpg", "z/a.jpg"], ["y/a.jpg"], {}),
        (["x/a", "a"], ["x/a.jpg", "y/b.jpg"], {"x/a": "x/a.jpg"}),
        (["a", "b.tif"], ["x/a.v2.jpg", "x/b.jpg", "x/a.PNG"], {"a": "x/a.PNG", "b.tif": "x/b.jpg"}),
        (["a.v2"], ["a.v2.jpg", "a.v3.jpg"], {"a.v2": "a.v2.jpg"}),
        (["a"], ["a.jpg", "a.png"], {}),
        (["A.jpg"], ["a.jpg"], {}),
        (["a.JPG"], ["a.jpg"], {"a.JPG": "a.jpg"}),  # by its stem
        (["/mnt/c/a.jpg", "C:\\x\\b.jpg"], ["a.jpg", "y/b.jpg"], {"/mnt/c/a.jpg": "a.jpg", "C:\\x\\b.jpg": "y/b.jpg"}),
        (["upload/1/0123abcd-a.jpg"], ["x/a.jpg"], {"upload/1/0123abcd-a.jpg": "x/a.jpg"}),
        (["0123abcd-a"], ["x/a.jpg", "x/0123abcd-a.jpg"], {"0123abcd-a": "x/0123abcd-a.jpg"}),
        (["0123abcd-a.jpg", "4567abcd-a.jpg"], ["a.jpg"], {}),
        (["0123abcd-a.jpg", "a.jpg"], ["a.jpg"], {"a.jpg": "a.jpg"}),
        (["0123abcd-a.jpg"], ["4567abcd-a.jpg"], {}),
    ],
)
def test_names_find_images(names: list[str], images: list[str], found: dict[str, str]) -> None:
    for order in (1, -1):
        assert match(names[::order], images[::order]) == found


def test_what_has_no_counterpart_is_refused(root: Path) -> None:
    for n in range(4):
        draw(root / f"new/{n}.jpg")
    refused(root, "labels.csv", str(root), "4 of 10 images have no entry (new/0, new/1, new/2, ...)")
    (root / "labels.csv").write_text(LABELS + "gone.jpg,dog\ngone2.jpg,\n")
    refused(root, "4 of 10 images", "2 entries find no image (gone.jpg, gone2.jpg)")
    (root / "train.txt").write_text("a.jpg\ng\n")
    refused(root, "2 entries", val="train.txt")
    refused(root, "2 entries", train="train.txt", val=0.5)
    assert Folder(str(root), train="train.txt").ids == ["a", "g"]  # the list says what takes part
    (root / "train.txt").write_text("a.jpg\nnew/1.jpg\n")
    refused(root, "1 of 10 images have no entry (new/1)", train="train.txt")
    refused(root, "1 of 10 images", split="val", train="train.txt")


def test_survey_lists_what_does_not_fit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wsss.data.base, "read_image", None)
    (root / "new.jpg").touch()
    (root / "labels.csv").write_text(LABELS + "gone.jpg,dog\n")
    found = survey(str(root), classes=["dog", "cow", "cat"])
    assert (found.root, found.source) == (root, root / "labels.csv")
    assert found.classes == ("dog", "cow", "cat")
    assert list(found.images) == sorted([*IDS, "new"])
    assert found.images["sub/f"] == root / "sub/f.bmp"
    assert found.present["b c"] == (0, 2)
    assert found.unlabelled == ("new",)
    assert found.negatives == ("sub/d\xe4",)
    assert found.missing == ("gone.jpg",)
    assert found.split == {}


def test_class_folders(root: Path) -> None:
    (root / "labels.csv").unlink()
    refused(root, "3 images beside its class folders (a.jpg, b c.PNG, g.TIFF)")
    for name in ("a.jpg", "b c.PNG", "g.TIFF"):
        draw(root / "hot dog" / name)
        (root / name).unlink()
    data = Folder(str(root))
    assert data.classes == ("hot dog", "sub")
    assert data.ids == ["hot dog/a", "hot dog/b c", "hot dog/g", "sub/deep/e.v2", "sub/d\xe4", "sub/f"]
    assert data.labels.tolist() == [[1, 0]] * 3 + [[0, 1]] * 3
    (root / "package.json").write_text("{}")
    refused(root, "package.json", "categories")
    for given in (".", str(root)):
        assert Folder(str(root), labels=given).ids == data.ids


def test_labels_are_found_or_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = Folder(str(root)).labels.tolist()
    (root / "labels.csv").rename(tmp_path / "mine.txt")
    assert Folder(str(root), labels="mine.txt").labels.tolist() == expected
    refused(root, "theirs.txt", "No such file", labels="theirs.txt")
    names = [name.rpartition("/")[2] for name in NAMES]
    vectors: Any = {name: np.array([n % 2, 1], np.float32) for n, name in enumerate(names)}
    np.save(root / "cls_labels.npy", vectors)
    (root / "class_names.txt").write_text("cat\ndog\n")
    assert Folder(str(root)).labels.tolist() == [[0, 1], [1, 1], [1, 1], [1, 1], [0, 1], [0, 1]]
    (root / "export.json").write_text(json.dumps({}))
    refused(root, "export.json, cls_labels.npy", "pass labels=")
    (root / "cls_labels.npy").unlink()
    done = [{"result": [{"type": "choices", "value": {"choices": ["dog"]}}]}]
    tasks = [{"data": {"image": f"/data/upload/3/0123abcd-{name}"}, "annotations": done} for name in names]
    (root / "export.json").write_text(json.dumps(tasks))
    assert Folder(str(root)).classes == ("cat", "dog")  # class_names.txt knows one that no label names
    (root / "class_names.txt").unlink()
    assert Folder(str(root)).classes == ("dog",)
    tasks[2]["annotations"] = []
    (root / "export.json").write_text(json.dumps(tasks))
    refused(root, "1 of 6 images have no entry (sub/d\xe4)")  # not finished is not negative
    (root / "export.json").unlink()
    (root / "Annotations").mkdir()
    for name in names:
        (root / "Annotations" / f"{name.rpartition('.')[0]}.xml").write_text(
            "<annotation><object><name>cow</name></object></annotation>"
        )
    assert Folder(str(root)).classes == ("cow",)


# Splits


def many(root: Path, count: int = 40) -> Path:
    for n in range(count):
        path = root / ("x" if n % 2 else "y") / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_a_fraction_is_drawn_alike_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(many(tmp_path))
    train, val = (Folder(root, split, val=0.2).ids for split in ("train", "val"))
    assert len(val) == 8
    assert sorted(train + val) == sorted(Folder(root).ids)
    assert val == Folder(root, "val", val="0.2").ids
    assert val != Folder(root, "val", val=0.2, seed=1).ids
    assert val == ["x/27", "x/35", "x/9", "y/0", "y/12", "y/2", "y/24", "y/4"]  # the same tomorrow
    walk = os.walk

    def shuffled(*arguments: Any, **options: Any) -> Any:
        for place, folders, files in walk(*arguments, **options):
            random.shuffle(folders)
            random.shuffle(files)
            yield place, folders, files

    monkeypatch.setattr(os, "walk", shuffled)
    for _ in range(5):
        assert (Folder(root, val=0.2).ids, Folder(root, "val", val=0.2).ids) == (train, val)


def test_a_fraction_leaves_something_on_both_sides(tmp_path: Path) -> None:
    root = many(tmp_path, 2)
    for share in (0.001, 0.999):
        assert [len(Folder(str(root), split, val=share)) for split in ("train", "val")] == [1, 1]
    (root / "list.txt").write_text("0.jpg\n")
    assert Folder(str(root), "val", train="list.txt", val=0.9).ids == ["x/1"]
    (root / "x/1.jpg").unlink()
    refused(root, "val=0.5", "1 images", val=0.5)
    refused(root, "val=0.5", "0 images", train="list.txt", val=0.5)


def test_lists(tmp_path: Path) -> None:
    root = many(tmp_path / "root", 6)
    (root / "train.txt").write_bytes(b"\xef\xbb\xbf4.jpg\r\n\r\nx/1.jpg\r\n")
    (tmp_path / "mine.txt").write_text("y/0\n3\n4\n")
    mine = str(tmp_path / "mine.txt")

    def split(**arguments: Any) -> tuple[list[str], list[str]]:
        return Folder(str(root), **arguments).ids, Folder(str(root), "val", **arguments).ids

    assert split() == (["x/1", "x/3", "x/5", "y/0", "y/2", "y/4"], [])
    assert split(train="train.txt") == (["y/4", "x/1"], [])
    assert split(val=mine) == (["x/1", "x/5", "y/2"], ["y/0", "x/3", "y/4"])
    assert split(train="train.txt", val=mine) == (["y/4", "x/1"], ["y/0", "x/3", "y/4"])
    assert split(train="train.txt", val="all") == (["y/4", "x/1"], ["x/1", "x/3", "x/5", "y/0", "y/2", "y/4"])
    train, val = split(train="train.txt", val=0.5)
    assert (train, len(val)) == (["y/4", "x/1"], 2)
    assert not set(train) & set(val)
    refused(root, "no image left to train on", val="all")
    assert len(Folder(str(root), "val", val="all")) == 6


def test_a_column_splits(root: Path) -> None:
    rows = LABELS.splitlines()
    text = [rows[0] + ",split", *(f"{row},{'val' if n % 3 else 'train'}" for n, row in enumerate(rows[1:]))]
    (root / "labels.csv").write_text("\n".join(text))
    assert Folder(str(root)).ids == ["a", "sub/deep/e.v2"]
    assert Folder(str(root), "val").ids == ["b c", "g", "sub/d\xe4", "sub/f"]
    assert len(Folder(str(root), val=0.5)) == 3
    (root / "list.txt").write_text("g\n")
    assert Folder(str(root), train="list.txt").ids == ["g"]
    assert len(Folder(str(root), "val", train="list.txt")) == 0
    (root / "labels.csv").write_text("\n".join(text).replace(",train", ",val"))
    refused(root, "no image left to train on")


@pytest.mark.parametrize("val", [0, 1, 1.5, -0.1, float("nan"), "1", "0", "inf", "val", "", "list.csv"])
def test_bad_val(root: Path, val: Any) -> None:
    refused(root, f"val is {val!r}", "fraction between 0 and 1", val=val)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\na\n", ("lists a 2 times",)),
        ("", ("lists no image 0 times",)),
        ("a.jpg\na\n", ("1 of 2", "(a)")),
        ("a\nx\ny\nz\nw\n", ("4 of 5", "(x, y, z, ...)")),
        ("a\n\xff", ("UTF-8",)),
    ],
)
def test_bad_lists(root: Path, content: str, words: tuple[str, ...]) -> None:
    (root / "list.txt").write_bytes(content.encode("latin1"))
    for key in ("train", "val"):
        refused(root, "list.txt", *words, **{key: "list.txt"})


def test_bad_arguments(root: Path) -> None:
    refused(root, "split is 'test'", split="test")
    refused(root, "train is 'all'", ".txt", train="all")
    refused(root, "none.txt", "No such file", train="none.txt")
    refused(root / "none", "dataset.root=", "is not a folder")
    refused(root, "not among", "dog", classes=["cat"])


# Masks


def test_masks_by_path_and_by_name(root: Path, tmp_path: Path) -> None:
    masks = root / "masks"
    for name in ("a", "g", "b c", "e.v2", "sub/f"):
        draw_mask(masks / f"{name}.png")
    draw_mask(masks / "other/d\xe4.PNG", ((1,) * 5,) * 4)
    draw(masks / "overview.jpg")
    data = Folder(str(root), "val", val="all", masks="masks")
    assert data.ids == IDS  # masks are no images
    item = data[4]
    assert set(item) == {"image", "label", "id", "mask"}
    assert (item["mask"].dtype, item["mask"].tolist()) == (np.uint8, [[1] * 5] * 4)
    assert data[0]["mask"][0].tolist() == [0, 1, 2, 255, 0]
    tiled = Folder(str(root), "val", val="all", masks="masks", has_background=False)
    assert not tiled.has_background
    assert tiled[0]["mask"][0].tolist() == [255, 1, 2, 255, 255]
    masks.rename(tmp_path / "elsewhere")
    assert Folder(str(root), "val", val="all", masks=str(tmp_path / "elsewhere"))[0]["mask"].shape == (4, 5)
    assert "mask" not in Folder(str(root), "val", val="all")[0]


def test_masks_that_are_missing_or_ambiguous(tmp_path: Path) -> None:
    for name in ("c/a.jpg", "c/b.jpg", "d/a.jpg", "d/e.jpg", "d/e.png"):
        draw(tmp_path / name)
    for name in ("a", "b", "d/e.png", "d/e.jpg"):
        draw_mask(tmp_path / "masks" / f"{name}.png", ((0,) * 5,) * 4)
    refused(tmp_path, "2 of 5 images", "(c/a, d/a)", "masks", split="val", val="all", masks="masks")
    (tmp_path / "list.txt").write_text("c/b\nd/e.jpg\nd/e.png\n")
    data = Folder(str(tmp_path), "val", val="list.txt", masks="masks")
    assert [path.name for path in data.masks or []] == ["b.png", "e.jpg.png", "e.png.png"]
    assert len(Folder(str(tmp_path), val="list.txt", masks="masks")) == 2  # training asks for no mask
    for given in ("none", ".", "c/a.jpg"):
        refused(tmp_path, f"masks={given} is neither a folder of masks alone nor an export", masks=given)
    draw(tmp_path / "d/masks/f.jpg")
    refused(tmp_path, "masks does not look like a class", masks="d/masks")
    (tmp_path / "empty").mkdir()
    (tmp_path / "masks").rename(tmp_path / "d/masks/old")
    refused(tmp_path, "dataset.masks=", "no image", split="val", val="list.txt", masks="empty")


def test_masks_that_do_not_fit(root: Path) -> None:
    (root / "val.txt").write_text("a.jpg")
    for values, words in (
        (np.zeros((5, 4)), ("(5, 4)", "(4, 5)")),
        ([[0, 3, 254, 255, 3]] * 4, ("[3, 254]", "0 to 2")),
    ):
        draw_mask(root / "masks/a.png", values)
        data = Folder(str(root), "val", val="val.txt", masks="masks")
        with pytest.raises(InputError) as caught:
            data[0]
        assert all(word in str(caught.value) for word in ("a.png", *words))


# Real photographs, and broken ones


@real
@pytest.mark.parametrize(("name", "count", "classes"), [("voc12_animals_256", 3576, 20), ("voc12_mix", 99, 20)])
def test_real_data(name: str, count: int, classes: int) -> None:
    root = str(Path(str(DATA), name))
    arguments: dict[str, Any] = {"root": root, "labels": "cls_labels_onehot.npy", "masks": "SegmentationClass"}
    arguments["val"] = 0.2
    train, val = (Folder(split=split, **arguments) for split in ("train", "val"))
    assert (len(train) + len(val), len(train.classes)) == (count, classes)
    assert not set(train.ids) & set(val.ids)
    for index in range(0, len(val), max(1, len(val) // 20)):
        item = val[index]
        assert item["mask"].shape == item["image"].shape[:2]
        assert "mask" not in train[index]


@real
def test_real_masks_are_not_taken_for_photographs() -> None:
    """A second folder of masks, which nothing names."""
    refused(Path(str(DATA), "msrc_v2"), "1182 of 1182 images", "name the folder of masks", masks="SegmentationClass")


def pictures() -> dict[str, bytes]:
    """Small images of many kinds, as files."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 4), np.uint8)
    colours, grey = Image.fromarray(noise[..., :3]), Image.fromarray(noise[..., 0])
    deep = Image.fromarray(noise[..., 0].astype(np.uint16) << 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "a.jpg": (colours, {"exif": exif}),
        "progressive.jpg": (colours, {"progressive": True}),
        "cmyk.jpg": (colours.convert("CMYK"), {}),
        "grey.jpg": (grey, {}),
        "a.png": (colours, {}),
        "rgba.png": (Image.fromarray(noise), {}),
        "palette.png": (colours.convert("P"), {"transparency": 3}),
        "deep.png": (deep, {}),
        "lossy.webp": (Image.fromarray(noise), {}),
        "lossless.webp": (colours, {"lossless": True, "exif": exif}),
        "a.bmp": (colours, {}),
        "grey.bmp": (grey, {}),
        "a.tif": (colours, {"exif": exif}),
        "deep.tif": (deep, {"compression": "tiff_lzw"}),
        "packed.tif": (Image.fromarray(noise), {"compression": "tiff_adobe_deflate"}),
    }
    files = {}
    for name, (image, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.rpartition(".")[2]), **options)
        files[name] = buffer.getvalue()
    return files


@pytest.mark.timeout(120)
def test_mutated_images_are_arrays_or_refused(tmp_path: Path) -> None:
    rng, outcomes = random.Random(0), Counter[str]()
    for name, content in pictures().items():
        path = tmp_path / name
        path.write_bytes(content)
        assert read_image(path).shape[2] == 3
        for turn in range(20):
            changed = bytearray(content)
            for _ in range(rng.choice((1, 2, 5))):
                place = rng.randrange(len(changed) if turn % 2 else min(len(changed), 200))  # the header, too
                match rng.randrange(4):
                    case 0:
                        changed[place] = rng.randrange(256)
                    case 1:
                        changed[place] ^= 1 << rng.randrange(8)
                    case 2:
                        del changed[place : place + rng.choice((1, 8))]
                    case 3:
                        changed[place:place] = rng.randbytes(rng.choice((1, 8)))
            path.write_bytes(changed[: rng.randrange(len(changed))] if turn % 5 == 4 else changed)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Pillow warns of what it puts up with
                    image = read_image(path)
            except InputError as error:
                message = str(error)
                outcomes["refused"] += 1
            else:
                message = str(path)
                assert image.dtype == np.uint8
                assert image.ndim == 3
                assert image.shape[2] == 3
                assert image.size
                outcomes["read"] += 1
            assert str(path) in message
            assert len(message.splitlines()) == 1
    print(f"\n{sum(outcomes.values())} mutated images: {dict(outcomes)}")
    assert sum(outcomes.values()) == 300
    assert min(outcomes["read"], outcomes["refused"]) > 50

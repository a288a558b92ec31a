"""What is likely a mistake: masks against labels, images on both sides, pictures that are not read as they are."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wsss import InputError
from wsss.data import doubts
from wsss.data.doubts import FEW, contents, few, left_out, masks_misfit, shared, unseen
from wsss.data.files import AVIF, read_image
from wsss.data.finding import find_files
from wsss.data.folder import Folder

NOISE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)


def photograph(path: Path, turn: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.roll(NOISE, turn)).save(path, **options)
    return path


def item(name: str, labels: tuple[int, ...], *shown: int) -> dict[str, Any]:
    return {"id": name, "label": np.array(labels, np.float32), "shown": np.array(shown, np.uint8)}


# Masks against labels

CLASSES = ("cat", "dog")
BOTH = [item("a", (1, 0), 0, 1), item("b", (0, 1), 0, 2, 255), item("c", (1, 1), 0, 1), item("d", (0, 0), 0)]


def test_masks_that_fit() -> None:
    assert masks_misfit(BOTH, CLASSES) is None
    assert masks_misfit([], CLASSES) is None
    assert masks_misfit([item("a", (1, 0))], CLASSES) is None  # without a mask
    assert masks_misfit([*BOTH, item("e", (1, 0), 0, 2)], CLASSES) is None
    assert masks_misfit([item("e", (0, 0), 0, 255)], CLASSES) is None  # ignored, and nothing to see


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([item("a", (1, 0), 0, 2), item("b", (0, 1), 0, 1)], ("2 of 2 masks", "a shows dog", "1 cat, 2 dog")),
        ([item("a", (1, 0), 0, 2), *BOTH[1:2], item("b", (0, 1), 0, 1)], ("2 of 3", "dataset.classes")),
        ([item("a", (1, 0), 0), item("b", (0, 1), 0)], ("2 of 2", "a shows no cat, b shows no dog")),  # the other way
        ([item("a", (1, 0), 0, 255), item("b", (1, 0), 0, 255), *BOTH[3:]], ("2 of 2", "only 0 and 255", "1 cat")),
    ],
)
def test_masks_that_do_not_fit(items: list[dict[str, Any]], words: tuple[str, ...]) -> None:
    said = masks_misfit(items, CLASSES)
    assert said is not None
    assert all(word in said for word in words), said


def test_check_tolerates_less_than_training() -> None:
    items = [*BOTH, item("e", (1, 0), 0, 2)]
    assert masks_misfit(items, CLASSES, tolerated=0.1) is not None
    assert masks_misfit(BOTH * 4 + items[-1:], CLASSES, tolerated=0.1) is None


def test_classes_that_nothing_shows() -> None:
    assert unseen(np.array([[1, 0, 0], [1, 1, 0]]), ("a", "b", "c")) == [
        "no training image shows c: nothing can be learnt about it"
    ]


def test_classes_that_few_images_show() -> None:
    assert few(np.ones((FEW, 2)), ("a", "b")) == []
    labels = np.zeros((40, 5))
    for column, count in enumerate((40, 9, 3, 0, 5)):
        labels[:count, column] = 1
    (said,) = few(labels, ("a", "b", "c", "d", "e"))
    assert said.startswith("3 classes have fewer than 30 training images, c (3), e (5), b (9): expect masks to correct")


# The same images on both sides


def two_sides(root: Path, **arguments: Any) -> list[str]:
    (root / "train.txt").write_text("\n".join(f"t/{n}.jpg" for n in range(4)))
    val = sorted(path.relative_to(root).as_posix() for path in root.glob("v/*"))
    (root / "val.txt").write_text("\n".join(val))
    return shared(
        *(Folder(str(root), split, train="train.txt", val="val.txt", **arguments) for split in ("train", "val"))
    )


def test_copies_and_links_are_noticed(tmp_path: Path) -> None:
    for n in range(4):
        photograph(tmp_path / f"t/{n}.jpg", n)
        photograph(tmp_path / f"v/other{n}.jpg", 100 + n)
    assert two_sides(tmp_path) == []
    shutil.copy(tmp_path / "t/0.jpg", tmp_path / "v/copy.jpg")
    (tmp_path / "v/link.jpg").symlink_to(tmp_path / "t/1.jpg")
    os.link(tmp_path / "t/2.jpg", tmp_path / "v/same.jpg")
    (said,) = two_sides(tmp_path)
    assert "3 of 7 images to evaluate on are trained on too" in said
    assert "copy.jpg" in said


def test_few_bytes_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitmaps are all of one size: it would take long to compare them all."""
    for n in range(4):
        photograph(tmp_path / f"t/{n}.bmp", n)
        (tmp_path / f"t/{n}.bmp").rename(tmp_path / f"t/{n}.jpg")
        shutil.copy(tmp_path / f"t/{n}.jpg", tmp_path / "v" / f"{n}.jpg") if n else (tmp_path / "v").mkdir()
    monkeypatch.setattr(doubts, "COMPARED_BYTES", 5 * (tmp_path / "t/0.jpg").stat().st_size)
    (said,) = two_sides(tmp_path)
    assert "1 of 3 images to evaluate on (of files of equal size 0 MB were compared, not all)" in said
    monkeypatch.setattr(doubts, "COMPARED_BYTES", 0)
    assert "no image to evaluate on was found among those trained on (of" in two_sides(tmp_path)[0]


# Files that are not read, or not whole


def test_kinds_that_are_not_read(tmp_path: Path) -> None:
    for name in ("cat/1.jfif", "cat/2.JPE", "cat/3.gif", "dog/1.jpg"):
        photograph(tmp_path / name, format="GIF" if name.endswith("gif") else "JPEG")
    for name in ("cat/4.HEIC", "bird/5.heic", "bird/6.svg", "bird/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    images, unread = find_files(tmp_path, "images")
    assert [path.name for path in images] == ["1.jfif", "2.JPE", "3.gif", "1.jpg"]
    (said,) = left_out(tmp_path, images, unread, folders=True)
    for word in ("3 images", "2 .heic, 1 .svg", "bird/5.heic", "no image is left of the class bird:", "JPEG or PNG"):
        assert word in said
    assert left_out(tmp_path, images, []) == []
    notes = Folder.inspection(root=str(tmp_path)).notes
    assert said in notes
    for path in images.values():
        path.unlink()
    with pytest.raises(InputError, match=r"3 of kinds that are not read, .heic, .svg"):
        find_files(tmp_path, "images")


@pytest.mark.skipif(not AVIF, reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    assert read_image(photograph(tmp_path / "a.avif")).shape == NOISE.shape


def looked_at(root: Path) -> list[str]:
    return contents(find_files(root, "images")[0])


def test_pages_and_depth_are_said(tmp_path: Path) -> None:
    pages = [Image.fromarray(np.roll(NOISE, n)) for n in range(4)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "b.gif", save_all=True, append_images=pages[1:3])
    photograph(tmp_path / "c.jpg")
    Image.fromarray(NOISE[..., 0].astype(np.uint16) * 16).save(tmp_path / "d.png")
    (tmp_path / "e.png").write_bytes(b"no image")
    frames, deep = looked_at(tmp_path)
    assert "2 files have several frames or pages (" in frames
    assert "only the first is read, not the other 5" in frames
    assert "1 files have more than 8 bits of grey (" in deep
    assert np.array_equal(read_image(tmp_path / "a.tif"), NOISE)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_keeps_its_levels(tmp_path: Path, bits: int) -> None:
    values = (np.arange(2**bits, dtype=np.uint16) * np.uint16(1)).reshape(-1, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 0], values >> (bits - 8))


def test_masks_among_photographs(tmp_path: Path) -> None:
    mask = np.zeros(NOISE.shape[:2], np.uint8)
    mask[5:20, 5:20] = 1
    for n in range(3):
        photograph(tmp_path / f"cat/{n}.jpg", n)
    photograph(tmp_path / "dog/0.png", 7)  # another photograph of one name and size
    photograph(tmp_path / "dog/0_crop.png", 8)
    assert looked_at(tmp_path) == []
    (tmp_path / "truth").mkdir()
    palette = Image.fromarray(mask)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "truth/0.png")
    Image.fromarray(mask * 255).save(tmp_path / "cat/1_mask.png")
    Image.fromarray(np.repeat(mask[..., None] * 255, 3, 2)).save(tmp_path / "cat/mask-2.png")
    Image.fromarray(mask).save(tmp_path / "cat/alone.png")  # a drawing, perhaps
    Image.fromarray(mask[:20]).save(tmp_path / "cat/2_small.png")
    (said,) = looked_at(tmp_path)
    assert "3 images look like masks of others" in said
    assert "(cat/1_mask.png, cat/mask-2.png, truth/0.png)" in said
    assert "(cat, truth) as dataset.masks" in said
    assert said in Folder.inspection(root=str(tmp_path)).notes


def test_few_files_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(9):
        photograph(tmp_path / f"{n}.jpg", n)
        Image.fromarray(NOISE[..., 0] & 1).save(tmp_path / f"{n}_mask.png")
    monkeypatch.setattr(doubts, "DECODED", 3)
    assert "3 images (of 3 looked at) look like masks" in looked_at(tmp_path)[0]


def test_a_program_is_never_started(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(InputError, match="cannot be read as an image"):
        read_image(tmp_path / "a.jpg")

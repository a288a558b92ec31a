"""Folders of masks: names, palettes, wholeness."""

import random
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsss import InputError
from wsss.outputs.masks import MaskFolder, output_names
from wsss.writing import palette, write_json, write_whole


def test_what_a_folder_holds(tmp_path: Path) -> None:
    folder = MaskFolder(tmp_path / "a" / "out")
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    cams = {2: np.full((2, 2), 0.25, np.float32)}
    folder.store.add(folder.encode("sub/x", mask, np.full((2, 2, 3), 100, np.uint8), cams))
    folder.store.add(folder.encode("y", mask))
    picture = Image.open(folder.masks / "sub/x.png")
    assert picture.mode == "P"
    assert np.array_equal(np.asarray(picture), mask)
    assert (np.array(picture.convert("RGB")) == palette()[mask]).all()
    arrays = np.load(folder.cams / "sub/x.npz", allow_pickle=False)
    assert (arrays["cam"].dtype, arrays["cam"].shape, arrays["ids"].tolist()) == (np.float16, (1, 2, 2), [2])
    found = sorted(path.relative_to(tmp_path / "a/out").as_posix() for path in tmp_path.rglob("*.*"))
    assert found == ["cams/sub/x.npz", "masks/sub/x.png", "masks/y.png", "overlays/sub/x.jpg"]
    folder.store.add(folder.encode("y", mask[:1], cams={}))
    assert np.load(folder.cams / "y.npz")["cam"].shape == (0, 1, 2)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a folder"):
        MaskFolder(tmp_path / "file" / "out")


def test_an_overlay_has_the_size_of_its_image(tmp_path: Path) -> None:
    folder = MaskFolder(tmp_path)
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 30:] = 1
    folder.store.add(folder.encode("small", mask, np.zeros((4, 6, 3), np.uint8)))
    overlay = np.asarray(Image.open(folder.overlays / "small.jpg")).astype(int)
    assert overlay.shape == (4, 6, 3)
    assert (overlay[:, 4:, 0] > 30).all()
    assert (overlay[:, :2, 0] < 30).all()
    wide = np.ones((1, 70_000), np.uint8)  # more than JPEG can hold
    folder.store.add(folder.encode("long", wide, np.zeros((1, 70_000, 3), np.uint8)))
    assert Image.open(folder.overlays / "long.png").size == (70_000, 1)
    assert Image.open(folder.masks / "long.png").size == (70_000, 1)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a.jpg", "a.png", "b/a.jpg"], ["a.jpg", "a.png", "b/a"]),
        (["a.jpg", "a.png", "a.jpg.bmp"], ["a.jpg", "a.png", "a.jpg.bmp"]),
        (["a.jpg.bmp", "a.jpg"], ["a.jpg.bmp", "a"]),
        (["a.jpg", "a.png/b.jpg"], ["a.jpg", "a.png/b"]),  # masks/a.png is a folder
        (["a.jpg", "a.png/b.jpg", "a.jpg.png/c.jpg"], ["a-8e78cb2bc7f7", "a.png/b", "a.jpg.png/c"]),
        (["A.jpg", "a.png"], ["A.jpg", "a.png"]),
        (["A.jpg", "b/a.jpg"], ["A", "b/a"]),
    ],
)
def test_names(paths: list[str], names: list[str]) -> None:
    found = output_names(map(Path, paths))
    assert [re.sub(r"-[0-9a-f]{12}$", "-HASH", name) for name in found] == [
        re.sub(r"-[0-9a-f]{12}$", "-HASH", name) for name in names
    ]
    assert sorted(output_names(map(Path, reversed(paths)))) == sorted(found)


@pytest.mark.parametrize("seed", range(200))
def test_names_are_one_file_each(seed: int, tmp_path: Path) -> None:
    """Whatever the photographs are called, and even where upper and lower case are one."""
    draw = random.Random(seed)
    long = draw.choice(["x" * 246, "ü" * 123])  # 255 bytes at most
    words = ["a", "A", "b", "é", unicodedata.normalize("NFD", "é"), "\udcff", long]
    ends = [".jpg", ".png", ".JPG", ".jpg.png", ".png.jpg", ".npz", ".png.png", "", ".", "..jpg"]

    def name() -> str:
        return draw.choice(words) + draw.choice(ends)

    folders = ["", "", f"{name()}/", f"{name()}/{name()}/"]
    paths = {Path(draw.choice(folders) + name()) for _ in range(12)}
    paths = sorted(path for path in paths if not any(path in other.parents for other in paths))
    names = output_names(paths)
    assert names == output_names(paths)
    for suffix in (".png", ".jpg", ".npz"):
        written = [unicodedata.normalize("NFC", name).casefold() + suffix for name in names]
        assert len(set(written)) == len(paths)
        assert not {str(folder) for name in written for folder in Path(name).parents} & set(written)
        for name, path in zip(names, paths, strict=True):
            assert Path(name).parent == path.parent
            place = tmp_path / f"{name}{suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch(exist_ok=False)


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / ("x" * 250)  # no room for a longer temporary name
    with write_whole(path) as file:
        file.write(b"whole")

    def fail() -> None:
        with write_whole(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]
    write_json(tmp_path / "a.json", {"a": float("nan"), "b": 1.5})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": null,\n  "b": 1.5\n}\n'


def test_palette_is_vocs() -> None:
    assert palette()[[0, 1, 2, 15, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [224, 224, 192],
    ]  # fmt: skip

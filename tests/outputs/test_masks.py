"""Folders of masks: names, palettes, wholeness."""

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
    folder.write("sub/x", mask, np.full((2, 2, 3), 100, np.uint8), cams)
    folder.write("y", mask)
    picture = Image.open(folder.masks / "sub/x.png")
    assert picture.mode == "P"
    assert np.array_equal(np.asarray(picture), mask)
    assert (np.array(picture.convert("RGB")) == palette()[mask]).all()
    arrays = np.load(folder.cams / "sub/x.npz", allow_pickle=False)
    assert (arrays["cam"].dtype, arrays["cam"].shape, arrays["ids"].tolist()) == (np.float16, (1, 2, 2), [2])
    found = sorted(path.relative_to(tmp_path / "a/out").as_posix() for path in tmp_path.rglob("*.*"))
    assert found == ["cams/sub/x.npz", "masks/sub/x.png", "masks/y.png", "overlays/sub/x.jpg"]
    folder.write("y", mask[:1], cams={})
    assert np.load(folder.cams / "y.npz")["cam"].shape == (0, 1, 2)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a folder"):
        MaskFolder(tmp_path / "file" / "out")


def test_files_that_differ_in_their_suffix_keep_it() -> None:
    paths = [Path("a.jpg"), Path("a.png"), Path("b/a.jpg")]
    assert output_names(paths) == ["a.jpg", "a.png", "b/a"]


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

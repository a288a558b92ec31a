import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse
from PIL import Image
from scipy.io import savemat
from voc2012 import EXTRA, IDS, ids_of, mat, png, sbd_files, tree, voc_files, write

from wsss import InputError
from wsss.data.files import palette, read_list, read_mask
from wsss.data.sbd import (
    FIELD,
    GENUINE,
    TrainAug,
    _field,
    _numbers,
    _variable,
    derive_train_aug,
    read_segmentation,
)
from wsss.report import colour_map

DATA = os.environ.get("WSSS_TEST_DATA")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return write(tmp_path / "VOC2012", voc_files())


@pytest.fixture
def sbd(tmp_path: Path) -> Path:
    return write(tmp_path / "dataset", sbd_files())


def refused(call: Callable[..., Any], *args: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_the_palette_is_that_of_the_pictures() -> None:
    assert palette() == colour_map().tobytes()


# SBD's masks


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("dtype", ["u1", "i4", "f8"])
@pytest.mark.parametrize("mask", [[[0, 1, 20], [255, 7, 0]], [[3]], np.arange(300 * 4).reshape(300, 4) % 21])
def test_masks_of_sbd(tmp_path: Path, mask: Any, dtype: str, compress: bool) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(mat(np.array(mask, dtype), compress))
    found = read_segmentation(path)
    assert found.dtype == np.uint8
    assert np.array_equal(found, mask)


def test_files_of_matlab_read_as_scipy_does() -> None:
    """MATLAB's own files, of which some installations of scipy carry a few."""
    files = sorted(Path(scipy.io.__file__).parent.glob("matlab/tests/data/teststruct_[67].[1-9]*GLNX86.mat"))
    if not files:
        pytest.skip("this scipy has no files of MATLAB")
    for path in files:
        found = _numbers(_field(_variable(path.read_bytes(), "teststruct"), "doublefield"))
        assert np.array_equal(found, scipy.io.loadmat(path)["teststruct"]["doublefield"][0, 0])
        assert found.size == 3


SMALL = mat(np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("no MATLAB 5",)),
        (b"no .mat file at all" * 20, ("no MATLAB 5",)),
        (SMALL[:-80], ()),
        (SMALL[:300], ()),
        (SMALL[:128], ("no GTcls",)),
        (mat(np.zeros((99, 99), np.uint8), True)[:-200], ()),
        (mat(np.full((4, 4), 21, np.uint8)), ("[21]", "0 to 20")),
        (mat(np.full((4, 4), -1)), ("[-1]", "0 to 20")),
        (mat(np.full((4, 4), 0.5)), ("[0.5]", "0 to 20")),
        (mat(np.full((4, 4), np.nan)), ("[nan]", "0 to 20")),
        (mat(np.zeros((4, 4, 3), np.uint8)), ("(4, 4, 3)", "(H, W)")),
        (mat(np.zeros((0, 4), np.uint8)), ("(0, 4)", "(H, W)")),
        (mat("text"), ("class 4", "numbers")),
        (mat({"deeper": 1}), ("class 2", "numbers")),
    ],
)
def test_other_files_are_refused_as_masks(tmp_path: Path, content: bytes, words: tuple[str, ...]) -> None:
    path = tmp_path / "a.mat"
    path.write_bytes(content)
    refused(read_segmentation, path, words=(str(path), "unpack SBD again", *words))


def test_mats_without_a_segmentation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.mat"
    for content in ({"GTinst": {"Segmentation": np.zeros((2, 2), np.uint8)}}, {"GTcls": 3}, {"GTcls": {"x": 1}}):
        savemat(path, content)
        refused(read_segmentation, path, words=(str(path), "GTcls.Segmentation"))
    refused(read_segmentation, tmp_path / "none.mat", words=("No such file",))


@pytest.mark.parametrize("compress", [True, False])
def test_damaged_mats_raise_nothing_else(tmp_path: Path, compress: bool) -> None:
    """scipy.io.loadmat crashes the interpreter on some of these."""
    rng, content = random.Random(0), mat(np.zeros((4, 4), np.uint8), compress)
    refusals = 0
    for _ in range(300):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 2, 5))):
            mutated[rng.randrange(128, len(mutated))] = rng.randrange(256)
        (tmp_path / "a.mat").write_bytes(mutated)
        try:
            assert read_segmentation(tmp_path / "a.mat").size
        except InputError:
            refusals += 1
    assert refusals > (200 if compress else 30)  # a compressed array has a checksum


def test_arrays_that_swell_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsss.data.sbd.MOST", 100_000)
    (tmp_path / "a.mat").write_bytes(mat(np.zeros((1000, 1000), np.uint8), True))
    refused(read_segmentation, tmp_path / "a.mat", words=("more than 100000 bytes",))


# train_aug


def test_train_aug(voc: Path, sbd: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    report = derive_train_aug(voc, sbd, lambda *call: calls.append(call))
    text = (voc / "ImageSets/Segmentation/train_aug.txt").read_bytes()
    assert text.decode() == "2007_000032\n2007_000039\n2008_000002\n2008_000007\n"
    assert (report.ids, report.sha256) == (4, hashlib.sha256(text).hexdigest())
    assert (report.voc_masks, report.sbd_masks, report.written, report.missing_images) == (4, 2, 6, 0)
    assert report.notes == ()
    assert calls == [(n + 1, 6) for n in range(6)]
    assert sorted(os.listdir(voc / "SegmentationClassAug")) == [f"{name}.png" for name in IDS]
    for name in IDS:
        path = voc / "SegmentationClassAug" / f"{name}.png"
        assert np.array_equal(read_mask(path), ids_of(name, 1 if name in EXTRA else 0))
        with Image.open(path) as image:
            assert image.mode == "P"
            assert bytes(image.getpalette() or ()) == palette()


def test_what_is_equal_is_not_written_again(voc: Path, sbd: Path) -> None:
    first = derive_train_aug(voc, sbd)
    made = tree(voc)
    kept, changed, broken = (voc / "SegmentationClassAug" / f"{name}.png" for name in IDS[:3])
    kept.write_bytes(png(ids_of(IDS[0], 0), "L"))  # equal ids in another file
    content = kept.read_bytes()
    changed.write_bytes(png(ids_of(IDS[1], 3)))
    broken.write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in voc.rglob("*")}
    again = derive_train_aug(voc, sbd)
    assert (again.written, first.written) == (2, 6)
    assert kept.read_bytes() == content
    assert {p for p in times if p.is_file() and p.stat().st_mtime_ns != times[p]} == {changed, broken}
    kept.unlink()
    assert derive_train_aug(voc, sbd).written == 1
    assert tree(voc) == made


def test_missing_images_are_counted(voc: Path, sbd: Path) -> None:
    (voc / "JPEGImages/2008_000002.jpg").unlink()
    report = derive_train_aug(voc, sbd)
    assert report.missing_images == 1
    assert "1 images" in report.notes[0]


def report_on(lists: dict[str, list[str]], root: Path, monkeypatch: pytest.MonkeyPatch) -> TrainAug:
    """The report on lists alone: with a mask wherever VOC or SBD has one, and no photograph."""
    files = {f"ImageSets/Segmentation/{name}.txt": lists[name] for name in ("train", "val")}
    files |= {"sbd/train.txt": lists["sbd_train"], "sbd/val.txt": lists["sbd_val"]}
    write(root, {name: "\n".join(ids).encode() for name, ids in files.items()})
    stems = {"SegmentationClass": lists["train"] + lists["val"], "cls": lists["sbd_train"] + lists["sbd_val"]}
    monkeypatch.setattr("wsss.data.sbd.files_by_stem", lambda path, *_: dict.fromkeys(stems.get(path.name, []), path))
    monkeypatch.setattr("wsss.data.sbd.read_mask", lambda _: None)
    monkeypatch.setattr("wsss.data.sbd.read_segmentation", lambda _: None)
    monkeypatch.setattr("wsss.data.sbd.save_mask", lambda *_: True)
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    return derive_train_aug(root, root / "sbd")


def test_unlike_the_released_sbd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VOC's own numbers of images with an SBD that is not the released one: said, not refused."""
    ids = [f"2007_{n:06d}" for n in range(4000)]
    lists = {"train": ids[: GENUINE[0]], "val": ids[-GENUINE[1] :], "sbd_train": ids[1000:1500], "sbd_val": ids[-2:]}
    report = report_on(lists, tmp_path, monkeypatch)
    assert (report.ids, report.missing_images, len(report.notes)) == (1500, 1500, 2)
    assert "1500" in report.notes[0]
    assert "10582" in report.notes[0]


@pytest.mark.skipif(not DATA, reason="set WSSS_TEST_DATA to the folder of real data")
def test_the_fields_own_list_has_the_known_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VOC's lists and an SBD of the field's train_aug and half of val."""
    train, val, train_aug = (read_list(Path(str(DATA), f"lists/voc12/{n}.txt")) for n in ("train", "val", "train_aug"))
    lists = {"train": train, "val": val, "sbd_train": train_aug[:5000] + val[::2], "sbd_val": train_aug[5000:]}
    report = report_on(lists, tmp_path, monkeypatch)
    assert (report.ids, report.sha256[:12]) == FIELD == (10_582, "d1326bd53264")
    assert (report.voc_masks, report.sbd_masks, report.written) == (2913, 9118, 12_031)
    assert len(report.notes) == 1  # no photographs here


def test_broken_inputs_are_refused(voc: Path, sbd: Path) -> None:
    (sbd / "cls/2008_000002.mat").unlink()
    refused(derive_train_aug, voc, sbd, words=("1 of 6", "2008_000002", str(sbd)))
    (sbd / "cls/2008_000002.mat").write_bytes(b"broken")
    refused(derive_train_aug, voc, sbd, words=("2008_000002.mat", "cannot be read"))
    assert not (voc / "ImageSets/Segmentation/train_aug.txt").exists()
    shutil.rmtree(sbd / "cls")
    refused(derive_train_aug, voc, sbd, words=(str(sbd / "cls"), "SBD"))
    (sbd / "val.txt").unlink()
    refused(derive_train_aug, voc, sbd, words=(str(sbd / "val.txt"),))

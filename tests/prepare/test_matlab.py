import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from scipy.io import savemat
from voc2012 import mat

from wsss import InputError
from wsss.prepare.matlab import _numbers, _struct_field, _variable, read_segmentation


def refused(call: Callable[..., Any], *args: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


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
        found = _numbers(_struct_field(_variable(path.read_bytes(), "teststruct"), "doublefield"))
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
    monkeypatch.setattr("wsss.prepare.matlab.MOST", 100_000)
    (tmp_path / "a.mat").write_bytes(mat(np.zeros((1000, 1000), np.uint8), True))
    refused(read_segmentation, tmp_path / "a.mat", words=("more than 100000 bytes",))

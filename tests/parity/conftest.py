"""Comparison with recordings of the original implementations: reading them, matching them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


class Recordings:
    """The `.npz` files of a folder, each read once: `recordings("toco/par")` is a dict of tensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str) -> dict[str, Any]:
        """Arrays of one file; text stays a numpy array. A missing file skips the test, by the file's name."""
        if name not in self.files:
            path = self.folder / f"{name}.npz"
            if not path.is_file():
                pytest.skip(f"{path} is not there")
            with np.load(path) as file:
                arrays = {key: file[key] for key in file.files}
            self.files[name] = {k: a if a.dtype.kind == "U" else torch.from_numpy(a) for k, a in arrays.items()}
        return self.files[name]


class Match:
    """Asserts that tensors equal recorded ones and remembers how well they did.

    `match("toco/par", "out", ours, rtol=..., atol=...)`; without tolerances they have to be equal. NaN equals
    NaN. `share` of the entries may fail, e.g. 0.001 of the pixels of a label map.
    """

    def __init__(self, recordings: Recordings, remember: Callable[[str, object], None]) -> None:
        self.recordings, self.remember = recordings, remember

    def __call__(
        self,
        file: str,
        key: str,
        ours: Any,
        *,
        rtol: float = 0.0,
        atol: float | Tensor = 0.0,
        share: float = 0.0,
    ) -> None:
        recorded = self.recordings(file)[key]
        ours = torch.as_tensor(ours).detach()
        assert ours.shape == recorded.shape, f"{file} {key}: shape {tuple(ours.shape)}, not {tuple(recorded.shape)}"
        ours, recorded = ours.double(), recorded.double()
        allowed = (atol + rtol * recorded.abs()).nan_to_num()
        close = ((ours - recorded).abs() <= allowed) | (ours.isnan() & recorded.isnan()) | (ours == recorded)
        failed = (~close).double().mean().item()
        self.remember("parity", (file, key, _error(ours, recorded)))
        if failed > share:
            worst = (ours - recorded).abs().nan_to_num(torch.inf).masked_fill(close, 0).argmax()
            pytest.fail(
                f"{file} {key}: {failed:.2%} of the entries differ, e.g. entry {worst.item()} is "
                f"{ours.flatten()[worst].item():.9g}, recorded {recorded.flatten()[worst].item():.9g}"
            )


def _error(ours: Tensor, recorded: Tensor) -> float:
    """Largest difference relative to the largest recorded value; entries that are NaN on both sides are equal."""
    if recorded.numel() == 0:
        return 0.0
    difference = torch.where(ours.isnan() & recorded.isnan(), 0, ours - recorded).abs().max()
    return (difference / recorded.nan_to_num().abs().max().clamp(min=torch.finfo(torch.double).tiny)).item()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the recordings were made
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def recordings(request: pytest.FixtureRequest) -> Recordings:
    folder: Path = request.config.getoption("golden")
    if not folder.is_dir():
        pytest.fail(f"--golden {folder} is not a folder")
    return Recordings(folder)


@pytest.fixture
def match(recordings: Recordings, record_property: Callable[[str, object], None]) -> Match:
    return Match(recordings, record_property)

"""Options and settings of all tests."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import OVERRIDES, Ended, call, make_voc

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
torch.set_num_threads(1)

RECORDED = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        type=Path,
        default=Path(os.environ.get("WSSS_TEST_GOLDEN") or RECORDED),
        help="folder of recordings of the original implementations, with one folder per method: toco/*.npz, ... "
        "(default: the environment variable WSSS_TEST_GOLDEN, else the small part in tests/golden)",
    )


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs; a test that asks for it is skipped where there is none."""
    given = os.environ.get("WSSS_TEST_DATA")
    if not given:
        pytest.skip("WSSS_TEST_DATA is not set: no real photographs")
    return Path(given)


@pytest.fixture
def voc_root(tmp_path: Path) -> Path:
    """A small tree in VOC's layout."""
    return make_voc(tmp_path / "voc")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Eight photographs with odd names in a folder with an odd name, labels, and masks for all of them."""
    root = tmp_path / "Füße und Köpfe"
    (root / "im Urlaub").mkdir(parents=True)
    (root / "masks").mkdir()
    rng = np.random.default_rng(0)
    rows = ["file,labels"]
    for number in range(8):
        name = f"im Urlaub/Bild {number} (groß)"
        picture = rng.integers(0, 256, (40 + number, 48, 3), np.uint8)
        Image.fromarray(picture).save(root / f"{name}.JPG", format="JPEG")
        mask = np.zeros(picture.shape[:2], np.uint8)
        mask[4:20, 4:20] = (1, 2, 1)[number % 3] if number else 0
        Image.fromarray(mask).save(root / "masks" / f"{Path(name).name}.png")
        rows.append(f"{name}.JPG,{('cat', 'dog', 'cat;dog')[number % 3] if number else ''}")
    (root / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny ToCo trained for two steps on shapes."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert call("train", *OVERRIDES, f"hydra.run.dir={out}") == 0
    return out


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs `wsss-<name>` in this process, in a directory of its own, and returns how it ended."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(name: str, *arguments: str) -> Ended:
        capfd.readouterr()
        code = call(name, *arguments)
        return Ended(code, *capfd.readouterr())

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of all comparisons; a report carries those of its test, also from an xdist worker."""
    table: dict[str, list[tuple[float, str]]] = {}
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        if report.when == "call":
            for name, value in report.user_properties:
                if name == "parity":
                    file, key, error = value
                    table.setdefault(file, []).append((error, key))
    if not table:
        return
    terminalreporter.section("parity with the recordings")
    terminalreporter.write_line(f"{'file':24} {'arrays':>6}  largest difference, relative to the array's largest value")
    for file, compared in sorted(table.items()):
        error, key = max(compared)
        terminalreporter.write_line(f"{file:24} {len(compared):6}  {error:.1e}  {key if error else ''}")

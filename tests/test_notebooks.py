"""The notebooks as they are in the repository: without outputs, and with nothing of the machine they were run on."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
PLACES = re.compile(r"(?<![\w.])(/(home|root|Users|work|workspace|tmp|mnt|opt|usr|var)\b|[A-Z]:\\)")


def test_there_are_some() -> None:
    assert {path.name for path in NOTEBOOKS} >= {"quickstart.ipynb", "own_photographs.ipynb"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cleared(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert not cell["metadata"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_no_path_of_a_machine(path: Path) -> None:
    assert PLACES.search(path.read_text(encoding="utf-8")) is None

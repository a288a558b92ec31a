"""Options and settings of all tests."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", help="folder of recordings for tests/parity (default: WSSS_TEST_GOLDEN, tests/golden)")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder of recordings."""
    given = request.config.getoption("--golden") or os.environ.get("WSSS_TEST_GOLDEN")
    return Path(given) if given else Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photographs; a test that asks for it is skipped where there is none."""
    given = os.environ.get("WSSS_TEST_DATA")
    if not given:
        pytest.skip("WSSS_TEST_DATA is not set: no real photographs")
    return Path(given)

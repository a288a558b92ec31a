"""Would the tests notice? Changes each recorded result by 1 % in turn and reports the changes that no test catches.

    python tests/parity/perturb.py [DIR] [FILE ...]        e.g. ... /path/to/golden toco/par toco/losses

The arrays are changed in memory, as the tests see them; DIR stays as it is. Floats are multiplied by 1.01 (0 becomes
0.01), of integers 1 % of the entries, at least one, are raised by one. Text, empty arrays and what a test module lists
in EXCEPTED (files, arrays, why) are left alone. Exits with 1 when a change goes unnoticed.
"""

import sys
from collections import Counter
from collections.abc import Generator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.runner import runtestprotocol
from torch import Tensor

HERE = Path(__file__).parent


def perturbed(array: Tensor) -> Tensor:
    if array.is_floating_point():
        return torch.where(array == 0, 0.01, array * 1.01)
    chosen = torch.randperm(array.numel(), generator=torch.Generator().manual_seed(0))[: -(-array.numel() // 100)]
    changed = array.flatten().clone()
    changed[chosen] += 1
    return changed.view_as(array)


class Perturb:
    """A pytest plugin whose run is: every test once, then those of a file again for each of its arrays."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.recordings: Any = None
        self.lines: list[str] = []
        self.failed: list[str] = []
        self.excepted: list[tuple[str, str, str]] = []
        self.uncaught: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        value = yield
        if fixturedef.argname == "recordings":
            self.recordings = value
        return value

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        compares: dict[pytest.Item, set[tuple[str, str]]] = {}
        for item in session.items:
            if not self.passes(item):
                self.failed.append(item.nodeid)
            compares[item] = {tuple(value[:2]) for name, value in item.user_properties if name == "parity"}  # type: ignore[misc]
        modules = {item.module: None for item in session.items if isinstance(item, pytest.Function)}
        self.excepted = [exception for module in modules for exception in getattr(module, "EXCEPTED", ())]
        counts: Counter[str] = Counter()
        tested = {file.split("/")[0] for keys in compares.values() for file, _ in keys}  # methods
        for path in sorted(self.recordings.folder.glob("*/*.npz")):
            file = f"{path.parent.name}/{path.stem}"
            if file in self.files or (path.parent.name in tested and not self.files):
                counts += self.perturb(file, {item: keys for item, keys in compares.items() if file in dict(keys)})
        self.lines.append(f"{'all':24} " + row(counts))
        return True

    def perturb(self, file: str, compares: dict[pytest.Item, set[tuple[str, str]]]) -> Counter[str]:
        arrays, counts = self.recordings(file), Counter[str]()
        # run again as below but unchanged: else a fault of this tool would look like a change that is noticed
        self.failed += [f"{item.nodeid}, run again" for item in compares if not self.passes(item)]
        for key, array in list(arrays.items()):
            counts["arrays"] += 1
            if not isinstance(array, Tensor) or array.numel() == 0 or self.exception(file, key):
                counts["excepted"] += 1
                continue
            arrays[key] = perturbed(array)
            # those that compare this very array first: one failure is enough
            items = sorted(compares, key=lambda item: (file, key) not in compares[item])
            if all(self.passes(item) for item in items):
                counts["uncaught"] += 1
                self.uncaught.append(f"{file} {key}")
            else:
                counts["caught"] += 1
            arrays[key] = array
        self.lines.append(f"{file:24} " + row(counts))
        return counts

    def exception(self, file: str, key: str) -> str | None:
        """Why an array is not perturbed: the reason that its tests' EXCEPTED gives."""
        for files, keys, reason in self.excepted:
            if file in files.split() and any(fnmatch(key, pattern) for pattern in keys.split()):
                return reason
        return None

    @staticmethod
    def passes(item: pytest.Item) -> bool:
        """Runs a test; session fixtures live on, because a test of another module is announced to follow."""
        item.user_properties.clear()
        following = next(other for other in item.session.items if other.path != item.path)
        return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


def row(counts: Counter[str]) -> str:
    return " ".join(f"{counts[name]:9}" for name in ("arrays", "excepted", "caught", "uncaught"))


def main(folder: str, files: list[str]) -> int:
    plugin = Perturb(files)
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-qq", "--no-summary", "-W", "ignore"]
    pytest.main([str(HERE), "--golden", folder, *options], plugins=[plugin])
    print(f"\n{'file':24} {'arrays':>9} {'excepted':>9} {'caught':>9} {'uncaught':>9}")
    print("\n".join(plugin.lines))
    for title, names in (("fails without any change", plugin.failed), ("no test notices 1 % in", plugin.uncaught)):
        for name in names:
            print(f"{title}: {name}")
    return int(bool(plugin.failed or plugin.uncaught))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else str(HERE.parent / "golden"), sys.argv[2:]))

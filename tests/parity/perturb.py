"""Would the tests notice? Changes each recorded result by 1 % in turn and reports the changes that no test catches.

    python tests/parity/perturb.py [DIR] [FILE ...]        e.g. ... /path/to/golden toco/par toco/losses

The arrays are changed in memory, as the tests see them; DIR stays as it is. Floats are multiplied by 1.01 (0 becomes
0.01), of integers 1 % of the entries, at least one, are raised by one. Exits with 1 when a change goes unnoticed.
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

EXCEPTED = (
    # files, arrays, why they are left alone
    ("toco/transforms", "*", "not compared yet"),
    ("toco/train_init", "*", "input: the weights training starts from"),
    ("toco/tiny_model", "encoder.head.*", "unused parameter, not imported"),
    ("toco/forward", "imgs_? crops_*", "input"),
    ("toco/multiscale_cam", "imgs imgs_b", "input"),
    ("toco/cam_label", "cam cls_label img_box aff_input", "input"),
    ("toco/roi_crops", "images roi_mask crop_num crop_size", "input"),
    ("toco/roi_crops", "seed", "seed of the original's generator"),
    ("toco/par", "imgs masks const_img const_mask", "input"),
    ("toco/par", "refine_inputs_255 refine_cam refine_cls_label refine_box", "input"),
    ("toco/losses", "ptc_fmap ptc_label ptc_allignore_fmap ctc_student ctc_teacher ctc_flags", "input"),
    ("toco/losses", "seg_pred seg_label cls_logit cls_label reg_img reg_logit reg_label reg_box", "input"),
    ("toco/losses", "bf_img bf_in bf_odd_img bf_odd_in bf_sigma_rgb bf_sigma_xy", "input"),
    ("toco/losses", "seg_loss_nobg seg_loss_nofg seg_loss_none", "NaN, which no factor changes"),
    ("toco/lr", "iters", "input"),
    ("toco/evaluate", "gts preds preds_ignore", "input"),
    ("toco/evaluate", "pAcc mAcc p_pAcc p_mAcc", "not among our figures"),
    ("toco/train_voc toco/train_coco", "batch*/* batch_order n_iter rec/topleft", "input"),
    ("toco/train_voc toco/train_coco", "names", "names"),
    ("toco/train_voc toco/train_coco", "rec/cls_score", "not among our figures"),
)


def exception(file: str, key: str) -> str | None:
    """Why an array is not perturbed."""
    for files, keys, reason in EXCEPTED:
        if file in files.split() and any(fnmatch(key, pattern) for pattern in keys.split()):
            return reason
    return None


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
            if not self.passes(item, session.items[-1]):
                self.failed.append(item.nodeid)
            compares[item] = {tuple(value[:2]) for name, value in item.user_properties if name == "parity"}  # type: ignore[misc]
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
        for key, array in list(arrays.items()):
            counts["arrays"] += 1
            if exception(file, key):
                counts["excepted"] += 1
                continue
            arrays[key] = perturbed(array)
            # those that compare this very array first: one failure is enough
            items = sorted(compares, key=lambda item: (file, key) not in compares[item])
            if all(self.passes(item, item) for item in items):
                counts["uncaught"] += 1
                self.uncaught.append(f"{file} {key}")
            else:
                counts["caught"] += 1
            arrays[key] = array
        self.lines.append(f"{file:24} " + row(counts))
        return counts

    @staticmethod
    def passes(item: pytest.Item, following: pytest.Item) -> bool:
        """Runs a test; session fixtures live on, because another test is announced to follow."""
        item.user_properties.clear()
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

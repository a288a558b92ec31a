"""Weights & Biases offline, for real, and TensorBoard: what is shown, and that a run which goes on is the same one."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_resume import interrupted
from tiny import OVERRIDES, call

STEPS = [*(o for o in OVERRIDES if not o.startswith("trainer.max_steps")), "trainer.max_steps=4"]


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    import wandb

    assert wandb.run is None  # the training has ended it


@pytest.mark.slow
@pytest.mark.usefixtures("_offline")
def test_wandb_goes_on_as_the_same_run(tmp_path: Path) -> None:
    arguments = [*STEPS, "logger=wandb", f"hydra.run.dir={tmp_path}", "resume=auto"]
    interrupted(*arguments, step=3)
    identity = (tmp_path / "wandb_id.txt").read_text().strip()
    assert call("train", *arguments) == 0
    assert (tmp_path / "wandb_id.txt").read_text().strip() == identity
    parts = sorted(path for path in (tmp_path / "wandb").iterdir() if path.name.startswith("offline-run-"))
    assert [path.name.rpartition("-")[2] for path in parts] == [identity] * 2
    for part in parts:  # after step 2, and after step 4
        content = (part / f"run-{identity}.wandb").read_bytes()
        for said in (b"train/loss_cls", b"val/map", b"val_check_interval", b"undecided", b"red-stripes"):
            assert said in content, said
        shown = part / "files/media"
        assert len(list(shown.glob("images/examples/masks_*.png"))) == 4  # images
        assert len(list(shown.glob("images/examples/CAM_*.png"))) == 4
        masks = list(shown.glob("images/mask/examples/*.mask.png"))
        assert masks
        with Image.open(masks[0]) as mask:
            assert set(np.unique(np.asarray(mask))) <= {0, 1, 2, 3, 4, 255}
        (table,) = shown.glob("table/classes/miou_*.table.json")
        rows = json.loads(table.read_text())
        assert rows["columns"][:2] == ["class", "iou"]
        assert rows["data"][0][0] == "background"
    assert "4," in (tmp_path / "log/metrics.csv").read_text()  # which stands beside


@pytest.mark.slow
@pytest.mark.usefixtures("_offline")
def test_trainings_of_a_sweep_are_runs_of_their_own(tmp_path: Path) -> None:
    short = [o for o in OVERRIDES if not o.startswith("dataset.val_size")]
    assert (
        call("train", "-m", *short, "dataset.val_size=1", "seed=1,2", "logger=wandb", f"hydra.sweep.dir={tmp_path}")
        == 0
    )
    identities = [(tmp_path / f"seed={seed}" / "wandb_id.txt").read_text().strip() for seed in (1, 2)]
    assert len(set(identities)) == 2
    for seed, identity in enumerate(identities, start=1):
        (part,) = (tmp_path / f"seed={seed}" / "wandb").glob("offline-run-*")
        assert part.name.endswith(identity)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "wsss[tensorboard]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert call("train", *OVERRIDES, "logger=tensorboard", f"hydra.run.dir={tmp_path}") == 0
    events = EventAccumulator(str(tmp_path / "log"), {"images": 0, "tensors": 0, "scalars": 0})
    tags = events.Reload().Tags()
    assert {"train/loss", "train/loss_cls", "val/map", "val/miou"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert tags["images"] == ["examples"]
    assert {"config/text_summary", "classes/miou/text_summary", "classes/cam_miou/text_summary"} <= set(tags["tensors"])
    (table,) = events.Tensors("classes/miou/text_summary")
    assert b"| class | iou |" in table.tensor_proto.string_val[0]
    assert b"val_check_interval" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert (tmp_path / "log/metrics.csv").exists()


def test_tensorboard_has_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason='tensorboard is not installed: pip install "wsss[tensorboard]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [*STEPS, "logger=tensorboard", f"hydra.run.dir={tmp_path}", "resume=auto"]
    interrupted(*arguments, step=3)  # step 3 is logged, step 2 saved
    assert call("train", *arguments) == 0
    events = EventAccumulator(str(tmp_path / "log"), {"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("val/map")] == [2, 4]


def test_tensorboard_is_missed_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wsss import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    assert call("train", *OVERRIDES, "logger=tensorboard", f"hydra.run.dir={tmp_path / 'run'}") == 2
    assert 'needs tensorboard: pip install "wsss[tensorboard]"' in capsys.readouterr().err

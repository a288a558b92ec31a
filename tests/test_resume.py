"""Interrupted runs: which one goes on, and that it ends as if nothing had happened."""

import fcntl
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kill import compare, settings
from PIL import Image
from tiny import OVERRIDES, Ended, call

from wsss.callbacks import CSVLog
from wsss.config import class_named
from wsss.data.shapes import Shapes

Command = Callable[..., Ended]


def interrupt(patch: pytest.MonkeyPatch, step: int, method: str = "wsss.methods.toco.ToCo") -> None:
    """Let the next training fail at a step, as a lost machine would."""
    stage: Any = class_named(method)
    proper = stage.training_step

    def failing(self: Any, batch: object, batch_idx: int) -> object:
        if self.global_step == step:
            raise KeyboardInterrupt
        return proper(self, batch, batch_idx)

    patch.setattr(stage, "training_step", failing)


def interrupted(*arguments: str, step: int, **method: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, step, **method)
        assert call("train", *arguments) != 0


ARGUMENTS = settings("toco", steps=6, workers=0)


def test_bit_equal(tmp_path: Path) -> None:
    assert call("train", *ARGUMENTS, f"hydra.run.dir={tmp_path / 'a'}") == 0
    for step in (1, 3, 5):  # before the first checkpoint, and between two
        interrupted(*ARGUMENTS, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto", step=step)
        assert not (tmp_path / "b/metrics.json").exists()
    torch.rand(random.randrange(1, 9))  # what else is drawn does not matter
    assert call("train", *ARGUMENTS, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto") == 0
    agreeing, different = compare(tmp_path / "a", tmp_path / "b")
    assert different == []
    assert agreeing > 100


@pytest.mark.parametrize(
    ("method", "target"), [("weaktr", "wsss.methods.mctformer.MCTformer"), ("cosa", "wsss.methods.cosa.CoSA")]
)
def test_bit_equal_of_other_methods(method: str, target: str, tmp_path: Path) -> None:
    """The attention's weights, and a teacher that is an average; no other random numbers take part."""
    arguments = settings(method, steps=6, workers=0)
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'a'}") == 0
    interrupted(*arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto", step=3, method=target)
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto") == 0
    assert compare(tmp_path / "a", tmp_path / "b")[1] == []


def test_bit_equal_boundaries(tmp_path: Path) -> None:
    """IRN, whose mean displacement goes on, too; it learns from masks and evaluates nothing."""
    shapes = Shapes("train", train_size=6, size=32, num_classes=4)
    (tmp_path / "masks").mkdir()
    for index, image_id in enumerate(shapes.ids):
        Image.fromarray(shapes.mask(index)).save(tmp_path / "masks" / f"{image_id}.png")
    arguments = [*settings("irn", steps=6, workers=0), f"pseudo_masks={tmp_path / 'masks'}"]
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'a'}") == 0
    again = [*arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto"]
    for step in (1, 3, 5):
        interrupted(*again, step=step, method="wsss.methods.irn.IRN")
    assert call("train", *again) == 0
    agreeing, different = compare(tmp_path / "a", tmp_path / "b")
    assert different == []
    assert agreeing > 100
    state = torch.load(tmp_path / "a/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["network.displacement.mean"].abs().sum() > 0


def test_bit_equal_features(tmp_path: Path) -> None:
    """Of a method that trains on features instead of images."""
    arguments = settings("frozen_cam", steps=6, workers=0)
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'a'}") == 0
    again = [*arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto"]
    for step in (1, 3, 5):
        interrupted(*again, step=step, method="wsss.methods.frozen_cam.FrozenCAM")
    assert call("train", *again) == 0
    agreeing, different = compare(tmp_path / "a", tmp_path / "b")
    assert different == []
    assert agreeing > 100


def test_bit_equal_from_a_frozen_classifier(tmp_path: Path, command: Command) -> None:
    """Fine-tuning, whose start is given again; the checkpoint stands on its own."""
    first = tmp_path / "first/checkpoints/last.ckpt"
    assert call("train", *settings("frozen_cam", steps=3, workers=0), f"hydra.run.dir={first.parents[1]}") == 0
    network = ["method.backbone=resnet10t", "method.backbone_args=null", "method.freeze_norm=true"]
    arguments = [*settings("cam", steps=6, workers=0), *network, f"method.init_checkpoint={first}"]
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'a'}") == 0
    again = [*arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto"]
    for step in (1, 3, 5):
        interrupted(*again, step=step, method="wsss.methods.cam.CAM")
    assert call("train", *again) == 0
    agreeing, different = compare(tmp_path / "a", tmp_path / "b")
    assert different == []
    assert agreeing > 100
    first.unlink()
    ended = command("eval", f"checkpoint={tmp_path / 'a/checkpoints/last.ckpt'}", f"hydra.run.dir={tmp_path / 'c'}")
    assert ended.code == 0, ended.err


@pytest.mark.slow
def test_killed() -> None:
    script = Path(__file__).parent / "kill.py"
    done = subprocess.run(
        [sys.executable, script, "toco", "--kills", "3", "--steps", "30"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 differ" in done.stdout


def test_accumulated_and_unevaluated_steps(tmp_path: Path) -> None:
    """A global batch of several, and a last step without a checkpoint of its own."""
    arguments = [*settings("toco", steps=6, workers=0), "global_batch_size=6", "trainer.max_steps=5"]
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'a'}") == 0
    interrupted(*arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto", step=3)
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto") == 0
    assert compare(tmp_path / "a", tmp_path / "b")[1] == []
    assert (tmp_path / "a/log/metrics.csv").read_text().splitlines()[-1].startswith("5,,")  # the last evaluation


def test_without_evaluation_and_before_the_first_row(tmp_path: Path, photographs: Path) -> None:
    """Checkpoints by steps, of several batches each, and one that is older than the first row of the log."""
    base = [o for o in ARGUMENTS if not o.startswith(("dataset.", "trainer.val", "trainer.log", "trainer.max"))]
    arguments = [
        *base,
        "method.weights=null",
        "dataset=folder",
        f"dataset.root={photographs}",
        "dataset.masks=masks",
        "global_batch_size=6",
        "trainer.max_steps=8",
        "trainer.val_check_interval=3",
        "trainer.log_every_n_steps=4",
    ]
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'a'}") == 0
    for step in (3, 5):
        interrupted(*arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto", step=step)
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto") == 0
    assert compare(tmp_path / "a", tmp_path / "b")[1] == []


def test_other_images_are_refused(command: Command, tmp_path: Path, photographs: Path) -> None:
    base = [*(o for o in ARGUMENTS if not o.startswith("dataset.")), "method.weights=null"]
    folder = ["dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks", f"hydra.run.dir={tmp_path / 'a'}"]
    interrupted(*base, *folder, step=3)
    labels = photographs / "labels.csv"
    labels.write_text(labels.read_text(encoding="utf-8").replace("dog", "wolf"), encoding="utf-8")
    ended = command("train", *base, *folder, "resume=auto")
    assert ended.code == 2
    assert "not those that" in ended.err


def test_interrupts_are_said(command: Command, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 3)
        ended = command("train", *ARGUMENTS, f"hydra.run.dir={tmp_path / 'a'}")
        assert ended.code == 130
        assert "interrupted; the same command with resume=auto" in ended.err
        interrupt(patch, 0)
        assert command("train", *ARGUMENTS, f"hydra.run.dir={tmp_path / 'b'}").code == 130
    assert not (tmp_path / "b").exists()  # it held nothing


def test_newest_of_the_same_configuration(command: Command) -> None:
    """Neither a finished run, nor one with another seed, nor an older one."""
    runs = Path("outputs/toco_shapes")
    fixed = [o for o in ARGUMENTS if "run.dir" not in o]
    interrupted(*fixed, f"hydra.run.dir={runs / 'old'}", step=3)
    interrupted(*fixed, f"hydra.run.dir={runs / 'new'}", step=3)
    os.utime(runs / "old/run.json", (1, 1))
    interrupted(*fixed, "seed=5", f"hydra.run.dir={runs / 'other'}", step=3)
    ended = command("train", *fixed, "resume=auto")
    assert ended.code == 0
    assert f"going on with {runs.absolute() / 'new'}" in ended.out
    assert sorted(p.name for p in runs.iterdir()) == ["new", "old", "other"]
    assert (runs / "new/metrics.json").exists()
    assert f"going on with {runs.absolute() / 'old'}" in command("train", *fixed, "resume=auto").out
    ended = command("train", *fixed, "resume=auto")
    assert ended.code == 0
    assert "no such run" in ended.out
    assert len(list(runs.iterdir())) == 4


def test_finished_run_is_reported(command: Command, trained: Path) -> None:
    before = (trained / "metrics.json").read_text()
    ended = command("train", *OVERRIDES, f"hydra.run.dir={trained}", "resume=auto")
    assert ended.code == 0
    assert "finished" in ended.out
    assert f"val/map {json.loads(before)['val/map']}" in ended.out
    assert (trained / "metrics.json").read_text() == before


def test_other_configuration_is_refused(command: Command, trained: Path) -> None:
    ended = command("train", *OVERRIDES, "seed=3", "method.lr=1.0", f"hydra.run.dir={trained}", "resume=auto")
    assert ended.code == 2
    assert "another configuration" in ended.err
    assert "seed" in ended.err
    assert "method.lr" in ended.err


def test_wrong_value_and_used_directory(command: Command, trained: Path) -> None:
    assert "expected auto or null" in command("train", *OVERRIDES, "resume=yes").err
    assert "add resume=auto" in command("train", *OVERRIDES, f"hydra.run.dir={trained}").err


def test_run_in_progress_is_left_alone(command: Command, tmp_path: Path) -> None:
    busy = tmp_path / "busy"
    interrupted(*ARGUMENTS, f"hydra.run.dir={busy}", step=3)
    from wsss.runs import LOCKS

    os.close(LOCKS.pop(busy))  # that of the interrupted run, which was this process
    descriptor = os.open(busy, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ended = command("train", *ARGUMENTS, f"hydra.run.dir={busy}", "resume=auto")
    os.close(descriptor)
    assert ended.code == 1
    assert "in use by another process" in ended.err
    assert busy.exists()


def test_sweep_goes_on(command: Command, tmp_path: Path) -> None:
    sweep = ["-m", *ARGUMENTS, "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}", "resume=auto"]
    assert command("train", *sweep).code == 0
    (tmp_path / "sweep/seed=2/metrics.json").unlink()
    before = (tmp_path / "sweep/seed=1/metrics.json").stat().st_mtime_ns
    assert command("train", *sweep).code == 0
    assert (tmp_path / "sweep/seed=2/metrics.json").exists()
    assert (tmp_path / "sweep/seed=1/metrics.json").stat().st_mtime_ns == before


def test_log_keeps_its_first_rows(tmp_path: Path) -> None:
    log = CSVLog(str(tmp_path))
    log.log_metrics({"a": 0.5}, step=1)
    log.log_metrics({"a": 1 / 3, "b": float("nan")}, step=2)
    whole = log.path.read_text()
    log.log_metrics({"c": 2.0}, step=3)
    with log.path.open("a") as file:
        file.write("4,0.1")  # torn by a kill
    again = CSVLog(str(tmp_path))
    again.keep(2)
    assert log.path.read_text() == whole
    again.log_metrics({"c": 2.0}, step=3)
    assert log.path.read_text().splitlines() == ["step,a,b,c", "1,0.5,,", f"2,{1 / 3},nan,", "3,,,2.0"]


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does; nothing half-written stays, and the run can go on."""
    arguments = [*ARGUMENTS, f"hydra.run.dir={tmp_path / 'run'}", "resume=auto"]
    script = (
        f"import resource, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from tiny import call\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"  # less than a checkpoint
        f"sys.exit(call('train', *{arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    assert call("train", *arguments) == 0


@pytest.mark.parametrize("step", [2, 6], ids=["between", "at the end"])
def test_killed_while_it_evaluates(tmp_path: Path, step: int) -> None:
    """The evaluation alone is made again, and everything ends as if nothing had happened."""
    from wsss.methods.toco import ToCo

    assert call("train", *ARGUMENTS, f"hydra.run.dir={tmp_path / 'a'}") == 0
    proper, trained = ToCo.validation_step, ToCo.training_step
    steps: list[int] = []

    def failing(self: ToCo, batch: object, batch_idx: int) -> None:
        if self.global_step == step:
            raise KeyboardInterrupt
        proper(self, batch, batch_idx)

    def counting(self: ToCo, batch: object, batch_idx: int) -> object:
        steps.append(self.global_step)
        return trained(self, batch, batch_idx)

    again = [*ARGUMENTS, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToCo, "validation_step", failing)
        assert call("train", *again) == 130
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToCo, "training_step", counting)
        assert call("train", *again) == 0
    assert steps == list(range(step, 6))
    assert compare(tmp_path / "a", tmp_path / "b")[1] == []


@pytest.mark.parametrize("broken", ["last.ckpt", "run.json", "metrics.json", "log/metrics.csv", "no log"])
@pytest.mark.parametrize("content", [b"", b"\0" * 999, b"junk"], ids=["empty", "zeros", "junk"])
def test_damaged_files_of_a_run(command: Command, tmp_path: Path, broken: str, content: bytes) -> None:
    """It says which, and goes on with the best that is left."""
    run = tmp_path / "run"
    interrupted(*ARGUMENTS, f"hydra.run.dir={run}", step=5)
    path = run / "checkpoints/last.ckpt" if broken == "last.ckpt" else run / broken
    if broken == "no log":
        (run / "log/metrics.csv").unlink()
    else:
        path.write_bytes(content)
    ended = command("train", *ARGUMENTS, f"hydra.run.dir={run}", "resume=auto")
    assert ended.code == 0, ended.err
    assert json.loads((run / "metrics.json").read_text())["steps"] == 6
    assert {"last.ckpt": "going on from best-step", "no log": "rows of earlier steps are lost"}.get(
        broken, path.name
    ) in ended.out


def test_what_cannot_go_on_says_so(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(*ARGUMENTS, f"hydra.run.dir={run}", step=5)
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    ended = command("train", *ARGUMENTS, f"hydra.run.dir={run}", "resume=auto")
    assert ended.code == 1
    assert "cannot go on, since last.ckpt, best-step" in ended.err
    for content in ("", "a: [", "3"):
        (run / "config.yaml").write_text(content)
        ended = command("train", *ARGUMENTS, f"hydra.run.dir={run}", "resume=auto")
        assert ended.code == 2
        assert "config.yaml" in ended.err
        assert "Traceback" not in ended.err


def test_a_named_directory_is_not_left_for_a_sibling(command: Command) -> None:
    runs = Path("outputs/toco_shapes").absolute()
    interrupted(*ARGUMENTS, f"hydra.run.dir={runs / 'old'}", step=3)
    ended = command("train", *ARGUMENTS, f"hydra.run.dir={runs / 'new'}", "resume=auto")
    assert ended.code == 0, ended.err
    assert (runs / "new/metrics.json").exists()
    assert not (runs / "old/metrics.json").exists()


def test_a_failing_evaluation_costs_no_training(command: Command, tmp_path: Path, photographs: Path) -> None:
    """It can be made again alone, once what it failed at is mended."""
    base = [o for o in ARGUMENTS if not o.startswith("dataset.")]
    run = tmp_path / "run"
    given = ["dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks", "dataset.val=0.5"]
    arguments = [*base, "method.weights=null", "data.eval_batch_size=1", *given, f"hydra.run.dir={run}", "resume=auto"]
    masks = sorted((photographs / "masks").iterdir())
    whole = [path.read_bytes() for path in masks]
    for path in masks:
        path.write_bytes(b"damaged")
    ended = command("train", *arguments)
    assert ended.code == 1
    assert "what was trained is kept" in ended.err
    for path, content in zip(masks, whole, strict=True):
        path.write_bytes(content)
    for path in (*masks, *photographs.rglob("*.JPG")):
        os.utime(path, ns=(1, 1))
    (run / "run.json").unlink()  # which knows when the masks were written
    ended = command("train", *arguments)
    assert ended.code == 0, ended.err
    assert json.loads((run / "metrics.json").read_text())["steps"] == 6


def test_pictures_that_fail_cost_no_figures(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsss.methods.base import WSSSModule

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(WSSSModule, "illustrate", fail)
    ended = command("train", *ARGUMENTS, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 1
    assert "is complete, but for its pictures" in ended.err
    assert (tmp_path / "run/metrics.json").exists()

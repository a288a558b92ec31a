"""wsss-run: what is run, skipped, gone on with, and refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import Ended

Command = Callable[..., Ended]
ROOT = Path(__file__).parent.parent
TRAINING = [
    "transform.crop_size=32",
    *(f"data.{name}" for name in ("batch_size=2", "eval_batch_size=1", "num_workers=0")),
    *(f"trainer.{name}" for name in ("accelerator=cpu", "max_steps=2", "val_check_interval=2", "log_every_n_steps=1")),
    "trainer.enable_progress_bar=false",
    "method.backbone_args={width: 4, frozen_stages: 0, batch_norm_momentum: 0.1}",
]
STAGES = [
    *(f"stages.{stage}.{override}" for stage in ("cam", "segment") for override in TRAINING),
    "stages.cam.method.cam_scales=[1.0]",
    "stages.segment.method.decoder_args={channels: 8, dilation: 2}",
    "stages.cam.transform.long_side=[32,40]",
    "stages.label.num_workers=0",
    "stages.label.refine=none",
]
SHAPES = [*(f"dataset.{name}" for name in ("size=32", "train_size=6", "val_size=4", "num_classes=4")), *STAGES]


@pytest.fixture(autouse=True)
def found_by_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def start(*arguments: str) -> "subprocess.Popen[str]":
    """wsss-run in a process of its own, which leads a group."""
    code = "from wsss.commands.run import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip


def ran(out: Path) -> dict[str, str]:
    """Of each stage whether it ran."""
    stages = json.loads((out / "pipeline.json").read_text())["stages"]
    return {name: record["status"] for name, record in stages.items()}


def masks(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("stages/label-*/masks/*.png")}


def refused(ended: Ended, code: int, *words: str) -> None:
    lines = [line for line in ended.err.splitlines() if line.startswith("wsss-run: ")]
    assert (ended.code, len(lines)) == (code, 1), ended
    assert "Traceback" not in ended.err
    assert all(word in lines[0] for word in words), lines[0]


def folder_of(out: Path, name: str) -> Path:
    (found,) = out.glob(f"stages/{name}-*")
    return found


def wait_for(pattern: str, out: Path, process: "subprocess.Popen[str]") -> Path:
    for _ in range(1200):
        if found := list(out.glob(pattern)):
            return found[0]
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} in {out}")


@pytest.mark.slow
def test_three_stages(command: Command, tmp_path: Path) -> None:
    """From nothing; all skipped; the last alone; what was edited; what does not belong."""
    out = tmp_path / "out"
    arguments = [*SHAPES, f"out={out}"]
    ended = command("run", *arguments)
    assert ended.code == 0, ended.err
    assert ran(out) == {"cam": "ran", "label": "ran", "segment": "ran"}
    record = json.loads((out / "pipeline.json").read_text())["stages"]
    assert record["label"]["figures"] == {"masks": 6}
    assert record["segment"]["inputs"] == {"label": folder_of(out, "label").name}
    assert {"val/map", "val/cam_miou"} <= record["cam"]["figures"].keys()
    assert "val/miou" in record["segment"]["figures"]
    made = masks(out)

    assert command("run", *arguments, "stages.cam.data.num_workers=1").code == 0  # no result depends on it
    assert set(ran(out).values()) == {"skipped"}

    assert command("run", *arguments, "stages.segment=[method.lr=0.002,trainer.max_steps=1]").code == 0
    assert ran(out) == {"cam": "skipped", "label": "skipped", "segment": "ran"}
    ended = command("run", *arguments, "clean=true")
    assert (ended.code, ended.out.count("/segment-"), "clean=delete" in ended.out) == (0, 1, True)
    assert len(list((out / "stages").iterdir())) == 4
    assert command("run", *arguments, "clean=delete").code == 0
    assert len(list((out / "stages").iterdir())) == 3

    (folder_of(out, "segment") / "done.json").write_text('{"figures": 3}')
    ended = command("run", *arguments)
    assert (ended.code, ran(out)) == (0, {"cam": "skipped", "label": "skipped", "segment": "ran"})
    (folder_of(out, "label") / "masks/train-000001.png").unlink()
    assert command("run", *arguments).code == 0
    assert (ran(out)["label"], masks(out) == made) == ("ran", True)
    (folder_of(out, "label") / "masks/train-000001.png").write_bytes(made["train-000002.png"])
    refused(command("run", *arguments), 2, "stage label", "train-000001.png", "manifest.json")


@pytest.mark.slow
def test_a_corrected_label(command: Command, photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "dataset=folder",
        f"dataset.root={photographs}",
        "dataset.val=0.25",
        "dataset.masks=masks",
        *STAGES,
        f"out={out}",
    ]
    arguments += ["stages.cam.monitor=null", "stop_after=label"]
    assert command("run", *arguments).code == 0
    assert ran(out) == {"cam": "ran", "label": "ran"}
    labels = photographs / "labels.csv"
    before = labels.read_text(encoding="utf-8")
    labels.write_text(before.replace(",cat;dog", ",dog", 1), encoding="utf-8")
    assert command("run", *arguments).code == 0
    assert ran(out) == {"cam": "ran", "label": "ran"}
    labels.write_text(before, encoding="utf-8")
    assert command("run", *arguments).code == 0
    assert ran(out) == {"cam": "skipped", "label": "skipped"}


@pytest.mark.slow
def test_killed_and_gone_on_with(command: Command, tmp_path: Path) -> None:
    """Both, then wsss-run alone, whose child is ended by the next; then it is terminated."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    arguments = [*SHAPES, "stages.cam.trainer.max_steps=60", "stop_after=label"]
    assert command("run", *arguments, f"out={alone}").code == 0
    arguments.append(f"out={out}")
    process = start(*arguments)
    running = wait_for("stages/cam-*/running.json", out, process)
    wait_for("stages/cam-*/config.yaml", out, process)
    child = json.loads(running.read_text())["pid"]
    refused(command("run", *arguments), 1, str(out), "in use")
    process.kill()
    os.killpg(child, signal.SIGKILL)
    process.communicate()
    running.unlink()

    process = start(*arguments)
    running = wait_for("stages/cam-*/running.json", out, process)
    process.kill()
    process.wait()
    child = json.loads(running.read_text())["pid"]
    os.kill(child, 0)  # is still there
    process = start(*arguments)
    wait_for("stages/label-*/running.json", out, process)
    process.terminate()
    said, error = process.communicate()
    assert f"process {child} of an earlier wsss-run" in said
    assert process.returncode == 143
    assert "terminated in stage label: the same command goes on" in error
    ended = command("run", *arguments)
    assert (ended.code, ran(out)) == (0, {"cam": "skipped", "label": "ran"}), ended
    assert masks(out) == masks(alone)


@pytest.mark.slow
def test_part_of_it_and_a_failing_stage(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [*SHAPES, f"out={out}"]
    refused(command("run", *arguments, "start_from=label"), 2, "stage cam is not finished", "leave start_from out")
    assert command("run", *arguments, "stop_after=cam").code == 0
    assert ran(out) == {"cam": "ran"}
    ended = command("run", *arguments, "start_from=label", "stages.label.refine.background.value=low")
    refused(ended, 2, "stage label failed (exit code 2)", "refine.background.value")
    assert command("run", *arguments, "start_from=label", "stop_after=label").code == 0
    assert ran(out) == {"cam": "skipped", "label": "ran"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pipeline=cams"], ["pipeline=cams", "known are cam"]),
        (["stop_after=segmnet"], ["stop_after=segmnet", "cam, label, segment"]),
        (["start_from=0"], ["start_from=0", "cam, label, segment"]),
        (["start_from=segment", "stop_after=cam"], ["stop_after=cam comes before"]),
        (["stages.crf.alpha=3"], ["stages.crf", "cam, label, segment"]),
        (["stages.segment=3"], ["stages.NAME.KEY=VALUE"]),
        (["stages.segment.trainer.max_step=3"], ["stage segment", "trainer.max_step", "max_steps"]),
        (["stages.label.refine=walks"], ["stage label", "refine=walks", "crf"]),
        (["stages.label.checkpoint={segment.checkpoint}"], ["{segment.checkpoint}", "needs"]),
        (["pipeline.stages.label=3"], ["lists no stages"]),
        (["pipeline.stages.label.needs=[segment]"], ["stage label", "before it"]),
        (["pipeline.stages.label.command=rm"], ["stage label", "known are train, label, eval"]),
        (["clean=all"], ["clean", "delete"]),
        (["dataset=voc"], ["dataset.root"]),
        (["dataset.trainsize=3"], ["dataset.trainsize", "train_size"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_values(command: Command, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    refused(command("run", f"out={tmp_path / 'out'}", *arguments), 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pipeline", [path.stem for path in (ROOT / "conf/pipeline").glob("*.yaml")])
def test_every_pipeline_composes(command: Command, tmp_path: Path, pipeline: str) -> None:
    ended = command("run", f"pipeline={pipeline}", f"out={tmp_path / 'out'}", "clean=true")
    assert (ended.code, "0 folders" in ended.out) == (0, True), ended.err

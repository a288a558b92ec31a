"""wsss-run: what is run, skipped, gone on with, and refused."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from tiny import Ended

from wsss.data.shapes import Shapes
from wsss.networks.clip import CLIPTower
from wsss.pipeline import data_fingerprint, earlier_tries, is_alive
from wsss.report.baseline import compare_with_baseline
from wsss.report.reading import read_all

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
    "stages.evaluate.data.num_workers=0",
]
# left out on shapes by default
EVALUATE = "pipeline.stages.evaluate={command: eval, overrides: ['checkpoint={segment.checkpoint}'], needs: [segment]}"
SHAPES = [
    EVALUATE,
    *(f"dataset.{name}" for name in ("size=32", "train_size=6", "val_size=4", "num_classes=4")),
    *STAGES,
]


@pytest.fixture(autouse=True)
def found_by_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("wsss.report.afterwards.PACKAGES", ("none",))  # tests/test_report.py makes reports


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


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    assert ran(out) == dict.fromkeys(("cam", "label", "segment", "evaluate"), "ran")
    record = json.loads((out / "pipeline.json").read_text())["stages"]
    assert {"val/map", "val/cam_miou"} <= record["cam"]["figures"].keys()
    assert {"masks", "train/mask_miou", "train/cam_miou"} <= record["label"]["figures"].keys()
    assert "val/miou" in record["segment"]["figures"]
    assert "val/miou" in record["evaluate"]["figures"]
    for name in ("CAM, threshold chosen by masks", "pseudo masks", "segmentation"):
        assert all(word in ended.out for word in name.split())
    made = masks(out)
    # from the masks back to the checkpoint
    folder = folder_of(out, "label")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert record["segment"]["inputs"]["label"]["sha256"] == sha256(folder / "manifest.json")
    assert record["label"]["inputs"]["cam"] == {
        "folder": folder_of(out, "cam").name,
        "file": "checkpoints/last.ckpt",
        "sha256": manifest["checkpoint_sha256"],
    }
    assert record["cam"]["sha256"] == sha256(folder_of(out, "cam") / "checkpoints/last.ckpt")
    assert all(100 < one["peak_memory_mb"] < 1e5 for one in record.values())

    assert command("run", *arguments, "stages.cam.data.num_workers=1").code == 0  # no result depends on it
    assert set(ran(out).values()) == {"skipped"}

    assert command("run", *arguments, "stages.segment=[method.lr=0.002,trainer.max_steps=1]").code == 0
    assert ran(out) == {"cam": "skipped", "label": "skipped", "segment": "ran", "evaluate": "ran"}
    ended = command("run", *arguments, "clean=true")
    assert (ended.code, ended.out.count("/segment-"), "clean=delete" in ended.out) == (0, 1, True)
    assert len(list((out / "stages").iterdir())) == 6
    assert command("run", *arguments, "clean=delete").code == 0
    assert len(list((out / "stages").iterdir())) == 4

    (folder_of(out, "segment") / "done.json").write_text('{"figures": 3}')
    ended = command("run", *arguments)
    assert (ended.code, ran(out)) == (
        0,
        {"cam": "skipped", "label": "skipped", "segment": "ran", "evaluate": "skipped"},
    )
    (folder_of(out, "label") / "masks/train-000001.png").unlink()
    assert command("run", *arguments).code == 0
    assert (ran(out)["label"], masks(out) == made) == ("ran", True)
    (folder_of(out, "label") / "masks/train-000001.png").write_bytes(made["train-000002.png"])
    refused(command("run", *arguments), 2, "stage label", "train-000001.png", "manifest.json")
    (folder / "masks/train-000001.png").write_bytes(made["train-000001.png"])
    assert command("run", *arguments).code == 0
    assert (ran(out)["label"], ran(out)["segment"]) == ("ran", "skipped")
    checkpoint = folder_of(out, "cam") / "checkpoints/last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes() + b"edited")
    refused(command("run", *arguments), 2, "is not what stage cam left there", "put it back")
    done = folder_of(out, "cam") / "done.json"
    done.write_text(json.dumps(json.loads(done.read_text()) | {"sha256": sha256(checkpoint)}))
    refused(command("run", *arguments), 2, "stage label was made of another checkpoints/last.ckpt", "remove")


@pytest.mark.slow
def test_the_chain_of_psa_on_photographs(command: Command, photographs: Path, tmp_path: Path) -> None:
    """With affinities, without images to evaluate on; then a label is corrected, and put back."""
    out = tmp_path / "out"
    own = [o for o in STAGES if not o.startswith(("stages.label.refine", "stages.evaluate"))]
    own += [o.replace("stages.cam.", "stages.affinity.") for o in own if o.removeprefix("stages.cam.") in TRAINING]
    own += ["stages.affinity.method.losses.affinity.radius=2", "stages.label.refine.logt=2"]
    own += [f"stages.scores.{o}" for o in ("num_workers=0", "refine.iterations=1")]
    data = ["dataset=folder", f"dataset.root={photographs}", "dataset.masks=masks"]
    arguments = ["pipeline=cam", *data, *own, f"out={out}"]
    ended = command("run", *arguments)
    assert ended.code == 0, ended.err
    chain = ("cam", "scores", "affinity", "label", "segment")
    assert ran(out) == dict.fromkeys(chain, "ran") | {"evaluate": "left out"}
    stages = json.loads((out / "pipeline.json").read_text())["stages"]
    for name in ("scores", "label"):
        assert "train, 8 images" in stages[name]["figures"]["protocol/train/mask_miou"]
    assert stages["label"]["inputs"].keys() == {"cam", "affinity"}
    assert command("run", *arguments).code == 0
    assert ran(out) == dict.fromkeys(chain, "skipped") | {"evaluate": "left out"}
    labels = photographs / "labels.csv"
    before = labels.read_text(encoding="utf-8")
    labels.write_text(before.replace(",cat;dog", ",dog", 1), encoding="utf-8")
    assert command("run", *arguments, "stop_after=scores").code == 0
    assert ran(out) == {"cam": "ran", "scores": "ran"}
    labels.write_text(before, encoding="utf-8")
    assert command("run", *arguments, "stop_after=label").code == 0
    assert ran(out) == dict.fromkeys(chain[:-1], "skipped")


def test_what_the_fingerprint_of_data_sees(photographs: Path, tmp_path: Path) -> None:
    def fingerprint() -> dict[str, Any]:
        return data_fingerprint({"root": str(photographs), "labels": "labels.csv"}, tmp_path / "out")

    before = fingerprint()
    (photographs / "labels.labels.txt").write_text("kept beside the labels by us")
    assert fingerprint() == before
    picture = next((photographs / "im Urlaub").iterdir())
    content, status = picture.read_bytes(), picture.stat()
    picture.write_bytes(content[:-1] + b"?")  # of the same size
    changed = fingerprint()
    assert (changed["files"] != before["files"], changed["labels"] == before["labels"]) == (True, True)
    picture.write_bytes(content)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint() == before
    (photographs / "labels.csv").write_bytes((photographs / "labels.csv").read_bytes())  # the same labels
    assert fingerprint() == before
    copy = shutil.copytree(photographs, tmp_path / "copy")  # times are kept
    other = data_fingerprint({"root": str(copy), "labels": "labels.csv"}, tmp_path / "out")
    assert {k: v for k, v in other.items() if k != "values"} == {k: v for k, v in before.items() if k != "values"}


def test_no_stage_begins_before_it_is_recorded(tmp_path: Path) -> None:
    """wsss-run is killed between starting a stage and writing its number down."""
    code = (
        "import os, sys; from pathlib import Path; import wsss.pipeline as p\n"
        "p.write_json = lambda path, content: (print(content['pid'], flush=True), os.kill(os.getpid(), 9))\n"
        "folder = Path(sys.argv[1]); stage = p.Stage('cam', 'train', [], [], {}, folder)\n"
        "p.run_process(stage, [f'hydra.run.dir={folder}/run'], [])\n"
    )
    folder = tmp_path / "cam-01234567"
    folder.mkdir()
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed
    for _ in range(400):
        if not is_alive(int(killed.stdout), folder):
            break
        time.sleep(0.05)
    assert not is_alive(int(killed.stdout), folder)
    assert [path.name for path in folder.iterdir()] == ["errors.txt"]


def test_time_of_earlier_tries(tmp_path: Path) -> None:
    assert earlier_tries(tmp_path) == []
    first = {"seconds": 3.0, "peak_memory_mb": 5.0, "ended": "signal 15"}
    (tmp_path / "running.json").write_text(json.dumps({"tries": [first]}))
    assert earlier_tries(tmp_path) == [first]
    (tmp_path / "running.json").write_text(json.dumps({"pid": 1, "started": 1000.0, "tries": [first]}))
    os.utime(tmp_path / "running.json", (1000, 1000))
    (tmp_path / "last.ckpt").touch()
    os.utime(tmp_path / "last.ckpt", (1007, 1007))
    assert earlier_tries(tmp_path) == [first, {"seconds": 7.0, "ended": "killed together with wsss-run"}]
    (tmp_path / "running.json").write_text('{"tries": "three"}')
    assert earlier_tries(tmp_path) == []


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
    killed = json.loads(running.read_text())["pid"]
    refused(command("run", *arguments), 1, str(out), "in use")
    process.kill()
    os.killpg(killed, signal.SIGKILL)
    process.communicate()

    process = start(*arguments)
    child = killed
    while child == killed:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
        child = json.loads(running.read_text()).get("pid", killed)
    time.sleep(0.5)  # a child that has not been told to go on yet ends with wsss-run
    process.kill()
    process.wait()
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
    figures = (folder_of(where, "label") / "metrics.json" for where in (out, alone))
    assert len({path.read_text() for path in figures}) == 1
    records = json.loads((out / "pipeline.json").read_text())["stages"]
    assert [one["ended"] for one in records["cam"]["tries"]] == ["killed together with wsss-run"] * 2 + ["exit code 0"]
    assert [one["ended"] for one in records["label"]["tries"]][-1] == "exit code 0"
    for record in records.values():
        assert record["seconds"] == pytest.approx(sum(one["seconds"] for one in record["tries"]), abs=0.1)


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


def test_a_baseline_without_training(command: Command, tmp_path: Path) -> None:
    """A stage before all others, of a tower and embeddings in files, under the protocol of the stage evaluate."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    tower = CLIPTower("vit_base_patch16_clip_quickgelu_224", None, sizes)
    save_file(tower.network.state_dict(), tmp_path / "tower.safetensors")
    names = Shapes(train_size=1, size=32, num_classes=4).classes
    drawn = np.random.default_rng(0).standard_normal((len(names) + 1, tower.embedding)).astype(np.float32)
    np.savez(
        tmp_path / "text.npz",
        classes=np.array(names),
        embeddings=drawn[1:],
        background=np.array(["sky"]),
        background_embeddings=drawn[:1],
    )
    values = ",".join(f"{key}:{value}" for key, value in sizes.items())
    given = [f"baseline.text={tmp_path / 'text.npz'}", f"baseline.weights={tmp_path / 'tower.safetensors'}"]
    given += [f"stages.baseline.method.backbone_args={{{values}}}", "stages.baseline.method.affinity_layers=2"]
    out = tmp_path / "out"
    ended = command("run", *SHAPES, f"out={out}", *given)
    assert ended.code == 0, ended.err
    assert list(ran(out)) == ["baseline", "cam", "label", "segment", "evaluate"]
    record = json.loads((out / "pipeline.json").read_text())["stages"]
    notes = [record["baseline"]["figures"]["protocol/val/cam_miou"], record["evaluate"]["figures"]["protocol/val/miou"]]
    assert [note.partition(",")[0] for note in notes] == ["val"] * 2
    assert all("true image labels" not in note for note in notes)  # of wsss-eval's own protocol
    rows = compare_with_baseline(read_all([out]))
    assert [row.run.name for row in rows] == ["baseline", "cam", "segment", "evaluate"]
    cam, segmentation = (
        record[name]["figures"][f"val/{key}"] for name, key in (("baseline", "cam_miou"), ("evaluate", "miou"))
    )
    assert rows[-1].more == pytest.approx(segmentation - cam)
    assert command("run", *SHAPES, f"out={out}", *given).code == 0
    assert set(ran(out).values()) == {"skipped"}


@pytest.mark.parametrize("pipeline", [path.stem for path in (ROOT / "conf/pipeline").glob("*.yaml")])
def test_every_pipeline_composes(command: Command, tmp_path: Path, pipeline: str) -> None:
    ended = command("run", f"pipeline={pipeline}", f"out={tmp_path / 'out'}", "clean=true")
    assert (ended.code, "0 folders" in ended.out) == (0, True), ended.err

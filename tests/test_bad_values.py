"""Values of the wrong kind, given at the command: one sentence, exit code 2, and nothing of the user's is removed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny import OVERRIDES, Ended, refused

Command = Callable[..., Ended]


@pytest.mark.parametrize(
    "override",
    [
        "seed=x",
        "seed=-1",
        "method.lr=abc",
        "method.lr=",
        "method.released_behaviour=maybe",
        "method.cam_scales=1",
        "method.losses.cls=0.5",
        "method.losses.cls.weight=abc",
        "method.phases=[{until: 3}]",
        "method.phases=[3]",
        "method.backbone_args.embed_dim=33",
        "+method.num_classes=3",
        "+dataset.split=val",
        "data.batch_size=abc",
        "data=3",
        "protocol.size=abc",
        "+protocol.crf={strength: 3}",
        "protocol.crf={iterations: many}",
        "+protocol.extras={sizes: [1]}",
        "+protocol.extras={scales: many}",
        "+protocol.extras={crf: {iterations: many}}",
        "transform.blur=1",
        "transform.crop_size=0",
        "trainer.max_steps=abc",
        "trainer.max_steps=-1",
        "trainer.precision=foo",
        "trainer.accelerator=foo",
        "trainer.val_check_interval=0",
        "monitor=val/foo",
        "gather_losses=flase",
        "worse.missing=nan",
    ],
)
def test_values_of_the_wrong_kind(command: Command, override: str) -> None:
    key, _, value = override.lstrip("+").partition("=")
    words = (key.rpartition(".")[2],) if value else ()
    refused(command("train", *OVERRIDES, override), *words)
    assert not list(Path.cwd().rglob("metrics.json"))


def test_a_mistyped_key_beside_a_group_given_as_a_dict(command: Command) -> None:
    refused(command("train", "trainer={accelerator: cpu, max_steps: 2}", "metod=3"), "metod", "method")


def test_what_hydra_cannot_read(command: Command) -> None:
    refused(command("train", *OVERRIDES, "logger.name=a=b(c"), "cannot read 'logger.name=a=b(c'", "quote")


def test_a_sweep_of_evaluations_ends_with_a_table(command: Command, trained: Path, tmp_path: Path) -> None:
    quiet = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "data.num_workers=0"]
    sweep = ["-m", "protocol.flip=none,sum", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    ended = command("eval", f"checkpoint={trained / 'checkpoints/last.ckpt'}", *quiet, *sweep)
    assert ended.code == 0, ended.err
    table = ended.out.rpartition("sweep ")[2]
    assert [line.split("│")[1].strip() for line in table.splitlines() if line.startswith("│")] == ["none", "sum"]


def test_a_group_that_the_command_does_not_have(command: Command, trained: Path) -> None:
    checkpoint = f"checkpoint={trained / 'checkpoints/last.ckpt'}"
    refused(command("predict", checkpoint, "images=a", "out=b", "dataset=voc"), "dataset")


def test_a_missing_folder_is_named(command: Command, trained: Path) -> None:
    refused(command("predict", f"checkpoint={trained / 'checkpoints/last.ckpt'}", "out=b"), "images", "images=")


def test_predict_leaves_the_working_directory(command: Command, trained: Path) -> None:
    ended = command("predict", f"checkpoint={trained / 'checkpoints/last.ckpt'}", "images=/nowhere", "out=b")
    refused(ended, "/nowhere")
    assert Path.cwd().is_dir()  # an empty one was removed as if Hydra had made it


def test_a_run_refused_at_its_first_step_leaves_no_directory(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    refused(command("train", *OVERRIDES, "method.local_crop_size=31", f"hydra.run.dir={out}"), "local_crop_size")
    assert not out.exists()


def test_sweep_of_four(command: Command, tmp_path: Path) -> None:
    sweep = ["-m", "method.losses.ptc.weight=0,0.2", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    ended = command("train", *OVERRIDES, "trainer.max_steps=1", *sweep)
    assert ended.code == 0, ended.err
    table = ended.out.rpartition("sweep ")[2].partition("variants of")[0]
    rows = [[c.strip() for c in line.split("│")[1:3]] for line in table.splitlines() if line.startswith("│")]
    assert rows == [["0", "1"], ["0", "2"], ["0.2", "1"], ["0.2", "2"]]


def test_what_a_run_will_not_do_is_said_before_it(command: Command, tmp_path: Path) -> None:
    late = "method.phases=[{until: 5, weights: {seg: null, ptc: 0}}, {until: 9, weights: {dense_energy: null}}]"
    overrides = [o for o in OVERRIDES if not o.startswith("method.phases")]
    ended = command("train", *overrides, late, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    assert "loss seg takes part from step 6 on, and this run ends at step 2, before that" in ended.out
    assert "dense_energy" not in ended.out.partition("metric")[0]  # it takes part until step 5
    assert "loss ptc" not in ended.out


def test_a_transform_without_the_views_of_a_method(command: Command, tmp_path: Path) -> None:
    given = [o for o in OVERRIDES if not o.startswith("transform")] + ["recipe=null"]
    ended = command("train", *given, "transform=null", f"hydra.run.dir={tmp_path / 'run'}")
    refused(ended, "global_view", "local_source", "transform=toco")
    ended = command("train", *given, "transform=null", "method.losses.ctc=null", f"hydra.run.dir={tmp_path / 'run'}")
    assert "global_view" not in ended.err


def test_images_that_the_network_cannot_take(command: Command, tmp_path: Path, photographs: Path) -> None:
    Image.new("RGB", (80, 1)).save(photographs / "im Urlaub" / "strip.png")
    labels = photographs / "labels.csv"
    labels.write_text(labels.read_text(encoding="utf-8") + "\nim Urlaub/strip.png,cat", encoding="utf-8")
    base = [o for o in OVERRIDES if not o.startswith("dataset.")]
    given = [*base, "data.eval_batch_size=1", "dataset=folder", f"dataset.root={photographs}", "dataset.val=val.txt"]
    given += ["method.weights=null", f"hydra.run.dir={tmp_path / 'run'}"]
    (photographs / "val.txt").write_text("strip.png\nBild 1 (groß)\n", encoding="utf-8")
    (photographs / "masks").rename(tmp_path / "masks")
    refused(command("train", *given), "strip.png has 80x1 pixels", "no side below 8")
    ended = command("train", *given, "on_bad_image=skip")
    assert ended.code == 0, ended.err
    assert "strip.png" in (tmp_path / "run/skipped.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y cannot be used (Permission denied)"),
        (OSError(36, "File name too long"), "run cannot be used (File name too long)"),
        (OSError(28, "No space left on device", "/x/z"), "cannot write /x/z (No space left on device)"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory (CUDA out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a loader process has died"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_machine_refuses(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    from wsss.methods.toco import ToCo

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(ToCo, "training_step", fail)
    ended = command("train", *OVERRIDES, f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 1
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_a_run_directory_that_cannot_be_made(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = command("train", *OVERRIDES, f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert ended.code == 1
    assert f"{tmp_path / 'file'}" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("name", ["train", "eval", "label", "predict"])
def test_help_says_what_the_command_does(command: Command, name: str) -> None:
    ended = command(name, "--help")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"wsss-{name}: ")
    assert all(line.startswith(f"  wsss-{name} ") for line in lines[1:4])
    assert "method=toco" in ended.out
    assert "hydra" not in ended.out.lower()

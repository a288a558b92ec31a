"""Values of the wrong kind, given at the command: one sentence, exit code 2, and nothing of the user's is removed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import OVERRIDES, Ended

Command = Callable[..., Ended]


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    assert all(word in lines[0] for word in words), lines[0]


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
        "transform.blur=1",
        "transform.crop_size=0",
        "trainer.max_steps=abc",
        "trainer.max_steps=-1",
        "trainer.precision=foo",
        "trainer.accelerator=foo",
        "trainer.val_check_interval=0",
        "monitor=val/foo",
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
    table = ended.out.rpartition("sweep ")[2]
    rows = [[c.strip() for c in line.split("│")[1:3]] for line in table.splitlines() if line.startswith("│")]
    assert rows == [["0", "1"], ["0", "2"], ["0.2", "1"], ["0.2", "2"]]

"""`wsss-doctor`: what it prints of a fit machine, and how it ends on another one."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import Ended

from wsss import RunError
from wsss.commands import doctor

Command = Callable[..., Ended]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the training, which one test has."""

    def nothing(cfg: object) -> Iterator[str]:
        yield "self-test: left out"

    nothing.__name__ = "self_test"
    monkeypatch.setattr(doctor, "self_test", nothing)


def test_fit(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = command("doctor")
    assert ended.code == 0, ended.err
    heads = [line.partition(":")[0] for line in ended.out.splitlines()]
    for head in ("packages", "extras", "machine", "devices", "disk, here", "weights", "data, train", "self-test"):
        assert head in heads
    assert heads[0].startswith("wsss ")
    assert heads[-1] == "no problem found"
    assert str(Path.home()) + "/" not in ended.out or Path.home() == Path("/")
    assert not list(Path.cwd().iterdir())


@pytest.mark.usefixtures("quick")
def test_lists_every_problem(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    ended = command("doctor", "dataset=folder", f"dataset.root={tmp_path / 'nowhere'}")
    assert ended.code == 1
    problems = [line for line in ended.out.splitlines() if line.startswith("- ")]
    assert [problem.split(":")[0] for problem in problems] == ["- room", "- data"]
    assert "less than 2 GB can be written in" in problems[0]
    assert "nowhere" in problems[1]
    assert ended.err.strip() == "wsss-doctor: 2 problems, listed above"


@pytest.mark.usefixtures("quick")
def test_packages(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy>=999", "absent-package>=1"])
    ended = command("doctor")
    assert ended.code == 1
    assert "wsss needs numpy>=999 (found " in ended.out
    assert "absent-package>=1 (found nothing)" in ended.out


@pytest.mark.usefixtures("quick")
def test_driver_without_gpu(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    (tmp_path / "version").touch()
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    ended = command("doctor")
    assert ended.code == 1
    assert "a driver of NVIDIA is loaded" in ended.out


@pytest.mark.usefixtures("quick")
def test_data_set(command: Command, photographs: Path) -> None:
    ended = command("doctor", "dataset=folder", f"dataset.root={photographs}", "dataset.val=2")
    assert ended.code == 1  # a fraction, not a number of images
    ended = command("doctor", "dataset=folder", f"dataset.root={photographs}", f"dataset.masks={photographs / 'masks'}")
    assert ended.code == 0
    assert "data, train: 8 images of 2 classes, the first 48 x 40" in ended.out


def test_training_that_does_not_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "STEPS", 5)  # the first steps are the last
    with pytest.raises(RunError, match="the loss of a small training went from"):
        list(doctor.self_test(None))  # type: ignore[arg-type]


@pytest.mark.slow
def test_help_answers_at_once() -> None:
    code = "from wsss.commands.doctor import main; main()"
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 2

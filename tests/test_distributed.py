"""Trainings of several processes: equal to one, started by torchrun and SLURM, ended by SIGTERM and gone on with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed import METHODS, failures, processes, supervise
from distributed import compare as with_one_process
from kill import compare, finish, last_step, settings
from tiny import OVERRIDES

ROOT = Path(__file__).parent.parent
ARGUMENTS = [*settings("toco", steps=60, workers=0), "global_batch_size=4", "data.batch_size=2"]


@pytest.fixture(scope="module")
def supervised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import wsss.commands.train
    import wsss.methods.base  # noqa: F401 - once for all processes

    folder = tmp_path_factory.mktemp("distributed")
    supervise(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(method: str, supervised: Path) -> None:
    row = with_one_process(method, supervised / method.replace(" ", "_"))
    assert failures(row) == [], row


def test_refusal_reaches_all_processes(trained: Path, tmp_path: Path) -> None:
    """The first process refuses, and no other waits for it; nor do they begin a sweep each."""
    sweep = ["-m", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    for more, said in (([f"hydra.run.dir={trained}"], "already holds a run"), (sweep, "would repeat the whole sweep")):
        folder = tmp_path / said
        assert processes([*OVERRIDES, *more], folder, world=2) == [2, 2]
        assert all(said in (folder / f"{rank}.txt").read_text() for rank in range(2))
    assert (trained / "metrics.json").exists()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a login node: our commands, torchrun and the stand-in for SLURM."""
    folder = tmp_path_factory.mktemp("cluster")
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    stand_in = f"sys.argv[:1] = ['', '{{}}']\nrunpy.run_path('{ROOT / 'tests/slurm.py'}', run_name='__main__')"
    said = {name: f"import runpy, sys\n{stand_in.format(name)}" for name in ("sbatch", "srun", "scontrol")}
    said["wsss-train"] = "from wsss.commands.train import main\nmain()"
    said["torchrun"] = "from torch.distributed.run import main\nmain()"
    for name, text in said.items():
        (bin_folder / name).write_text(f"#!{sys.executable}\n{text}\n")
        (bin_folder / name).chmod(0o755)
    mine = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "FAKE_SLURM": str(folder)}
    return os.environ | mine | {"OMP_NUM_THREADS": "1"}


def start(words: list[str], folder: Path, environment: dict[str, str]) -> "subprocess.Popen[str]":
    folder.mkdir(exist_ok=True)
    said = (folder / "said.txt").open("w")
    return subprocess.Popen(words, cwd=folder, env=environment, text=True, stdout=said, stderr=subprocess.STDOUT)


def end(process: "subprocess.Popen[str]", folder: Path, code: int = 0) -> str:
    process.wait(300)
    said = (folder / "said.txt").read_text()
    assert process.returncode == code, said
    return said


def run_of(folder: Path) -> Path:
    """The one run directory there is."""
    [run] = (folder / "outputs/toco_shapes").iterdir()
    return run


def wait_for(step: int, folder: Path, process: "subprocess.Popen[str]") -> None:
    while process.poll() is None:
        for log in folder.glob("outputs/*/*/log/metrics.csv"):
            if last_step(log) >= step:
                return
        time.sleep(0.01)
    raise AssertionError((folder / "said.txt").read_text())


def saved_step(run: Path) -> int:
    return int(torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"])


@pytest.fixture(scope="module")
def undisturbed(cluster: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two processes that torchrun has started and nobody ended."""
    folder = tmp_path_factory.mktemp("torchrun")
    environment = cluster | {"GPUS": "2", "PORT": "0"}
    said = end(start([str(ROOT / "docs/cluster/torchrun.sh"), *ARGUMENTS], folder, environment), folder)
    assert said.count("toco (") == 1  # one process speaks
    return run_of(folder)


@pytest.mark.slow
def test_job_is_requeued_and_ends_as_if_never_ended(cluster: dict[str, str], undisturbed: Path, tmp_path: Path) -> None:
    """On two nodes of SLURM, terminated by the scheduler."""
    words = ["sbatch", "--nodes=2", "--ntasks-per-node=1", str(ROOT / "docs/cluster/slurm.sh"), *ARGUMENTS]
    job = start(words, tmp_path, cluster)
    wait_for(7, tmp_path, job)
    os.kill(int((Path(cluster["FAKE_SLURM"]) / "srun.pid").read_text()), signal.SIGTERM)
    said = end(job, tmp_path)
    assert "terminated; the same command with resume=auto goes on with it" in said
    assert "going on with" in said
    agreeing, different = compare(undisturbed, run_of(tmp_path))
    assert different == []
    assert agreeing > 100


def terminate(words: list[str], folder: Path, environment: dict[str, str]) -> Path:
    """Start a run, end it between two evaluations, see that its step is saved, and go on with it."""
    process = start(words, folder, environment)
    wait_for(7, folder, process)
    process.send_signal(signal.SIGTERM)
    assert "terminated; the same command with resume=auto" in end(process, folder, 143)
    run = run_of(folder)
    step = last_step(run / "log/metrics.csv")
    assert saved_step(run) == step
    assert 7 <= step < 20  # long before the next evaluation
    end(start(words, folder, environment), folder)
    return run


@pytest.mark.slow
def test_terminated_run_saves_its_step(cluster: dict[str, str], tmp_path: Path) -> None:
    run = terminate(["wsss-train", *ARGUMENTS, "resume=auto"], tmp_path / "here", cluster)
    finish([*ARGUMENTS, f"hydra.run.dir={tmp_path / 'whole'}"], tmp_path)
    assert compare(tmp_path / "whole", run)[1] == []


@pytest.mark.slow
def test_terminated_processes_save_one_step(cluster: dict[str, str], undisturbed: Path, tmp_path: Path) -> None:
    """Of two processes of which Lightning has started the second."""
    words = ["wsss-train", *ARGUMENTS, "trainer.devices=2", "trainer.strategy=ddp", "resume=auto"]
    assert compare(undisturbed, terminate(words, tmp_path / "here", cluster))[1] == []

"""The benchmarks run: what they measure is for people to look at."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_case_beside_that_of_another_checkout(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = run("refine", "sweep 20", "--repeats", "1", "--before", str(ROOT), "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split()[-2:] == ["ratio", "apart"]
    (line,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (line["benchmark"], line["case"]) == ("refine", "sweep 20")
    assert 0 < line["cpu_ms"] < 1e5
    assert 0.1 < line["ratio"] < 10
    assert line["peak_mib"] > 50


@pytest.mark.slow
def test_gradients_beside_those_of_another_checkout(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = run("classes", "seam 20", "--repeats", "1", "--before", str(ROOT), "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["apart"] == 0


@pytest.mark.slow
def test_shards_are_read_over_http() -> None:
    done = run("sources", "bytes of shards http", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("bytes of shards http")


@pytest.mark.slow
def test_an_unknown_case_is_refused() -> None:
    done = run("refine", "crfs")
    assert done.returncode == 2
    assert "crfs is no case: known are par 3, par 21" in done.stderr


@pytest.mark.slow
def test_the_script_for_a_gpu_in_small(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    done = run("gpu", "--tiny", "--json", str(out))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 14
    assert all(line["ms"] > 0 for line in lines)

"""Completion in bash, as docs/settings.md sets it up."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import MODULES, call

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of commands as an installation has them."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("train", "eval", "label", "run", "data"):
        script = folder / f"wsss-{name}"
        module = f"wsss.commands.{MODULES.get(name, name)}"
        script.write_text(f"#!{sys.executable}\nfrom {module} import main\nmain()\n")
        script.chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("wsss-train method=to", {"method=toco"}),
        ("wsss-train method=toco method.aux", {"method.aux_layer="}),
        ("wsss-label refine=irn", {"refine=irn_walk"}),
        ("wsss-eval protocol=hon", {"protocol=honest"}),
        ("wsss-run pipeline=rcm", {"pipeline=rcm_mam"}),
        ("wsss-data ch", {"check"}),
        ("wsss-data check dataset=fo", {"dataset=folder"}),
    ],
)
def test_bash(commands: Path, line: str, expected: set[str]) -> None:
    name, *words = line.split()
    script = f"""
        eval "$({name} --shell-completion install=bash)"
        complete -p {name} >&2
        COMP_WORDS=({line}) COMP_CWORD={len(words)} COMP_LINE={line!r} COMP_POINT={len(line)}
        hydra_bash_completion {name}
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert set(ended.stdout.split()) == expected
    assert f"-F hydra_bash_completion {name}" in ended.stderr


def test_words_of_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COMP_LINE", "wsss-data ")
    monkeypatch.setenv("COMP_POINT", "10")
    assert call("data", "-sc", "query=bash") == 0
    assert capsys.readouterr().out.split() == ["check", "voc", "coco", "shards", "index", "weights"]


def test_configuration_of_a_run_is_printed_at_the_end_of_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "method=seam", "--cfg", "job") == 0
    assert "wsss.methods.seam.SEAM" in capsys.readouterr().out

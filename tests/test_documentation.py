"""What README, CONTRIBUTING, docs/ and the headers of conf/ tell a user to type: commands, Python, links, the site."""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tiny import MODULES, call

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = {
    "GPUS=8",
    "cp",
    "done",
    "eval",
    "export",
    "for",
    "mkdir",
    "mkdocs",
    "pip",
    "pre-commit",
    "pytest",
    "python",
    "sbatch",
}
"""First words of lines in a shell that are no commands of ours."""


class Typed(NamedTuple):
    """A command as a page has it."""

    page: Path
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text}"


def typed(path: Path) -> Iterator[Typed]:
    """The lines of a page's blocks that are indented by four spaces, of conf/ those of a header, one a command."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        text = re.sub(r" *\\\n# *", " ", text)
        for line in re.findall(r"^# {2,}(wsss-.*)$", text, re.M):
            yield Typed(path, re.split(r" {2,}", line)[0])
        return
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)
    for block in re.findall(r"(?:\A|\n)\n((?: {4}.*\n)+)", text):
        looped = dict(re.findall(r"for (\w+) in (\S+)", block))  # of a loop the first turn
        block = re.sub(r"\$\{?(\w+)\}?", lambda match, known=looped: known.get(match[1], match[0]), block)
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            yield from (Typed(path, part.strip()) for part in re.sub(r" {2,}#.*", "", line).split("&&"))


EVERY = (command for path in (*PAGES, *sorted((ROOT / "conf").rglob("*.yaml"))) for command in typed(path))
COMMANDS = list({command.text: command for command in EVERY}.values())
OURS = [command for command in COMMANDS if command.text.startswith("wsss-")]


def test_there_are_commands() -> None:
    assert len(OURS) > 80
    for name in ("train", "eval", "label", "run", "predict", "export", "report", "data", "doctor"):
        assert any(command.text.startswith(f"wsss-{name}") for command in OURS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in OURS and c.page.suffix == ".md"], ids=str)
def test_other_command(command: Typed) -> None:
    """Extras, files and tests that it names are there."""
    first, *words = shlex.split(command.text.replace("$(", "").rstrip(":;"))
    assert first in OTHERS, f"{command} is nothing that this test knows"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for before, word in zip([first, *words], words, strict=False):
        if match := re.search(r"\[([\w,]+)\]$", word):
            assert set(match[1].split(",")) <= extras.keys()
        if re.match(r"(tests|notebooks|docs|wsss)\b.*[\w]$", word) and "[" not in word:
            path = f"{word.replace('.', '/')}.py" if (first, before) == ("python", "-m") else word
            assert (ROOT / path).exists(), word


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[DictConfig]:
    """What the commands would do: they compose and check their settings, and stop there."""
    found: list[DictConfig] = []

    def stub(module: Any, name: str) -> None:
        def task(cfg: DictConfig) -> None:
            OmegaConf.to_container(cfg, resolve=True)
            found.append(cfg)

        task.__name__, task.__module__ = name, module.__name__
        monkeypatch.setattr(module, name, task)

    for name in ("train", "evaluate", "label", "predict", "export", "report", "doctor"):
        stub(importlib.import_module(f"wsss.commands.{name}"), name)
    data, run = (importlib.import_module(f"wsss.commands.{name}") for name in ("data", "run"))
    for name in ("check", "voc", "coco", "shards", "index", "weights"):
        stub(data, name)
    monkeypatch.setattr(run, "data_fingerprint", lambda values, out: "data")
    monkeypatch.setattr(run, "run_stages", lambda stages, *_, **__: found.extend(stages) or {})
    monkeypatch.setattr("wsss.report.afterwards.write_report", lambda *_: None)
    monkeypatch.setattr("wsss.config.SweepTable.on_multirun_end", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture(scope="module")
def of_photographs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that says that it was trained on a folder of photographs."""
    content = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    content["wsss"] |= {"dataset": "folder", "dataset_values": {}}
    path = tmp_path_factory.mktemp("photographs") / "last.ckpt"
    torch.save(content, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("command", OURS, ids=str)
def test_command(command: Typed, asked: list[DictConfig], trained: Path, of_photographs: Path) -> None:
    """Groups, keys and values of a command are there; it is composed, of a pipeline with all stages, and not run."""
    if command.page.name == "CONTRIBUTING.md" or "my-conf" in command.text:
        pytest.skip("of a method from outside, which test_outside.py trains")
    name, *arguments = shlex.split(command.text)
    # test_sweeps.py starts jobs in processes of their own
    arguments = [a for a in arguments if not re.match(r"\+?hydra[./]launcher[.=]", a)]
    if name == "wsss-train" and any(a.startswith("experiment=") for a in arguments):
        arguments.append("seed=1")  # one of three that differ in nothing else
    own = any(argument.startswith("dataset=") for argument in arguments)
    folder = not own and any(re.match(r"dataset\.(root|val|masks)=", argument) for argument in arguments)
    checkpoint = of_photographs if folder else trained / "checkpoints/last.ckpt"
    arguments = [re.sub(r"(?<=^checkpoint=).*", str(checkpoint), argument) for argument in arguments]
    before = len(asked)
    assert call(name.removeprefix("wsss-"), *arguments) == 0
    assert len(asked) > before or "--help" in arguments or "--cfg" in arguments or "clean=true" in arguments


@pytest.mark.slow
@pytest.mark.parametrize("page", ["tour.md"])
def test_page_is_typed_from_top_to_bottom(page: str, tmp_path: Path) -> None:
    """Every command of the page as it stands there, one after the other in an empty directory."""
    shims = tmp_path / "bin"
    shims.mkdir()
    for name in ("train", "eval", "label", "run", "predict", "export", "report", "data", "doctor"):
        script = shims / f"wsss-{name}"
        script.write_text(f"#!{sys.executable}\nfrom wsss.commands.{MODULES.get(name, name)} import main\nmain()\n")
        script.chmod(0o755)
    (tmp_path / "here").mkdir()
    environment = os.environ | {"PATH": f"{shims}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    commands = list(typed(ROOT / "docs" / page))
    assert len(commands) > 4
    for command in commands:
        ended = subprocess.run(
            command.text, shell=True, cwd=tmp_path / "here", env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-1000:]}\n{ended.stderr[-2000:]}"
    left = {path.name for path in (tmp_path / "here").iterdir()}
    assert {"first", "measured", "labels", "labels.json", "predicted", "without"} <= left


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python(path: Path) -> None:
    """Blocks of Python can be read, and what they import of wsss is there."""
    for block in re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "wsss":
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links(path: Path) -> None:
    """Files that are linked are there; those of the site alone are checked by `mkdocs build --strict`."""
    generated = {"configuration.md", "contributing.md", "changelog.md"}
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name = target.partition("#")[0]
        if name and "://" not in target and Path(name).name not in generated:
            assert (path.parent / name).exists(), target


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_reference_of_the_configuration() -> None:
    """Every option of conf/ is on the page, and the arguments of a method have kind and meaning."""
    pytest.importorskip("mkdocs")
    hooks = site_hooks()
    page = hooks.configuration()
    for path in (ROOT / "conf").rglob("*.yaml"):
        group = path.parent.relative_to(ROOT / "conf").as_posix()
        assert (f"wsss-{hooks.COMMANDS.get(path.stem, path.stem)}" if group == "." else path.stem) in page
    kinds, meanings = hooks.signature("wsss.methods.seam.SEAM")
    assert kinds["view_scale"] == "float"
    assert meanings["view_scale"] == "size of the second view relative to the first."
    assert "| `view_scale` | `0.3` | `float` | size of the second view relative to the first. |" in page


def site_hooks() -> Any:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

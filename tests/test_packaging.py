"""The wheel: what is in it, and that it works away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"wsss/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    for path in (ROOT / "wsss").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    assert "wsss/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "conf/")) for name in names)
    (entry_points,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    for command in (
        "wsss-train = wsss.commands.train:main",
        "wsss-eval = wsss.commands.evaluate:main",
        "wsss-label = wsss.commands.label:main",
        "wsss-run = wsss.commands.run:main",
        "wsss-predict = wsss.commands.predict:main",
        "wsss-export = wsss.commands.export:main",
    ):
        assert command in entry_points.read_text()
    code = "import wsss.config, wsss.commands.train; print(wsss.config.config_dir()); wsss.commands.train.main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    ended = subprocess.run(
        [sys.executable, "-c", code, "--cfg", "job", "method.lr=0.5"],
        cwd="/", env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout.splitlines()[0] == str(tmp_path / "site" / "wsss" / "conf")
    assert "lr: 0.5" in ended.stdout

"""The wheel holds what an installation needs, and works from anywhere."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPOSE = """
import sys
from pathlib import Path
import hydra, wsss
from wsss.config import config_dir
assert Path(wsss.__file__).parent == Path(sys.argv[1]) / "wsss", wsss.__file__
assert config_dir() == Path(sys.argv[1]) / "wsss" / "conf", config_dir()
for name in ("train", "eval", "predict"):
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        print(hydra.compose(name).method.backbone)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = [name for name in ("build", "hatchling") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"a wheel is built with {' and '.join(missing)}: pip install {' '.join(missing)}")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.mark.slow
def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(archive.read(n).decode() for n in names if n.endswith("entry_points.txt"))
    conf = {f"wsss/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "wsss").rglob("*.py")}
    assert conf
    assert conf | source | {"wsss/py.typed"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    for line in ("wsss-train = wsss.train:main", "wsss-eval = wsss.evaluate:main", "wsss-predict = wsss.predict:main"):
        assert line in entry_points
    assert not [n for n in names if n.startswith(("tests", "conf", "notebooks", "outputs")) or "__pycache__" in n]


@pytest.mark.slow
def test_composes_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    command = [sys.executable, "-c", COMPOSE, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[1:] == ["vit_base_patch16_224"] * 2

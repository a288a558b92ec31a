"""Who may import whom: the layers of the library, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "wsss"
COMMANDS = {"train", "evaluate", "predict", "prepare"}
LAYERS = {
    **{
        command: {"config", "methods", "data", "refine", "metrics", "checkpoints", "callbacks", "report", *COMMANDS}
        for command in COMMANDS
    },
    "methods": {"methods", "networks", "refine", "losses", "metrics", "optim"},
    "checkpoints": {"networks"},
    "callbacks": {"metrics"},
    "report": {"metrics"},
    "networks": {"networks", "lattice"},
    "refine": {"refine", "lattice"},
    "losses": {"losses", "lattice"},
    "data": {"data"},
    "metrics": set(),
    "optim": set(),
    "lattice": set(),
    "config": set(),
    "__init__": set(),
}
OUTSIDE = {
    "hydra": {"config", "report", *COMMANDS},
    "albumentations": {"data/transforms"},
    "pytorch_lightning": {"methods", "data", "callbacks", *COMMANDS},
    "timm": {"networks", "train", "data/transforms"},
    "wandb": set(),
    "pydensecrf": {"refine"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module a file imports at run time, at the top or inside a function."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_layers(path: Path) -> None:
    module = path.relative_to(PACKAGE).with_suffix("")
    layer = module.parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "wsss" and len(parts) > 1:
            assert parts[1] in LAYERS[layer], f"{module} imports {name}"
        elif parts[0] in OUTSIDE:
            assert {layer, str(module)} & OUTSIDE[parts[0]], f"{module} imports {name}"


def test_every_file_belongs_to_a_layer() -> None:
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES} <= LAYERS.keys()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("wsss.losses", ("pytorch_lightning", "timm", "hydra", "wsss.methods")),
        ("wsss.train", ("torch", "pytorch_lightning", "timm", "cv2", "PIL")),
        ("wsss.methods.toco", ("hydra", "albumentations")),
    ],
)
def test_imports_stay_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""Who may import whom: the layers of the library, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "wsss"
GROUND = {"cam", "lattice", "optim", "pairs", "pickles", "places", "shards", "writing"}
COMMANDS = {
    *GROUND, "assemble", "callbacks", "checkpoints", "commandline", "config", "data", "evaluation", "methods",
    "networks", "outputs", "predictor", "refine", "report", "runs", "stored", "threads", "trackers",
}  # fmt: skip
LAYERS = {
    "commands": COMMANDS,  # and none of commands
    "commands/run": {"commandline", "config", "pipeline", "report", "runs"},
    "pipeline": {"runs", "writing"},
    "commands/data": COMMANDS | {"prepare"},  # nothing else may: no training needs it
    "assemble": {"config", "data", "evaluation", "methods", "networks", "refine", "report"},
    "checkpoints": {"assemble", "config", "methods", "networks", "stored"},
    "predictor": {"cam", "checkpoints", "config", "data", "refine"},
    "runs": {"config", "writing"},
    "callbacks": {"evaluation", "report", "writing"},
    "trackers": {"report", "writing"},
    "methods": {"methods", "networks", "refine", "losses", "evaluation", "optim", "cam", "pairs", "writing"},
    "networks": {"networks", "cam", "pairs", "pickles"},
    "networks/cache": {"networks", "writing"},
    "losses": {"losses", "lattice", "cam", "pairs"},
    "refine": {"refine", "lattice", "cam", "pairs"},
    "data": {"data", *GROUND},
    "prepare": {"prepare", "data", "places", "shards", "writing"},
    "evaluation": {"evaluation", *GROUND},
    "outputs": {"outputs", "report", "evaluation", "places", "shards", "writing"},
    "report": {"report", "evaluation", "writing"},
    "report/reading": {"config", "evaluation", "runs", "writing"},
    "report/sweep": {"config", "evaluation", "report", "writing"},
    "config": set(),
    "commandline": {"config"},
    **{file: set() for file in GROUND},
    "shards": {"places", "writing"},
    "stored": {"networks", "pickles"},
    "threads": set(),
    "__init__": {"predictor"},
}
"""By the name of a file or of its folder."""

OUTSIDE = {
    "hydra": {"config", "commandline", "commands"},
    "albumentations": {"data/transforms"},
    "pytorch_lightning": {"methods", "data/datamodule", "callbacks", "trackers", "assemble", "runs", "commands"},
    "timm": {"networks", "runs", "data/transforms"},
    "wandb": set(),
    "pydensecrf": {"refine/crf"},
    "altair": {"report/charts"},
    "fsspec": {"places"},
    "webdataset": {"prepare/shards"},
    "vl_convert": {"report/page"},
    "segmentation_models_pytorch": {"networks/segmenters"},
    "open_clip": {"networks/clip"},
    **{package: {"outputs/onnx"} for package in ("onnx", "onnxruntime", "onnxscript")},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def layer_of(path: Path) -> str:
    name = name_of(path)
    return name if name in LAYERS else name.partition("/")[0]


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
            if node.module == "wsss":  # perhaps a module of it
                found |= {f"wsss.{alias.name}" for alias in node.names if (PACKAGE / f"{alias.name}.py").exists()}
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_layers(path: Path) -> None:
    layer = layer_of(path)
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "wsss" and rest:
            assert rest.partition(".")[0] in LAYERS[layer], f"{name_of(path)} imports {name}"
        elif first in OUTSIDE:
            assert {layer, name_of(path)} & OUTSIDE[first] or layer.partition("/")[0] in OUTSIDE[first], (
                f"{name_of(path)} imports {name}"
            )


def test_every_file_belongs_to_a_layer() -> None:
    assert {layer_of(path) for path in FILES} <= LAYERS.keys()


def test_only_the_command_that_prepares_imports_preparation() -> None:
    users = {name_of(path) for path in FILES if any(name.startswith("wsss.prepare") for name in imports(path))}
    assert {user for user in users if not user.startswith("prepare/")} == {"commands/data"}


def test_pixels_enter_in_one_place() -> None:
    """Of all that loads data only one file knows the keys under which pixels may supervise a training."""
    knowing = {
        name_of(path)
        for path in FILES
        if layer_of(path) in ("data", "assemble", "checkpoints", "commands", "commands/data")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in ("pseudo_mask", "affinity_scores", "affinity_label")
    }
    assert knowing == {"data/pseudo"}


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("wsss", ("torch", "numpy", "hydra")),
        ("wsss.losses", ("pytorch_lightning", "timm", "hydra", "PIL", "wsss.methods")),
        ("wsss.commands.train", ("torch", "pytorch_lightning", "timm", "cv2", "PIL")),
        ("wsss.commands.run", ("torch", "pytorch_lightning", "timm", "cv2", "wsss.methods")),
        ("wsss.runs", ("torch", "pytorch_lightning", "wsss.methods")),
        ("wsss.methods.toco", ("hydra", "albumentations")),
    ],
)
def test_imports_stay_light(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""What a user adds without touching the library: the files of CONTRIBUTING.md, as they are printed there."""

import csv
import doctest
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tiny import OVERRIDES, SHARED, call

import wsss
from wsss.config import class_named
from wsss.data.datamodule import DataModule
from wsss.losses import LOSSES, build

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^`(\S+)`:\n\n```(?:python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILES: dict[str, str] = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
QUIET = ["data.num_workers=0", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on Python's path, whose modules and losses are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = dict(LOSSES)
    yield tmp_path
    LOSSES.clear()
    LOSSES.update(before)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.fixture
def mine(outside: Path) -> Path:
    """The files of CONTRIBUTING.md."""
    for path, text in FILES.items():
        (outside / path).parent.mkdir(parents=True, exist_ok=True)
        (outside / path).write_text(text, encoding="utf-8")
    return outside


def test_the_files_are_there() -> None:
    modules = {f"mine/{name}.py" for name in ("data", "loss", "method", "transform")}
    options = {"method/mine", "dataset/squares", "transform/mine", "recipe/mine_squares"}
    assert FILES.keys() == modules | {f"my-conf/{option}.yaml" for option in options} | {"wsss/outputs/boxes.py"}


def test_method_loss_data_set_and_transform(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained for two steps, evaluated from the checkpoint, and loaded in Python."""
    conf, run = ["--config-dir", str(mine / "my-conf")], mine / "run"
    sizes = ["dataset.size=32", "dataset.count=4", "transform.crop_size=24"]
    network = ["method.backbone=resnet38", "method.backbone_args={width: 4, frozen_stages: 0}"]
    steps = [o for o in SHARED if o.startswith(("trainer.", "data."))]
    given = ["method=mine", "dataset=squares", *sizes, *network, *steps]
    assert call("train", *conf, *given, f"hydra.run.dir={run}") == 0
    assert "no recipe" not in capsys.readouterr().out
    trained = json.loads((run / "metrics.json").read_text())
    assert trained["steps"] == 2
    assert {"val/map", "val/cam_miou"} <= trained.keys()
    with (run / "log" / "metrics.csv").open(newline="") as file:
        columns = csv.DictReader(file).fieldnames or []
    assert {"train/loss_cls", "train/loss_area"} <= set(columns)
    checkpoint, asked = run / "checkpoints" / "last.ckpt", ["protocol=single_scale", f"hydra.run.dir={mine / 'eval'}"]
    assert call("eval", *conf, f"checkpoint={checkpoint}", *QUIET, *asked) == 0
    measured = json.loads((mine / "eval" / "metrics.json").read_text())
    for key in ("val/map", "val/cam_miou", "val/cam_best_miou"):
        assert measured[key] == pytest.approx(trained[key], abs=1e-6), key
    result = wsss.load(checkpoint, config_dir=mine / "my-conf").predict(np.zeros((40, 50, 3), np.uint8))
    assert result.mask.shape == (40, 50)
    assert set(result.scores) <= {"red", "blue"}


def test_in_python_without_configuration(mine: Path) -> None:
    """A plain torch data set is enough, and its masks train nothing."""
    method, squares, turn = (class_named(f"mine.{name}") for name in ("method.Mine", "data.Squares", "transform.Turn"))
    source = squares("val", count=4, size=32)  # its items have masks
    data = DataModule(source, source, turn(crop_size=24), num_workers=0)
    batch = next(iter(data.train_dataloader()))
    assert {"image", "label", "id"} <= batch.keys() <= {"image", "label", "id", "image_box"}
    assert batch["image"].shape == (2, 3, 24, 24)
    network = {"width": 4, "frozen_stages": 0}
    model = method(data.num_classes, data.classes, "resnet38", backbone_args=network, losses={"cls": {}, "area": None})
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=mine)
    trainer.fit(model, data)
    assert trainer.global_step == 2
    trainer.validate(model, data, verbose=False)
    assert 0 <= trainer.callback_metrics["val/cam_best_miou"] <= 1


def test_the_example_of_the_loss(mine: Path) -> None:
    loss = class_named("mine.loss.AreaLoss")
    (example,) = doctest.DocTestFinder(recurse=False).find(loss, "area", globs={"torch": torch, "build": build})
    assert len(example.examples) == 2
    assert doctest.DocTestRunner().run(example).failed == 0


def test_export_format(mine: Path) -> None:
    content: dict[str, Any] = {}
    exec(compile(FILES["wsss/outputs/boxes.py"], "boxes.py", "exec"), content)
    table, mask = content["BoxTable"](mine / "out", ("cat", "dog, brown")), np.zeros((6, 8), np.uint8)
    mask[1:3, 2:5], mask[5, 7] = 2, 255
    table.write("a", mask)
    table.close()
    with (mine / "out" / "boxes.csv").open(newline="") as file:
        assert list(csv.reader(file))[1:] == [["a", "dog, brown", "2", "1", "5", "3"]]


def test_method_from_outside(outside: Path) -> None:
    """One of ours with a name and a recipe of its own."""
    (outside / "mine.py").write_text("from wsss.methods.toco import ToCo\n\n\nclass Mine(ToCo):\n    pass\n")
    for group in ("method", "recipe"):
        (outside / "conf" / group).mkdir(parents=True)
    ours = (ROOT / "conf/method/toco.yaml").read_text()
    (outside / "conf/method/mine.yaml").write_text(ours.replace("wsss.methods.toco.ToCo", "mine.Mine"))
    recipe = "# @package _global_\nmethod: {lr: 0.0123}\n"
    (outside / "conf/recipe/mine_shapes.yaml").write_text(recipe)
    overrides = [o for o in OVERRIDES if not o.startswith("transform")]
    given = ["method=mine", "--config-dir", str(outside / "conf"), f"hydra.run.dir={outside / 'run'}"]
    views = ["+transform._target_=x"]
    assert call("train", *overrides, *given, *views) == 2  # a class never comes from the command line
    crop = ["transform=toco", "transform.crop_size=32"]
    assert call("train", *overrides, *given, *crop) == 0
    assert "lr: 0.0123" in (outside / "run" / "config.yaml").read_text()
    assert json.loads((outside / "run" / "metrics.json").read_text())["steps"] == 2

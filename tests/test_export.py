"""wsss-export: formats by the command, the way back from an annotation tool, ONNX equal to torch."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from pycocotools.coco import COCO
from tiny import CLIP, COSA, METHOD, OVERRIDES, RESNET38_OVERRIDES, WECLIP, Ended

import wsss
from wsss.config import class_named, method_option
from wsss.data.files import read_mask
from wsss.methods.cam import CAM
from wsss.outputs.onnx import write_onnx

Command = Callable[..., Ended]
ROOT = Path(__file__).parent.parent
SLIM = {"width": 4, "frozen_stages": 0, "batch_norm_momentum": 0.1}
VIT = {"backbone": "vit_tiny_patch16_224", "backbone_args": METHOD["backbone_args"], "weights": None}
CNN = {"backbone": "resnet10t", "weights": None, "backbone_args": None, "size": 64}
METHODS: dict[str, dict[str, Any]] = {
    "toco": METHOD | {"weights": None},
    "cosa": COSA | {"weights": None},
    **{name: VIT | {"attention_layers": 2} for name in ("mctformer_v1", "mctformer", "mctformer_plus")},
    "weaktr": VIT | {"attention_layers": 2, "fusion": {"reduction": 2, "feature_reduction": 4}},
    **{name: {"backbone_args": SLIM, "weights": None} for name in ("cam", "seam", "ppc", "rcm_mam", "segmentation")},
    **dict.fromkeys(("frozen_cam", "frozen_segmentation"), CNN),
    "irn": {"backbone": "resnet18", "weights": None},
    "affinity": {"backbone_args": SLIM, "weights": None},
    "clip_es": CLIP,
    "weclip": WECLIP,
}


def build(name: str) -> Any:
    node = method_option(name)
    values: Any = OmegaConf.to_container(node, resolve=True)
    target = class_named(values.pop("_target_"))
    torch.manual_seed(0)
    method = target(num_classes=3, classes=["a", "b", "c"], **values | METHODS[name]).eval()
    with torch.no_grad():  # so that values are large enough to tell a difference
        for parameter in method.parameters():
            parameter.mul_(1.5)
    return method


def test_every_method_is_tried() -> None:
    assert METHODS.keys() == {path.stem for path in (ROOT / "conf/method").glob("*.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("irn", "affinity", "clip_es")])
def test_onnx_equals_torch(name: str, tmp_path: Path) -> None:
    """At sizes that were not traced: square ones, that of a position table, no multiples of a patch; any batch."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    method = build(name)
    names = write_onnx(tmp_path / "x.onnx", method, name)
    session = runtime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    assert told["method"] == name
    assert json.loads(told["classes"]) == ["a", "b", "c"]
    assert json.loads(told["mean"]) == pytest.approx(method.mean)
    largest = dict.fromkeys(names, (0.0, 0.0))
    for size in ((1, 32, 32), (3, 53, 37), (2, 64, 64), (1, 97, 131)):
        image = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            output = method(image)
        assert set(names) == {key for key in ("logits", "cam", "seg") if output.get(key) is not None}
        for key, found in zip(names, session.run(names, {"image": image.numpy()}), strict=True):
            expected = output[key].numpy()
            assert found.shape == expected.shape
            scale = float(np.abs(expected).max())
            difference = float(np.abs(found - expected).max())
            assert difference <= 2e-5 * scale, (key, size, difference, scale)
            largest[key] = max(largest[key], (difference / scale, difference))
    print(
        name, {key: f"{relative:.1e} of the largest, {absolute:.1e}" for key, (relative, absolute) in largest.items()}
    )


def test_maps_by_gradients_are_no_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with pytest.raises(wsss.InputError, match="makes its maps by gradients") as error:
        write_onnx(tmp_path / "x.onnx", build("clip_es"), "clip_es")
    assert "\n" not in str(error.value)


class Fixed(CAM):
    """Its graph depends on the size of the image that it is traced with."""

    def forward(self, image: torch.Tensor) -> dict[str, Any]:
        square = image.shape[2] == image.shape[3]
        return {"logits": image.mean((2, 3)), "cam": image if square else -image, "seg": None}


class Branching(CAM):
    """What it does depends on values."""

    def forward(self, image: torch.Tensor) -> dict[str, Any]:
        return {"logits": image.mean((2, 3)), "cam": image if image.sum() > 1 else -image, "seg": None}


@pytest.mark.parametrize("target", [Fixed, Branching])
def test_what_torch_cannot_trace_is_refused(target: type[CAM], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    with pytest.raises(wsss.InputError, match="with this backbone cannot be exported") as error:
        write_onnx(tmp_path / "x.onnx", target(3, backbone_args=SLIM), "cam")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("name", ["irn", "affinity"])
def test_what_makes_no_masks_is_not_exported(name: str, tmp_path: Path) -> None:
    with pytest.raises(wsss.InputError, match="makes no masks of its own"):
        write_onnx(tmp_path / "x.onnx", build(name), name)


def test_a_script_without_wsss(command: Command, trained: Path) -> None:
    """That of docs/export.md gives the mask of wsss.load."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    checkpoint = trained / "checkpoints/last.ckpt"
    ended = command("export", f"checkpoint={checkpoint}", "format=onnx", "out=model.onnx")
    assert (ended.code, "logits, cam, seg -> model.onnx" in ended.out) == (0, True), ended.err
    photo = np.random.default_rng(0).integers(0, 256, (50, 75, 3), np.uint8)
    Image.fromarray(photo).save("photograph.png")
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "wsss" not in script
    exec(script.replace("photograph.jpg", "photograph.png"), {})
    assert (read_mask("mask.png") == wsss.load(checkpoint).predict("photograph.png").mask).mean() > 0.999


def test_missing_packages_are_named(command: Command, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    ended = command("export", f"checkpoint={trained / 'checkpoints/last.ckpt'}", "format=onnx", "out=model.onnx")
    assert ended.code == 2
    assert 'pip install "wsss[export]"' in ended.err
    assert ended.err.count("\n") == 1


def test_predictions_are_exported(command: Command, trained: Path, photographs: Path, tmp_path: Path) -> None:
    given = [f"checkpoint={trained / 'checkpoints/last.ckpt'}", "num_workers=0", "overlay=false"]
    shutil.move(photographs / "masks", tmp_path / "truth")
    out = tmp_path / "out"
    assert command("predict", *given, f"images={photographs}", f"out={out}").code == 0
    ended = command("export", f"masks={out}", "format=coco", "out=x.json", f"images={photographs}")
    assert (ended.code, "8 masks of 4 classes" in ended.out) == (0, True), ended.err
    read = COCO("x.json")
    assert [one["name"] for one in read.cats.values()] == list(wsss.load(trained / "checkpoints/last.ckpt").classes)
    for image in read.imgs.values():
        assert (photographs / image["file_name"]).is_file()
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        for one in read.loadAnns(read.getAnnIds(imgIds=[image["id"]])):
            mask[read.annToMask(one) > 0] = one["category_id"]
        assert np.array_equal(mask, read_mask(out / "masks" / Path(image["file_name"]).with_suffix(".png")))
    for name, target in (("cvat", "x.xml"), ("yolo", "yolo"), ("png", "png"), ("label_studio", "ls")):
        assert command("export", f"masks={out / 'masks'}", f"format={name}", f"out={target}").code == 0
    assert Path("yolo/labels/im Urlaub/Bild 1 (groß).txt").is_file()


def test_losses_are_said(command: Command, tmp_path: Path) -> None:
    mask = np.ones((9, 9), np.uint8)
    mask[3:5, 3:5], mask[0, 0] = 0, 255
    (tmp_path / "m").mkdir()
    Image.fromarray(mask).save(tmp_path / "m/a.png")
    given = [f"masks={tmp_path / 'm'}", "classes=[cat]"]
    ended = command("export", *given, "format=yolo", "out=yolo")
    assert "1 masks have undecided pixels (255)" in ended.out
    assert "1 masks have regions with holes" in ended.out
    assert len(Path("yolo/labels/a.txt").read_text().splitlines()) > 1
    assert "note" not in command("export", *given, "format=png", "out=png").out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["format=tiff", "out=x"], "one of png, coco"),
        (["format=coco", "out=x"], "ends in .json"),
        (["format=coco", "out=x.json"], "give masks=..."),
        (["format=onnx", "out=x.onnx", "masks=."], "give checkpoint=..."),
        (["format=png", "out=x", "masks={m}"], "give classes="),
        (["format=png", "out=x", "masks={m}", "polygons=true", "classes=[a]"], "polygons"),
        (["format=voc_test", "out=x.tar", "masks={m}", "classes=[cat]"], "VOC's 20 classes"),
        (["format=png", "out=x", "masks={m}", "classes=[cat]"], "ids [7]"),
        (["format=png", "out=x", "masks={m}", "classes=[a,b,c,d,e,f,g]", "images={n}"], "find no image"),
    ],
)
def test_mistakes_are_one_sentence(command: Command, tmp_path: Path, given: list[str], said: str) -> None:
    for folder, name in (("m", "a"), ("n", "other")):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((3, 3), 7, np.uint8)).save(tmp_path / folder / f"{name}.png")
    ended = command("export", *(one.format(m=tmp_path / "m", n=tmp_path / "n") for one in given))
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert said in ended.err


def test_correct_measure_retrain(command: Command, photographs: Path, tmp_path: Path) -> None:
    shutil.move(photographs / "masks", tmp_path / "truth")
    data = ["dataset=folder", f"dataset.root={photographs}", "data.num_workers=0", "trainer.accelerator=cpu"]
    small = [o for o in OVERRIDES if not o.startswith(("dataset.", "trainer.val_check"))]
    assert command("train", *small, *data, "hydra.run.dir=run", "method.weights=null").code == 0
    checkpoint = "checkpoint=run/checkpoints/last.ckpt"
    assert command("label", checkpoint, "out=LABELS", "num_workers=0").code == 0
    ended = command("export", "masks=LABELS", "format=label_studio", "out=TASKS", f"images={photographs}")
    assert ended.code == 0, ended.err

    # somebody corrects two: one as in the truth, one to nothing at all
    tasks = json.loads(Path("TASKS/tasks.json").read_text())
    done = [task | {"annotations": []} for task in tasks]
    masks = {"im Urlaub/Bild 1 (groß)": "Bild 1 (groß).png", "im Urlaub/Bild 0 (groß)": None}
    Path("fixed").mkdir()
    for name, file in masks.items():
        mask = read_mask(tmp_path / "truth" / file) if file else np.zeros((40, 48), np.uint8)
        Image.fromarray(mask).save(Path("fixed") / f"{Path(name).name}.png")
    given = ["masks=fixed", "classes=[cat,dog]", f"images={photographs}"]
    assert command("export", *given, "format=label_studio", "out=FIXED", "polygons=true").code == 0
    fixed = {task["data"]["image"]: task["predictions"][0] for task in json.loads(Path("FIXED/tasks.json").read_text())}
    for task in done:
        if task["data"]["image"] in fixed:
            task["annotations"] = [fixed[task["data"]["image"]]]
    assert sum(bool(task["annotations"]) for task in done) == 2
    Path("corrected.json").write_text(json.dumps(done))
    Path("two.txt").write_text("\n".join(masks), encoding="utf-8")

    ended = command(
        "eval", checkpoint, f"dataset.val={Path('two.txt').resolve()}",
        f"dataset.masks={Path('corrected.json').resolve()}", "data.num_workers=0", "trainer.accelerator=cpu",
        "hydra.run.dir=measured",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert "val/miou" in Path("measured/metrics.json").read_text()

    shutil.copytree("LABELS/masks", "BETTER/masks")
    back = ["masks=corrected.json", "format=png", "out=BETTER", "classes=[cat,dog]", f"images={photographs}"]
    assert command("export", *back).code == 0
    for path in Path("LABELS/masks").rglob("*.png"):
        name = path.relative_to("LABELS/masks").with_suffix("").as_posix()
        expected = read_mask(Path("fixed") / f"{Path(name).name}.png" if name in masks else path)
        assert np.array_equal(read_mask(Path("BETTER/masks") / f"{name}.png"), expected)

    slim = [o for o in RESNET38_OVERRIDES if not o.startswith(("dataset.", "method.cam", "trainer.val_check"))]
    ended = command(
        "train",
        "method=segmentation",
        *slim,
        *data,
        "pseudo_masks=BETTER/masks",
        "monitor=null",
        "hydra.run.dir=second",
    )
    assert ended.code == 0, ended.err

"""The commands as a user meets them: what they leave, what they say, how they end."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from official import mctformer_to_official, toco_to_official
from PIL import Image
from tiny import (
    MCTFORMER_OVERRIDES,
    OVERRIDES,
    RESNET38_OVERRIDES,
    VOC_IDS,
    VOC_OVERRIDES,
    WEAKTR_OVERRIDES,
    Ended,
    call,
    make_voc,
    save_labels,
)

from wsss import losses
from wsss.data.shapes import Shapes
from wsss.evaluation.comparison import read_counts, weighted_miou
from wsss.evaluation.protocol import Measured
from wsss.outputs.masks import MaskFolder
from wsss.predictor import Predictor


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return make_voc(tmp_path / "voc")


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str, command: str = "train") -> str:
    """The one sentence with which a command ends."""
    capsys.readouterr()
    assert call(command, *arguments) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    sentences = [line for line in said.splitlines() if line.startswith(f"wsss-{command}: ")]
    assert len(sentences) == 1
    return sentences[0]


def test_run_directory(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert {"val/map", "val/miou", "val/cam_miou", "val/aux_cam_miou", "seconds", "peak_memory_mb"} <= metrics.keys()
    assert metrics["images_per_second"] > 0
    assert 0 <= metrics["waiting_for_data"] < 1
    assert "last checkpoint, single scale" in metrics["protocol/val/miou"]
    tags = json.loads((trained / "tags.json").read_text())
    assert {f"protocol/{key}" for key in tags} == {key for key in metrics if key.startswith("protocol/")}
    assert all(str(Measured(**fields)) == metrics[f"protocol/{key}"] for key, fields in tags.items())
    assert "true image labels" in metrics["protocol/val/cam_miou"]
    record = json.loads((trained / "run.json").read_text())
    assert record["seed"] == 0
    assert record["torch"] == torch.__version__
    assert "${" not in (trained / "config.yaml").read_text()
    assert (trained / "log" / "metrics.csv").stat().st_size > 0
    width, height = Image.open(trained / "examples.png").size
    assert width > 5 * 100
    assert height > 4 * 100
    assert not list(trained.rglob("*.tmp"))


def test_checkpoint_is_plain(trained: Path) -> None:
    names = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert names == ["best-step-000002.ckpt", "last.ckpt"]
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert {"method", "dataset", "dataset_values", "classes", "mean", "std", "protocol"} <= checkpoint["wsss"].keys()


def test_eval_in_detail(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What takes time is measured too, maps by another rule, and each image counted."""
    run = tmp_path / "run"
    arguments = [f"checkpoint={trained / 'checkpoints/last.ckpt'}", f"hydra.run.dir={run}", "data.num_workers=0"]
    arguments += ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    rules = ["protocol.threshold=otsu", "protocol.area_prior=0.3"]
    assert call("eval", *arguments, *rules, "detail=true") == 0
    printed, metrics = capsys.readouterr().out, json.loads((run / "metrics.json").read_text())
    for kind in ("", "cam_", "aux_cam_"):
        for key in ("boundary_miou", "trimap_miou", "large_miou", "cooccurrence", "absent"):
            assert 0 <= metrics[f"val/{kind}{key}"] <= 1
            assert metrics[f"protocol/val/{kind}{key}"]
    assert -1 <= metrics["val/over_smoothing"] <= 1
    assert "Otsu's threshold" in metrics["protocol/val/cam_miou"]
    assert "threshold 0.25" in metrics["protocol/val/cam_fixed_miou"]
    assert metrics["val/cam_gap"] == pytest.approx(metrics["val/cam_best_miou"] - metrics["val/cam_miou"])
    assert "to best" in printed
    assert "val/cam_gap" not in printed
    tables = json.loads((run / "tables.json").read_text())
    assert len(tables["over_smoothing"]["blocks"]) == 2
    assert len(tables["cam_miou"]["curve"]) == len(tables["cam_miou"]["thresholds"]) == 100
    # the counts of the images make the figures, those of maps at the fixed threshold
    for figure, key in (("miou", "miou"), ("cam_miou", "cam_fixed_miou"), ("aux_cam_miou", "aux_cam_fixed_miou")):
        counts = read_counts(run / "per_image.csv", figure)
        assert weighted_miou(counts, np.ones(4, int), 5) == pytest.approx(metrics[f"val/{key}"], abs=1e-6)
    assert call("eval", *arguments, "detail=maybe") == 2
    assert "detail is 'maybe': expected true or false" in capsys.readouterr().err


def test_honest_and_papers_protocol(trained: Path, tmp_path: Path) -> None:
    """One checkpoint under both: neither mask nor true label helps, and three steps of one pass; or all of it does."""
    measured = {}
    for protocol in ("", "paper"):
        arguments = [f"checkpoint={trained / 'checkpoints/last.ckpt'}", f"hydra.run.dir={tmp_path / protocol}"]
        arguments += ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "data.num_workers=0"]
        assert call("eval", *arguments, *([f"protocol={protocol}"] if protocol else [])) == 0
        measured[protocol] = json.loads((tmp_path / protocol / "metrics.json").read_text())
    honest, paper = measured[""], measured["paper"]
    tags = json.loads((tmp_path / "tags.json").read_text())
    assert {key for key, fields in tags.items() if fields["labels_at_test"] == "true"} == set()
    chosen = {key for key, fields in tags.items() if fields["threshold_rule"] in ("best", "first_drop")}
    assert chosen == {f"val/{cam}_{key}_miou" for cam in ("cam", "aux_cam") for key in ("best", "first_drop")}
    assert "predicted image labels" in honest["protocol/val/cam_miou"]
    assert "threshold 0.25" in honest["protocol/val/cam_miou"]
    assert "flip (max)" in honest["protocol/val/multiscale_miou"]
    assert "no CRF" in honest["protocol/val/multiscale_miou"]
    assert "CRF iterations 10" in honest["protocol/val/crf_miou"]
    assert honest["val/miou"] == pytest.approx(paper["val/miou"])
    assert "true image labels" in paper["protocol/val/cam_miou"]
    assert "chosen with these masks" in paper["protocol/val/cam_miou"]
    assert paper["val/cam_miou"] == paper["val/cam_best_miou"] >= paper["val/cam_fixed_miou"]
    assert "val/multiscale_miou" not in paper


def test_how_a_checkpoint_was_chosen_is_known(command: Callable[..., Ended], trained: Path, tmp_path: Path) -> None:
    """The last one, the best by image labels, the best by masks, which is not honest, and what does not say."""
    by_masks, old = tmp_path / "by masks", tmp_path / "old.ckpt"
    assert command("train", *OVERRIDES, "monitor=val/miou", f"hydra.run.dir={by_masks}").code == 0
    content = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["wsss"].pop("checkpoint_rule") == "last"
    torch.save(content, old)
    quiet = ["data.num_workers=0", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    best = "checkpoints/best-step-000002.ckpt"
    for number, (path, rule) in enumerate(
        (
            (trained / "checkpoints/last.ckpt", "last"),
            (trained / best, "best by val/map"),
            (by_masks / best, "best by masks (val/miou)"),
            (old, "not known"),
        )
    ):
        out = tmp_path / str(number)
        ended = command("eval", f"checkpoint={path}", *quiet, f"hydra.run.dir={out}")
        assert ended.code == 0, ended.err
        assert {fields["checkpoint_rule"] for fields in json.loads((out / "tags.json").read_text()).values()} == {rule}
        assert ("masks have chosen this checkpoint" in ended.out) == ("masks" in rule)


def test_eval_repeats_the_figures_of_training(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "last.ckpt"
    settings = ["data.num_workers=0", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    asked = ["protocol=single_scale", f"hydra.run.dir={tmp_path}"]
    assert call("eval", f"checkpoint={checkpoint}", *settings, *asked) == 0
    trained, measured = (json.loads((path / "metrics.json").read_text()) for path in (trained, tmp_path))
    for key, value in measured.items():
        if key.startswith("val/"):
            assert value == pytest.approx(trained[key], abs=1e-6), key
    assert (tmp_path / "examples.png").exists()


def test_predict(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = tmp_path / "my photographs", tmp_path / "aus gäbe"
    (images / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    colours.save(images / "grüße (1)=a.JPG")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # stored lying on its side
    colours.save(images / "turned.jpg", exif=rotated)
    colours.convert("L").save(images / "grey.png")
    colours.convert("RGBA").save(images / "alpha.webp")
    colours.convert("CMYK").save(images / "sub" / "cmyk.tiff")
    Image.fromarray(rng.integers(0, 2**16, (33, 47), np.uint16)).save(images / "deep.png")
    colours.resize((50, 31)).save(images / "grey.bmp")
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    (images / "notes.txt").write_text("not an image")
    arguments = [f"images={images}", f"out={out}", "cam=true", "class_threshold=0.0", "num_workers=0"]
    checkpoint = f"checkpoint={trained / 'checkpoints' / 'last.ckpt'}"
    assert "broken.jpg" in fails(capsys, 2, checkpoint, *arguments, command="predict")
    sizes = {
        "grüße (1)=a": (60, 40), "turned": (40, 60), "grey.png": (60, 40), "grey.bmp": (50, 31), "alpha": (60, 40),
        "sub/cmyk": (60, 40), "deep": (47, 33),
    }  # fmt: skip
    assert {p.relative_to(out / "masks").as_posix() for p in (out / "masks").rglob("*.*")} == {
        "class_names.txt",
        *(f"{n}.png" for n in sizes),
    }
    for name, size in sizes.items():
        mask = Image.open(out / "masks" / f"{name}.png")
        assert (mask.mode, mask.size) == ("P", size), name
        assert Image.open(out / "overlays" / f"{name}.jpg").size == size
        arrays = np.load(out / "cams" / f"{name}.npz")
        assert arrays["cam"].shape == (len(arrays["ids"]), *size[::-1])
        assert len(arrays["ids"]) == 4


def test_predict_reduces_large_photographs(command: Callable[..., Ended], trained: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.effect_noise((20000, 500), 60).save(tmp_path / "images" / "panorama.png")
    arguments = [f"checkpoint={trained / 'checkpoints' / 'last.ckpt'}", f"images={tmp_path / 'images'}", "cam=true"]
    ended = command("predict", *arguments, "max_side=400", f"out={tmp_path / 'out'}", "num_workers=0")
    assert ended.code == 0, ended.err
    mask = Image.open(tmp_path / "out/masks/panorama.png")
    assert (mask.mode, mask.size) == ("P", (20000, 500))
    assert np.load(tmp_path / "out/cams/panorama.npz")["cam"].shape[1:] == (32, 400)
    assert Image.open(tmp_path / "out/overlays/panorama.jpg").size == (400, 32)
    assert "max_side is 0" in command("predict", *arguments, "max_side=0", f"out={tmp_path / 'none'}").err


def test_no_image_ends_a_prediction(
    command: Callable[..., Ended], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out, long = tmp_path / "images", tmp_path / "out", "x" * 251
    (images / "a.png").mkdir(parents=True)
    sizes = {"line.png": (65535, 1), "strip.png": (65535, 33), "wanting.png": (41, 40), "torn.png": (42, 40)}
    for name in ("a.jpg", "a.jpg.bmp", "a.png/b.jpg", f"{long}.jpg", f"{long}.bmp", *sizes):
        Image.new("RGB", sizes.get(name, (60, 40))).save(images / name)
    predict, encode = Predictor.predict_reduced, MaskFolder.encode

    def predict_without_memory(self: Predictor, image: np.ndarray, *rest: Any) -> Any:
        if image.shape[1] == 41:
            raise MemoryError
        return predict(self, image, *rest)

    def encode_torn(self: MaskFolder, name: str, *rest: Any) -> dict[str, bytes]:
        if name == "torn":
            raise OSError(fault, os.strerror(fault), name)
        return encode(self, name, *rest)

    monkeypatch.setattr(Predictor, "predict_reduced", predict_without_memory)
    monkeypatch.setattr(MaskFolder, "encode", encode_torn)
    fault = errno.EINVAL
    arguments = [f"checkpoint={trained / 'checkpoints' / 'last.ckpt'}", f"images={images}", f"out={out}"]
    ended = command("predict", *arguments, "num_workers=0", "cam=true")
    assert ended.code == 2
    assert "6 masks" in ended.out
    for said in ("3 of 9 images", "line: ", "wanting: MemoryError", "torn: [Errno 22]"):
        assert said in ended.err
    masks = sorted(
        path.relative_to(out / "masks").as_posix() for path in (out / "masks").rglob("*.png") if path.is_file()
    )
    assert masks[:3] == ["a.jpg.bmp.png", "a.jpg.png", "a.png/b.png"]
    assert masks[3] == "strip.png"
    assert all(name.startswith("x" * 200 + "-") for name in masks[4:])  # which share their first 251 letters
    assert Image.open(out / "masks/strip.png").size == (65535, 33)
    assert Image.open(out / "overlays/strip.jpg").size == (1024, 32)
    fault = errno.ENOSPC  # nor has the next one any room
    assert command("predict", *arguments, "num_workers=0", f"out={tmp_path / 'other'}").code == 1


def test_the_protocol_of_a_checkpoint_is_that_of_masks_and_of_no_evaluation(
    command: Callable[..., Ended], trained: Path, tmp_path: Path
) -> None:
    """Of one from before images were reduced masks are made without; an evaluation says how it measures itself."""
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["wsss"]["protocol"].pop("max_side") == 1024
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert "image size, reduced to 1024" in json.loads((trained / "metrics.json").read_text())["protocol/val/miou"]
    quiet = ["data.num_workers=0", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    made = command("label", f"checkpoint={tmp_path / 'old.ckpt'}", "num_workers=0", f"out={tmp_path / 'labels'}")
    assert made.code == 0, made.err
    assert json.loads((tmp_path / "labels/settings.json").read_text())["settings"]["protocol.max_side"] is None
    for given, size in (([], "reduced to 1024, predicted"), (["protocol.max_side=20"], "reduced to 20, predicted")):
        run = tmp_path / f"run{len(given)}"
        ended = command("eval", f"checkpoint={tmp_path / 'old.ckpt'}", *quiet, *given, f"hydra.run.dir={run}")
        assert ended.code == 0, ended.err
        assert size in json.loads((run / "metrics.json").read_text())["protocol/val/cam_miou"]


@pytest.mark.parametrize(
    ("names", "said"),
    [([f"c{c}" for c in range(255)], "255 classes"), (["c1", "background"], "has the class background")],
    ids=["many", "background"],
)
def test_classes_that_masks_cannot_hold(
    names: list[str], said: str, command: Callable[..., Ended], tmp_path: Path
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    (root / "a.png").write_bytes(b"never opened")
    (root / "labels.csv").write_text("file,labels\na.png,c1\n")
    (root / "class_names.txt").write_text("\n".join(names))
    data = ["dataset=folder", f"dataset.root={root}"]
    ended = command("train", *data, "on_bad_image=skip", f"hydra.run.dir={tmp_path / 'run'}")
    assert (ended.code, said in ended.err) == (2, True), ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version", ["mctformer_v1", "mctformer", "mctformer_plus", "weaktr"])
def test_mctformer(version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained, evaluated, exported, evaluated again from the official layout, and asked for masks."""
    run, quiet = (
        tmp_path / "run",
        ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "data.num_workers=0"],
    )
    settings = WEAKTR_OVERRIDES if version == "weaktr" else MCTFORMER_OVERRIDES
    # affinities of a network that knows nothing make maps so flat that bringing them to [0, 1] magnifies rounding
    settings = [*settings, "method.refine=false"]
    assert call("train", f"method={version}", *settings, f"hydra.run.dir={run}") == 0
    figures = {k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k.startswith("val/")}
    of_labels = {"map", "image_map", "f1", "image_f1"}
    of_maps = {"miou", "miou_all", "foreground_miou", "gap", "otsu_miou", "otsu_gap", "best_miou", "best_threshold"}
    of_maps |= {"first_drop_miou", "first_drop_threshold", "area_under_curve"}
    assert {f"val/{key}" for key in of_labels | {f"cam_{key}" for key in of_maps}} == figures.keys()
    assert Image.open(run / "attention.png").height > 4 * 160
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    official = tmp_path / "checkpoint.pth"
    torch.save({"model": mctformer_to_official(checkpoint["state_dict"])}, official)
    # what no official file tells has to be given
    told = [
        "dataset=shapes",
        *(o for o in MCTFORMER_OVERRIDES if o.startswith("dataset.")),
        "method.cam_scales=[1.0, 0.75]",
    ]
    told += [
        "method.background_threshold=0.39",
        "method.refine=false",
        "method.attention_layers=2",
        "method.backbone=vit_tiny_patch16_224",
        "++method.backbone_args.num_heads=2",
    ]
    for path, given in ((run / "checkpoints" / "last.ckpt", []), (official, told)):
        out = tmp_path / path.stem
        asked = ["protocol=single_scale", f"hydra.run.dir={out}"]
        assert call("eval", f"checkpoint={path}", *given, *quiet, *asked) == 0
        measured = json.loads((out / "metrics.json").read_text())
        # a value at a threshold may differ
        assert {k: v for k, v in measured.items() if k.startswith("val/")} == pytest.approx(figures, abs=1e-5)
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (45, 30)).save(images / "a.png")
    arguments = [f"images={images}", f"out={tmp_path / 'out'}", "num_workers=0", "class_threshold=0.0"]
    assert call("predict", f"checkpoint={run / 'checkpoints' / 'last.ckpt'}", *arguments) == 0
    assert Image.open(tmp_path / "out" / "masks" / "a.png").size == (45, 30)
    Image.new("RGB", (45, 5)).save(images / "tiny.png")
    said = fails(capsys, 2, f"checkpoint={run / 'checkpoints' / 'last.ckpt'}", *arguments, command="predict")
    assert "1 of 2 images could not be used" in said
    assert "tiny: an image of 45x5 pixels is smaller than one patch of 8" in said
    other = "mctformer" if version != "mctformer" else "mctformer_v1"
    said = fails(capsys, 2, f"checkpoint={official}", f"method={other}", "dataset=shapes", command="eval")
    assert f"is of method={version}" in said


@pytest.mark.parametrize("name", ["cam", "seam", "ppc", "rcm_mam"])
def test_methods_on_resnet38(name: str, tmp_path: Path) -> None:
    """Trained, evaluated and asked for masks; RCM-MAM also from an earlier run that is gone when it is evaluated."""
    run, given = tmp_path / "run", [f"method={name}", *RESNET38_OVERRIDES, "transform.long_side=[32, 40]"]
    if name == "rcm_mam":
        given += ["method.features=8", "method.rcm_start=0", "method.mam_start=1"]
        assert call("train", *given, "method.losses.mam=null", f"hydra.run.dir={tmp_path / 'first'}") == 0
        given += [f"method.init_checkpoint={tmp_path / 'first' / 'checkpoints' / 'last.ckpt'}"]
    assert call("train", *given, f"hydra.run.dir={run}") == 0
    if name == "rcm_mam":
        shutil.rmtree(tmp_path / "first")
    trained = json.loads((run / "metrics.json").read_text())
    assert trained["steps"] == 2
    quiet = ["trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "data.num_workers=0"]
    checkpoint = f"checkpoint={run / 'checkpoints' / 'last.ckpt'}"
    asked = ["protocol=single_scale", f"hydra.run.dir={tmp_path / 'eval'}"]
    assert call("eval", checkpoint, *quiet, *asked) == 0
    measured = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    for key in ("val/map", "val/cam_miou", "val/cam_best_miou"):
        assert measured[key] == pytest.approx(trained[key], abs=1e-6), key
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (45, 30)).save(images / "a.png")
    assert call("predict", checkpoint, f"images={images}", f"out={tmp_path / 'out'}", "num_workers=0") == 0
    assert Image.open(tmp_path / "out" / "masks" / "a.png").size == (45, 30)


def test_affinity_learns_from_scores_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is evaluated; who asks for a figure, or gives the wrong pixels, is told."""
    scores, run = tmp_path / "scores = 1", tmp_path / "run"
    scores.mkdir()
    shapes = Shapes("train", train_size=6, size=32, num_classes=4)
    for image_id in shapes.ids:
        half = np.full((2, 32, 32), 0.5, np.float16)
        np.savez(scores / f"{image_id}.npz", low=half, high=half, ids=np.array([3]))
    given = ["method=affinity", *RESNET38_OVERRIDES[:-1], "method.losses.affinity.radius=2"]
    assert call("train", *given, f"pseudo_scores={scores}", f"hydra.run.dir={run}") == 0
    trained = json.loads((run / "metrics.json").read_text())
    assert trained["steps"] == 2
    assert not any(key.startswith("val/") for key in trained)
    checkpoint = f"checkpoint={run / 'checkpoints' / 'last.ckpt'}"
    assert "Affinity has no figure" in fails(capsys, 2, checkpoint, f"hydra.run.dir={tmp_path / 'x'}", command="eval")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (45, 30)).save(tmp_path / "images" / "a.png")
    images = [f"images={tmp_path / 'images'}", f"out={tmp_path / 'out'}"]
    assert "Affinity makes no masks of its own" in fails(capsys, 2, checkpoint, *images, command="predict")
    out = f"hydra.run.dir={tmp_path / 'other'}"
    assert "add pseudo_scores=FOLDER" in fails(capsys, 2, *given, out)
    assert "leave the setting out" in fails(capsys, 2, *OVERRIDES, f"pseudo_scores={scores}", out)
    assert "monitor=null keeps" in fails(capsys, 2, *given, f"pseudo_scores={scores}", "monitor=val/map", out)


def test_sweep_ends_with_one_table_and_survives_a_bad_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code = call("train", "-m", *OVERRIDES, "method.local_crop_size=8,200", "seed=1,2", f"hydra.sweep.dir={tmp_path}")
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.count("local_crop_size is 200") == 2
    table = printed.out.rpartition("sweep ")[2]
    assert table.count("failed") >= 2
    for header in ("local_crop_size", "seed", "miou"):
        assert header in table
    assert len(list(tmp_path.glob("*/metrics.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method.lrr=1"], ["method.lrr", "lr", "backbone"]),
        (["foo=1"], ["foo", "seed", "trainer"]),
        (["method=tocoo"], ["method=tocoo", "toco"]),
        (["recipe=typo"], ["recipe=typo", "toco_voc"]),
        (["transform=typo"], ["transform=typo", "toco"]),
        (["method.losses.rcm={weight: 1}"], ["rcm", "ptc"]),
        (["+method.losses.rcm={weight: 1}"], ["rcm", "ptc"]),
        (["+method.losses.ptc.heat=1"], ["ptc", "heat", "ignore_index"]),
        (["method.projector={heat: 1}"], ["unknown config key method.projector.heat", "bottleneck"]),
        (["+method.unheard=1"], ["method", "unheard", "backbone"]),
        (["method.backbone=vit_nonsense"], ["vit_nonsense", "vit_"]),
        (["method.weights=/no/such.pth"], ["/no/such.pth"]),
        (["method.weights=nonsense"], ["nonsense", "timm tag"]),
        (["method.aux_layer=7"], ["aux_layer", "7"]),
        (["dataset.size=0"], ["size", "0"]),
        (["dataset=voc"], ["dataset.root", "not set"]),
        (["method._target_=os.system"], ["_target_"]),
        (["protocol.image_labels=guessed"], ["image_labels", "guessed", "predicted"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: list[str]
) -> None:
    out = tmp_path / "run"
    keys = {argument.partition("=")[0] for argument in arguments}
    overrides = [o for o in OVERRIDES if o.partition("=")[0] not in keys]
    if "dataset=voc" in arguments:
        overrides = [o for o in overrides if not o.startswith("dataset")]
    sentence = fails(capsys, 2, *overrides, *arguments, f"hydra.run.dir={out}")
    assert all(word in sentence for word in said), sentence
    assert not out.exists()


def broken_voc(root: Path, kind: str) -> list[str]:
    """Damages a VOC tree; returns the words that the answer has to hold."""
    first, val = VOC_IDS[0], VOC_IDS[2]
    if kind == "root":
        (root / "JPEGImages").rename(root / "Images")
        return ["JPEGImages"]
    if kind == "list":
        (root / "ImageSets/Segmentation/train_aug.txt").unlink()
        return ["train.txt"]
    if kind == "image":
        (root / "JPEGImages" / f"{first}.jpg").unlink()
        return [first]
    if kind == "label entry":
        save_labels(root, {name: np.ones(2, np.float32) for name in VOC_IDS[1:]})
        return [first, "cls_labels_onehot.npy"]
    if kind == "label length":
        save_labels(root, {name: np.ones(3, np.float32) for name in VOC_IDS})
        return ["cls_labels_onehot.npy", "3", "2"]
    if kind == "hostile labels":
        save_labels(root, {first: print})
        return ["cls_labels_onehot.npy", "print"]
    if kind == "truncated image":
        path = root / "JPEGImages" / f"{first}.jpg"
        path.write_bytes(path.read_bytes()[:200])
        return [first]
    mask = root / "SegmentationClassAug" / f"{val}.png"
    if kind == "mask size":
        Image.new("L", (5, 7)).save(mask)
        return [mask.name, "5"]
    Image.fromarray(np.full(np.asarray(Image.open(mask)).shape, 9, np.uint8)).save(mask)
    return [mask.name, "9"]


@pytest.mark.parametrize(
    "kind",
    [
        "root",
        "list",
        "image",
        "label entry",
        "label length",
        "hostile labels",
        "truncated image",
        "mask size",
        "mask ids",
    ],
)
def test_bad_data(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    said = broken_voc(voc, kind)
    code = 1 if kind.startswith("mask") else 2  # masks are met when the training is over, which is kept
    sentence = fails(capsys, code, *VOC_OVERRIDES, f"dataset.root={voc}", f"hydra.run.dir={tmp_path / 'run'}")
    assert all(word in sentence for word in said), sentence
    assert (tmp_path / "run/checkpoints/last.ckpt").exists() == (code == 1)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_bad_data_in_a_worker(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = broken_voc(voc, "truncated image")
    workers = ["data.num_workers=1", f"dataset.root={voc}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert said[0] in fails(capsys, 2, *VOC_OVERRIDES, *workers)


def test_official_checkpoint(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained here, written as the original code does, evaluated as if it had been downloaded: the same figures."""
    given = [f"dataset.root={voc}", f"hydra.run.dir={tmp_path / 'run'}", "data.eval_batch_size=1", "protocol.size=40"]
    assert call("train", *VOC_OVERRIDES, *given) == 0
    ours = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    official = tmp_path / "model_iter_2.pth"
    torch.save({f"module.{name}": tensor for name, tensor in toco_to_official(ours).items()}, official)
    checkpoint, out = f"checkpoint={official}", tmp_path / "eval"
    assert "dataset=voc" in fails(capsys, 2, checkpoint, command="eval")
    # what no tensor tells
    settings = [
        "method.backbone_args.num_heads=2",
        "method.aux_layer=-2",
        "method.cam_scales=[1.0]",
        "method.decoder_dilation=1",
    ]
    settings += [
        "protocol=single_scale",
        "protocol.size=40",
        "data.num_workers=0",
        "trainer.enable_progress_bar=false",
        "trainer.accelerator=cpu",
    ]
    asked = ["method=toco", "dataset=voc", f"dataset.root={voc}", f"hydra.run.dir={out}"]
    assert call("eval", checkpoint, *asked, *settings) == 0
    trained, measured = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path / "run", out))
    for key in ("val/map", "val/miou", "val/cam_miou", "val/aux_cam_miou"):
        assert measured[key] == pytest.approx(trained[key], abs=1e-6), key


def test_bad_checkpoints(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    cases: dict[str, Any] = {
        "empty": b"",
        "foreign": {"state_dict": good["state_dict"]},
        "hostile": {"state_dict": print},
        "short": good | {"state_dict": dict(list(good["state_dict"].items())[1:])},
        "other method": good | {"wsss": good["wsss"] | {"method": "unheard"}},
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        sentence = fails(capsys, 2, f"checkpoint={path}", f"hydra.run.dir={tmp_path / 'out'}", command="eval")
        assert ("unheard" if name == "other method" else path.name) in sentence
        assert not (tmp_path / "out").exists()
    path = trained / "checkpoints" / "last.ckpt"
    assert "method=other" in fails(capsys, 2, f"checkpoint={path}", "method=other", command="eval")
    assert "checkpoint" in fails(capsys, 2, command="eval")
    assert "nowhere" in fails(capsys, 2, f"checkpoint={path}", "images=/nowhere", "out=x", command="predict")


def test_what_a_checkpoint_says_is_inert(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are options or refused, values are neither interpolated nor parsed."""
    monkeypatch.setenv("SECRET", "a canary")
    good = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    (tmp_path / "evil.yaml").write_text("_target_: os.getcwd\n")
    cases = {
        "../../evil": good | {"wsss": good["wsss"] | {"method": "../../evil"}},
        "toco,cam": good | {"wsss": good["wsss"] | {"dataset": "toco,cam"}},
        "${oc.env:SECRET}": good | {"hyper_parameters": good["hyper_parameters"] | {"backbone": "${oc.env:SECRET}"}},
        "a b=[": good | {"wsss": good["wsss"] | {"dataset_values": {"split_": "a b=["}}},
    }
    for shown, content in cases.items():
        torch.save(content, tmp_path / "x.ckpt")
        sentence = fails(
            capsys, 2, f"checkpoint={tmp_path / 'x.ckpt'}", f"hydra.run.dir={tmp_path / 'out'}", command="eval"
        )
        assert shown in sentence or "split_" in sentence
        assert "canary" not in sentence


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(self: Any, tokens: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return (tokens * torch.nan).sum()

    monkeypatch.setattr(losses.PatchTokenContrastLoss, "forward", diverge)
    sentence = fails(capsys, 1, *OVERRIDES, f"hydra.run.dir={tmp_path}")
    assert "step 1" in sentence
    assert "ptc = nan" in sentence
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["--help", "method.lrr=1"])
def test_answers_at_once(argument: str) -> None:
    code = "from wsss.commands.train import main; main()"
    times = []
    for _ in range(3):
        started = time.perf_counter()
        ended = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - started)
    assert ended.returncode == (0 if argument == "--help" else 2)
    assert min(times) < 2


def test_training_in_double_precision(command: Callable[..., Ended], tmp_path: Path) -> None:
    ended = command("train", *OVERRIDES, "trainer.precision=64-true", f"hydra.run.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.err
    assert (tmp_path / "run/examples.png").exists()

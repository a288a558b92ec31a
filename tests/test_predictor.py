"""From Python without any configuration: a checkpoint's masks, and a method in a plain Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from official import toco_to_official
from PIL import Image
from tiny import METHOD, Ended
from torch import nn

import wsss
from wsss import InputError
from wsss.data.datamodule import DataModule
from wsss.data.pixels import Normalise
from wsss.data.shapes import Shapes
from wsss.data.transforms import ToCoViews
from wsss.evaluation.metrics import SegmentationIoU
from wsss.evaluation.protocol import Protocol
from wsss.methods.cam import CAM
from wsss.methods.toco import ToCo
from wsss.predictor import Predictor


def tiny_toco() -> ToCo:
    return ToCo(num_classes=3, **METHOD)


def tiny_cam() -> CAM:
    return CAM(num_classes=3, backbone_args={"width": 4}, weights=None, cam_scales=(1.0,))


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "images" / "a.png")
    return tmp_path / "images" / "a.png"


def test_python_does_what_the_command_does(
    command: Callable[..., Ended], trained: Path, photograph: Path, tmp_path: Path
) -> None:
    checkpoint = trained / "checkpoints/last.ckpt"
    arguments = [f"checkpoint={checkpoint}", f"images={photograph.parent}", f"out={tmp_path / 'out'}", "cam=true"]
    assert command("predict", *arguments, "class_threshold=0.4", "num_workers=0").code == 0
    model = wsss.load(checkpoint, class_threshold=0.4)
    result = model.predict(photograph, cams=True)
    assert np.array_equal(result.mask, np.asarray(Image.open(tmp_path / "out/masks/a.png")))
    assert (result.mask.dtype, result.mask.shape) == (np.uint8, (40, 60))
    arrays = np.load(tmp_path / "out/cams/a.npz")
    assert list(result.scores) == [model.classes[c - 1] for c in arrays["ids"]]
    assert result.cams is not None
    assert list(result.cams) == list(result.scores)
    for ours, written in zip(result.cams.values(), arrays["cam"], strict=True):
        assert np.array_equal(ours.astype(np.float16), written)


def test_what_the_mask_shows_has_a_score(trained: Path, photograph: Path) -> None:
    """Even where the classifier finds nothing; true of a network with a decoder, whose mask does not ask it."""
    model = wsss.load(str(trained / "checkpoints/last.ckpt"), class_threshold=1.0)
    result = model.predict(photograph, cams=True)
    shown = [model.classes[c - 1] for c in np.unique(result.mask) if c]
    assert shown
    assert result.cams is not None
    assert shown == list(result.scores) == list(result.cams)


def test_paths_images_arrays_and_lists(trained: Path, photograph: Path) -> None:
    model = wsss.load(str(trained / "checkpoints/last.ckpt"), class_threshold=0.0).to("cpu")
    image = Image.open(photograph)
    first, *others = model.predict([photograph, str(photograph), image, np.asarray(image)])
    assert first.cams is None
    assert list(first.scores) == list(model.classes)
    assert all(0 < score < 1 for score in first.scores.values())
    for other in others:
        assert np.array_equal(first.mask, other.mask)
        assert first.scores == other.scores
    assert model.predict([]) == []


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("/nowhere.jpg", "nowhere.jpg"),
        (3, "images holds int"),
        (np.zeros((4, 5, 3)), r"array float64 \(4, 5, 3\)"),
        (np.zeros((4, 5), np.uint8), r"array uint8 \(4, 5\)"),
        (np.zeros((40, 5, 3), np.uint8), "5x40 pixels is smaller than one patch"),
    ],
    ids=["missing", "number", "floats", "grey", "tiny"],
)
def test_what_is_no_photograph(trained: Path, image: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        wsss.load(trained / "checkpoints/last.ckpt").predict(image)


def test_large_photographs_are_reduced_and_their_masks_enlarged(trained: Path) -> None:
    model = wsss.load(trained / "checkpoints/last.ckpt", max_side=64)
    sizes = []
    model.method.encoder.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[-2:]))
    assert model.predict(np.zeros((300, 150, 3), np.uint8)).mask.shape == (300, 150)
    assert sizes[0] == (64, 32)
    result = model.predict(np.zeros((300, 150, 3), np.uint8)[::-1], cams=True)
    assert result.cams is not None
    assert all(cam.shape == (64, 32) for cam in result.cams.values())


@pytest.mark.parametrize("build", [tiny_toco, tiny_cam])
def test_evaluation_and_prediction_have_one_bound(build: Callable[[], Any]) -> None:
    """Beyond `max_side` the same mask is compared as is predicted, nothing is larger, and what fits is untouched."""
    torch.manual_seed(0)
    method = build().eval()
    photo = np.random.default_rng(0).integers(0, 256, (130, 200, 3), np.uint8)
    batch = {
        "image": Normalise(method.mean, method.std)(photo)[None],
        "label": torch.ones(1, 3),
        "mask": torch.randint(0, 4, (1, 130, 200)),
    }
    sizes = []
    for module in method.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: sizes.append(max(inputs[0].shape[-2:])))
    method.protocol = Protocol(max_side=64, scales=(1.0, 0.5), flip="sum")
    method.validation_step(batch, 0)
    shown = method.illustrate(batch)["examples"]
    assert {tuple(picture.shape[:2]) for picture in shown.values()} == {(42, 64)}
    assert max(sizes) <= 64
    _, predicted, true = (counts[0] for counts in method.metrics["cam_miou"].counts())
    assert predicted.sum() == true.sum() == 130 * 200

    predictor = Predictor(method, class_threshold=0.0, max_side=64)
    assert method.protocol.scales == (1.0, 0.5)
    mask = torch.from_numpy(predictor.predict(photo).mask)[None]
    if method.metrics["miou"].update_called:
        compared = SegmentationIoU(4)
        compared.update(mask, batch["mask"])
        same = (compared.confusion - method.metrics["miou"].confusion).abs().sum() / mask.numel()
        assert same < 0.02  # a photograph is reduced as bytes, a batch as floats
    untouched = method.infer(batch["image"][..., :40, :64])
    method.protocol = Protocol(scales=(1.0, 0.5), flip="sum")
    assert torch.equal(untouched["cam"], method.infer(batch["image"][..., :40, :64])["cam"])


def test_a_checkpoint_of_the_original_layout(photograph: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    method = ToCo(num_classes=3, classes=("ant", "bee", "cow"), **METHOD).eval()
    path = tmp_path / "model_iter_20000.pth"
    torch.save({f"module.{name}": t for name, t in toco_to_official(method.state_dict()).items()}, path)
    told = {"aux_layer": -2, "decoder_dilation": 1, "cam_scales": [1.0], "backbone": METHOD["backbone"]}
    model = wsss.load(path, classes=("ant", "bee", "cow"), backbone_args={"num_heads": 2}, class_threshold=0.0, **told)
    result, ours = (m.predict(photograph) for m in (model, Predictor(method, class_threshold=0.0)))
    assert list(result.scores) == ["ant", "bee", "cow"]
    assert np.array_equal(result.mask, ours.mask)
    assert wsss.load(path, backbone_args={"num_heads": 2}, **told).classes == ("0", "1", "2")


def test_what_cannot_be_loaded(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        wsss.load(tmp_path / "missing.ckpt")
    with pytest.raises(InputError, match="has no argument unheard"):
        wsss.load(trained / "checkpoints/last.ckpt", unheard=1)
    torch.save({"weight": torch.ones(2)}, tmp_path / "foreign.pth")
    with pytest.raises(InputError, match=r"neither of wsss-train nor of the original code.* weight"):
        wsss.load(tmp_path / "foreign.pth")


def test_a_method_in_a_plain_trainer(tmp_path: Path) -> None:
    train, val = (Shapes(split, train_size=4, val_size=2, size=32, num_classes=3) for split in ("train", "val"))
    data = DataModule(train, val, ToCoViews(32), batch_size=2, num_workers=0)
    method = ToCo(num_classes=data.num_classes, classes=data.classes, **METHOD)
    trainer = pl.Trainer(max_steps=2, val_check_interval=2, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.fit(method, data)
    assert trainer.global_step == 2
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(InputError, match="names no method"):
        wsss.load(tmp_path / "plain.ckpt")
    assert {"val/map", "val/miou", "train/loss"} <= trainer.callback_metrics.keys()

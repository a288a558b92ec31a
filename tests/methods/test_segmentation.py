"""The segmentation stage: trained from a folder of masks by the command, evaluated, predicted with, refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import RESNET38_OVERRIDES, SHARED, Ended, call

import wsss
from wsss import InputError
from wsss.data.shapes import Shapes
from wsss.evaluation.protocol import Protocol
from wsss.methods.cam import CAM
from wsss.methods.rcm_mam import RCMMAM
from wsss.methods.seam import SEAM
from wsss.methods.segmentation import Segmentation
from wsss.networks.segmenters import load_encoder

pytestmark = pytest.mark.filterwarnings("ignore:ResNet38 starts from random weights")

TINY = {"backbone_args": {"width": 2, "frozen_stages": 1}, "decoder_args": {"channels": 6, "dilation": 2}}
OVERRIDES = [
    *SHARED,
    "method=segmentation",
    "method.backbone_args={width: 2, frozen_stages: 0, batch_norm_momentum: 0.1}",
    "method.decoder_args={channels: 6, dilation: 2}",
]


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pseudo mask of every training image of the tiny shapes."""
    folder = tmp_path_factory.mktemp("masks")
    shapes = Shapes(size=32, train_size=6, num_classes=4)
    for index, image_id in enumerate(shapes.ids):
        Image.fromarray(shapes.mask(index)).save(folder / f"{image_id}.png")
    return folder


@pytest.fixture(scope="module")
def run(masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("segmentation") / "run"
    assert call("train", *OVERRIDES, f"pseudo_masks={masks}", f"hydra.run.dir={out}") == 0
    return out


# --- the stage --------------------------------------------------------------------------------------------------------


def test_shapes_views_and_figures() -> None:
    stage = Segmentation(3, **TINY)
    assert stage(torch.zeros(2, 3, 33, 40))["seg"].shape == (2, 4, 5, 5)
    assert stage.views == ("image", "pseudo_mask")
    assert stage.figures(has_masks=True) == ["val/miou"]
    assert stage.figures(has_masks=False) == []
    stage.protocol = Protocol(scales=(0.5, 1.0), softmax="before")
    assert stage.smallest_side == 2
    assert "0.5, 1 (max of probabilities)" in str(stage.describe("val")["val/miou"])
    shown = stage.illustrate({"image": torch.zeros(1, 3, 8, 9)})["examples"]
    assert {name: tuple(picture.shape) for name, picture in shown.items()} == {"image": (8, 9, 3), "prediction": (8, 9)}


@pytest.mark.parametrize("kind", [CAM, RCMMAM, SEAM])
def test_starting_from_an_earlier_stage(kind: type, tmp_path: Path) -> None:
    torch.manual_seed(3)
    slim = {"width": 4, "frozen_stages": 0, "batch_norm_momentum": 0.1}
    first = kind(3, backbone_args=slim)
    torch.save({"state_dict": first.state_dict(), "wsss": {"mean": [0.5, 0.4, 0.3]}}, tmp_path / "first.ckpt")
    decoder = {"channels": 8, "dilation": 2}
    stage = Segmentation(3, backbone_args=slim, decoder_args=decoder, init_checkpoint=str(tmp_path / "first.ckpt"))
    own = (first.main if kind is RCMMAM else first).backbone.state_dict()
    assert (stage.mean, stage.std) == ((0.5, 0.4, 0.3), first.std)
    started = stage.network.encoder.body.state_dict()
    for name, tensor in own.items():
        assert torch.equal(tensor, started[name.removeprefix("body.")]), name
    with pytest.raises(InputError, match=r"first.ckpt does not fit this network \(backbone\.\*\): it has other shapes"):
        Segmentation(3, backbone_args=slim | {"width": 2}, init_checkpoint=str(tmp_path / "first.ckpt"))


def test_head_learns_faster_and_what_is_frozen_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segmentation, "total_steps", 10)
    stage = Segmentation(3, lr=0.1, head_lr_factor=5.0, **TINY)
    configured: Any = stage.configure_optimizers()
    body, head = configured["optimizer"].param_groups
    assert (body["lr"], head["lr"]) == (0.1, 0.5)
    assert len(head["params"]) == 4
    assert all(p.requires_grad for p in body["params"])
    assert len(body["params"]) + 4 == sum(p.requires_grad for p in stage.parameters())


def test_segmenter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WeakTr's last stage: every parameter learns, rates end at a floor, any size."""
    monkeypatch.setattr(Segmentation, "total_steps", 10)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    network = {
        "backbone": "vit_tiny_patch16_224",
        "decoder": "mask_transformer",
        "losses": {"clipped_ce": {"patch": 8}},
    }
    stage = Segmentation(3, backbone_args=small, lr_floor=0.1, **network)
    stage.log = stage.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    assert stage(torch.zeros(2, 3, 33, 41))["seg"].shape == (2, 4, 4, 5)
    mask = torch.randint(0, 4, (2, 32, 40))
    stage.training_step({"image": torch.randn(2, 3, 32, 40), "pseudo_mask": mask}, 0)["loss"].backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []
    configured: Any = stage.configure_optimizers()
    schedule = configured["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert schedule(0) == 1
    assert schedule(5) == pytest.approx(0.1 + 0.9 * 0.5**0.9)
    torch.save(stage.network.encoder.vit.state_dict(), tmp_path / "vit.pth")
    started = Segmentation(3, backbone_args=small, weights=str(tmp_path / "vit.pth"), **network)
    assert started.mean == started.std == (0.5, 0.5, 0.5)  # as timm's weights of this network are made with
    with pytest.raises(InputError, match=r"decoder_args.depth is 0"):
        Segmentation(3, backbone_args=small, decoder_args={"depth": 0}, **network)
    with pytest.raises(InputError, match="not a plain vision transformer"):
        Segmentation(3, **network | {"backbone": "resnet18"})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"decoder_args": {"dilation": 0}}, "decoder_args.dilation is 0"),
        ({"decoder_args": {"depth": 3}}, "decoder_args.depth: large_fov takes channels, dilation"),
        ({"decoder": "mask_transformer"}, "decoder_args.channels: mask_transformer takes depth"),
        ({"lr_floor": 2}, "lr_floor is 2"),
        ({"backbone": "resnet1"}, "unknown backbone 'resnet1'"),
        ({"losses": {"seg": {"weight": 1.0}}}, "losses.seg: Segmentation does not compute it, only ce, clipped_ce"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Segmentation(3, **TINY | arguments)


# --- under the commands -----------------------------------------------------------------------------------------------


def test_last_checkpoint_alone(run: Path) -> None:
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (run / "examples.png").exists()


def test_evaluated_and_predicted_with(command: Callable[..., Ended], run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints/last.ckpt"
    settings = ["protocol=large_fov", "trainer.accelerator=cpu", "data.num_workers=0", "data.eval_batch_size=2"]
    ended = command("eval", f"checkpoint={checkpoint}", *settings, f"hydra.run.dir={tmp_path / 'eval'}")
    assert ended.code == 0, ended.err
    assert "val/miou" in (tmp_path / "eval/metrics.json").read_text()
    (tmp_path / "images").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "images/a.png")
    arguments = [f"checkpoint={checkpoint}", f"images={tmp_path / 'images'}", f"out={tmp_path / 'out'}"]
    assert command("predict", *arguments, "num_workers=0").code == 0
    model = wsss.load(checkpoint)
    result = model.predict(colours)
    assert np.array_equal(result.mask, np.asarray(Image.open(tmp_path / "out/masks/a.png")))
    assert list(result.scores) == [model.classes[c - 1] for c in np.unique(result.mask) if c]
    assert all(0 < score <= 1 for score in result.scores.values())
    with pytest.raises(InputError, match="Segmentation makes no class activation maps"):
        model.predict(colours, cams=True)
    ended = command("predict", *arguments, "cam=true")
    assert (ended.code, "makes no class activation maps" in ended.err) == (2, True)


def test_scores_are_of_the_classes_in_the_mask() -> None:
    stage = Segmentation(2, classes=("cat", "dog"), **TINY)
    with torch.no_grad():
        stage.network.fc8_seg_conv2.weight.zero_()
        stage.network.fc8_seg_conv2.bias.copy_(torch.tensor([0.0, 1.0, 3.0]))
    result = wsss.predictor.Predictor(stage).predict(np.zeros((20, 30, 3), np.uint8))
    assert (result.mask == 2).all()
    assert result.scores == {"dog": pytest.approx(float(torch.tensor([0.0, 1.0, 3.0]).softmax(0)[2]))}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (OVERRIDES, "segmentation learns from pixels: add pseudo_masks=FOLDER"),
        ([*RESNET38_OVERRIDES, "method=cam", "pseudo_masks={masks}"], "cam has no use for pseudo_masks"),
        ([*OVERRIDES, "pseudo_masks={masks}", "dataset.train_size=8"], "2 of 8 images have no pseudo mask in"),
        ([*OVERRIDES, "pseudo_masks={masks}/none"], "6 of 6 images have no pseudo mask in"),
        ([*OVERRIDES, "pseudo_masks={masks}", "monitor=val/map"], "known are val/miou; monitor=null keeps"),
    ],
    ids=["none", "unused", "missing", "no folder", "monitor"],
)
def test_refused_before_training(command: Callable[..., Ended], masks: Path, given: list[str], said: str) -> None:
    ended = command(
        "train", *(override.format(masks=masks) if "{masks}" in override else override for override in given)
    )
    assert ended.code == 2
    assert said in ended.err


def test_bad_masks_are_met_or_skipped(command: Callable[..., Ended], masks: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for path in masks.iterdir():
        (tmp_path / "masks" / path.name).write_bytes(path.read_bytes())
    first, second, *_ = sorted((tmp_path / "masks").iterdir())
    first.write_bytes(b"no picture")
    Image.new("L", (5, 5)).save(second)
    given = [*OVERRIDES, f"pseudo_masks={tmp_path / 'masks'}", f"hydra.run.dir={tmp_path / 'run'}"]
    ended = command("train", *given, "on_bad_image=skip")
    assert ended.code == 0, ended.err
    assert "4 images of 4 classes" in ended.out
    skipped = (tmp_path / "run/skipped.txt").read_text().splitlines()
    assert len(skipped) == 2
    assert first.name in skipped[0]
    assert second.name in skipped[1]
    for path in (tmp_path / "masks").iterdir():
        path.write_bytes(b"no picture")
    ended = command("train", *given[:-1], "on_bad_image=skip")
    assert (ended.code, "none of the 6 pseudo masks" in ended.err) == (2, True)


# --- encoders and decoders of segmentation-models-pytorch -------------------------------------------------------------


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch", None)
    with pytest.raises(InputError, match=r"not installed: pip install 'wsss\[seg\]', or set method.decoder=large_fov"):
        Segmentation(3, decoder="unet", backbone="tu-resnet10t")


@pytest.fixture
def smp() -> Any:
    return pytest.importorskip("segmentation_models_pytorch")


@pytest.mark.parametrize("decoder", ["unet", "deeplabv3plus"])
def test_any_size(smp: Any, decoder: str) -> None:
    stage = Segmentation(3, decoder=decoder, backbone="tu-resnet10t").eval()
    assert stage(torch.zeros(1, 3, 45, 70))["seg"].shape == (1, 4, 45, 70)
    assert set(stage.network.encoder.parameters()) < set(stage.parameters())


def test_weights_of_an_encoder(smp: Any, tmp_path: Path) -> None:
    import timm

    network = timm.create_model("resnet10t")
    torch.save(network.state_dict(), tmp_path / "x.pth")
    stage = Segmentation(3, decoder="unet", backbone="tu-resnet10t", weights=str(tmp_path / "x.pth"))
    ours = dict(stage.network.encoder.model.named_parameters())
    theirs = {n: p for n, p in network.named_parameters() if not n.startswith("fc.")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())
    assert len(stage.loaded) == 1
    assert str(tmp_path / "x.pth") in stage.loaded[0]
    assert stage.mean == tuple(network.pretrained_cfg["mean"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"decoder": "nope"}, "nope"),
        ({"backbone": "tu-nope"}, "nope"),
        ({"backbone": "nope"}, "nope"),
        ({"decoder_args": {"heads": 3}}, "heads"),
        ({"backbone": "resnet18", "weights": "imagenet"}, "take tu-resnet18"),
        ({"weights": "/missing.pth"}, "does not exist"),
    ],
)
def test_what_the_package_does_not_know(smp: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Segmentation(3, **{"decoder": "unet", "backbone": "tu-resnet10t"} | arguments)


def test_every_layer_of_an_encoder_needs_weights(tmp_path: Path) -> None:
    encoder = torch.nn.Sequential(torch.nn.Linear(2, 2))
    torch.save({"0.weight": torch.ones(2, 2), "fc.weight": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"does not fit the encoder own: it lacks 0\.bias"):
        load_encoder(encoder, "own", str(tmp_path / "x.pth"))

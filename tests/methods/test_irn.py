"""IRN as a stage: what it learns from masks, what its walk gives label-making, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from wsss import InputError
from wsss.data.datamodule import DataModule
from wsss.data.pseudo import PseudoMasks
from wsss.data.shapes import Shapes
from wsss.data.transforms import ScaleCrop
from wsss.methods.cam import CAM
from wsss.methods.irn import IRN

pytestmark = pytest.mark.filterwarnings("ignore:.*starts from random weights")

SLIM: dict[str, Any] = {"width": 4, "dropout": [0.0, 0.0], "frozen_stages": 0, "batch_norm_momentum": 0.1}
SMALL: dict[str, Any] = {"affinity": {"weight": 1.0, "radius": 3}, "displacement": {"weight": 1.0, "radius": 3}}


def method(**arguments: Any) -> IRN:
    torch.manual_seed(0)
    values = {"num_classes": 3, "backbone": "resnet38", "backbone_args": SLIM, "losses": SMALL, "least_side": 32}
    return IRN(**(values | arguments))


def test_training_finds_boundaries(tmp_path: Path) -> None:
    shapes = Shapes(train_size=8, size=64, num_classes=3)
    for index, image_id in enumerate(shapes.ids):
        Image.fromarray(shapes.mask(index)).save(tmp_path / f"{image_id}.png")
    data = DataModule(PseudoMasks(shapes, str(tmp_path)), transform=ScaleCrop(64, (1.0, 1.0)), batch_size=8)
    data.num_workers = 0
    stage = method(momentum=0.9, lr=0.5, displacement_lr_factor=1.0)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=40, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        stage.log, stage.log_dict = (lambda *_, **__: None,) * 2  # type: ignore[assignment]
        before = stage.training_step(batch, 0)["terms"]
        del stage.log, stage.log_dict
    trainer.fit(stage, data)
    for key in ("affinity", "displacement"):
        assert trainer.callback_metrics[f"train/loss_{key}"] < 0.9 * before[key], key
    assert stage.figures(has_masks=True) == []
    assert stage.network.displacement.mean.abs().sum() > 0


@pytest.mark.parametrize("size", [(64, 80), (61, 83), (16, 16), (5, 3)])
def test_walk_of_any_size(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    image, cam = 255 * torch.rand(3, *size), torch.rand(2, *size)
    refined = method().eval().walk(image, cam, logt=2, instances=True)
    assert refined.mask.shape == size
    assert refined.mask.max() <= 2
    assert refined.instances is not None
    numbers, classes, scores = refined.instances
    assert numbers.shape == size
    assert int(numbers.max()) == len(classes) == len(scores)
    assert scores == sorted(scores, reverse=True)
    field = method().eval()(image[None])
    assert [tuple(field[key].shape) for key in ("edge", "displacement")] == [
        (1, channels, *(-(-side // 4) for side in size)) for channels in (1, 2)
    ]


def test_maps_of_nothing_are_background() -> None:
    refined = method().eval().walk(255 * torch.rand(3, 40, 40), torch.zeros(1, 40, 40), instances=True)
    assert not refined.mask.any()
    assert refined.instances is not None
    assert refined.instances.classes == []


def test_a_mirror_image_has_mirrored_boundaries() -> None:
    torch.manual_seed(1)
    stage, image = method().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain, mirrored = (stage(x)["edge"] for x in (image, image.flip(-1)))
    torch.testing.assert_close(mirrored.flip(-1), plain)


def test_starting_from_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(3)
    classifier = CAM(3, backbone_args=SLIM)
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "cam.ckpt")
    stage = method(init_checkpoint=str(tmp_path / "cam.ckpt"))
    for name, tensor in classifier.backbone.state_dict().items():
        assert torch.equal(tensor, stage.network.backbone.state_dict()[name]), name


def test_rates_of_the_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IRN, "total_steps", 10)
    stage = method()
    configured: Any = stage.configure_optimizers()
    groups = configured["optimizer"].param_groups
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in groups] == [(0.1, 1e-4, 1e-4), (1.0, 1e-4, 1e-4)]
    learnt = {id(p) for p in stage.parameters() if p.requires_grad}
    assert {id(p) for group in groups for p in group["params"]} == learnt
    configured["optimizer"].step()
    configured["lr_scheduler"]["scheduler"].step()
    assert groups[1]["lr"] == pytest.approx(0.9**0.9)


def test_masks_alone_need_no_displacement() -> None:
    stage = method(losses={"affinity": {"radius": 3}, "displacement": None})
    assert not any(p.requires_grad for p in stage.network.displacement.parameters())
    with pytest.raises(InputError, match="was trained without"):
        stage.walk(torch.rand(3, 32, 32), torch.rand(1, 32, 32), instances=True)


def test_refusals() -> None:
    for radius in (1, 2.5, "x", None):
        with pytest.raises(
            InputError, match=r"losses\.displacement\.radius is .*: expected a whole number of at least"
        ):
            method(losses={"displacement": {"radius": radius}})
    batch = {"image": torch.randn(1, 3, 16, 16), "pseudo_mask": torch.zeros(1, 16, 16, dtype=torch.long)}
    with pytest.raises(InputError, match=r"4 x 4 cells .* radius 3: set transform\.crop_size to at least 20"):
        method().training_step(batch, 0)
    for given in ({"radius": 1}, {"beta": 0.0}, {"logt": 17}):
        with pytest.raises(InputError, match="expected a radius of at least 2, beta above 0, logt 0 to 16"):
            method().walk(torch.rand(3, 32, 32), torch.rand(1, 32, 32), **given)
    with pytest.warns(UserWarning, match="resnet38 starts from random weights, and it does not learn"):
        method()

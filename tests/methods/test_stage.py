"""A stage that is no CAM method: trained on pixels in a plain Trainer, written, and restored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn

from wsss import InputError
from wsss.data.datamodule import DataModule
from wsss.data.pseudo import PseudoMasks
from wsss.data.shapes import Shapes
from wsss.data.transforms import FlipCrop
from wsss.evaluation.protocol import Measured, Protocol
from wsss.methods.cam import CAM
from wsss.methods.stage import Stage


class Pixels(Stage):
    """The smallest network that learns from pseudo masks."""

    def __init__(self, num_classes: int, classes: Any = None, losses: Any = None, lr: float = 0.1) -> None:
        super().__init__(num_classes, classes, losses or {"seg": {"weight": 2.0}}, ("seg",))
        self.save_hyperparameters()
        self.network = nn.Conv2d(3, 1 + num_classes, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"seg": self.network(image)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        seg = self(batch["image"])["seg"]
        return self.combine({"seg": self.losses["seg"](seg, batch["pseudo_mask"])}, self.loss_weights)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.hparams.lr)


@pytest.fixture
def data(tmp_path: Path) -> DataModule:
    shapes = Shapes(train_size=4, size=32, num_classes=3)
    for index, image_id in enumerate(shapes.ids):
        Image.fromarray(shapes.mask(index)).save(tmp_path / f"{image_id}.png")
    return DataModule(PseudoMasks(shapes, str(tmp_path)), transform=FlipCrop(32, (1, 1)), num_workers=0)


def test_trained_written_and_restored(data: DataModule, tmp_path: Path) -> None:
    stage = Pixels(data.num_classes, data.classes)
    trainer = pl.Trainer(max_steps=40, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    before = stage.network.bias.clone()
    trainer.fit(stage, data)
    assert not torch.equal(stage.network.bias, before)
    assert stage.total_steps == 40
    assert trainer.callback_metrics["train/loss"] == pytest.approx(2 * trainer.callback_metrics["train/loss_seg"])
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert checkpoint["wsss"]["classes"] == list(data.classes)
    again = Pixels(**checkpoint["hyper_parameters"])
    again.load_state_dict(checkpoint["state_dict"])
    image = torch.rand(2, 3, 8, 8)
    seg = stage(image)["seg"]
    assert torch.equal(seg, again(image)["seg"])
    # inference under a protocol is every stage's
    assert torch.equal(stage.segment(image, (8, 8), seg), seg)
    assert torch.equal(stage.infer(image)["seg"], seg)
    stage.protocol = Protocol(softmax="before")
    assert torch.equal(stage.segment(image, (8, 8), seg), seg.softmax(1))
    # several steps of one pass are those of each protocol
    stage.protocol = Protocol(extras={"scales": [1.0, 0.5], "flip": "sum", "crf": {"iterations": 2}})
    steps = stage.segment_steps(image, (8, 8), seg, torch.ones(len(image), 2))
    for name, protocol in stage.protocol.steps().items():
        stage.protocol = protocol
        assert torch.equal(stage.segment(image, (8, 8), seg), steps[name])
    # through windows, also at a single scale
    stage.protocol = Protocol(window=4, stride=4)
    parts = [[stage(image[..., y : y + 4, x : x + 4])["seg"] for x in (0, 4)] for y in (0, 4)]
    expected = torch.cat([torch.cat(row, dim=-1) for row in parts], dim=-2)
    torch.testing.assert_close(stage.segment(image, (8, 8), seg), expected)
    stage.protocol = Protocol(softmax="before")
    stage.without_background()
    assert (stage.segment(image, (8, 8), seg).argmax(1) > 0).all()


def test_without_figures() -> None:
    stage = Pixels(3)
    assert stage.figures(has_masks=True) == []
    assert stage.describe("val") == {}
    stage.started_from = ["timm weights a.in21k"]  # of the network that has made its masks
    assert stage.measured_on("val") == Measured("val", ("ImageNet-21k",), "last")
    checkpoint: dict[str, Any] = {}
    stage.on_save_checkpoint(checkpoint)
    assert checkpoint["wsss"]["loaded"] == stage.started_from
    assert stage.illustrate({"image": torch.zeros(1, 3, 8, 8)}) == {}


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"cls": {"weight": 1}}, "losses.cls: Pixels does not compute it, only seg"),
        ({"seg": 3}, "losses.seg is 3"),
        ({"seg": None}, "every term is null"),
        ({"seg": {"weight": "x"}}, "losses.seg"),
        ({"seg": {"heat": 1}}, "no argument heat"),
    ],
)
def test_bad_losses(losses: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Pixels(3, losses=losses)


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("cat", "dog"), "2 names for num_classes=255"),
        (None, "there are 255 classes, but a mask of 8 bits holds 254"),
        ((*map(str, range(254)), "background"), "255 classes"),
    ],
)
def test_bad_classes(classes: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Pixels(255, classes)
    assert len(Pixels(254).classes) == 254
    with pytest.raises(InputError, match="a class is called background"):
        Pixels(2, ("cat", "background"))


def test_ids_are_those_of_the_masks(data: DataModule) -> None:
    batch = next(iter(data.train_dataloader()))
    assert batch["pseudo_mask"].max() <= 3
    assert np.unique(batch["pseudo_mask"]).size > 1


def test_trained_after_an_evaluation(tmp_path: Path) -> None:
    data = DataModule(
        Shapes(train_size=4, size=32, num_classes=3),
        Shapes("val", val_size=2, size=32, num_classes=3),
        FlipCrop(32, (1, 1)),
        batch_size=2,
        num_workers=0,
    )
    method = CAM(3, data.classes, "resnet18", None, cam_scales=[1.0])
    options = {"logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=1, num_sanity_val_steps=1, **options)
    trainer.validate(method, data, verbose=False)  # in inference mode
    trainer.fit(method, data)
    trainer.validate(method, data, verbose=False)
    measured = method.metrics["cam_miou"].compute()  # stays until the next evaluation
    assert trainer.callback_metrics["val/cam_miou"].item() == pytest.approx(measured.item())

"""PSA's affinity network as a stage: what it learns from scores, what its walk gives label-making, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from wsss import InputError
from wsss.data.datamodule import DataModule
from wsss.data.pseudo import PseudoScores
from wsss.data.shapes import Shapes
from wsss.data.transforms import JitterCrop
from wsss.methods.affinity import Affinity
from wsss.methods.cam import CAM

SLIM: dict[str, Any] = {"width": 4, "dropout": [0.0, 0.0], "frozen_stages": 0, "batch_norm_momentum": 0.1}
SMALL: dict[str, Any] = {"affinity": {"weight": 1.0, "radius": 3}}


def method(**arguments: Any) -> Affinity:
    torch.manual_seed(0)
    return Affinity(**({"num_classes": 3, "backbone_args": SLIM, "losses": SMALL} | arguments))


def save_scores(shapes: Shapes, folder: Path) -> None:
    """What a CRF would say that knows the truth."""
    for index, image_id in enumerate(shapes.ids):
        mask = shapes.mask(index)
        ids = np.unique(mask[mask > 0]).astype(np.int64)
        scores = (mask == np.array([0, *ids])[:, None, None]).astype(np.float16)
        np.savez(folder / f"{image_id}.npz", low=scores, high=scores, ids=ids)


def test_training_separates_classes(tmp_path: Path) -> None:
    shapes = Shapes(train_size=8, size=64, num_classes=3)
    save_scores(shapes, tmp_path)
    data = DataModule(PseudoScores(shapes, str(tmp_path)), transform=JitterCrop(64), batch_size=8, num_workers=0)
    stage = method(lr=0.01, momentum=0.9)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=30, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    first = stage.network.head.f9.weight.clone()
    batch = next(iter(data.train_dataloader()))
    assert batch["affinity_label"].shape == (8, 8, 8)
    with torch.no_grad():
        before = stage.losses["affinity"](stage(batch["image"])["affinity"], batch["affinity_label"])
    trainer.fit(stage, data)
    assert not torch.equal(stage.network.head.f9.weight, first)
    assert trainer.callback_metrics["train/loss_affinity"] < 0.8 * before
    assert stage.figures(has_masks=True) == []


def inputs(size: tuple[int, int] = (64, 80), batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    label = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])[:batch]
    return torch.randn(batch, 3, *size), torch.rand(batch, 3, *size), label


@pytest.mark.parametrize("size", [(64, 80), (61, 83), (16, 16), (5, 3)])
def test_walk_of_any_size(size: tuple[int, int]) -> None:
    image, cam, label = inputs(size, 3)
    scores = method(losses=None).eval().refine(image, cam, label, logt=2)
    assert scores.shape == (3, 4, *size)
    assert scores.isfinite().all()
    assert (scores[:, 1:].amax(dim=(-2, -1)) > 0).float().equal(label)
    assert (scores[2].argmax(0) == 0).all()


def test_images_of_a_batch_are_apart() -> None:
    image, cam, label = inputs(batch=3)
    stage = method().eval()
    together = stage.refine(image, cam, label, background=0.4, logt=4)
    alone = [stage.refine(image[i : i + 1], cam[i : i + 1], label[i : i + 1], 0.4, logt=4) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_walk_without_steps_is_the_average_of_cells() -> None:
    image, cam, label = inputs((64, 64), 1)
    cam = cam[..., ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)
    cells = method().eval().refine(image, cam, label, background=0.3, beta=1e4, logt=0)[..., 1:, 3::8, 3::8]
    # with such an exponent no affinity is left but that of a cell with itself
    torch.testing.assert_close(cells[:, 0], cam[:, 0, 3::8, 3::8], rtol=0, atol=0.15)


def test_background_rules_and_no_background() -> None:
    image, cam, label = inputs()
    stage = method().eval()
    low, high = (stage.refine(image, cam, label, background=b).argmax(1) for b in (0.0, 1.0))
    assert (low > 0).all()
    assert (high == 0).all()
    weak, strong = (stage.refine(image, cam, label, alpha=a)[:, 0].mean() for a in (16, 1))
    assert weak < strong
    stage.without_background()
    assert (stage.refine(image, cam, label, background=1.0).argmax(1) > 0).all()


def test_starting_from_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(3)
    classifier = CAM(3, backbone_args=SLIM)
    said = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3], "loaded": ["timm weights a.in21k", 3]}
    torch.save({"state_dict": classifier.state_dict(), "wsss": said}, tmp_path / "cam.ckpt")
    stage = method(init_checkpoint=str(tmp_path / "cam.ckpt"))
    assert (stage.mean, stage.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert stage.told == ["timm weights a.in21k"]
    for name, tensor in classifier.backbone.state_dict().items():
        assert torch.equal(tensor, stage.network.backbone.state_dict()[name]), name
    torch.save({"state_dict": CAM(3, backbone_args=SLIM | {"width": 2}).state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"other.ckpt does not fit this network \(backbone\.\*\): it has other shapes"):
        method(init_checkpoint=str(tmp_path / "other.ckpt"))


def test_only_the_head_learns_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Affinity, "total_steps", 10)
    configured: Any = method().configure_optimizers()
    groups = configured["optimizer"].param_groups
    assert [round(g["lr"] / groups[0]["lr"]) for g in groups] == [1, 2, 10, 20]
    assert len(groups[2]["params"]) == 4


def test_refusals() -> None:
    for radius in (1, 2.5, "x", None):
        with pytest.raises(InputError, match=r"losses\.affinity\.radius is .*: expected a whole number of at least 2"):
            method(losses={"affinity": {"radius": radius}})
    batch = {"image": torch.randn(1, 3, 32, 32), "affinity_label": torch.zeros(1, 4, 4, dtype=torch.long)}
    with pytest.raises(InputError, match=r"4 x 4 cells .*\.radius=3: set transform\.crop_size to at least 40"):
        method().training_step(batch, 0)

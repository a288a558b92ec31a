"""CAM, SEAM, PPC and RCM-MAM: training steps, what learns, inference, edge cases and refusals."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from wsss import InputError
from wsss.config import build, config_dir
from wsss.methods.base import WSSSModule
from wsss.methods.rcm_mam import RCMMAM

SLIM = {"width": 4, "frozen_stages": 0, "batch_norm_momentum": 0.1}
METHODS = ("cam", "seam", "ppc", "rcm_mam")


def method(name: str, num_classes: int = 3, **arguments: Any) -> Any:
    """From its own configuration, slim."""
    torch.manual_seed(0)
    node: Any = OmegaConf.load(config_dir() / "method" / f"{name}.yaml")
    node.backbone_args = arguments.pop("backbone_args", SLIM)
    small: dict[str, Any] = {"ppc": {"view_size": 32}, "rcm_mam": {"features": 8}}.get(name, {})
    node = OmegaConf.merge(node, OmegaConf.create(small | arguments))
    built = build(node, "method", num_classes=num_classes, classes=None)
    built.log = built.log_dict = lambda *args, **kwargs: None
    return built


def batch(images: int = 2, num_classes: int = 3) -> dict[str, Any]:
    torch.manual_seed(1)
    label = torch.zeros(images, num_classes)
    label[0, 0] = 1  # the others have no label
    return {"image": torch.randn(images, 3, 48, 48), "label": label}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("images", "num_classes"), [(2, 3), (2, 1), (3, 30)])
def test_training_step_is_finite(name: str, images: int, num_classes: int) -> None:
    module = method(name, num_classes).train()
    result = module.training_step(batch(images, num_classes), 0)
    assert set(result["terms"]) == set(module.losses)
    result["loss"].backward()
    assert all(p.grad.isfinite().all() for p in module.parameters() if p.grad is not None)
    assert torch.isfinite(result["loss"])


@pytest.mark.parametrize("name", METHODS)
def test_no_image_has_a_label(name: str) -> None:
    given = batch()
    given["label"].zero_()
    result = method(name).train().training_step(given, 0)
    assert all(term.isfinite() for term in result["terms"].values())


@pytest.mark.parametrize("name", METHODS)
def test_maps_that_are_zero_everywhere(name: str) -> None:
    module = method(name).eval()
    for layer in ("fc8", "fc9"):
        for where in (module, getattr(module, "head", None), getattr(module, "main", None)):
            if getattr(where, layer, None) is not None:
                torch.nn.init.zeros_(getattr(where, layer).weight)
    with torch.no_grad():
        output = module.infer(batch()["image"])
    assert output["cam"].isfinite().all()
    assert output["cam"].max() <= 0
    step = module.train().training_step(batch(), 0)
    assert all(term.isfinite() for term in step["terms"].values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [(48, 48), (41, 70)])
def test_inference_at_any_size(name: str, size: tuple[int, int]) -> None:
    module = method(name).eval()
    output = module.infer(torch.randn(2, 3, *size))
    assert output["cam"].shape == (2, 3, *size)
    assert output["logits"].shape == (2, 3)
    assert output["seg"] is None
    assert output["cam"].max() <= 1


@pytest.mark.parametrize("prototypes", ["mean", "loo", "memory"])
def test_a_single_image(prototypes: str) -> None:
    module = method("rcm_mam", prototypes=prototypes).eval()  # batch norm needs more than one value a channel
    result = module.training_step(batch(1), 0)
    assert torch.isfinite(result["loss"])


def test_support_network_is_the_average_of_the_main_network(tmp_path: Path) -> None:
    module: RCMMAM = method("rcm_mam", ema_momentum=0.75, momentum=0.9)
    del module.log, module.log_dict  # type: ignore[attr-defined]
    before = {name: tensor.clone() for name, tensor in module.support.state_dict().items()}
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader([batch()], batch_size=None))  # type: ignore[arg-type]
    main, support = module.main.state_dict(), module.support.state_dict()
    moved = 0
    for name, tensor in support.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * main[name], msg=name)
            moved += not torch.equal(tensor, before[name])
    assert moved > 100
    assert any("running_mean" in name and not torch.equal(support[name], before[name]) for name in support)
    assert not any(p.requires_grad for p in module.support.parameters())
    assert not any(layer.training for layer in module.support.modules())
    groups = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in groups} == {id(p) for p in module.main.parameters()}


def test_stages_start_at_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    module = method("rcm_mam", rcm_start=2, mam_start=3).eval()
    for step, keys in ((0, {"cls"}), (1, {"cls"}), (2, {"cls", "rcm"}), (3, {"cls", "rcm", "mam"})):
        monkeypatch.setattr(RCMMAM, "global_step", step)
        assert set(module.training_step(batch(), 0)["terms"]) == keys


def test_starting_from_a_checkpoint(tmp_path: Path) -> None:
    first = method("rcm_mam")
    torch.nn.init.ones_(first.main.fc9.weight)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "first.ckpt")
    second = method("rcm_mam", init_checkpoint=str(tmp_path / "first.ckpt"))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    torch.save({"state_dict": method("cam").state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"other.ckpt does not fit this network \(main\.\*\): it lacks"):
        method("rcm_mam", init_checkpoint=str(tmp_path / "other.ckpt"))


def test_gradients_of_the_pixel_correlation_stay_in_its_layers() -> None:
    """`ecr` and `rvmin` train the revised CAM, whose input is constant."""
    keys = ("cls", "rvmin", "er", "ecr")
    for key, learning in (("ecr", {"f8_3", "f8_4", "f9"}), ("er", {"fc8"}), ("cls", {"fc8"})):
        module = method("seam", losses={k: {"weight": 1.0} if k == key else None for k in keys}).train()
        module.training_step(batch(), 0)["loss"].backward()
        found = {n.split(".")[0] for n, p in module.head.named_parameters() if p.grad is not None and p.grad.any()}
        assert found == learning, key
        assert (module.backbone.conv1a.weight.grad is None) == (key == "ecr")


def test_any_network_of_timm() -> None:
    module = method("cam", num_classes=2, backbone="resnet18", backbone_args={"output_stride": 16}).eval()
    assert isinstance(module, WSSSModule)
    assert module(torch.randn(1, 3, 64, 64))["cam"].shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("seam", {"backbone": "resnet50"}, "the pixel correlation module needs resnet38"),
        ("seam", {"losses": {"ppc": {"weight": 1.0}}}, "losses.ppc: SEAM does not compute it"),
        ("rcm_mam", {"prototypes": "median"}, "prototypes is 'median': expected one of mean, loo, memory"),
        ("rcm_mam", {"main_scales": [0.5]}, "main_scales is [0.5]: expected positive factors with 1 among them"),
        ("rcm_mam", {"mam_fraction": 2.0}, "mam_fraction is 2.0: expected 0 to 1"),
        ("cam", {"backbone": "vit_tiny_patch16_224", "backbone_args": None}, "gives no maps of features"),
        ("cam", {"backbone": "nothing"}, "unknown backbone 'nothing'"),
        ("cam", {"backbone_args": {"depth": 3}}, "backbone_args.depth: resnet38 takes width, dropout"),
    ],
    ids=str,
)
def test_refusals(name: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        method(name, **arguments)
    assert said in str(refused.value)

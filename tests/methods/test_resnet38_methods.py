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
from wsss.methods.cam import CAM
from wsss.methods.frozen_cam import FrozenCAM
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


LITE: dict[str, Any] = {"backbone": "resnet10t", "backbone_args": {"output_stride": 16}}


def frozen_checkpoint(path: Path, **arguments: Any) -> FrozenCAM:
    """A classifier on frozen features, and its file as a training leaves it."""
    torch.manual_seed(2)
    first = FrozenCAM(
        3, ("ant", "bee", "cow"), "resnet10t", None, LITE["backbone_args"], 64, propagation=None, **arguments
    )
    for tensor in first.frozen.buffers():
        tensor.copy_(torch.rand_like(tensor, dtype=torch.float) + 0.5)  # as statistics of weights are
    torch.save({"state_dict": first.state_dict(), "wsss": {"classes": list(first.classes), "mean": [0.5] * 3}}, path)
    return first


def named(name: str, **arguments: Any) -> Any:
    node: Any = OmegaConf.load(config_dir() / "method" / f"{name}.yaml")
    node.backbone_args = None  # rcm_mam has one for ResNet38
    node = OmegaConf.merge(node, OmegaConf.create({**LITE, **arguments}))
    return build(node, "method", num_classes=3, classes=("ant", "bee", "cow"))


@pytest.mark.parametrize(("name", "hidden"), [("cam", None), ("rcm_mam", 8)])
def test_starting_from_a_frozen_classifier(tmp_path: Path, name: str, hidden: int | None) -> None:
    """Its maps, but for the biases, are those that the training begins with, and the images are normalised alike."""
    path = tmp_path / "frozen.ckpt"
    first = frozen_checkpoint(path, hidden=hidden).eval()
    for parameter_name, parameter in first.classifier.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    features: dict[str, Any] = {} if hidden is None else {"features": hidden}
    second = named(name, init_checkpoint=str(path), freeze_norm=True, **features)
    assert second.mean == (0.5, 0.5, 0.5)
    image = torch.randn(2, 3, 64, 96)
    expected = first(image)
    for mode in (False, True):  # dropout of the features alone tells training from evaluation
        second.train(mode)
        if name == "cam":
            second.dropout.eval()
        output = second(image)
        torch.testing.assert_close(output["logits"], expected["logits"])
        torch.testing.assert_close(output["cam"].relu(), expected["cam"])
    if name == "rcm_mam":
        for main, support in zip(second.main.parameters(), second.support.parameters(), strict=True):
            assert torch.equal(main, support)


def test_starting_a_classifier_from_its_own_checkpoint(tmp_path: Path) -> None:
    first = named("cam")
    torch.save({"state_dict": first.state_dict()}, tmp_path / "first.ckpt")
    second = named("cam", init_checkpoint=str(tmp_path / "first.ckpt"))
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("cam", {"hidden": 8}, "has unknown classifier.2.weight (1 in all) and has other shapes for fc8.weight"),
        ("cam", {"hidden": 8}, "give one of method=cam, or of frozen_cam with this backbone and method.hidden=null"),
        ("rcm_mam", {}, "does not fit this network (main.*): it lacks fc9.weight (1 in all) and has other shapes for"),
        ("rcm_mam", {}, "frozen_cam with this backbone and method.hidden=256"),
        ("rcm_mam", {"hidden": 8}, "has other shapes for fc8.weight, fc9.weight (2 in all)"),
    ],
    ids=str,
)
def test_other_checkpoints_are_refused(tmp_path: Path, name: str, arguments: dict[str, Any], said: str) -> None:
    path = tmp_path / "frozen.ckpt"
    frozen_checkpoint(path, **arguments)
    with pytest.raises(InputError) as refused:
        named(name, init_checkpoint=str(path))
    assert said in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_checkpoint_of_other_classes_is_refused(tmp_path: Path) -> None:
    frozen_checkpoint(tmp_path / "frozen.ckpt")
    with pytest.raises(InputError, match=r"knows the classes ant, bee, cow, but the data have bee, ant, cow"):
        CAM(3, ("bee", "ant", "cow"), **LITE, init_checkpoint=str(tmp_path / "frozen.ckpt"))


@pytest.mark.parametrize("network", [LITE, {"backbone": "resnet38", "backbone_args": SLIM}], ids=["timm", "resnet38"])
@pytest.mark.parametrize("name", ["cam", "rcm_mam"])
def test_frozen_batch_norms(name: str, network: dict[str, Any], tmp_path: Path) -> None:
    """A step changes every convolution, but nothing of a batch norm, and the optimizer does not know them."""
    module = named(name, freeze_norm=True, momentum=0.9, **network).train()
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    main = getattr(module, "main", module)
    own = {id(p) for norm in norms for p in norm.parameters()}
    before = {key: tensor.clone() for key, tensor in main.state_dict().items()}
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
    known = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert known == {id(p) for p in main.parameters()} - own
    moved = {key for key, tensor in main.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == {key for key, p in main.named_parameters() if id(p) not in own}
    assert not named(name, **network).train().state_dict().keys() ^ module.state_dict().keys()
    if name == "cam":
        weights, biases, head, _ = trainer.optimizers[0].param_groups
        assert [id(p) for p in head["params"]] == [id(module.fc8.weight)]
        assert (head["initial_lr"], weights["initial_lr"], biases["params"]) == (0.1, 0.01, [])


def test_arguments_of_resnet38_do_not_fit_others() -> None:
    for name in ("cam", "rcm_mam"):
        with pytest.raises(InputError, match=r"resnet10t does not take the backbone_args width, .*args=null"):
            method(name, backbone="resnet10t")
    with pytest.raises(InputError, match=r"does not fit resnet10t: .*'nonsense'"):
        method("cam", backbone="resnet10t", backbone_args={"nonsense": 1})


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


@pytest.mark.parametrize("name", ["seam", "rcm_mam"])
def test_maps_of_the_classes_that_are_there(name: str) -> None:
    found = []
    for more in ({}, {"max_labels": 1}):
        module = method(name, 5, backbone_args={"width": 4}).eval()
        result = module.training_step(batch(num_classes=5) | more, 0)
        result["loss"].backward()
        found.append((result["terms"], [p.grad for p in module.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_one_beginning_for_both_networks(frozen: int) -> None:
    """Stages that do not learn run once where they are the same, without a change of the numbers."""
    found = []
    for one in (True, False):
        module: RCMMAM = method("rcm_mam", backbone_args={"width": 4, "frozen_stages": frozen}).train()
        assert module.one_beginning
        module.one_beginning = one
        torch.manual_seed(2)
        result = module.training_step(batch(), 0)
        result["loss"].backward()
        found.append((result["terms"], [p.grad for p in module.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-8)
    state = module.state_dict()
    state["support.backbone.body.b2.conv_branch2a.weight"] = state["support.backbone.body.b2.conv_branch2a.weight"] + 1
    module.load_state_dict(state)
    assert module.one_beginning == (frozen < 2)

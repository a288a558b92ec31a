"""Training steps and commands on a GPU; skipped where torch finds none."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kill import settings
from tiny import COSA, METHOD, OVERRIDES, WECLIP, call

from tests.benchmarks.cases import method_of, on_device, optimizer_of, training_batch
from wsss.losses.ppc import PixelPrototypeContrastLoss
from wsss.methods.toco import ToCo
from wsss.refine import par
from wsss.refine.par import PAR

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

MCT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "attention_layers": 2,
}
SLIM: dict[str, Any] = {"backbone_args": {"width": 4}}
PAIRS = {"affinity": {"radius": 2}, "displacement": {"radius": 3}}
METHODS: dict[str, dict[str, Any]] = {
    "toco": METHOD,
    "cosa": COSA,
    "mctformer": MCT,
    "mctformer_v1": MCT,
    "mctformer_plus": MCT,
    "weaktr": MCT | {"fusion": {"reduction": 2, "feature_reduction": 4}},
    "weclip": WECLIP,
    **dict.fromkeys(("cam", "seam", "ppc", "rcm_mam", "segmentation"), SLIM),
    "affinity": SLIM | {"losses": {"affinity": {"radius": 2}}},
    "irn": SLIM | {"backbone": "resnet38", "losses": PAIRS, "least_side": 32},
}


def prepared(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    method = method_of(name, num_classes=4, **METHODS[name])
    return method, training_batch(method, 2, max(32, method.smallest_side))


@pytest.fixture
def same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generators of host and device draw different numbers: nothing is dropped, and the host draws all others."""
    for name in ("dropout", "dropout2d"):
        monkeypatch.setattr(torch.nn.functional, name, lambda values, *args, **kwargs: values)
    for name in ("rand", "randperm"):
        proper = getattr(torch, name)
        drawn = lambda *shape, device=None, proper=proper, **kwargs: proper(*shape, **kwargs).to(device)  # noqa: E731
        monkeypatch.setattr(torch, name, drawn)
    proper_top = PixelPrototypeContrastLoss.top_pixels  # of equal scores, those of the background, any may be taken
    monkeypatch.setattr(
        PixelPrototypeContrastLoss, "top_pixels", lambda self, scores: proper_top(self, scores.cpu()).to(scores.device)
    )


SINGLE = ("irn", "affinity")
"""Whose losses are in single precision."""
ALL_BUT_WECLIP = [name for name in METHODS if name != "weclip"]


# WeCLIP's frozen tower is in single precision, and 1e-7 of an image turns pixels of what so small a one labels
@pytest.mark.parametrize("name", ALL_BUT_WECLIP)
@pytest.mark.usefixtures("same_numbers")
def test_loss_and_gradients_are_those_of_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision, so that neither rounding nor what it decides hides anything."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    method, batch = prepared(name)
    if name not in SINGLE:
        method = method.double()
        batch = {
            key: view.double() if isinstance(view, torch.Tensor) and view.is_floating_point() else view
            for key, view in batch.items()
        }
    results = []
    for module, views in ((copy.deepcopy(method).cuda(), on_device(batch, "cuda")), (method, batch)):
        torch.manual_seed(0)
        loss = module.training_step(views, 0)["loss"]
        loss.backward()
        results.append((loss.detach(), {key: p.grad for key, p in module.named_parameters() if p.grad is not None}))
    (found, gradients), (loss, expected) = results
    torch.testing.assert_close(found.cpu(), loss, atol=1e-6, rtol=2e-4 if name in SINGLE else 1e-5)
    assert gradients.keys() == expected.keys()
    least = (1e-3 if name in SINGLE else 1e-5) * max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(
            gradients[key].cpu(), gradient, atol=least, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", ALL_BUT_WECLIP)  # which looks for boxes in its CAMs on the host
def test_a_step_never_waits_for_the_device(name: str) -> None:
    method, batch = prepared(name)
    method.cuda()
    batch, optimizer = on_device(batch, "cuda"), optimizer_of(method)

    def step() -> None:
        optimizer.zero_grad()
        method.training_step(batch, 0)["loss"].backward()
        optimizer.step()

    step()  # constants of the first step may be copied
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_commands(tmp_path: Path) -> None:
    """What is trained on the device evaluates there as on the host."""
    gpu = [*OVERRIDES, "trainer.accelerator=gpu", "trainer.devices=1"]
    assert call("train", *gpu, f"hydra.run.dir={tmp_path / 'run'}") == 0
    checkpoint = f"checkpoint={tmp_path / 'run/checkpoints/last.ckpt'}"
    figures = {}
    for where in ("gpu", "cpu"):
        assert call("eval", checkpoint, f"hydra.run.dir={tmp_path / where}", f"trainer.accelerator={where}") == 0
        figures[where] = json.loads((tmp_path / where / "metrics.json").read_text())
    for key, value in figures["cpu"].items():
        if key.startswith("val/") and isinstance(value, float):
            assert figures["gpu"][key] == pytest.approx(value, abs=5e-3, nan_ok=True), key


def test_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was interrupted ends as one that was not, up to the order in which the device adds."""
    gpu = [o for o in settings("toco", steps=6, workers=0) if not o.startswith("trainer.accelerator")]
    gpu += ["trainer.accelerator=gpu", "trainer.devices=1", "trainer.enable_progress_bar=false"]
    assert call("train", *gpu, f"hydra.run.dir={tmp_path / 'whole'}") == 0
    proper = ToCo.training_step

    def failing(self: ToCo, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        if self.global_step == 3:
            raise KeyboardInterrupt
        return proper(self, batch, batch_idx)

    monkeypatch.setattr(ToCo, "training_step", failing)
    assert call("train", *gpu, f"hydra.run.dir={tmp_path / 'resumed'}") != 0
    monkeypatch.undo()
    assert call("train", *gpu, f"hydra.run.dir={tmp_path / 'resumed'}", "resume=auto") == 0
    one, other = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
        for run in ("whole", "resumed")
    )
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_par(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels, with sides that no block of theirs divides, and the operations they stand for."""
    torch.manual_seed(0)
    refine = PAR().cuda()
    image, masks = torch.rand(2, 3, 83, 131, device="cuda"), torch.rand(2, 7, 40, 60, device="cuda")
    image[0, :, :40] = 0.5  # without any differences
    found = refine(image, masks)
    expected = copy.deepcopy(refine).double()(image.double(), masks.double())
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)
    monkeypatch.setattr(par, "TRITON", False)
    torch.testing.assert_close(refine(image, masks), found, atol=2e-5, rtol=1e-5)

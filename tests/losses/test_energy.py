"""The dense energy loss against the recorded values and gradients of the original one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from wsss.losses.energy import DenseEnergyLoss

GOLDEN = Path(__file__).parents[1] / "golden" / "toco" / "losses.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files if k.startswith("reg")}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    arrays["image"] = (arrays["reg_img"] * std.view(3, 1, 1) + mean.view(3, 1, 1)) * 255
    return arrays


def value_and_gradient(
    loss: DenseEnergyLoss, image: Tensor, logits: Tensor, label: Tensor, box: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(image, logits, label, box)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def arguments(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return golden["image"], golden["reg_logit"], golden["reg_label"], golden["reg_box"]


@pytest.mark.parametrize(
    ("name", "options", "atol"), [("reg", {}, 1e-12), ("reg1", {"strength": 1.0, "scale": 1.0}, 1e-5)]
)
def test_matches_recorded_value_and_gradient(
    golden: dict[str, Tensor], name: str, options: dict[str, float], atol: float
) -> None:
    value, gradient = value_and_gradient(DenseEnergyLoss(**options), *arguments(golden))
    assert value.shape == ()
    torch.testing.assert_close(value, golden[f"{name}_loss"][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, golden[f"{name}_grad"], rtol=1e-4, atol=atol)


def test_batch_is_the_mean_of_its_images(golden: dict[str, Tensor]) -> None:
    loss = DenseEnergyLoss()
    value, gradient = value_and_gradient(loss, *arguments(golden))
    alone = [value_and_gradient(loss, *(x[i : i + 1] for x in arguments(golden))) for i in range(2)]
    torch.testing.assert_close(value, (alone[0][0] + alone[1][0]) / 2)
    torch.testing.assert_close(gradient, torch.cat([alone[0][1], alone[1][1]]) / 2, rtol=1e-4, atol=1e-13)


def test_no_box_is_the_whole_image(golden: dict[str, Tensor]) -> None:
    image, logits, label, _ = arguments(golden)
    whole = torch.tensor([[0, 48, 0, 64]] * 2)
    loss = DenseEnergyLoss()
    assert torch.equal(loss(image, logits, label), loss(image, logits, label, whole))


def test_empty_box_gives_zero_and_no_gradient(golden: dict[str, Tensor]) -> None:
    image, logits, label, _ = arguments(golden)
    value, gradient = value_and_gradient(DenseEnergyLoss(), image, logits, label, torch.zeros(2, 4, dtype=torch.long))
    assert value == 0
    assert not gradient.any()


def test_padding_receives_no_gradient(golden: dict[str, Tensor]) -> None:
    image, logits, label, _ = arguments(golden)
    box = torch.tensor([[0, 48, 0, 64], [8, 40, 10, 60]])  # even: no half-size pixel straddles the border
    _, gradient = value_and_gradient(DenseEnergyLoss(), image, logits, label, box)
    assert gradient[1, :, 8:40, 10:60].abs().amax(0).all()
    gradient[1, :, 8:40, 10:60] = 0
    assert not gradient[1].any()
    assert gradient[0].any()


def test_undecided_pixels_open_the_gate(golden: dict[str, Tensor]) -> None:
    image, logits, label, box = arguments(golden)
    confident = 100 * torch.nn.functional.one_hot(logits.argmax(1), 6).permute(0, 3, 1, 2).float()
    loss = DenseEnergyLoss(strength=1.0, scale=1.0)
    # Probabilities of exactly 1 close the gate, whatever the known label is.
    assert loss(image, confident, torch.zeros_like(label), box) == 0
    assert loss(image, confident, torch.full_like(label, 254), box) == 0
    undecided = loss(image, confident, torch.full_like(label, 255), box)
    assert undecided < 0
    renamed = DenseEnergyLoss(strength=1.0, scale=1.0, ignore_index=-1)
    assert torch.equal(renamed(image, confident, torch.full_like(label, -1), box), undecided)


def test_logits_of_another_size_are_resized_first(golden: dict[str, Tensor]) -> None:
    image, logits, label, box = arguments(golden)
    small = logits[..., ::16, ::16]
    large = torch.nn.functional.interpolate(small, size=(48, 64), mode="bilinear", align_corners=False)
    loss = DenseEnergyLoss()
    assert torch.equal(loss(image, small, label, box), loss(image, large, label, box))


def test_stays_in_float32_under_autocast(golden: dict[str, Tensor]) -> None:
    image, logits, label, box = arguments(golden)
    half = logits.bfloat16()
    loss = DenseEnergyLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, gradient = value_and_gradient(loss, image, half, label, box)
    assert value.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(value, loss(image, half.float(), label, box))

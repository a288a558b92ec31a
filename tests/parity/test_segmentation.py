"""The segmentation stage against recordings of MCTformer's: `--golden DIR`/mctformer/seg.npz."""

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from wsss.config import config_dir
from wsss.data.pixels import Normalise
from wsss.data.transforms import ScaleCrop
from wsss.evaluation.protocol import Protocol
from wsss.methods.segmentation import Segmentation

pytestmark = pytest.mark.filterwarnings("ignore:ResNet38 starts from random weights", "ignore:You are trying to")

FILE = "mctformer/seg"
EXCEPTED = ((FILE, "fwd/in_u8 img/* gt/* train/step?/scale train/step?/flip_p train/step?/crop_uniforms", "input"),)


def recorded_weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights behind the recordings, a function of the name; none are stored."""
    noise = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if "bn" in name:
        of_norm = {"weight": 1 + 0.1 * noise, "running_var": 1 + 0.1 * np.abs(noise)}
        return of_norm.get(name.rpartition(".")[2], 0.1 * noise)
    if name.endswith(".bias"):
        return 0.1 * noise
    return noise * (0.5 if "conv_branch2b" in name else 1) / np.sqrt(np.prod(shape[1:]))


def official(name: str) -> str:
    return name.removeprefix("network.").removeprefix("encoder.body.")


def fill(method: Segmentation) -> Segmentation:
    for name, tensor in method.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            tensor.copy_(torch.from_numpy(recorded_weights(official(name), tuple(tensor.shape))))
    return method.eval()  # no dropout was recorded, and batch norms are frozen


@pytest.fixture(scope="session")
def method() -> Segmentation:
    recipe: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "recipe/segmentation_voc.yaml"))
    return fill(Segmentation(20, **recipe["method"]))


@pytest.fixture(scope="session")
def protocol() -> Protocol:
    values: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "protocol/large_fov.yaml"))
    return Protocol(**values)


def test_names_and_shapes(recordings: Any, match: Any, method: Segmentation) -> None:
    arrays = recordings(FILE)
    ours = {official(name): str(tuple(tensor.shape)) for name, tensor in method.state_dict().items()}
    assert ours == dict(zip(arrays["seg_keys"].tolist(), arrays["seg_shapes"].tolist(), strict=True))
    match(FILE, "seg_nparams", sum(p.numel() for p in method.parameters()))


@torch.no_grad()
def test_forward(recordings: Any, match: Any, method: Segmentation) -> None:
    match(FILE, "fwd/logits", method(recordings(FILE)["fwd/in_u8"].float() / 128 - 1)["seg"], atol=1e-4)


@torch.no_grad()
def test_inference(recordings: Any, match: Any, method: Segmentation, protocol: Protocol) -> None:
    image = Normalise(method.mean, method.std)(recordings(FILE)["img/2007_000032"].numpy())[None]
    size, seg = image.shape[-2:], method(image)["seg"]
    method.protocol = replace(protocol, crf=None)
    probability = method.segment(image, size, seg)[0]
    match(FILE, "infer/probs_max", probability, atol=2e-5)
    match(FILE, "infer/pred_crf_False", probability.argmax(0), share=0.002)
    method.protocol = protocol
    refined = method.segment(image, size, seg)[0]
    match(FILE, "infer/crf_prob_every2nd", refined[:, ::2, ::2], atol=1e-4)
    match(FILE, "infer/pred_crf_True", refined.argmax(0), share=0.002)


class Script:
    """Stands in for the generator: gives what was drawn when the batch was recorded."""

    def __init__(self, scale: float, draws: list[float]) -> None:
        self.scale, self.draws = scale, draws

    def uniform(self, low: float, high: float) -> float:
        assert low <= self.scale <= high
        return self.scale

    def random(self) -> float:
        return self.draws.pop(0)


@pytest.mark.parametrize("step", [0, 1])
def test_transform(recordings: Any, match: Any, step: int) -> None:
    arrays, prefix = recordings(FILE), f"train/step{step}"
    names, crops = arrays[f"{prefix}/names"].tolist(), arrays[f"{prefix}/crop_uniforms"].tolist()
    side = arrays[f"{prefix}/gt"].shape[-1]
    transform, normalise = ScaleCrop(side, padding=0), Normalise(Segmentation.mean, Segmentation.std)
    images, masks = [], []
    for name, flip in zip(names, arrays[f"{prefix}/flip_p"].tolist(), strict=True):
        views = {"image": arrays[f"img/{name}"].numpy(), "pseudo_mask": arrays[f"gt/{name}"].numpy()}
        draws: Any = Script(arrays[f"{prefix}/scale"].item(), [flip, *crops])
        cut = transform(views, draws)
        crops = draws.draws
        images.append(normalise(cut["image"]))
        masks.append(torch.from_numpy(cut["pseudo_mask"]))
    assert not crops
    match(FILE, f"{prefix}/images", torch.stack(images), atol=1e-5)
    match(FILE, f"{prefix}/gt", torch.stack(masks))


@pytest.fixture(scope="session")
def trained(recordings: Any, method: Segmentation) -> dict[str, Any]:
    """What the recorded steps leave; the method is given its weights back."""
    arrays = recordings(FILE)
    before = {official(name): tensor.clone() for name, tensor in method.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Segmentation, "total_steps", len(arrays["train/loss"]))
        configured: Any = method.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    losses, rates, squares = [], [], {}
    for step in range(len(arrays["train/loss"])):
        batch = {
            "image": arrays[f"train/step{step}/images"],
            "pseudo_mask": arrays[f"train/step{step}/gt"].long(),
        }
        optimizer.zero_grad()
        loss = method.training_step(batch, step)["loss"]
        loss.backward()
        losses.append(loss.item())
        rates.append(
            [group["lr"] for group in optimizer.param_groups]
            + [optimizer.param_groups[0][k] for k in ("momentum", "weight_decay")]
        )
        if step == 0:
            squares = {
                official(n): -1.0 if p.grad is None else p.grad.double().square().sum().item()
                for n, p in method.named_parameters()
            }
        optimizer.step()
        schedule.step()
    after = {official(name): tensor for name, tensor in method.state_dict().items()}
    moved = [(after[name] - before[name]).double() for name in arrays["train/delta_names"].tolist()]
    result = {
        "losses": losses,
        "rates": rates,
        "squares": squares,
        "l2": torch.stack([d.square().sum().sqrt() for d in moved]),
        "sum": torch.stack([d.sum() for d in moved]),
        "absolute": torch.stack([d.abs().sum() for d in moved]),
        "bias": after["fc8_seg_conv2.bias"].clone(),
    }
    fill(method).zero_grad()
    return result


def test_training(recordings: Any, match: Any, trained: dict[str, Any]) -> None:
    arrays = recordings(FILE)
    match(FILE, "train/loss", torch.tensor(trained["losses"], dtype=torch.double), atol=1e-5)
    match(FILE, "train/lr0_lr1_momentum_wd", torch.tensor(trained["rates"], dtype=torch.double), rtol=1e-9)
    for group in ("1x", "10x"):
        squares = [trained["squares"][name] for name in arrays[f"train/names_{group}"].tolist()]
        match(FILE, f"train/step0_gradsq_{group}", torch.tensor(squares, dtype=torch.double), rtol=1e-3)
    match(FILE, "train/delta_l2", trained["l2"], rtol=1e-3)
    match(FILE, "train/delta_sum", trained["sum"], rtol=1e-4, atol=1e-5 * trained["absolute"])
    match(FILE, "train/final_fc8_seg_conv2_bias", trained["bias"], atol=1e-6)

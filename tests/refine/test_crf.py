"""The dense CRF against the C++ code, on noise and, where they are, on real photographs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsss import InputError
from wsss.cam import resize
from wsss.refine.crf import dense_crf


def disagreement(image: torch.Tensor, probability: torch.Tensor) -> tuple[float, float]:
    """Share of pixels with another label, and the largest difference of a probability."""
    ours, theirs = (dense_crf(image, probability, backend=backend) for backend in ("torch", "pydensecrf"))
    return float((ours.argmax(1) != theirs.argmax(1)).double().mean()), float((ours - theirs).abs().max())


def guess(mask: np.ndarray, labels: int) -> torch.Tensor:
    """Coarse, unsure probabilities (1, labels, H, W) around a mask of ids."""
    generator = torch.Generator().manual_seed(0)
    hot = torch.nn.functional.one_hot(torch.from_numpy(mask).long().clamp(max=labels - 1), labels)
    coarse = resize(hot.permute(2, 0, 1)[None].float(), (24, 32))
    coarse = 3 * coarse + torch.randn(coarse.shape, generator=generator)
    return resize(coarse, mask.shape).softmax(1)


def test_backends_agree_on_a_drawing() -> None:
    pytest.importorskip("pydensecrf", reason="the extra crf is not installed")
    rng = np.random.default_rng(0)
    mask = np.zeros((40, 52), np.uint8)
    mask[8:30, 10:35] = 1
    image = torch.from_numpy(rng.integers(0, 60, (3, 40, 52)) + 120 * mask)[None]
    share, largest = disagreement(image, guess(mask, 3))
    assert share == 0
    assert largest < 1e-3


def test_backends_agree_on_photographs(real_data: Path) -> None:
    pytest.importorskip("pydensecrf", reason="the extra crf is not installed")
    root = real_data / "voc12_mix"
    for path in sorted((root / "SegmentationClass").iterdir())[:2]:
        image = np.array(Image.open(root / "JPEGImages" / f"{path.stem}.jpg").convert("RGB"))
        probability = guess(np.array(Image.open(path)) % 255 % 4, 4)
        share, largest = disagreement(torch.from_numpy(image).permute(2, 0, 1)[None], probability)
        assert share <= 1e-3
        assert largest <= 1e-3


def test_images_of_a_batch_do_not_meet() -> None:
    torch.manual_seed(0)
    image, probability = 255 * torch.rand(2, 3, 12, 16), torch.rand(2, 5, 12, 16).softmax(1)
    together = dense_crf(image, probability)
    alone = torch.cat([dense_crf(image[i : i + 1], probability[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.sum(1), torch.ones(2, 12, 16))


def test_unknown_backend() -> None:
    with pytest.raises(InputError, match="pydensecrf"):
        dense_crf(torch.zeros(1, 3, 4, 4), torch.ones(1, 2, 4, 4), backend="cpp")

"""The loss of WeakTr for noisy masks against recordings of the original code: `--golden DIR`/weaktr."""

from typing import Any

import pytest
import torch

from wsss.losses import build
from wsss.losses.cross_entropy import ClippedCrossEntropyLoss

FILE = "weaktr/weaktr_clipped_ce"
EXCEPTED = (
    (FILE, "*/logits */gt start_value patch_size", "input"),
    (
        "weaktr/weaktr_weights weaktr/weaktr_forward weaktr/weaktr_training weaktr/weaktr_cams "
        "weaktr/weaktr_mask_decoder",
        "*",
        "network of WeakTr",
    ),
)


@pytest.mark.parametrize("case", ["below_start", "with_ignore", "above_start", "one_hard_patch", "batch_of_one"])
def test_clipped_cross_entropy(recordings: Any, match: Any, case: str) -> None:
    arrays = recordings(FILE)
    logits, label = arrays[f"{case}/logits"].clone().requires_grad_(), arrays[f"{case}/gt"].long()
    settings = {"start": arrays["start_value"].item(), "patch": arrays["patch_size"].item()}
    loss = build("clipped_ce", **settings)
    assert isinstance(loss, ClippedCrossEntropyLoss)
    value = loss(logits, label)
    value.backward()
    match(FILE, f"{case}/loss", value, rtol=1e-6)
    match(FILE, f"{case}/pixel_loss", loss.pixels(logits, label), atol=1e-6)
    match(FILE, f"{case}/grad", logits.grad, atol=1e-9)
    match(FILE, f"{case}/pixel_ce", ClippedCrossEntropyLoss(start=-1.0).pixels(logits, label), atol=1e-6)
    if case == "above_start":
        assert torch.equal(loss.pixels(logits, label), ClippedCrossEntropyLoss(start=-1.0).pixels(logits, label))

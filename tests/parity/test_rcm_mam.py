"""RCM-MAM against an independent reference in float64: every array of `--golden DIR`/rcm_mam.

Ours has the background first, as label maps do; the reference has it last.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.cam import by_max
from wsss.losses import build
from wsss.losses.rcm_mam import (
    attention_weights,
    image_prototypes,
    leave_one_out_prototypes,
    mean_prototypes,
    pixel_features,
)
from wsss.methods.rcm_mam import RCMMAM
from wsss.optim import update_average
from wsss.refine.thresholds import cam_to_label

Arrays = dict[str, Any]

# What no array tells. Shapes, classes, scales, thresholds and temperatures come from the arrays and their names.
SETTINGS: dict[str, Any] = {
    "file": "rcm_mam/rcm_mam",
    "support": {"s3": ("05", "10", "20"), "s4": ("05", "10", "15", "20")},
    "regions": {"loss": "region_s4_th03", "prototypes": "single_scale_region_th03"},
    "ema": {"steps": 3, "momentum": 0.997},
    "total": "total_s4_loo_T2_w111",
}

EXCEPTED = (
    ("rcm_mam/rcm_mam", "label HW sup_cam_low_* main_cam_low_* *_feat_low main_logits ema_sup ema_main", "input"),
)

FILE = SETTINGS["file"]


@pytest.fixture
def arrays(recordings: Any) -> Arrays:
    return recordings(FILE)


@pytest.fixture
def match(match: Any) -> Any:
    return partial(match, FILE, atol=1e-9)


def scales(arrays: Arrays, network: str) -> list[str]:
    return sorted(key.removeprefix(f"{network}_cam_low_") for key in arrays if key.startswith(f"{network}_cam_low_"))


def cams(arrays: Arrays, network: str, of: Sequence[str]) -> Tensor:
    """(scales, B, C, H, W) from the raw maps."""
    size = arrays["HW"].tolist()
    return torch.stack([RCMMAM.visible(arrays[f"{network}_cam_low_{scale}"], arrays["label"], size) for scale in of])


def fused(arrays: Arrays, name: str) -> Tensor:
    of = ("10",) if name == "single_scale" else SETTINGS["support"][name]
    return by_max(cams(arrays, "sup", of).sum(dim=0))


def last(maps: Tensor, dim: int) -> Tensor:
    """The background from first to last."""
    return maps.roll(-1, dim)


def region(arrays: Arrays, key: str) -> Tensor:
    """Ours, by the name of the recorded one."""
    name, threshold = key.removeprefix("region_").replace("_region", "").rsplit("_th", 1)
    return cam_to_label(fused(arrays, name), arrays["label"], float(f"{threshold[0]}.{threshold[1:]}"))


def masked_mean_prototypes(features: Tensor, region: Tensor, num_classes: int) -> Tensor:
    """The paper's words taken literally, which we do not offer: plain features, averaged over pixels, then images."""
    masks = (region[:, None] == torch.arange(1 + num_classes)[:, None, None]).to(features.dtype)
    features = F.interpolate(features, size=region.shape[-2:], mode="bilinear", align_corners=False)
    count = masks.sum(dim=(-2, -1))[..., None].clamp(min=1)
    return mean_prototypes(torch.einsum("bdhw,bkhw->bkd", features, masks) / count)  # the length does not matter


def prototypes(arrays: Arrays, mode: str) -> Tensor:
    """(B, 1 + C, D)."""
    of_pixels = (arrays["sup_feat_low"], region(arrays, SETTINGS["regions"]["prototypes"]), arrays["label"].shape[1])
    images = image_prototypes(*of_pixels)
    if mode == "loo":
        return leave_one_out_prototypes(images)
    of_batch = masked_mean_prototypes(*of_pixels) if mode == "maskedmean" else mean_prototypes(images)
    return of_batch.expand_as(images)  # mean: all images at once, present: those that show the class; the same


def test_cams(arrays: Arrays, match: Any) -> None:
    for network in ("sup", "main"):
        for scale in scales(arrays, network):
            match(f"{network}_cam_{scale}", cams(arrays, network, [scale])[0])
    for name in SETTINGS["support"]:
        match(f"fused_{name}", fused(arrays, name))
    match("single_scale_cam", fused(arrays, "single_scale"))


def test_regions(arrays: Arrays, match: Any) -> None:
    keys = [key for key in arrays if "region_" in key]
    assert keys
    for key in keys:
        ours = region(arrays, key)
        match(key, torch.where(ours == 0, arrays["label"].shape[1], ours - 1), atol=0)


def test_prototypes(arrays: Arrays, match: Any) -> None:
    found, classes = region(arrays, SETTINGS["regions"]["prototypes"]), arrays["label"].shape[1]
    match("sup_feat", pixel_features(arrays["sup_feat_low"], found))
    match("image_prototypes", last(image_prototypes(arrays["sup_feat_low"], found, classes), 1))
    match("masked_mean_prototypes", last(prototypes(arrays, "maskedmean")[0], 0))
    for key in (key for key in arrays if key.startswith("protos_")):
        match(key, last(prototypes(arrays, key.removeprefix("protos_")), 1))


def rcm(arrays: Arrays, name: str, features: Tensor) -> Tensor:
    """By a name such as loo_T2_bg."""
    mode, temperature, background = name.split("_")
    loss = build("rcm", temperature=float(temperature[1:]), use_background=background == "bg")
    return loss(features, region(arrays, SETTINGS["regions"]["loss"]), prototypes(arrays, mode))


def test_rcm(arrays: Arrays, match: Any) -> None:
    names = [key.removeprefix("rcm_loss_") for key in arrays if key.startswith("rcm_loss_")]
    assert names
    for name in names:
        features = arrays["main_feat_low"].clone().requires_grad_()
        loss = rcm(arrays, name, features)
        match(f"rcm_loss_{name}", loss)
        loss.backward()
        if f"rcm_grad_{name}" in arrays:
            match(f"rcm_grad_{name}", features.grad)


@pytest.mark.parametrize("name", SETTINGS["support"])
def test_mam(arrays: Arrays, match: Any, name: str) -> None:
    of = scales(arrays, "main")
    raw = {f"main_cam_low_{scale}": arrays[f"main_cam_low_{scale}"].clone().requires_grad_() for scale in of}
    main, support = cams(arrays | raw, "main", of), cams(arrays, "sup", SETTINGS["support"][name])
    loss = build("mam")
    match(f"mam_weight_{name}", attention_weights(main, support))
    match(f"mam_target_{name}", loss.target(main, support))
    match(f"mam_loss_{name}", loss(main, support))
    loss(main, support).backward()
    for scale in of:
        match(f"mam_grad_{name}_{scale}", raw[f"main_cam_low_{scale}"].grad)
    if f"mam_loss_plain_mean_{name}" in arrays:
        match(f"mam_loss_plain_mean_{name}", build("mam", attention=False)(main, support))


def test_total(arrays: Arrays, match: Any) -> None:
    cls = build("cls")(arrays["main_logits"], arrays["label"])
    match("cls_loss", cls)
    support, mode, temperature, weights = SETTINGS["total"].removeprefix("total_").split("_")
    mam = build("mam")(cams(arrays, "main", scales(arrays, "main")), cams(arrays, "sup", SETTINGS["support"][support]))
    terms = torch.stack([cls, rcm(arrays, f"{mode}_{temperature}_bg", arrays["main_feat_low"]), mam])
    match(SETTINGS["total"], (terms * torch.tensor([float(w) for w in weights[1:]])).sum())


def test_moving_average(arrays: Arrays, match: Any) -> None:
    teacher, ema = arrays["ema_sup"].clone(), SETTINGS["ema"]
    for _ in range(ema["steps"]):
        update_average([teacher], [arrays["ema_main"]], ema["momentum"])
    match("ema_after3_m0997", teacher)

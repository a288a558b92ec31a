"""Settings and data small enough to train in seconds, shared by the tests."""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

METHOD: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "aux_layer": -2,
    "decoder_channels": 8,
    "decoder_dilation": 1,
    "projector": {"hidden": 16, "bottleneck": 8, "out": 16},
    "local_crops": 2,
    "local_crop_size": 8,
    "cam_scales": [1.0],
    "par": {"dilations": [1, 2], "iterations": 2},
    "phases": [],
}
OVERRIDES = [
    "dataset.size=32",
    "dataset.train_size=6",
    "dataset.val_size=4",
    "dataset.num_classes=4",
    "transform.crop_size=32",
    *(f"data.{name}" for name in ("batch_size=2", "eval_batch_size=2", "num_workers=0")),
    *(f"trainer.{name}" for name in ("accelerator=cpu", "max_steps=2", "val_check_interval=2", "log_every_n_steps=1")),
    "trainer.enable_progress_bar=false",
]
VOC_IDS = ("2007_000032", "2007_000039", "2007_000063", "2007_000068")


def as_override(value: Any) -> str:
    """A plain value in Hydra's grammar, written without the function under test."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {as_override(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(as_override, value)) + "]" if isinstance(value, list) else str(value)


SHARED = list(OVERRIDES)
MCTFORMER_OVERRIDES = [
    *SHARED,
    "method.backbone=vit_tiny_patch16_224",
    "method.backbone_args={img_size: 32, patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
    "method.attention_layers=2",
    "method.cam_scales=[1.0, 0.75]",
    "method.epochs=2",
    "method.refine=true",
    "method.background_threshold=0.39",
]
WEAKTR_OVERRIDES = [*MCTFORMER_OVERRIDES, "method.fusion={reduction: 2, feature_reduction: 4}"]
RESNET38_OVERRIDES = [
    *SHARED,
    "method.backbone_args={width: 4, frozen_stages: 0, batch_norm_momentum: 0.1}",
    "method.cam_scales=[1.0, 0.5]",
]
IRN_OVERRIDES = [
    *SHARED,
    "method.backbone=resnet38",
    "method.backbone_args={output_stride: null, width: 4, frozen_stages: 0}",
    "method.losses.affinity.radius=2",
    "method.losses.displacement.radius=3",
    "method.least_side=32",
]
FROZEN_OVERRIDES = [
    *(override for override in SHARED if not override.startswith(("transform.", "data.eval"))),
    "method.backbone=resnet10t",
    "method.weights=null",
    "method.backbone_args=null",
    "method.size=64",
    "data.eval_batch_size=1",
    f"features.folder={Path(tempfile.gettempdir()) / 'wsss-test-features'}",
]
COSA: dict[str, Any] = {
    **{key: METHOD[key] for key in ("backbone", "backbone_args", "aux_layer", "decoder_channels", "decoder_dilation")},
    "cam_scales": [1.0, 0.5],
    "loss_warmup_steps": 0,
}
COSA_OVERRIDES = [*SHARED, *(f"method.{key}={as_override(value)}" for key, value in COSA.items())]
CLIP: dict[str, Any] = {
    "weights": None,
    "text": None,
    "backbone_args": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2},
    "affinity_layers": 2,
}
WECLIP: dict[str, Any] = CLIP | {
    "refine_layers": 2,
    "static_steps": 3,
    "long_side": 48,
    "channels": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
    "par": {"dilations": [1, 2], "iterations": 2},
}
WECLIP_PLUS: dict[str, Any] = WECLIP | {
    "dino": "vit_small_patch14_dinov2",
    "dino_weights": None,
    "dino_args": {"img_size": 28, "embed_dim": 12, "depth": 1, "num_heads": 2},
    "static_steps": 0,
    "box_threshold": None,
    "soft_product": True,
    "skip_block": True,
    "self_labels": {"step": 2, "threshold": 0.3, "gate": False},
    "losses": {"seg": {"weight": 1.0}, "aff": {"weight": 0.1}, "dice": {"weight": 1.0}, "cross": {"weight": 0.1}},
}


def method_overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"method.{key}={as_override('null' if value is None else value)}" for key, value in values.items()]


CLIP_OVERRIDES = [o for o in SHARED if not o.startswith("transform.")] + method_overrides(CLIP)
WECLIP_OVERRIDES = SHARED + method_overrides(WECLIP)
WECLIP_PLUS_OVERRIDES = SHARED + method_overrides(WECLIP_PLUS)
OVERRIDES += [f"method.{key}={as_override(value)}" for key, value in METHOD.items()]
VOC_OVERRIDES = ["dataset=voc", "method.weights=null", *(o for o in OVERRIDES if not o.startswith("dataset."))]


MODULES = {"eval": "evaluate"}
"""Where a command lives, if not under its own name."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def refused(ended: Ended, *words: str) -> None:
    """By one sentence that has these words."""
    assert ended.code == 2
    lines = ended.err.strip().splitlines()
    assert len(lines) == 1, ended.err
    assert all(word in lines[0] for word in words), lines[0]


def content(out: Path) -> dict[str, bytes]:
    """Of all files in a folder, by their relative paths."""
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def call(command: str, *arguments: str) -> int:
    """Run `wsss-<command>` in this process; returns its exit code."""
    from importlib import import_module

    module = import_module(f"wsss.commands.{MODULES.get(command, command)}")
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"wsss-{command}", *arguments])
        try:
            module.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            GlobalHydra.instance().clear()
    return 0


def make_voc(root: Path) -> Path:
    """A VOC tree of two classes: two images to train on, two others of different sizes to evaluate on."""
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, name in enumerate(VOC_IDS):
        height, width = 40, 36 + 4 * number
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        mask = np.zeros((height, width), np.uint8)
        mask[4:20, 4:20], mask[0] = 1 + number % 2, 255
        Image.fromarray(mask).save(root / "SegmentationClassAug" / f"{name}.png")
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("\n".join(VOC_IDS[:2]))
    (root / "ImageSets/Segmentation/val.txt").write_text("\n".join(VOC_IDS[2:]))
    (root / "class_names.txt").write_text("cat\ndog\n")
    save_labels(root, {name: np.eye(2, dtype=np.float32)[n % 2] for n, name in enumerate(VOC_IDS)})
    return root


def save_labels(root: Path, labels: Any) -> None:
    np.save(root / "cls_labels_onehot.npy", labels, allow_pickle=True)

"""What a step of training costs at 20, 80, 300 and 1,000 classes, of which an image shows one or two.

    python -m tests.benchmarks.classes [CASE ...] [--before CHECKOUT] [--json FILE]
    python -m tests.benchmarks.classes --plot FILE.json PICTURE.png

Small networks from random weights: a vision transformer of timm's tiny size, and ResNet38 of width 8; four images of 64
pixels, of ToCo also of 128. A method of more than 254 classes is refused outside of here, as masks have 8 bits. The
second line draws time and memory by classes of what the first has written with `--before` (the extra `report`).
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import wsss.methods.stage
from tests.benchmarks.cases import method_of, training_batch
from tests.benchmarks.harness import Case, main

CLASSES = (20, 80, 300, 1000)
IMAGES = 4


def step(name: str, classes: int, side: int = 64) -> Any:
    """Forward and backward pass."""
    wsss.methods.stage.check_classes = lambda classes: None
    small: dict[str, Any] = {"backbone_args": {"width": 8}}
    if name == "toco":
        small = {
            "backbone": "vit_tiny_patch16_224",
            "backbone_args": {"img_size": side},
            "projector": {"hidden": 256, "bottleneck": 64, "out": 256},
            "local_crop_size": side // 2,
        }
    method = method_of(name, classes, **small).train()
    label = torch.zeros(IMAGES, classes)
    label[0, [3, 7]], label[1:, 11] = 1, 1
    coarse = torch.randn(IMAGES, 3, side // 8, side // 8)
    image = F.interpolate(coarse, size=(side, side), mode="bicubic")  # neighbours are alike, as in photographs
    views = {"image": image, "label": label, "global_view": image.flip(-1), "local_source": image}
    batch = training_batch(method, IMAGES, side)
    batch = method.on_before_batch_transfer(batch | {key: views[key] for key in views.keys() & batch.keys()}, 0)

    def run() -> dict[str, Tensor]:
        method.zero_grad()
        loss = method.training_step(batch, 0)["loss"]
        loss.backward()
        return {"loss": loss.detach()} | {key: p.grad for key, p in method.named_parameters() if p.grad is not None}

    return run


CASES: dict[str, Case] = {
    **{f"{name} {count}": partial(step, name, count) for name in ("toco", "seam", "rcm_mam") for count in CLASSES},
    **{f"toco {count} at 128": partial(step, "toco", count, 128) for count in CLASSES},
}


def plot(results: Path, picture: Path) -> None:
    """Of each method processor time and peak memory by classes, before and after."""
    import altair as alt

    lines = [json.loads(line) for line in results.read_text().splitlines()]
    values = []
    for line in (line for line in lines if line["benchmark"] == "classes" and "at" not in line["case"]):
        method, count = line["case"].split()
        for prefix, version in (("before_", "before"), ("", "after")):
            row = {"method": method, "classes": int(count), "version": version}
            values.append(row | {"what": "CPU seconds a step", "value": line[f"{prefix}cpu_ms"] / 1000})
            values.append(row | {"what": "peak MiB", "value": line[f"{prefix}peak_mib"]})
    chart = alt.Chart(alt.Data(values=values)).mark_line(point=True)
    chart = chart.encode(
        x=alt.X("classes:Q", scale=alt.Scale(type="log"), axis=alt.Axis(values=list(CLASSES))),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=True)),
        color=alt.Color("method:N"),
        strokeDash=alt.StrokeDash("version:N", sort=["after", "before"]),
    )
    panel = chart.properties(width=320, height=240).facet(alt.Facet("what:N", title=None), columns=2)
    panel.resolve_scale(y="independent").save(str(picture), scale_factor=2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plot"]:
        plot(*map(Path, sys.argv[2:4]))
    else:
        main("tests.benchmarks.classes", CASES, __doc__)

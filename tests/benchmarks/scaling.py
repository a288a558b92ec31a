"""How costs grow with tokens, the side of an image, and the batch; each case is one of a row.

    python -m tests.benchmarks.scaling [CASE ...] [--json FILE]
    python -m tests.benchmarks.scaling --plot FILE.json PICTURE.png

The second draws processor time over size, both logarithmic, of what the first has written (`pip install altair
vl-convert-python`, the extra `report`).
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.cams import one_pass
from tests.benchmarks.cases import method_of
from tests.benchmarks.harness import Case, main
from tests.benchmarks.refine import lattice
from tests.benchmarks.step import MCT, step


def tokens(side: int) -> Any:
    """Forward pass of DeiT-S alone."""
    encoder, image = method_of("mctformer").encoder.eval(), torch.randn(1, 3, side, side)
    return torch.no_grad()(lambda: encoder(image))


SIDES = (112, 224, 448, 896)
CASES: dict[str, Case] = {
    **{f"tokens {(side // 16) ** 2}": partial(tokens, side) for side in SIDES},
    **{f"cam {side}": partial(one_pass, "mctformer", side, side) for side in SIDES},
    **{f"lattice {side}": partial(lattice, side) for side in SIDES},
    **{f"batch {count}": partial(step, "mctformer", count, 224, **MCT) for count in (1, 2, 4, 8, 16)},
}
TITLES = {
    "tokens": "forward pass by tokens",
    "cam": "refined CAM by side in pixels",
    "lattice": "building a lattice by side in pixels",
    "batch": "training step by images",
}


def plot(results: Path, picture: Path) -> None:
    """A chart for each row of cases."""
    import altair as alt

    lines = [json.loads(line) for line in results.read_text().splitlines()]
    rows = [line for line in lines if line["benchmark"] == "scaling"]
    charts = []
    for kind, title in TITLES.items():
        values = [
            {"size": int(row["case"].split()[1]), "ms": row["cpu_ms"]} for row in rows if row["case"].startswith(kind)
        ]
        sizes = sorted({value["size"] for value in values})
        x = alt.X("size:Q", title=None, scale=alt.Scale(type="log"), axis=alt.Axis(values=sizes, grid=False))
        y = alt.Y("ms:Q", title="ms of processor time", scale=alt.Scale(type="log"))
        line = alt.Chart(alt.Data(values=values), title=title).mark_line(point=True)
        charts.append(line.encode(x=x, y=y).properties(width=260, height=200))
    pairs = [alt.hconcat(*charts[i : i + 2]) for i in range(0, len(charts), 2)]
    alt.vconcat(*pairs).save(str(picture), scale_factor=1.5)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plot"]:
        plot(*map(Path, sys.argv[2:4]))
    else:
        main("tests.benchmarks.scaling", CASES, __doc__)

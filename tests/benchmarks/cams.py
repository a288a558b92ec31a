"""CAMs of photographs: one pass, and the multi-scale, mirrored CAM that a method evaluates and trains with.

    python -m tests.benchmarks.cams [CASE ...] [--before CHECKOUT] [--json FILE]

Networks of the papers' size with random weights; the images are of VOC's size, 500 x 375 pixels, or of the side of the
training crops.
"""

from functools import partial
from typing import Any

import torch

from tests.benchmarks.cases import method_of
from tests.benchmarks.harness import Case, main


def one_pass(name: str, height: int, width: int, **arguments: Any) -> Any:
    method, image = method_of(name, **arguments).eval(), torch.randn(1, 3, height, width)
    return torch.no_grad()(lambda: method(image))


def multiscale(name: str, height: int, width: int, **arguments: Any) -> Any:
    method, image = method_of(name, **arguments).eval(), torch.randn(1, 3, height, width)
    return lambda: method.multiscale(image)


CASES: dict[str, Case] = {
    "toco photograph": partial(multiscale, "toco", 375, 500),
    "mctformer pass 224": partial(one_pass, "mctformer", 224, 224),
    "mctformer pass 448": partial(one_pass, "mctformer", 448, 448),
    "mctformer 224": partial(multiscale, "mctformer", 224, 224),
    "mctformer photograph": partial(multiscale, "mctformer", 375, 500),
    "mctformer no refinement": partial(multiscale, "mctformer", 375, 500, refine=False),
    "mctformer_plus photograph": partial(multiscale, "mctformer_plus", 375, 500),
    "seam photograph": partial(multiscale, "seam", 375, 500),
}

if __name__ == "__main__":
    main("tests.benchmarks.cams", CASES, __doc__)

"""What makes masks of maps: PAR, the dense CRF, its lattice, the random walk, a sweep of thresholds, the dense energy.

    python -m tests.benchmarks.refine [CASE ...] [--before CHECKOUT] [--json FILE]

Images of 500 x 375 pixels with smooth colours and a little noise, of which the lattice has as many vertices as of a
photograph. `pydensecrf` is the C++ code (the extra `crf`), for comparison.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.cases import labels
from tests.benchmarks.harness import Case, main
from wsss.evaluation.metrics import CamIoU
from wsss.lattice import PermutohedralLattice
from wsss.losses.energy import DenseEnergyLoss
from wsss.pairs import pair_views
from wsss.refine.crf import dense_crf
from wsss.refine.par import PAR
from wsss.refine.random_walk import refine_scores

HEIGHT, WIDTH = 375, 500


def colours(height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """(1, 3, H, W) from 0 to 255."""
    smooth = F.interpolate(torch.rand(1, 3, 5, 6), (height, width), mode="bicubic")
    return (255 * smooth + 3 * torch.randn(1, 3, height, width)).clamp(0, 255)


def scores(channels: int) -> Tensor:
    """(1, K, H, W) probabilities."""
    return (4 * F.interpolate(torch.randn(1, channels, 9, 12), (HEIGHT, WIDTH), mode="bilinear")).softmax(1)


def crf(channels: int, backend: str) -> Any:
    image, probability = colours(), scores(channels)
    return lambda: dense_crf(image, probability, backend=backend)


def lattice(side: int) -> Any:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack([x, y], -1).view(1, -1, 2) / 121
    features = torch.cat([place, colours(side, side).flatten(2).mT / 5], -1)
    return lambda: PermutohedralLattice(features)


def par(channels: int) -> Any:
    refine, image, masks = PAR(), colours() / 255, scores(channels)
    return lambda: refine(image, masks)


def walk(dense: bool) -> Any:
    pairs = pair_views(torch.zeros(-(-HEIGHT // 8), -(-WIDTH // 8)), 5)[1]
    affinity, maps = torch.rand(1, len(pairs), pairs[0].numel()), scores(4)
    return lambda: refine_scores(affinity, maps, dense=dense)


def sweep(classes: int) -> Any:
    metric, cam, label = CamIoU(classes, 0.45), torch.rand(1, classes, HEIGHT, WIDTH), labels(1, classes)
    mask = scores(classes + 1).argmax(1)
    return lambda: metric.update(cam, label, mask)


def energy() -> Any:
    loss, logits = DenseEnergyLoss(), torch.randn(2, 21, 28, 28, requires_grad=True)
    image = F.interpolate(colours(), (448, 448)).expand(2, -1, -1, -1)
    label = torch.full((2, 448, 448), 255)
    return lambda: loss(image, logits, label).backward()


CASES: dict[str, Case] = {
    "par 3": partial(par, 3),
    "par 21": partial(par, 21),
    "energy": energy,
    "crf 3": partial(crf, 3, "torch"),
    "crf 21": partial(crf, 21, "torch"),
    "lattice 112": partial(lattice, 112),
    "lattice 448": partial(lattice, 448),
    "lattice 896": partial(lattice, 896),
    "walk dense": partial(walk, True),
    "walk sparse": partial(walk, False),
    "sweep 20": partial(sweep, 20),
}
if find_spec("pydensecrf") is not None:
    CASES |= {f"crf {channels} pydensecrf": partial(crf, channels, "pydensecrf") for channels in (3, 21)}

if __name__ == "__main__":
    main("tests.benchmarks.refine", CASES, __doc__)

"""A training step of each method at its paper's size: forward, backward and optimizer, batches of random numbers.

    python -m tests.benchmarks.step [CASE ...] [--before CHECKOUT] [--json FILE]

Networks start from random weights, and batches are small, for a processor; a GPU takes those of the papers, see
`tests.benchmarks.gpu`. The transforms are not part of it (`tests.benchmarks.loader`). `slim` is ResNet38 at half its
width and 96 pixels, for which a machine needs seconds.
"""

from functools import partial
from typing import Any

from torch import Tensor

from tests.benchmarks.cases import method_of, optimizer_of, training_batch
from tests.benchmarks.harness import Case, main


def step(name: str, batch_size: int, side: int, **arguments: Any) -> Any:
    method = method_of(name, **arguments)
    optimizer, batch = optimizer_of(method), training_batch(method, batch_size, side)

    def run() -> dict[str, Tensor]:
        optimizer.zero_grad()
        loss = method.training_step(batch, 0)["loss"]
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()} | {name: p.grad for name, p in method.named_parameters() if p.grad is not None}

    return run


SLIM = {"backbone_args": {"width": 32}}
MCT = {"backbone_args": {"drop_path_rate": 0.1}}
RANDOM = {"weights": None, "text": None}  # of a frozen tower, which takes the same time
CASES: dict[str, Case] = {
    "toco": partial(step, "toco", 2, 448),
    "mctformer_v1": partial(step, "mctformer_v1", 8, 224, **MCT),
    "mctformer": partial(step, "mctformer", 8, 224, **MCT),
    "mctformer_plus": partial(step, "mctformer_plus", 2, 448, **MCT),
    "weaktr": partial(step, "weaktr", 8, 224, **MCT),
    "cosa": partial(step, "cosa", 1, 448, loss_warmup_steps=-1),
    "weclip": partial(step, "weclip", 2, 320, **RANDOM),
    "weclip refined": partial(step, "weclip", 2, 320, **RANDOM, static_steps=0),
    "seam": partial(step, "seam", 1, 448),
    "ppc": partial(step, "ppc", 2, 448),
    "rcm_mam": partial(step, "rcm_mam", 2, 192),
    **{f"{name} slim": partial(step, name, 2, 96, **SLIM) for name in ("seam", "ppc", "rcm_mam")},
    "cam": partial(step, "cam", 1, 448),
    "affinity": partial(step, "affinity", 1, 448),
    "irn": partial(step, "irn", 1, 512),
    "segmentation": partial(step, "segmentation", 1, 321),
}

if __name__ == "__main__":
    main("tests.benchmarks.step", CASES, __doc__)

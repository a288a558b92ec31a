"""A training on two devices is the training on one: trains every method on one process and on two, and compares.

    python tests/distributed.py [METHOD ...]

Two processes of this CPU take two images each in a step, one process takes four; both see the same images in the same
order. What torch draws in a step depends on the device, so dropout is switched off and what remains (ToCo's crops, the
pixels of PPC) is drawn here for all images at once; batch norms keep their statistics. Printed are the largest
differences, each relative to the largest value of its tensor: of the gradients of the first step, with each device's
own losses and with `gather_losses=true`; then, with that, of weights and moving averages after four steps, and of the
evaluation's figures. Exits with 1 where the images or their order differ, or a difference with `gather_losses=true`
exceeds TOLERANCE.
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from kill import settings
from tiny import FROZEN_OVERRIDES, SHARED, call

STEPS = 4
SLIM = "method.backbone_args={width: 4, frozen_stages: 0, dropout: [0, 0], batch_norm_momentum: null}"
"""Batch norms keep their statistics."""
EARLY = ("method.rcm_start=0", "method.mam_start=0")
CHANGES = {
    "toco": ["method.warmup_steps=0"],
    "cosa": ["method.warmup_weights={}", "method.loss_warmup_steps=-1"],
    **{name: [SLIM] for name in ("cam", "seam", "ppc")},
    "rcm_mam": [SLIM, *EARLY, "method.prototypes=mean"],
    "rcm_mam loo": [SLIM, *EARLY, "method.prototypes=loo"],
    "rcm_mam memory": [SLIM, *EARLY],
    "weclip with dino": ["method.static_steps=2"],
}
"""What is set beside `kill.SETTINGS`."""
OTHERS = {
    "segmentation": [*SHARED, SLIM, "method.decoder_args={channels: 6, dilation: 2}"],
    "segmentation clipped": [
        *SHARED,
        SLIM,
        "method.decoder_args={channels: 6, dilation: 2}",
        "method.losses={ce: null, clipped_ce: {weight: 1.0, start: 9.0, patch: 16}}",
    ],
    "affinity": [*SHARED, SLIM, "method.losses.affinity.radius=2"],
    "frozen_segmentation": [*FROZEN_OVERRIDES, "method.channels=8"],
}
METHODS = (
    *("toco", "cosa", "mctformer", "mctformer_plus", "weaktr", "cam", "seam", "ppc", "rcm_mam", "rcm_mam loo"),
    *("rcm_mam memory", "irn", "weclip", "weclip with dino", "frozen_cam", *OTHERS),
)
TOLERANCE = {"gathered": 1e-9, "weights": 1e-8, "averages": 1e-8, "figures": 1e-5}


class Trained(NamedTuple):
    """What a training left."""

    order: list[list[str]]  # the images of every step
    gradients: dict[str, Tensor]  # of the first step
    weights: dict[str, Tensor]
    figures: dict[str, float]


class Recording(pl.Callback):
    """Keeps the images of each step and the gradients of the first, and lets no layer drop anything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.order: list[list[str]] = []
        self.gradients: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                module.p = 0.0
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        views = [batch[name] for name in sorted(batch) if isinstance(batch[name], Tensor)]
        sums = [sum(float(view[image].double().sum()) for view in views) for image in range(len(batch["id"]))]
        self.order.append([f"{name} {total:.6f}" for name, total in zip(batch["id"], sums, strict=True)])

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            grads = ((name, p.grad) for name, p in pl_module.named_parameters())
            self.gradients = {name: grad.clone() for name, grad in grads if grad is not None}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save({"order": self.order, "gradients": self.gradients}, self.path)


def draw_as_one(rank: int, world: int) -> None:
    """Let the crops and pixels that a step draws not depend on the number of processes."""
    from wsss.losses.ppc import PixelPrototypeContrastLoss
    from wsss.methods import toco

    proper, rand = toco.draw_crops, torch.rand

    def of_all(shape: torch.Size, **_: Any) -> Tensor:
        return rand((shape[0] * world, *shape[1:]), generator=torch.Generator().manual_seed(7))[rank::world]

    def crops(*arguments: Any) -> Tensor:
        with mock.patch.object(torch, "rand", of_all):
            return proper(*arguments)

    def pixels(self: Any, label: Tensor) -> Tensor:
        return rand(label.shape, generator=torch.Generator().manual_seed(7))

    mock.patch.object(toco, "draw_crops", crops).start()
    mock.patch.object(PixelPrototypeContrastLoss, "draw", pixels).start()


def stay_double() -> None:
    """Let nothing be brought to single precision, whose roundings flip the ids that methods make of maps."""
    single = Tensor.float

    def kept(self: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return self if self.dtype == torch.double else single(self, *arguments, **named)

    mock.patch.object(Tensor, "float", kept).start()


def child(arguments: list[str], folder: Path, rank: int, world: int, port: int) -> None:
    import wsss.assemble
    from wsss.data.datamodule import DataModule

    sys.stdout = sys.stderr = said = (folder / f"{rank}.txt").open("w", buffering=1)
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    if world > 1:  # as torchrun says it
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        os.environ.update({key: str(value) for key, value in (place | meeting).items()})
    draw_as_one(rank, world)
    stay_double()
    built = wsss.assemble.build_trainer

    def recorded(settings: dict[str, Any], callbacks: list[Any], **extra: Any) -> pl.Trainer:
        return built(settings, callbacks=[*callbacks, Recording(folder / f"{rank}.pt")], **extra)

    mock.patch.object(wsss.assemble, "build_trainer", recorded).start()
    mock.patch.object(DataModule, "examples", return_value=[]).start()  # pictures are of single precision
    os._exit(call("train", *arguments))


def processes(arguments: list[str], folder: Path, world: int) -> list[int | None]:
    """Train in so many new processes, as torchrun starts them; their exit codes. What they say is in <rank>.txt."""
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = 20_000 + free.getsockname()[1] % 10_000
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=child, args=(arguments, folder, rank, world, port)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
    return [process.exitcode for process in ranks]


def train(arguments: list[str], folder: Path, world: int) -> Trained:
    """Train in processes that share the global batch.

    Raises:
        RuntimeError: one of them failed; with what it said.
    """
    mine = [f"data.batch_size={4 // world}", f"trainer.devices={world}", f"hydra.run.dir={folder / 'run'}"]
    if any(code != 0 for code in processes([*arguments, *mine], folder, world)):
        raise RuntimeError("\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.txt"))))
    parts = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    order = [
        [name for names in zip(*step, strict=True) for name in names]
        for step in zip(*(p["order"] for p in parts), strict=True)
    ]
    state = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    figures = json.loads((folder / "run/metrics.json").read_text())
    numbers = {key: value for key, value in figures.items() if key.startswith("val/") and isinstance(value, float)}
    return Trained(order, parts[0]["gradients"], state, numbers)


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest of all tensors, relative to the largest value of each, or a millionth of the largest of all."""
    assert ours.keys() == theirs.keys()
    largest = {key: float(value.abs().max()) for key, value in ours.items() if value.is_floating_point()}
    floor = 1e-6 * max(largest.values(), default=0.0) or 1.0
    apart = [float((ours[k] - theirs[k]).abs().max()) / max(top, floor) for k, top in largest.items()]
    return float(np.max(apart, initial=0.0))  # NaN, too, which Python's own max may pass over


AVERAGES = ("teacher", "support.", "memory.", "network.displacement.mean")
"""First parts of the names of what follows the weights in time."""


def compare(method: str, folder: Path) -> dict[str, Any]:
    """Train a method three times; the row of the table."""
    name = method.split()[0]
    known = OTHERS.get(method) or settings("rcm_mam" if name == "rcm_mam" else method, STEPS, workers=0)
    arguments = [*known, *CHANGES.get(method, []), f"method={name}", "global_batch_size=4"]
    arguments += [
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS}",
        "trainer.accelerator=cpu",
        "trainer.precision=64-true",
    ]
    arguments += (
        [f"pseudo_masks={folder.parent / 'masks'}"] if name in ("irn", "segmentation", "frozen_segmentation") else []
    )
    arguments += [f"pseudo_scores={folder.parent / 'scores'}"] if name == "affinity" else []
    arguments += ["monitor=null"] if name in ("irn", "segmentation", "affinity") else []
    one = train(arguments, folder / "one", 1)
    own = train(arguments, folder / "own", 2)
    gathered = train([*arguments, "gather_losses=true"], folder / "gathered", 2)
    averages = [{k: v for k, v in run.weights.items() if k.startswith(AVERAGES)} for run in (one, gathered)]
    figures = [np.array(list(run.figures.values())) for run in (one, gathered)]
    assert one.figures.keys() == gathered.figures.keys()
    unlike = np.where(np.isnan(figures[0]) & np.isnan(figures[1]), 0.0, np.abs(figures[0] - figures[1]))
    return {
        "same images": one.order == own.order == gathered.order,
        "own": difference(one.gradients, own.gradients),
        "gathered": difference(one.gradients, gathered.gradients),
        "weights": difference(one.weights, gathered.weights),
        "averages": difference(*averages) if averages[0] else None,
        "figures": float(unlike.max()) if len(unlike) else None,
    }


def supervise(folder: Path) -> None:
    """Masks and scores of the training images, for the methods that learn from them."""
    from wsss.data.shapes import Shapes

    shapes = Shapes(size=32, train_size=6, num_classes=4)
    (folder / "masks").mkdir()
    (folder / "scores").mkdir()
    for index, image_id in enumerate(shapes.ids):
        mask = shapes.mask(index)
        mask[: 4 * index] = 255  # pixels that do not count, in every image others
        Image.fromarray(mask).save(folder / "masks" / f"{image_id}.png")
        ids = np.unique(mask[(mask > 0) & (mask < 255)]).astype(np.int64)
        scores = (mask == np.array([0, *ids])[:, None, None]).astype(np.float16)
        np.savez(folder / "scores" / f"{image_id}.npz", low=scores, high=scores, ids=ids)


def failures(row: dict[str, Any]) -> list[str]:
    """What of a row is not as it should be."""
    large = [key for key, limit in TOLERANCE.items() if row[key] is not None and not row[key] <= limit]
    return large if row["same images"] else ["same images", *large]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS)
    given = parser.parse_args()
    import wsss.commands.train  # once for all runs
    import wsss.methods.base  # noqa: F401

    failed = False
    columns = ("same images", "own", *TOLERANCE)
    print(f"{'method':22} {' '.join(f'{column:>12}' for column in columns)}")
    with tempfile.TemporaryDirectory() as place:
        supervise(Path(place))
        for method in given.methods:
            row = compare(method, Path(place) / method.replace(" ", "_"))
            cells = ("" if v is None else v if isinstance(v, bool) else f"{v:.1e}" for v in row.values())
            wrong = failures(row)
            failed |= bool(wrong)
            print(f"{method:22} {' '.join(f'{cell!s:>12}' for cell in cells)} {'!' if wrong else ''}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Interrupted runs are the uninterrupted run: kills a training again and again, lets it end, and compares.

    python tests/kill.py [--kills 10] [--steps 60] [METHOD ...]

Every method trains on small shapes with two loader workers. At steps drawn from those of the run, and up to a tenth of
a second later, the process gets SIGKILL, and the same command with resume=auto is started. At the end weights,
optimizer, schedules, every logged number and metrics.json (without seconds and memory) have to be those of the run that
nobody disturbed, bit by bit.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny import (
    COSA_OVERRIDES,
    FROZEN_OVERRIDES,
    IRN_OVERRIDES,
    MCTFORMER_OVERRIDES,
    OVERRIDES,
    RESNET38_OVERRIDES,
    WEAKTR_OVERRIDES,
    WECLIP_OVERRIDES,
    WECLIP_PLUS_OVERRIDES,
    call,
)

SETTINGS = {
    "toco": [*OVERRIDES, "method.phases=[{until: 20, weights: {seg: null, dense_energy: null}}]"],
    "cosa": COSA_OVERRIDES,
    **dict.fromkeys(("mctformer", "mctformer_v1"), MCTFORMER_OVERRIDES),
    "mctformer_plus": [o for o in MCTFORMER_OVERRIDES if "epochs" not in o],
    "weaktr": WEAKTR_OVERRIDES,
    **dict.fromkeys(("cam", "seam", "ppc"), RESNET38_OVERRIDES),
    "rcm_mam": [*RESNET38_OVERRIDES, "method.prototypes=memory"],
    "irn": IRN_OVERRIDES,
    "frozen_cam": FROZEN_OVERRIDES,
    "weclip": WECLIP_OVERRIDES,
    "weclip with dino": WECLIP_PLUS_OVERRIDES,
}


def settings(method: str, steps: int, workers: int = 2) -> list[str]:
    """The command of a run; a third of its steps between checkpoints."""
    mine = [
        f"method={method.split()[0]}",
        *(o for o in SETTINGS[method] if not o.startswith(("data.num_workers", "trainer.max"))),
    ]
    mine = [o for o in mine if not o.startswith("trainer.val_check_interval")]
    return [
        *mine,
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps // 3}",
        f"data.num_workers={workers}",
    ]


def child(arguments: list[str], seen: Path) -> None:
    with seen.open("a") as file:  # what it says is not looked at, but kept
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os._exit(call("train", *arguments))


def start(arguments: list[str], folder: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=child, args=(arguments, folder / "output.txt"))
    process.start()
    return process


def finish(arguments: list[str], folder: Path) -> None:
    process = start(arguments, folder)
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{arguments} ended with {process.exitcode}: {(folder / 'output.txt').read_text()[-2000:]}")


def leaves(node: Any, key: str = "") -> dict[str, Any]:
    """Everything in nested containers, by its path."""
    if isinstance(node, dict | list | tuple):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for name, value in pairs for k, v in leaves(value, f"{key}/{name}").items()}
    return {key: node}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b or (a != a and b != b))  # NaN is NaN


COST = ("seconds", "peak_memory_mb", "images_per_second", "waiting_for_data")


def compare(undisturbed: Path, killed: Path) -> tuple[int, list[str]]:
    """How many values two runs have in common, and which differ."""
    values: list[dict[str, Any]] = []
    for run in (undisturbed, killed):
        found: dict[str, Any] = {"log": (run / "log/metrics.csv").read_text()}
        figures = json.loads((run / "metrics.json").read_text())
        found["metrics"] = {k: v for k, v in figures.items() if k not in COST}
        for path in sorted((run / "checkpoints").iterdir()):
            checkpoint = torch.load(path, weights_only=True)
            # the evaluation's counters of batches: one that follows a kill at the last step is made by another loop
            counters = [key for key in leaves(checkpoint["loops"]) if "val_loop" in key or "validate_loop" in key]
            found[path.name] = {k: v for k, v in leaves(checkpoint).items() if k.removeprefix("/loops") not in counters}
        values.append(leaves(found))
    first, second = values
    return len(first), [key for key in first | second if not same(first.get(key), second.get(key))]


def kill(arguments: list[str], folder: Path, log: Path, step: int, delay: float) -> int:
    """Start a run and kill it some seconds after it has logged a step; the last step in its log."""
    began = time.time()
    process = start(arguments, folder)
    while process.exitcode is None and not (log.exists() and log.stat().st_mtime > began and last_step(log) >= step):
        process.join(0.002)
    process.join(delay)
    if process.exitcode is not None:
        raise SystemExit(f"the run ended with {process.exitcode} before it could be killed at step {step}")
    process.kill()
    process.join()
    return last_step(log)


def last_step(log: Path) -> int:
    steps = [row.partition(",")[0] for row in log.read_text().splitlines()[1:]]
    return max((int(step) for step in steps if step), default=0)


def trial(method: str, folder: Path, steps: int, kills: int, rng: random.Random) -> tuple[int, list[str], list[int]]:
    """Train undisturbed and killed; how many values agree, which do not, and the steps logged at each kill."""
    folder.mkdir(parents=True)
    arguments = settings(method, steps)
    finish([*arguments, f"hydra.run.dir={folder / 'undisturbed'}"], folder)
    again = [*arguments, f"hydra.run.dir={folder / 'killed'}", "resume=auto"]
    log = folder / "killed/log/metrics.csv"
    # in ascending order, so that each lies ahead of the checkpoint the run goes on from
    moments = sorted(rng.randrange(1, steps) for _ in range(kills))
    reached = [kill(again, folder, log, step, rng.uniform(0, 0.1)) for step in moments]
    finish(again, folder)
    agreeing, different = compare(folder / "undisturbed", folder / "killed")
    return agreeing, different, reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "methods", nargs="*", default=[method for method in SETTINGS if method != "irn"]
    )  # which needs masks
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    import wsss.commands.evaluate  # once for all runs
    import wsss.methods.base  # noqa: F401

    failed = False
    with tempfile.TemporaryDirectory() as place:
        for method in given.methods:
            folder = Path(place) / method
            agreeing, different, reached = trial(method, folder, given.steps, given.kills, random.Random(given.seed))
            failed |= bool(different)
            print(f"{method:15} {agreeing} values, {len(different)} differ {different[:3] or ''}; killed at {reached}")
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Images a second of whole commands by the clock, on all cores, or in turn with those of another checkout.

    python -m tests.benchmarks.throughput [CASE ...] [--images 48] [--repeats 3] [--before CHECKOUT] [--json FILE]

Photographs are 500 x 375 pixels of smooth noise, networks start from random weights: ToCo's with timm's tiny ViT, CAM's
with lite0, both with 20 classes. A command runs for 8 images and for all of them, and what the one takes more than the
other counts: start, imports and the pictures of an evaluation do not. Other processes on the machine do, so look for a
quiet one.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks.harness import HERE, command_line, keep
from wsss.assemble import local_device
from wsss.writing import write_mask

CLASSES, FEW = 20, 8
RUN = """
import sys
root = sys.argv.pop(1)
sys.path.insert(0, root)
from wsss.commands.{} import main
assert sys.modules["wsss"].__file__.startswith(root)
main()
"""
TOCO = ("method=toco", "method.backbone=vit_tiny_patch16_224", "method.projector={hidden: 16, bottleneck: 8, out: 16}")
CAM = ("method=cam", "method.backbone=efficientnet_lite0", "method.cam_scales=[1.0]")
CASES = {  # method, command, its settings
    "label": (CAM, "label", ("cams=true", "overlay=true")),
    "label crf": (CAM, "label", ("refine=crf",)),
    "label par": (CAM, "label", ("refine=par",)),
    "label scales": (CAM, "label", ("refine=crf", "method.cam_scales=[1.0,0.5,1.5,2.0]")),
    "predict": (TOCO, "predict", ()),
    "predict crf": (TOCO, "predict", ("protocol.crf={iterations: 10}",)),
    "eval": (TOCO, "evaluate", ("protocol=single_scale",)),
    "eval crf": (TOCO, "evaluate", ("protocol=single_scale", "protocol.crf={iterations: 10}")),
}


def make_photographs(root: Path, count: int) -> None:
    """`all`, so many, and `few` of them in folders, their labels and their masks."""
    generator = np.random.default_rng(0)
    for name, number in (("all", count), ("few", FEW)):
        rows = ["file,labels"]
        for index in range(number):
            cells = generator.integers(0, 256, (6, 8, 3)).astype(np.uint8)
            path = root / name / f"{index:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(cells).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
            shown = sorted(generator.choice(CLASSES, 3, replace=False).tolist())
            rows.append(f"{path.name},{';'.join(f'class{c:02d}' for c in shown)}")
            ids = np.array([0, *(c + 1 for c in shown)], np.uint8)[generator.integers(0, 4, (6, 8))]
            write_mask(root / f"{name}_masks" / f"{index:04d}.png", ids.repeat(63, 0).repeat(63, 1)[:375, :500])
        (root / f"{name}.csv").write_text("\n".join(rows) + "\n")


def run(checkout: Path, command: str, *arguments: str) -> float:
    """Seconds that a command takes with the library of a checkout."""
    start = time.perf_counter()
    code = [sys.executable, "-c", RUN.format(command), str(checkout), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    ended = subprocess.run(code, capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise SystemExit(f"{command} {' '.join(arguments)} has failed:\n{ended.stdout}{ended.stderr}")
    return time.perf_counter() - start


def data(root: Path, name: str) -> list[str]:
    classes = ",".join(f"class{c:02d}" for c in range(CLASSES))
    return [
        "dataset=folder",
        f"dataset.root={root / name}",
        f"dataset.labels={root / name}.csv",
        f"dataset.classes=[{classes}]",
    ]


def seconds(checkout: Path, root: Path, case: str, name: str) -> float:
    """Of the command of a case on the photographs of a name."""
    method, command, settings = CASES[case]
    given = [f"checkpoint={root / method[0]}/checkpoints/last.ckpt", *settings]
    with tempfile.TemporaryDirectory() as out:
        if command == "predict":
            return run(checkout, command, *given, f"images={root / name}", f"out={out}/masks")
        given += data(root, name)
        if command == "label":
            return run(checkout, command, *given, f"out={out}/masks")
        masks = ["dataset.val=all", f"dataset.masks={root / name}_masks"]
        return run(checkout, command, *given, *masks, f"hydra.run.dir={out}/eval", "trainer.enable_progress_bar=false")


def main() -> None:
    parser = command_line(CASES, __doc__, repeats=3)
    parser.add_argument("--images", type=int, default=48, help=f"more than {FEW}")
    given = parser.parse_args()
    if given.images <= FEW:
        parser.error(f"--images is {given.images}: expected more than {FEW}")
    chosen, checkouts = given.cases or list(CASES), [HERE, *filter(None, [given.before])]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_photographs(root, given.images)
        for method in dict.fromkeys(CASES[case][0] for case in chosen):
            steps = ["trainer.max_steps=1", "data.batch_size=1", "monitor=null", f"hydra.run.dir={root / method[0]}"]
            run(checkouts[-1], "train", *method, "method.weights=null", *data(root, "few"), *steps)
        print(f"{'case':16}{'images/s':>10}" + (f"{'before':>10}{'ratio':>8}" if given.before else ""))
        for case in chosen:
            rates: list[list[float]] = []
            for _ in range(given.repeats + 1):  # the first one warms up
                took = [[seconds(checkout, root, case, name) for name in ("all", "few")] for checkout in checkouts]
                rates.append([(given.images - FEW) / (many - few) for many, few in took])
            rate, *before = (statistics.median(column) for column in zip(*rates[1:], strict=True))
            cost = {"images_per_second": rate, "device": str(local_device()), "cores": os.cpu_count()}
            shown = f"{case:16}{rate:10.2f}"
            if before:
                ratio = statistics.median(now / other for now, other in rates[1:])
                cost |= {"before_images_per_second": before[0], "ratio": ratio}
                shown += f"{before[0]:10.2f}{ratio:8.2f}"
            print(shown, flush=True)
            keep(given.json, {"benchmark": "throughput", "case": case} | cost)


if __name__ == "__main__":
    main()

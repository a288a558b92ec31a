"""Steps of training by two versions of the code in turn: processor time, peak memory, and how far the numbers differ.

What `classes.py` and `resnet38_steps.py` share. A process for each version imports it once and forks one for each case,
so that peaks of memory belong to a case. Rounds of both versions take turns, on one thread, so that what else the
machine does falls on both; processor time leaves out what it takes away. A method of more than 254 classes is refused
outside of here, as masks have 8 bits.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
PPC = {
    "view_size": 128,
    "projection": 128,
    "losses": {k: {"weight": 1.0} for k in ("cls", "rvmin", "er", "ecr", "ppc")},
}


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--before", type=Path, required=True, help="root of the other version, e.g. a git worktree")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--size", type=int, default=128, help="side of the training images")
    return made


class Version:
    """A process with one version of the code."""

    def __init__(self, root: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, question: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def compare(versions: list[Version], case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Medians of both versions of a case, and the largest difference of loss terms and gradients.

    Differences are relative, of a gradient to the largest value of its tensor.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{number}" for number in range(len(versions))]
        for version, path in zip(versions, paths, strict=True):
            version.ask(case | {"path": path})  # the first step warms up and is saved
        answers = [[version.ask("step") for version in versions] for _ in range(rounds)]
        for version in versions:
            version.ask("end")
        (terms, gradients), (other_terms, other_gradients) = (torch.load(path) for path in paths)
    apart = [
        (a - b).abs().max() / a.abs().max().clamp(min=1e-12) for a, b in zip(gradients, other_gradients, strict=True)
    ]
    return {
        "seconds": [statistics.median(round[i]["seconds"] for round in answers) for i in (0, 1)],
        "mib": [answers[-1][i]["mib"] for i in (0, 1)],
        "terms": max(abs(terms[key] - other_terms[key]) / max(abs(terms[key]), 1e-12) for key in terms),
        "gradients": float(max(apart)),
    }


def show(name: str, found: dict[str, Any]) -> None:
    before, after = found["seconds"]
    print(
        f"{name:22}{before:10.2f}{after:9.2f}{after / before:7.2f}{found['mib'][0]:12.0f}{found['mib'][1]:9.0f}"
        f"{found['terms']:12.1e}{found['gradients']:11.1e}",
        flush=True,
    )


HEADER = f"{'':22}{'CPU s':>10}{'after':>9}{'ratio':>7}{'peak MiB':>12}{'after':>9}{'terms':>12}{'gradients':>11}"


def serve() -> None:
    """Forks a process for every case that is asked for."""
    import torch

    import wsss.methods.rcm_mam
    import wsss.methods.seam
    import wsss.methods.stage
    import wsss.methods.toco

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of random weights
    wsss.methods.stage.check_classes = lambda classes: None
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            steps(json.loads(line))
            os._exit(0)
        os.waitpid(child, 0)


def steps(case: dict[str, Any]) -> None:
    """One step, saved, then one for every line that is read."""
    import torch
    import torch.nn.functional as F

    from wsss.methods.rcm_mam import RCMMAM
    from wsss.methods.seam import SEAM
    from wsss.methods.toco import ToCo

    classes, size, images = case["classes"], case["size"], case["images"]
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"backbone_args": {"width": case.get("width", 8)}}
    if case["method"] == "toco":
        arguments = {
            "backbone": "vit_tiny_patch16_224",
            "backbone_args": {"img_size": size},
            "projector": {"hidden": 256, "bottleneck": 64, "out": 256},
            "local_crop_size": size // 2,
        }
    made = {"toco": ToCo, "seam": SEAM, "ppc": SEAM, "rcm_mam": RCMMAM}[case["method"]]
    method: Any = made(classes, **arguments, **(PPC if case["method"] == "ppc" else {})).train()
    method.log = method.log_dict = lambda *_, **__: None
    label = torch.zeros(images, classes)
    label[0, [3, 7]], label[1:, 11] = 1, 1
    image = F.interpolate(torch.randn(images, 3, size // 8, size // 8), size=(size, size), mode="bicubic")
    box = torch.tensor([[0, size, 0, size]] * images)
    batch = {"image": image, "label": label, "image_box": box, "global_view": image.flip(-1), "local_source": image}
    batch = method.on_before_batch_transfer(batch, 0)

    def step() -> dict[str, Any]:
        torch.manual_seed(1)
        method.zero_grad()
        start = time.process_time()
        output = method.training_step(batch, 0)
        output["loss"].backward()
        answer = {"seconds": time.process_time() - start}
        return answer | {"mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "terms": output["terms"]}

    terms = {key: float(term) for key, term in step()["terms"].items()}
    torch.save((terms, [p.grad for p in method.parameters() if p.grad is not None]), case["path"])
    print("true", flush=True)
    while json.loads(sys.stdin.readline()) == "step":
        answer = step()
        print(json.dumps({"seconds": answer["seconds"], "mib": answer["mib"]}), flush=True)
    print("true", flush=True)


if __name__ == "__main__":
    serve()

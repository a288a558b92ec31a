"""What a GPU makes of the parts that are most of the papers' cost, under ten minutes on an H100.

    python -m tests.benchmarks.gpu [--json FILE]
    python -m tests.benchmarks.gpu --tiny        the same code on a processor, in small: no figure of it means anything

First the same numbers as in double precision have to come out; then milliseconds by CUDA events, the median of ten
rounds after three, and the most memory that was allocated. The variants are settings that a user or we could choose:
bf16 autocast, attention fused or not, channels last, torch.compile.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.cases import method_of, on_device, optimizer_of, training_batch
from tests.benchmarks.refine import colours, scores
from wsss.lattice import PermutohedralLattice
from wsss.refine.crf import dense_crf
from wsss.refine.par import PAR

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
SMALL = {"decoder_channels": 8, "projector": {"hidden": 16, "bottleneck": 8, "out": 16}}
TINY: dict[str, dict[str, Any]] = {
    "toco": {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT, "local_crop_size": 16, **SMALL},
    "mctformer": {"backbone": "vit_tiny_patch16_224", "backbone_args": VIT, "attention_layers": 2},
    "cam": {"backbone_args": {"width": 4}},
}
NETWORK = {"toco": "encoder", "mctformer": "encoder", "cam": "backbone"}
"""Which part of a method is compiled: the network, never the LightningModule."""


class Bench:
    """Runs cases on a device and prints a line for each."""

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.device = tiny, torch.device("cpu" if tiny else "cuda")
        self.lines: list[dict[str, Any]] = []

    def measure(self, name: str, run: Callable[[], Any], images: int = 1) -> None:
        """Milliseconds of a call, images a second, and MiB."""
        warm, rounds = (1, 1) if self.tiny else (3, 10)
        gc.collect()  # the networks of earlier cases are memory of theirs
        if not self.tiny:
            torch.cuda.reset_peak_memory_stats()
        took = [self.milliseconds(run) for _ in range(warm + rounds)][warm:]
        peak = 0.0 if self.tiny else torch.cuda.max_memory_allocated() / 2**20
        ms = statistics.median(took)
        self.lines.append({"case": name, "ms": ms, "images_per_s": 1000 * images / ms, "peak_mib": peak})
        print(f"{name:44}{ms:10.2f}{1000 * images / ms:10.1f}{peak:10.0f}", flush=True)

    def milliseconds(self, run: Callable[[], Any]) -> float:
        if self.tiny:
            start = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def method(self, name: str) -> Any:
        torch.manual_seed(0)
        return method_of(name, **(TINY[name] if self.tiny else {})).to(self.device)

    def autocast(self, bf16: bool) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def step(
        self,
        name: str,
        count: int,
        side: int,
        bf16: bool = False,
        fused_attention: bool = True,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        """A training step of batches that are on the device already."""
        variant = {"bf16": bf16, "attention not fused": not fused_attention}
        variant |= {"channels last": channels_last, "compiled": compiled}
        words = ", ".join(word for word, on in variant.items() if on) or "fp32"
        method = self.method(name)
        count, side = (2, 32) if self.tiny else (count, side)
        batch = on_device(training_batch(method, count, side), self.device)
        for module in method.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused_attention
        if channels_last:
            method.to(memory_format=torch.channels_last)
            batch["image"] = batch["image"].to(memory_format=torch.channels_last)
        if compiled:
            getattr(method, NETWORK[name]).compile(backend="eager" if self.tiny else "inductor", dynamic=False)
        optimizer = optimizer_of(method)

        def run() -> None:
            optimizer.zero_grad()
            with self.autocast(bf16):
                loss = method.training_step(batch, 0)["loss"]
            loss.backward()
            optimizer.step()

        self.measure(f"{name} step, {count} of {side}: {words}", run, count)

    def passes(self, name: str, side: int, bf16: bool) -> None:
        """A refined CAM of one image, without gradients."""
        method, side = self.method(name).eval(), 32 if self.tiny else side
        image = torch.randn(1, 3, side, side, device=self.device)

        def run() -> None:
            with torch.no_grad(), self.autocast(bf16):
                method(image)

        self.measure(f"{name} CAM of {side}: {'bf16' if bf16 else 'fp32'}", run)

    def correct(self) -> None:
        """Raises SystemExit where single precision on this device is far from double precision on the host."""
        method = self.method("mctformer").eval()
        exact = copy.deepcopy(method).cpu().double()
        image = torch.randn(2, 3, *[32 if self.tiny else 224] * 2)
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected = exact(image.double())
            for bf16, most in ((False, 1e-3), (True, 0.2)):
                with self.autocast(bf16):
                    found = method(image.to(self.device))
                for key in ("logits", "cam"):
                    self.compare(f"mctformer {key}, {'bf16' if bf16 else 'fp32'}", found[key], expected[key], most)
            photograph, masks = colours(48, 64) / 255, scores(3)[..., :48, :64]
            par = PAR()
            expected_par = copy.deepcopy(par).double()(photograph.double(), masks.double())
            self.compare(
                "PAR", par.to(self.device)(photograph.to(self.device), masks.to(self.device)), expected_par, 1e-3
            )
            features, values = torch.randn(1, 500, 5), torch.rand(1, 500, 4)
            exactly = PermutohedralLattice(features.double())(values.double())
            found_values = PermutohedralLattice(features.to(self.device))(values.to(self.device))
            self.compare("lattice", found_values, exactly, 1e-3)
            crf = dense_crf(255 * photograph.to(self.device), masks.to(self.device))
            self.compare("CRF, with that of the host", crf, dense_crf(255 * photograph, masks).double(), 1e-2)

    @staticmethod
    def compare(name: str, found: Tensor, expected: Tensor, most: float) -> None:
        error = float((found.cpu().double() - expected).abs().max() / expected.abs().max())
        print(f"{name:44}differs by {error:.1e} of the largest value")
        if not error <= most:
            raise SystemExit(f"{name} is wrong: it differs by {error:.1e}, expected at most {most:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small networks on the processor, to test this script")
    parser.add_argument("--json", type=Path, help="file to which a line for each case is appended")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --tiny runs the script on the processor")
    bench = Bench(given.tiny)
    hardware = "processor" if given.tiny else torch.cuda.get_device_name()
    print(f"{hardware}, torch {torch.__version__}")
    bench.correct()
    print(f"{'case':44}{'ms':>10}{'images/s':>10}{'peak MiB':>10}")
    for name, count, side in (("toco", 4, 448), ("mctformer", 64, 224)):
        bench.step(name, count, side)
        bench.step(name, count, side, bf16=True)
        bench.step(name, count, side, bf16=True, fused_attention=False)
    for bf16 in (False, True):
        bench.passes("mctformer", 448, bf16)
    for channels_last in (False, True):
        bench.step("cam", 16, 448, bf16=True, channels_last=channels_last)
    image, probability = colours().to(bench.device), scores(21).to(bench.device)
    if bench.tiny:
        image, probability = image[..., :24, :32], probability[..., :24, :32]
    bench.measure("CRF 500 x 375, 21 labels", lambda: dense_crf(image, probability))
    par = PAR().to(bench.device)
    bench.measure("PAR 500 x 375, 21 channels", lambda: par(image / 255, probability))
    for name, count, side in (("toco", 4, 448), ("mctformer", 64, 224)):  # last: compiling takes a minute or two
        bench.step(name, count, side, bf16=True, compiled=True)
    if given.json is not None:
        with given.json.open("a") as file:
            for line in bench.lines:
                print(
                    json.dumps({"benchmark": "gpu", "device": hardware, "torch": torch.__version__} | line), file=file
                )


if __name__ == "__main__":
    main()

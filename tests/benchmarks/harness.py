"""Times cases in processes of their own, in turn with those of another checkout, and says what they cost.

A benchmark is a module `tests/benchmarks/NAME.py` with `CASES`: by name a function that prepares a case and returns
what is timed. `python -m tests.benchmarks.NAME` prints a table, the medians of `--repeats` rounds after one to warm up:

* `cpu ms`, processor time of the process and its children on one thread. Where other processes share the machine, the
  clock (`wall ms`) says nothing.
* `peak MiB` that the process held at most, interpreter and libraries included.
* with `--before DIR`, a checkout of another version of this library: the same of that one, run in turn, and `ratio`,
  the median of the rounds' own ratios of processor time, now to before. `apart` is how far the tensors are from each
  other that both returned in the first round, if the case returns some by name: the largest difference, relative to
  the largest value of its tensor. Both have started from the same seed.

`--json FILE` appends a line for each case, with versions and processor, by which machines and months are compared.
"""

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
Case = Callable[[], Callable[[], Any]]
START = """
import sys
sys.path.insert(0, sys.argv[1])
import wsss
assert wsss.__file__.startswith(sys.argv[1]), wsss.__file__
sys.path.insert(0, sys.argv[2])
from tests.benchmarks.harness import serve
serve(*sys.argv[3:])
"""
"""A process takes wsss from the one checkout and the benchmark from this one."""


def cpu() -> float:
    """Seconds of processor time of this process and the children that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak() -> float:
    """MiB that this process or one of its children held at most."""
    unit, whose = 2**20 if sys.platform == "darwin" else 2**10, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    own, children = (resource.getrusage(who).ru_maxrss / unit for who in whose)
    status = Path("/proc/self/status")
    if status.exists():  # what the process that has started this one held counts in the other
        own = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 2**10
    return max(own, children)


def serve(module: str, name: str, returned: str = "") -> None:
    """Prepare a case; then run it once for each line of stdin, and answer what it took.

    The file `returned`, if one is named, receives the tensors that the first round has returned.
    """
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a case prints is no answer
    run = importlib.import_module(module).CASES[name]()
    for _ in sys.stdin:
        start = cpu(), time.perf_counter()
        found = run()
        took = {"cpu": cpu() - start[0], "wall": time.perf_counter() - start[1]}
        took |= {"peak": peak()}
        if returned:
            named = found.items() if isinstance(found, Mapping) else ()
            torch.save({key: value for key, value in named if isinstance(value, torch.Tensor)}, returned)
            returned = ""
        del found
        answers.write(json.dumps(took) + "\n")


class Worker:
    """A process that runs a case of `module` with the library of a checkout."""

    def __init__(self, checkout: Path, module: str, name: str, returned: str = "") -> None:
        command = [sys.executable, "-c", START, str(checkout), str(HERE), module, name, returned]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.rounds: list[dict[str, float]] = []

    def run(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print("go", file=self.process.stdin, flush=True)
            self.rounds.append(json.loads(self.process.stdout.readline()))
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(f"a case has failed:\n{self.process.communicate()[1]}") from None

    def close(self) -> dict[str, float]:
        """The medians of the rounds after the first one, in milliseconds, and the peak in MiB."""
        self.process.communicate()
        cost = {f"{key}_ms": 1000 * statistics.median(r[key] for r in self.rounds[1:]) for key in ("cpu", "wall")}
        return cost | {"peak_mib": self.rounds[-1]["peak"]}


def measure(module: str, name: str, repeats: int, before: Path | None) -> dict[str, Any]:
    """What a case costs, and with `before` the cost there and the ratio."""
    if before is None:
        worker = Worker(HERE, module, name)
        for _ in range(repeats + 1):
            worker.run()
        return dict(worker.close())
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/now", f"{folder}/before"]
        workers = [Worker(root, module, name, path) for root, path in zip((HERE, before), paths, strict=True)]
        for _ in range(repeats + 1):
            for worker in workers:
                worker.run()
        now, other = (worker.close() for worker in workers)
        difference = apart(*paths)
    rounds = zip(*(worker.rounds[1:] for worker in workers), strict=True)
    ratio = statistics.median(a["cpu"] / b["cpu"] for a, b in rounds)
    return now | {"ratio": ratio, "apart": difference} | {f"before_{key}": value for key, value in other.items()}


def apart(path: str, other_path: str) -> float | None:
    """The largest difference of tensors of the same name, relative to the largest value of each; None without any."""
    import torch

    found, other = torch.load(path), torch.load(other_path)
    pairs = [(found[name].double(), other[name].double()) for name in found.keys() & other.keys()]
    differences = [((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item() for a, b in pairs if a.numel()]
    return max(differences, default=None)


def main(module: str, cases: Mapping[str, Case], doc: str | None) -> None:
    """The command line of a benchmark; `module` is its name, `cases` its CASES."""
    given = command_line(cases, doc, repeats=5).parse_args()
    columns = {"cpu_ms": "cpu ms", "wall_ms": "wall ms", "peak_mib": "peak MiB"}
    if given.before:
        columns |= {"before_cpu_ms": "before", "before_peak_mib": "peak", "ratio": "ratio", "apart": "apart"}
    print(f"{'case':28}" + "".join(f"{title:>10}" for title in columns.values()))
    for name in given.cases or cases:
        cost = measure(module, name, given.repeats, given.before)
        kinds = {"ratio": "10.2f", "apart": "10.1e"}
        shown = ("         -" if cost[key] is None else f"{cost[key]:{kinds.get(key, '10.1f')}}" for key in columns)
        print(f"{name:28}" + "".join(shown), flush=True)
        keep(given.json, {"benchmark": module.rpartition(".")[2], "case": name} | cost)


def command_line(cases: Iterable[str], doc: str | None, repeats: int) -> argparse.ArgumentParser:
    """What benchmarks of cases take."""

    def known(name: str) -> str:
        if name not in cases:
            raise argparse.ArgumentTypeError(f"{name} is no case: known are {', '.join(cases)}")
        return name

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", type=known, help=f"of {', '.join(cases)}; all unless given")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--before", type=lambda path: Path(path).resolve(), help="checkout of another version")
    parser.add_argument("--json", type=Path, help="file to which a line for each case is appended")
    return parser


def keep(path: Path | None, row: Mapping[str, Any]) -> None:
    """Appends what was measured, with machine and versions, to the file that was asked for, if any was."""
    if path is not None:
        with path.open("a") as file:
            print(json.dumps({**row, **machine()}), file=file)


def machine() -> dict[str, str]:
    """Where and when, and with which versions."""
    import torch

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": processor(),
    }


def processor() -> str:
    """Its name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()

"""Damaged and hostile files end in a sentence: mutates checkpoints, labels, images and run directories, and counts.

    python tests/fuzz.py [--checkpoints 1000] [--labels 1000] [--images 300] [--runs 200] [--seed 0] [--keep DIR]

Each case is a command in a process of its own, with 20 seconds and 4 GB: `wsss-eval` of a checkpoint, `wsss-data check`
of labels, `wsss-predict` of an image beside a good one, `wsss-train resume=auto` of a run directory. It may succeed, or
fail with one sentence and exit code 1 or 2. A traceback, a hang, too much memory, a process that dies, and a checkpoint
that is taken although it has to be refused, are failures: the exit code is then 1, and DIR gets what led to them.
"""

import argparse
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from tiny import OVERRIDES, call

SECONDS, BYTES = 20, 4 * 2**30
GOOD, BAD = ("fine", "one sentence"), ("TRACEBACK", "HANG", "MEMORY", "DIED", "SILENT CHANGE")
QUIET = ["data.num_workers=0", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]


class Case(NamedTuple):
    """A command on something mutated."""

    what: str
    command: str
    arguments: list[str]
    refuse: bool = False  # it must not succeed
    figures: bool = False  # where it succeeds, it must measure what the good one does


class Ended(NamedTuple):
    outcome: str
    said: str


def run(case: Case, folder: Path) -> Ended:
    """The command in a process of its own, watched."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            os.chdir(folder)
            output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            code = call(case.command, *case.arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    pages = Path(f"/proc/{child}/statm")
    large = False
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > BYTES and not large:
            large = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(ended[1])
    said = (folder / "output.txt").read_text(errors="replace")
    sentences = [line for line in said.splitlines() if line.startswith(f"wsss-{case.command}")]
    if large:
        outcome = "MEMORY"
    elif code < 0:
        outcome = "HANG" if code == -signal.SIGALRM else "DIED"
    elif "Traceback" in said or code not in (0, 1, 2) or (code and len(sentences) != 1):
        outcome = "TRACEBACK"
    else:
        outcome = "one sentence" if code else "fine"
    if outcome == "fine" and case.refuse:
        outcome = "SILENT CHANGE"
    return Ended(outcome, sentences[0] if sentences else said.strip().rpartition("\n")[2])


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flips, deletes, inserts or repeats a few bytes, or cuts the end off."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place, length = rng.randrange(len(changed) or 1), rng.choice((1, 1, 2, 8, 64))
        match rng.randrange(5):
            case 0 | 1:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length] if rng.random() < 0.5 else rng.randbytes(length)
            case 4 if rng.random() < 0.2:
                del changed[place:]
    return bytes(changed)


def nested(times: int) -> Any:
    value: Any = 1
    for _ in range(times):
        value = {"a": value}
    return value


def places(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything in nested dicts and lists."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*above, key)
        yield from places(value, (*above, key))


def change(content: Any, place: tuple[Any, ...], rng: random.Random, values: dict[str, Any]) -> str:
    """Replace, drop, rename, wrap or repeat what stands at a path; what was done, in words."""
    node = content
    for key in place[:-1]:
        node = node[key]
    key = place[-1]
    how = rng.choice([*values, "drop", "rename", "wrap", "repeat"])
    old = node[key]
    if how == "drop":
        del node[key]
    elif how == "wrap":
        node[key] = rng.choice([{"x": old}, [old]])
    elif how == "repeat" and isinstance(node, dict):
        node[f"{key}_2"] = old
    elif how == "repeat":
        node.insert(key, old)
    elif how == "rename" and isinstance(node, dict):
        node[rng.choice([f"{key}x", "../x", "", "a" * 100_000, "_target_"])] = node.pop(key)
    else:
        value = values.get(how)
        node[key] = value(old) if callable(value) else deepcopy(value)
    return how


PLAIN: dict[str, Any] = {
    **{repr(v): v for v in (None, True, False, 0, 1, -1, 3, 10**9, 10**30, 1e9, 1e-9, -0.5, 7.5, math.nan, math.inf)},
    **{
        repr(v): v
        for v in ("", "x", "../../x", "null", "${oc.env:HOME}", "a\nb", "\x1b[31m", "é" * 9, [], {}, [1], [0])
    },
    **{repr(v): v for v in (["a"], [[1]], {"a": 1}, {"until": 1}, [-1.0], [math.nan], [1e9])},
    "long": "a" * 3_000_000,
    "deep": nested(300),
    "wide": list(range(100_000)),
}
NEVER = {"nan", "inf", "long", "deep", "wide", "[nan]", repr(10**30)}
TENSORS: dict[str, Any] = {
    **{name: PLAIN[name] for name in ("None", "3", "'x'", "[1]", "{}", "nan", "long", "deep")},
    "NaN": lambda t: t * math.nan if t.is_floating_point() else None,
    "one infinite": lambda t: torch.cat([t.flatten()[:-1].float(), torch.tensor([math.inf])]).view(t.shape),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "expanded": lambda t: torch.zeros(1).expand(10**12),
    "whole numbers": lambda t: t.long() if t.is_floating_point() else t.float(),
    "complex": lambda t: t.to(torch.complex64),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "flat": lambda t: t.flatten() if t.ndim > 1 else t[None],
    "longer": lambda t: torch.cat([t, t]) if t.ndim else t.repeat(2),
    "half": lambda t: t.half() if t.is_floating_point() else t,
    "double": lambda t: t.double() if t.is_floating_point() else t,
    "zero": lambda t: t * 0,
    "large": lambda t: t * 1e30 if t.is_floating_point() else t,
    "view": lambda t: t.flip(0).flip(0).contiguous().as_strided(t.shape, t.stride()),
}
ALLOWED = {"half", "double", "zero", "large", "view"}


def checkpoints(rng: random.Random, folder: Path, good: Path) -> Case:
    path = folder / "x.ckpt"
    arguments = [f"checkpoint={path}", f"hydra.run.dir={folder / 'out'}", *QUIET]
    if rng.random() < 0.3:
        path.write_bytes(mutate(good.read_bytes(), rng))
        return Case("bytes", "eval", arguments, figures=True)
    content = torch.load(good, weights_only=True)
    content = {key: content[key] for key in ("state_dict", "hyper_parameters", "wsss")}
    if rng.random() < 0.1:
        how = change(content, (rng.choice(list(content)),), rng, PLAIN)
        torch.save(content, path)
        return Case(f"top {how}", "eval", arguments, refuse=how not in ("repeat",))
    part = rng.choice(list(content))
    if part == "state_dict":
        name = rng.choice(list(content[part]))
        how = change(content, (part, name), rng, TENSORS)
        refuse = how not in ALLOWED
    else:
        place = rng.choice(list(places(content[part], (part,))))
        name = ".".join(map(str, place[1:]))
        how = change(content, place, rng, PLAIN)
        refuse = how in NEVER
    torch.save(content, path)
    return Case(f"{part}.{name}: {how[:60]}", "eval", arguments, refuse)


LISTED = 'file,labels\n1.jpg,cat;dog\n2.jpg,\n3.jpg,dog\n"4.jpg",cat\n'
TABLE = "file,dog,cat\n1.jpg,1,0\n2.jpg,1,1\n3.jpg,0,0\n4.jpg,0,1\n"
COCO = {
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    "images": [{"id": n, "file_name": f"{n + 1}.jpg", "width": 20, "height": 16} for n in range(4)],
    "annotations": [
        {"id": n, "image_id": n, "category_id": (3, 7)[n % 2], "bbox": [0, 0, 9, 9], "iscrowd": 0, "area": 81,
         "segmentation": [[0, 0, 9, 0, 9, 9]]} for n in range(3)
    ],
}  # fmt: skip
CHOICE = {"id": "a", "type": "choices", "from_name": "l", "to_name": "image"}
STUDIO = [
    {"id": n, "data": {"image": f"/data/upload/1/abcdef12-{n}.jpg"}, "annotations": [
        {"id": n, "result": [CHOICE | {"value": {"choices": [("cat", "dog")[n % 2]]}}]}
    ]} for n in range(1, 5)
]  # fmt: skip
XML = "<?xml version='1.0'?>\n<annotation><filename>1.jpg</filename><object><name>cat</name></object></annotation>"


def labels(rng: random.Random, folder: Path, good: Path) -> Case:
    for number in range(1, 5):
        Image.new("RGB", (20, 16), (60 * number, 9, 200)).save(folder / f"{number}.jpg")
    kind = rng.choice(["list", "table", "coco", "studio", "xml", "npy"])
    names = {"list": "labels.csv", "table": "labels.csv", "xml": "1.xml", "npy": "cls_labels.npy"}
    path, how = folder / names.get(kind, "labels.json"), "bytes"
    if kind in ("coco", "studio"):
        content: Any = deepcopy(COCO if kind == "coco" else STUDIO)
        if rng.random() < 0.6:
            how = change(content, rng.choice(list(places(content))), rng, PLAIN)
        data = json.dumps(content).encode()
    elif kind == "npy":
        content = {str(n): np.array([n % 2, 1 - n % 2], np.float32) for n in range(1, 5)}
        if rng.random() < 0.6:
            how = change(content, rng.choice(list(places(content))), rng, PLAIN)
        box, buffer = np.empty((), object), io.BytesIO()
        box[()] = content
        np.save(buffer, box)
        data = buffer.getvalue()
        (folder / "class_names.txt").write_text("cat\ndog\n")
    else:
        text = {"list": LISTED, "table": TABLE, "xml": XML}[kind]
        if rng.random() < 0.5:
            how, parts = "cells", text.replace("\n", ",\n,").split(",")
            parts[rng.randrange(len(parts))] = rng.choice(
                ["", "x", "-1", "1e999", '"', "\0", "a" * 200_000, "../..", "é\ud800"]
            )
            text = ",".join(parts).replace(",\n,", "\n")
        data = text.encode(errors="surrogatepass")
    path.write_bytes(mutate(data, rng) if how == "bytes" else data)
    where = folder if kind == "xml" else path
    given = ["dataset=folder", f"dataset.root={folder}", f"dataset.labels={where}", "num_workers=0"]
    return Case(f"{kind}: {how[:60]}", "data", ["check", *given])


FORMATS = {"JPEG": "L RGB CMYK", "PNG": "1 L LA P RGB RGBA I;16", "TIFF": "1 L P RGB RGBA CMYK I;16 I F"}
FORMATS |= {"WEBP": "RGB RGBA", "BMP": "1 L P RGB"}
SIZES = [(40, 30), (40, 30), (40, 30), (1, 1), (1, 300), (3000, 2), (7, 9), (257, 31)]


def images(rng: random.Random, folder: Path, good: Path) -> Case:
    (folder / "images").mkdir()
    kind = rng.choice(list(FORMATS))
    mode, size = rng.choice(FORMATS[kind].split()), rng.choice(SIZES)
    buffer = io.BytesIO()
    noise = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    noise.convert("L").convert(mode).save(buffer, kind) if mode in ("I;16", "I", "F") else noise.convert(mode).save(
        buffer, kind
    )
    whole = rng.random() < 0.2
    suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    (folder / "images" / f"x.{suffix}").write_bytes(buffer.getvalue() if whole else mutate(buffer.getvalue(), rng))
    Image.new("RGB", (40, 30), "teal").save(folder / "images" / "good.png")
    given = [f"checkpoint={good}", f"images={folder / 'images'}", f"out={folder / 'out'}", "num_workers=0", "cam=true"]
    return Case(
        f"{kind} {mode} {size} {'whole' if whole else 'bytes'}",
        "predict",
        [*given, f"class_threshold={rng.random():.2f}"],
    )


def runs(rng: random.Random, folder: Path, good: Path) -> Case:
    run = folder / "run"
    shutil.copytree(good.parent.parent, run)
    if unfinished := rng.random() < 0.7:
        (run / "metrics.json").unlink()
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.suffix != ".png"]
    path = rng.choice(files)
    content = path.read_bytes()
    how = rng.choice(["empty", "junk", "NUL", "missing", "bytes", "folder", "list"])
    path.unlink()
    match how:
        case "folder":
            path.mkdir()
        case "missing":
            pass
        case _:
            damaged = {"empty": b"", "junk": rng.randbytes(300), "NUL": bytes(len(content)), "list": b"[1, 2]\n"}
            path.write_bytes(damaged.get(how) if how in damaged else mutate(content, rng))  # type: ignore[arg-type]
    what = f"{'unfinished' if unfinished else 'finished'}, {path.relative_to(run)} {how}"
    return Case(what, "train", [*OVERRIDES, f"hydra.run.dir={run}", "resume=auto"])


def import_all() -> None:
    """Once for all processes."""
    import wsss.callbacks
    import wsss.commands.data
    import wsss.commands.evaluate
    import wsss.commands.predict
    import wsss.commands.train
    import wsss.methods.toco
    import wsss.predictor  # noqa: F401


def measured(folder: Path) -> dict[str, float]:
    figures = json.loads((folder / "out" / "metrics.json").read_text())
    return {key: value for key, value in figures.items() if key.startswith("val/")}


KINDS: dict[str, Callable[[random.Random, Path, Path], Case]] = {
    "checkpoints": checkpoints,
    "labels": labels,
    "images": images,
    "runs": runs,
}


def fuzz(
    counts: dict[str, int], seed: int, good: Path, place: Path, keep: Path | None = None
) -> dict[str, Counter[str]]:
    """Outcomes of so many cases of each kind; `good` is the last checkpoint of a run."""
    table: dict[str, Counter[str]] = {}
    (place / "first").mkdir()
    first = run(
        Case("", "eval", [f"checkpoint={good}", f"hydra.run.dir={place / 'first/out'}", *QUIET]), place / "first"
    )
    assert first.outcome == "fine", first.said
    expected = measured(place / "first")
    for kind, count in counts.items():
        table[kind] = Counter()
        for number in range(count):
            folder = place / f"{kind}-{number}"
            folder.mkdir()
            case = KINDS[kind](random.Random(f"{seed} {kind} {number}"), folder, good)
            ended = run(case, folder)
            if ended.outcome == "fine" and case.figures and measured(folder) != expected:
                ended = ended._replace(outcome="SILENT CHANGE")
            table[kind][ended.outcome] += 1
            if ended.outcome in BAD:
                print(f"{ended.outcome}: {kind} {number}, {case.what!r}: {ended.said[:300]}", flush=True)
                if keep is not None:
                    shutil.copytree(folder, keep / folder.name, dirs_exist_ok=True)
            shutil.rmtree(folder)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, count in (("checkpoints", 1000), ("labels", 1000), ("images", 300), ("runs", 200)):
        parser.add_argument(f"--{kind}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    import_all()
    with tempfile.TemporaryDirectory() as place:
        trained = Path(place) / "trained"
        ended = run(Case("", "train", [*OVERRIDES, f"hydra.run.dir={trained}"]), Path(place))
        assert ended.outcome == "fine", ended.said
        counts = {kind: getattr(given, kind) for kind in KINDS}
        table = fuzz(counts, given.seed, trained / "checkpoints/last.ckpt", Path(place), given.keep)
    columns = (*GOOD, *BAD)
    print(f"{'':12}" + "".join(f"{column:>15}" for column in columns))
    for kind, outcomes in table.items():
        print(f"{kind:12}" + "".join(f"{outcomes[column]:15}" for column in columns))
    sys.exit(any(outcomes[column] for outcomes in table.values() for column in BAD))


if __name__ == "__main__":
    main()

"""What it costs to read photographs from files, from shards and from shards over HTTP, and to read an index.

    python -m tests.benchmarks.sources [CASE ...] [--before CHECKOUT] [--json FILE]

A round reads a hundred JPEGs of 500 x 375 pixels and some 84 kB in a shuffled order, as a loader does with one worker:
a hundred thousand divided by its milliseconds is images a second. The server is a process of its own on this machine,
whose processor time is not counted; `wall ms` also has the way there and back. `index` reads that of a million images
in a hundred shards: its peak, less that of the others, is what they take in memory.
"""

import json
import multiprocessing
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.benchmarks.harness import Case, main
from tests.served import FolderServer
from wsss.data.base import Images
from wsss.data.folder import Folder
from wsss.data.shards import Shards
from wsss.prepare.shards import planned, write_list, write_shard

COUNT, SHARDS, IN_SHARD = 100, 100, 10_000


def photographs() -> Path:
    """A folder of them; of two classes, so that it can be a data set."""
    root, rng = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    for number in range(COUNT):
        coarse = Image.fromarray(rng.integers(0, 256, (15, 20, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        grain = rng.normal(0, 8, (375, 500, 1))
        path = root / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=92)
    return root


def in_shards() -> Path:
    out, images = Path(tempfile.mkdtemp()), Folder(str(photographs()))
    plan = planned("train", images, 30)
    for shard in plan:
        write_shard(out, shard, 0, lambda items, total: items)
    write_list(out, images.classes, True, {"train": [shard.name for shard in plan]})
    return out


def serve(root: Path, told: Any) -> None:
    server = FolderServer(root)
    told.send(server.url)
    told.recv()


def over_http() -> str:
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.Process(target=serve, args=(in_shards(), theirs), daemon=True).start()
    return str(ours.recv())


def read(make: Any) -> Any:
    images: Images = make()
    order = np.random.default_rng(1).permutation(len(images)).tolist()
    return lambda: [images[index]["id"] for index in order][:0]


def fetch(make: Any) -> Any:
    """The bytes alone."""
    images: Images = make()
    order = np.random.default_rng(1).permutation(len(images)).tolist()

    def run() -> None:
        for index in order:
            with images.images[index].open("rb") as file:
                file.read()

    return run


def index() -> Any:
    root = Path(tempfile.mkdtemp())
    names = [f"train-{number:06d}" for number in range(SHARDS)]
    (root / "index.json").write_text(
        json.dumps({"version": 1, "classes": [f"c{c}" for c in range(20)], "has_background": True,
                    "splits": {"train": names}})
    )  # fmt: skip
    for number, name in enumerate(names):
        with (root / f"{name}.tar").open("wb") as file:
            file.truncate(IN_SHARD * 102_400)
        column = {"offset": list(range(0, IN_SHARD * 102_400, 102_400)), "length": [100_000] * IN_SHARD}
        ids = [f"photographs/{number:04d}/{image:08d}" for image in range(IN_SHARD)]
        labels = [[image % 20] for image in range(IN_SHARD)]
        says = {"version": 1, "bytes": IN_SHARD * 102_400, "of": "", "ids": ids, "labels": labels}
        says |= {"images": {**column, "crc32": [4_000_000_000] * IN_SHARD}}
        (root / f"{name}.json").write_text(json.dumps(says))
    return lambda: len(Shards(str(root)).ids) * 0


CASES: dict[str, Case] = {
    "files": partial(read, lambda: Folder(str(photographs()))),
    "shards": partial(read, lambda: Shards(str(in_shards()))),
    "shards http": partial(read, lambda: Shards(over_http())),
    "bytes of files": partial(fetch, lambda: Folder(str(photographs()))),
    "bytes of shards": partial(fetch, lambda: Shards(str(in_shards()))),
    "bytes of shards http": partial(fetch, lambda: Shards(over_http())),
    "index": index,
}

if __name__ == "__main__":
    main("tests.benchmarks.sources", CASES, __doc__)

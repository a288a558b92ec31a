"""`wsss-data`: a data set looked through before training, public ones brought into shape, weights to begin with."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from wsss import InputError, printable
from wsss.commandline import run_command
from wsss.config import check_arguments, class_named, plain_values

if TYPE_CHECKING:
    from rich.progress import TaskID

USAGE = """wsss-data check dataset=NAME [dataset.KEY=VALUE ...]
    counts, sizes, and whatever does not fit, before any training
wsss-data voc root=DIR
    VOC 2012 with the masks of SBD: download, train_aug, masks, image-level labels
wsss-data coco root=DIR
    COCO 2014: masks and image-level labels from the instances files
wsss-data shards out=SHARDS dataset=NAME [dataset.KEY=VALUE ...]
    tar files with an index, which dataset=shards reads from a disk or a URL
wsss-data index out=SHARDS tars=FILES
    the same index for tar files that others have written for WebDataset
wsss-data weights
    ImageNet weights: what can be had from where, and what is on this machine
Each says with --help what can be set."""


def check(cfg: DictConfig) -> int:
    """Open every image and mask, print what there is, and refuse what training would; returns the images seen."""
    from wsss.assemble import inspect_all
    from wsss.data.base import Images, as_images, both_splits
    from wsss.data.doubts import masks_misfit, shared

    target, values = class_named(cfg.dataset._target_), plain_values(cfg.dataset, "dataset")
    check_arguments(target, values, "dataset", given=("split",))
    # a data set from elsewhere may be any torch Dataset
    inspection = target.inspection(**values) if issubclass(target, Images) else both_splits(target, values)
    for note in inspection.notes:
        print(printable(note))
    problems = list(inspection.problems)
    seen: dict[str, list[dict[str, Any]]] = {}
    opened: dict[str, Images] = {}
    classes: tuple[str, ...] = ()
    for split, make in inspection.sets.items():
        try:
            images = opened[split] = as_images(make())
        except InputError as error:
            problems += [str(error)] if str(error) not in problems else []
            continue
        classes = images.classes
        items, bad = inspect_all(images, split, cfg.num_workers)
        seen[split] = list(items.values())
        wrong = masks_misfit(seen[split], classes, tolerated=0.1)
        problems += [*bad, *([wrong] if wrong else [])]
    if seen:
        print_counts(seen, classes, cfg.dataset.get("root", "drawn"))
        if "val" in seen and not seen["val"]:
            unseen = ", and masks were not looked at" if cfg.dataset.get("masks") else ""
            print(f"nothing to evaluate on (dataset.val names what to use): training will leave it out{unseen}")
        for note in shared(opened["train"], opened["val"]) if len(opened) == 2 else ():
            print(printable(note))
    for problem in problems[:MOST_SHOWN]:
        print(f"- {printable(problem)}")
    if problems:
        more = f" ({len(problems) - MOST_SHOWN} more are not shown)" if len(problems) > MOST_SHOWN else ""
        raise InputError(f"{len(problems)} problems, listed above{more}: mend them, then check again.")
    print("no problem found")
    return sum(map(len, seen.values()))


def print_counts(seen: Mapping[str, Sequence[dict[str, Any]]], classes: Sequence[str], root: str) -> None:
    """A table of the images of each class by split, what cannot be learnt, and the sizes of the images."""
    import numpy as np
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from wsss.data.doubts import unseen

    counts: dict[str, Counter[str]] = {}
    for split, items in seen.items():
        found = Counter(classes[c] for item in items for c in np.flatnonzero(item["label"]).tolist())
        empty = sum(not item["label"].any() for item in items)
        counts[split] = found + Counter({"(no class)": empty, "(images)": len(items)})
    table = Table(title=escape(f"{root}: images of each class"), title_justify="left")
    table.add_column("class")
    for split in counts:
        table.add_column(split, justify="right")
    for name in (*classes, "(no class)", "(images)"):
        table.add_row(escape(name), *(str(count[name]) for count in counts.values()))
    Console().print(table)
    if learnt := seen.get("train"):
        for note in unseen(np.array([item["label"] for item in learnt]), classes):
            print(note)
    if sizes := [item["size"] for items in seen.values() for item in items]:
        heights, widths = np.array(sizes).T
        shown = "{:.0f} to {:.0f}, median {:.0f}"
        ranges = (shown.format(side.min(), side.max(), np.median(side)) for side in (widths, heights))
        print("width {}; height {}".format(*ranges))


MOST_SHOWN = 50


def voc(cfg: DictConfig) -> int:
    """Make root what `dataset=voc` reads; returns the number of images of train_aug."""
    from wsss.prepare.voc import prepare_voc

    with Steps() as steps:
        urls = {key: cfg[key] for key in ("voc_url", "sbd_url", "voc_md5", "sbd_md5")}
        made = prepare_voc(cfg.root, **urls, progress=steps.show)
    masks = made.train_aug
    print(
        f"{cfg.root}: train_aug of {masks.ids} images (sha256 of the sorted list {masks.sha256[:12]}...), "
        f"masks of {masks.voc_masks} images from VOC and {masks.sbd_masks} from SBD ({masks.written} written now), "
        f"image-level labels of {made.labelled} images in {made.labels}"
    )
    for note in masks.notes:
        print(f"note: {note}")
    return masks.ids


def coco(cfg: DictConfig) -> int:
    """Draw root's masks from its instances files; returns their number."""
    from wsss.prepare.coco import build_masks

    root = Path(cfg.root).expanduser()
    made = 0
    for split in ("train", "val"):
        folder = f"{split}2014"
        annotations = root / "annotations" / f"instances_{folder}.json"
        if not annotations.is_file():
            raise InputError(
                f"{annotations} does not exist: unpack COCO's annotations_trainval2014.zip, train2014.zip and "
                f"val2014.zip in {root}"
            )
        print(f"reading {annotations}")
        with Steps() as steps:
            show = partial(steps.show, f"masks of {split}")
            report = build_masks(annotations, root / "masks" / folder, cfg.rule, show)
        made += report.masks
        print(
            f"{root / 'masks' / folder}: {report.masks} masks by the rule {report.rule} ({report.written} written "
            f"now), {report.annotations} annotations, {report.crowds} of them crowds, {report.without_annotations} "
            f"images without any; sha256 of all masks {report.sha256}"
        )
    return made


def shards(cfg: DictConfig) -> int:
    """Write what is missing of this process's share, and the index once all is there; returns the number of images."""
    from wsss.assemble import open_images
    from wsss.prepare.shards import is_written, planned, write_list, write_shard
    from wsss.report.tables import progress
    from wsss.runs import share, shared, write_skipped

    for key, least in (("images_per_shard", 1), ("num_workers", 0)):
        if not isinstance(cfg[key], int) or cfg[key] < least:
            raise InputError(f"{key} is {cfg[key]!r}: expected a whole number of at least {least}")
    rank, world = share(cfg.shards, cfg.shard)
    values, out = plain_values(cfg.dataset, "dataset"), Path(cfg.out).expanduser()
    sets, skipped = {}, list[str]()
    for split in ("train", "val"):
        sets[split], bad = open_images(cfg.dataset._target_, values, split, cfg.on_bad_image, cfg.num_workers)
        skipped += bad
    first = sets["train"] or sets["val"]
    if first is None:
        raise InputError("the data set has no image: name some as dataset.train or dataset.val")
    plan = {split: planned(split, images, cfg.images_per_shard) for split, images in sets.items()}
    every = [shard for listed in plan.values() for shard in listed]
    out.mkdir(parents=True, exist_ok=True)
    with shared(out):
        if rank == 0:
            write_skipped(out, skipped)
        pending = [shard for shard in every[rank::world] if not is_written(out, shard)]
        for shard in pending:
            write_shard(out, shard, cfg.num_workers, partial(progress, description=shard.name))
        written = sum(len(shard.indices) for shard in pending)
        of = f", share {rank} of {world}" if world > 1 else ""
        print(f"{len(pending)} of {len(every)} shards written{of}, {written} images -> {out}")
        if missing := sum(not is_written(out, shard) for shard in every):
            print(f"{missing} shards are not there yet: who writes the last one writes the index")
        else:
            names = {split: [shard.name for shard in listed] for split, listed in plan.items()}
            write_list(out, first.classes, first.has_background, names)
            print(f"dataset=shards dataset.root={out} reads them")
    return written


def index(cfg: DictConfig) -> int:
    """Index tar files that others have written; returns the number of images."""
    from wsss.prepare.shards import index_foreign
    from wsss.report.tables import progress

    out, classes = Path(cfg.out).expanduser(), None if cfg.classes is None else list(cfg.classes)
    found = index_foreign(cfg.tars, out, classes, cfg.split, partial(progress, description="passing over"))
    print(f"{found} images in {out}; dataset=shards dataset.root={out} reads them where they are")
    return found


WIDE = 1000
"""Columns of a table that is not looked at in a terminal: nothing in it is folded, so that it can be searched."""


def weights(_: DictConfig) -> int:
    """Print which ImageNet weights can be had from where and which are here; returns their number."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from wsss.networks.sources import weight_rows

    table = Table(title="ImageNet weights", title_justify="left", show_lines=True)
    for column in ("set", "from", "here"):
        table.add_column(column, overflow="fold")
    rows = weight_rows()
    for backbone, name, source, here in rows:
        table.add_row(*map(escape, (f"method.backbone={backbone}\nmethod.weights={name}", source, here)))
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(table)
    print(
        "Any other tag of timm will do too, and any .pth or .safetensors file that fits; a run says what it loaded. "
        "All tags: python -c 'import timm; print(*timm.list_pretrained())'"
    )
    return len(rows)


class Steps:
    """A bar for each step of a preparation, with its rate: bytes of downloads and archives, else files."""

    def __enter__(self) -> "Steps":
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"))
        self.bars = Progress(*columns, TimeRemainingColumn())
        self.bars.start()
        self.tasks: dict[str, TaskID] = {}
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def show(self, what: str, done: int, total: int | None) -> None:
        from rich.filesize import decimal

        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total, done="")
        in_bytes = what.startswith(("downloading", "unpacking"))
        shown, speed = str(done), self.bars.tasks[self.tasks[what]].speed or 0.0
        if in_bytes:
            shown = f"{decimal(done)}, {decimal(int(speed))}/s"
        elif speed:
            shown = f"{done}, {speed:.0f}/s"
        self.bars.update(self.tasks[what], completed=done, total=total, done=shown)


def complete(tasks: Mapping[str, Callable[[DictConfig], int]]) -> None:
    """What Hydra answers a shell: `install=bash`, or what may follow on a line, whose first word is ours."""
    line = os.environ.get("COMP_LINE", "")
    command, _, rest = line.partition(" ")
    word, found, rest = rest.lstrip().partition(" ")
    if line and not (found and word in tasks):
        print(*tasks)
        return
    os.environ["COMP_LINE"] = f"{command} {rest}"
    os.environ["COMP_POINT"] = str(len(os.environ["COMP_LINE"]))
    run_command(f"data {word or 'check'}", tasks[word or "check"])


def main() -> None:
    tasks = {"check": check, "voc": voc, "coco": coco, "shards": shards, "index": index, "weights": weights}
    word = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if word in ("-sc", "--shell-completion"):
        sys.argv.insert(1, word)
        complete(tasks)
    elif word in tasks:
        run_command(f"data {word}", tasks[word])
    elif word in ("-h", "--help"):
        print(USAGE)
    else:
        print(f"wsss-data: expected {', '.join(tasks)}, found {word or 'nothing'}\n{USAGE}", file=sys.stderr)
        sys.exit(2)

"""What people look at: tables in the terminal, metrics files, pictures."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

T = TypeVar("T")
Array = np.ndarray


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write under a temporary name, then rename: the file is whole or absent. NaN and infinity are written as null."""
    temporary = path.with_suffix(".tmp")
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
    temporary.write_text(json.dumps(plain, indent=2) + "\n")
    os.replace(temporary, path)


def print_figures(figures: Mapping[str, float], notes: Mapping[str, str], title: str) -> None:
    """A table of figures, each with the protocol it was measured under."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("measured on")
    for key, value in figures.items():
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        table.add_row(escape(key), shown, escape(notes.get(key, "")))
    Console().print(table)


def colour_map(count: int = 256) -> Array:
    """(count, 3) uint8: VOC's colours, the bits of an id spread over the channels."""
    ids = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((ids >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def paint(mask: Array) -> Array:
    """(H, W) ids -> (H, W, 3) uint8 in VOC's colours, 255 (ignore) in white."""
    return np.where((mask == 255)[:, :, None], 255, colour_map()[mask.astype(np.uint8)]).astype(np.uint8)


def heat(image: Array, cam: Array) -> Array:
    """(H, W, 3) uint8 image under a heat map of (H, W) values in [0, 1]."""
    import cv2

    coloured = cv2.applyColorMap((255 * cam.clip(0, 1)).astype(np.uint8), cv2.COLORMAP_JET)[:, :, ::-1]
    return (0.5 * image + 0.5 * coloured).astype(np.uint8)


def overlay(image: Array, mask: Array, opacity: float = 0.5) -> Array:
    """(H, W, 3) uint8 image with the foreground of (H, W) ids tinted in VOC's colours."""
    tinted = (1 - opacity) * image + opacity * paint(mask)
    return np.where((mask > 0)[:, :, None], tinted, image).astype(np.uint8)


def save_grid(path: Path, rows: Sequence[Sequence[Array]], titles: Sequence[str], side: int = 160) -> None:
    """A PNG of pictures (H, W, 3) uint8 in rows under column titles, each fitted into a square of `side` pixels."""
    from PIL import Image, ImageDraw

    gap, head = 4, 18
    sheet = Image.new("RGB", (len(titles) * (side + gap) + gap, len(rows) * (side + gap) + gap + head), "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((gap + x * (side + gap), 3), title, fill="black")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            tile = Image.fromarray(np.ascontiguousarray(picture))
            factor = side / max(tile.size)
            tile = tile.resize([max(1, round(length * factor)) for length in tile.size], Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + x * (side + gap), head + gap + y * (side + gap)))
    temporary = path.with_suffix(".tmp")
    sheet.save(temporary, format="PNG")
    os.replace(temporary, path)


def progress(items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """The items under a progress bar with their rate."""
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    started = time.perf_counter()
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total, rate="")
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(task, advance=1, rate=f"{done / (time.perf_counter() - started):.1f}/s")


class SweepTable(Callback):
    """Hydra callback: after `-m`, one table over the jobs, from their metrics.json and overrides."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(config.hydra.sweep.dir)
        runs = sorted(directory.glob("*/run.json"), key=lambda p: (len(p.parent.name), p.parent.name))
        jobs = []
        for run in runs:
            overrides = dict(o.split("=", 1) for o in json.loads(run.read_text())["overrides"])
            metrics = run.with_name("metrics.json")
            jobs.append((overrides, json.loads(metrics.read_text()) if metrics.exists() else {}))
        varied = [k for k in dict.fromkeys(k for o, _ in jobs for k in o) if len({o.get(k) for o, _ in jobs}) > 1]
        keys = [key for key in SUMMARY if any(key in values for _, values in jobs)]
        table = Table(title=escape(f"sweep {directory}"), title_justify="left")
        for key in (*varied, *keys):  # short names: eight columns have to fit a terminal
            table.add_column(".".join(key.removeprefix("val/").split(".")[-2:]), justify="right", overflow="fold")
        for overrides, values in jobs:
            cells = [_cell(values.get(key)) if values else "failed" for key in keys]
            table.add_row(*(escape(overrides.get(key, "")) for key in varied), *cells)
        Console().print(table)


SUMMARY = ("val/map", "val/cam_miou", "val/cam_best_miou", "val/aux_cam_miou", "val/miou", "seconds", "peak_memory_mb")
"""The figures of a run that stand in tables over runs."""


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) and value < 10 else "" if value is None else f"{value:.0f}"

"""What Weights & Biases and TensorBoard show of a training: losses, figures, pictures, tables of classes, settings."""

import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from wsss import InputError
from wsss.report.pictures import coloured, example_grids
from wsss.writing import write_lines

IMAGES = 8
"""Evaluation images that are shown, the first ones."""


def wandb_logger(
    save_dir: str,
    project: str = "wsss",
    entity: str | None = None,
    group: str | None = None,
    name: str | None = None,
    tags: Sequence[str] | None = None,
    offline: bool = False,
) -> WandbLogger:
    """Weights & Biases for a run directory, which keeps the id in `wandb_id.txt`: who goes on with it continues there.

    Args:
        save_dir: the run directory.
        project, entity, group, name, tags: of `wandb.init`.
        offline: nothing is sent; `wandb sync` does it later.
    """
    path = Path(save_dir) / "wandb_id.txt"
    known = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    if not re.fullmatch(r"\w{1,64}", known):
        known = secrets.token_hex(4)
        rank_zero_only(write_lines)(path, [known])
    named: dict[str, Any] = {"project": project, "entity": entity, "group": group, "name": name, "tags": tags}
    return WandbLogger(save_dir=save_dir, id=known, offline=offline, **named)


def tensorboard_logger(save_dir: str) -> TensorBoardLogger:
    """TensorBoard's files in `log` of a run directory.

    Raises:
        InputError: it is not installed.
    """
    if find_spec("tensorboard") is None:
        raise InputError('logger=tensorboard needs tensorboard: pip install "wsss[tensorboard]"')
    return TensorBoardLogger(save_dir, name="log", version="", default_hp_metric=False)


@contextmanager
def ending() -> Iterator[None]:
    """Ends the run of Weights & Biases behind it, if there is one: the next training of a sweep is another."""
    failed = True
    try:
        yield
        failed = False
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=int(failed))


class Showing(pl.Callback):
    """Shows the settings at the beginning, and after each evaluation its tables of classes, and pictures of images.

    Args:
        data: whose `examples` are shown.
        settings: all of the run, as plain values.
    """

    def __init__(self, data: Any, settings: Mapping[str, Any]) -> None:
        self.data, self.settings = data, settings

    @rank_zero_only
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.close()  # the next file says that the later steps, which are made again, are void
                logger.experiment.purge_step = checkpoint["global_step"] + 1

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(dict(self.settings))
            elif isinstance(logger, TensorBoardLogger):
                said = yaml.safe_dump(dict(self.settings), sort_keys=False)
                logger.experiment.add_text("config", f"```\n{said}```", trainer.global_step)

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        batches = list(self.data.examples(IMAGES, pl_module.smallest_side))
        items = {batch["id"][0]: pl_module.illustrate(batch) for batch in batches}
        tables = {f"classes/{key}": table["classes"] for key, table in pl_module.tables.items() if "classes" in table}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                names = {0: "background", 255: "undecided"} | dict(enumerate(pl_module.classes, 1))
                _show_in_wandb(logger, items, names, tables, trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                for name, grid in example_grids(list(items.values())).items():
                    logger.experiment.add_image(name, grid, trainer.global_step, dataformats="HWC")
                for key, table in tables.items():
                    columns, rows = _cells(table)
                    lines = [columns, ["---"] * len(columns), *rows]
                    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
                    logger.experiment.add_text(key, text, trainer.global_step)


def _show_in_wandb(
    logger: WandbLogger,
    items: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    names: Mapping[int, str],
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]],
    step: int,
) -> None:
    """Masks with the names of classes upon the images, which can be switched on and off; heat as images of its own."""
    shown: dict[str, list[tuple[Any, str, dict[str, Any]]]] = {}
    for identity, grids in items.items():
        for name, pictures in grids.items():
            image, masks = pictures["image"], {}
            for title, value in pictures.items():
                if value.is_floating_point():
                    shown.setdefault(f"{name}/{title}", []).append((coloured(image, value), identity, {}))
                elif value.ndim == 2:
                    masks[title] = {"mask_data": value.cpu().numpy().astype("uint8"), "class_labels": dict(names)}
            if masks:
                shown.setdefault(f"{name}/masks", []).append((image.cpu().numpy(), identity, masks))
    for key, images in shown.items():
        pictures_of, captions, masks_of = (list(column) for column in zip(*images, strict=True))
        logger.log_image(key, pictures_of, step, caption=captions, masks=masks_of)
    for key, table in tables.items():
        columns, rows = _cells(table)
        logger.log_table(key, columns, rows, step=step)


def _cells(table: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """The heading and the rows of a table of classes; empty where a class has no value."""
    columns = list(dict.fromkeys(column for values in table.values() for column in values))
    return ["class", *columns], [[name, *(values.get(column) for column in columns)] for name, values in table.items()]

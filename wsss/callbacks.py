"""Lightning callbacks of a training run."""

import csv
import io
import math
import os
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils._pytree import tree_map_only

from wsss import RunError
from wsss.evaluation.comparison import COLUMNS
from wsss.report.tables import Meter
from wsss.writing import write_json, write_whole


class FiniteLoss(pl.Callback):
    """Stops a run whose loss is NaN or infinite, before anything of it is saved.

    On a GPU the losses are looked at every `every` steps and before each checkpoint, so that the step
    never waits for the host; the first bad step is the one named.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.pending: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.pending.append((trainer.global_step, {**outputs["terms"], "total": outputs["loss"].detach()}))
        if outputs["loss"].device.type == "cpu" or len(self.pending) >= self.every:
            self.check(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self.check(trainer)

    def check(self, trainer: pl.Trainer) -> None:
        pending, self.pending = self.pending, []
        for step, terms in pending:
            bad = {key: float(term) for key, term in terms.items() if not torch.isfinite(term)}
            if bad:
                saved = [c.path for c in trainer.checkpoint_callbacks if isinstance(c, LastCheckpoint) and c.step > 0]
                last = next(iter(saved), None)
                raise RunError(
                    f"the loss is not finite at step {step} ({', '.join(f'{k} = {v}' for k, v in bad.items())}); "
                    + (f"the last good checkpoint is {last}" if last else "no checkpoint was saved before")
                    + "; lower method.lr or look at the images of that step"
                )


class StepSeed(pl.Callback):
    """Seeds torch anew at every step and rank: what a step draws depends on the seed and the step alone.

    So a run that was interrupted draws after its last checkpoint what it would have drawn, however often the
    evaluation or the loaders have asked for random numbers in between.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        place = (self.seed, trainer.fit_loop.total_batch_idx, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]) >> 1)


class GatherLosses(pl.Callback):
    """Computes losses over the images that all devices have in a batch, where they are no means over images.

    Such a loss, or what makes the prototypes of one, says in `over_batch` how many of its first arguments hold images.
    These are gathered with their gradients, in the order in which one device would have them, so that the gradient,
    which devices average, is that of one device with all the images. Memory of these losses grows with the devices.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            for module in pl_module.modules():
                if getattr(module, "over_batch", 0):
                    module.register_forward_pre_hook(partial(self.gather, pl_module))

    @staticmethod
    def gather(pl_module: pl.LightningModule, loss: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        def gathered(part: Tensor) -> Tensor:  # (B, ...) -> (B * devices, ...)
            parts: Any = pl_module.all_gather(part, sync_grads=part.requires_grad)
            if parts.requires_grad:
                parts.register_hook(Tensor.contiguous)  # torch sends gradients back without a look at their strides
            return parts.transpose(0, 1).flatten(0, 1)

        return (*tree_map_only(Tensor, gathered, arguments[: loss.over_batch]), *arguments[loss.over_batch :])


class RunLog(pl.Callback):
    """Hands the losses and rates of every `every`-th step, and each evaluation, to the loggers.

    What is more than a number of the last evaluation stands in tables.json, in the trainer's directory.

    It does so before a checkpoint of that step is written, and the checkpoint remembers how many rows there were:
    a run that goes on drops the later ones and so leaves the log of a run that was never interrupted.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.evaluated = -1  # the step of the last evaluation
        self.figures: dict[str, float] = {}
        self.losses: dict[str, float] = {}  # of the last logged step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.every == 0:
            self.losses = {key: float(term) for key, term in outputs["terms"].items()}
            # the batch's own loss, which Lightning has divided by the number of batches a step takes
            total = float(outputs["loss"]) * trainer.accumulate_grad_batches
            groups = trainer.optimizers[0].param_groups
            losses = {"train/loss": total} | {f"train/loss_{key}": value for key, value in self.losses.items()}
            self.write(trainer, losses | {f"lr/{i}": g["lr"] for i, g in enumerate(groups)})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.evaluated = trainer.global_step
        self.figures = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.write(trainer, self.figures)
        tables = getattr(pl_module, "tables", None)  # a module from elsewhere may have none
        if tables and trainer.is_global_zero:
            write_json(Path(trainer.default_root_dir) / "tables.json", tables)

    def write(self, trainer: pl.Trainer, row: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        rows = sum(logger.rows for logger in trainer.loggers if isinstance(logger, CSVLog))
        checkpoint["log"] = {"rows": rows, "evaluated": self.evaluated, "figures": self.figures}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        log = checkpoint["log"]
        self.evaluated, self.figures = log["evaluated"], log["figures"]
        for logger in trainer.loggers:
            if isinstance(logger, CSVLog):
                logger.keep(log["rows"])


class Pace(pl.Callback):
    """Images a second of a training, of all devices, and the share of its time in which it waits for the loader.

    The first step and what follows an evaluation are left out: they set up kernels and workers. On a GPU, which works
    on while the host waits, a share above 0 need not cost anything.
    """

    def __init__(self) -> None:
        self.images = 0
        self.waited = self.worked = 0.0
        self.since: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any) -> None:
        now = time.perf_counter()
        self.counted = self.since is not None
        if self.since is not None:
            self.waited += now - self.since
        self.since = now

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        if self.counted and self.since is not None:
            self.worked += now - self.since
            self.images += len(batch["id"]) * trainer.world_size
        self.since = now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.since = None

    @property
    def figures(self) -> dict[str, float]:
        """Empty where there was no more than a step."""
        total = self.waited + self.worked
        return {"images_per_second": self.images / total, "waiting_for_data": self.waited / total} if total else {}


class PerImageCounts(pl.Callback):
    """Writes the counts of each image that an evaluation returns to `per_image.csv`.

    Of several processes each writes its own, which the first one joins. They grow with the images, so that no metric
    holds them.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.open = ExitStack()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        name = "per_image.csv" if trainer.world_size == 1 else f"per_image.{trainer.global_rank}.csv"
        file = self.open.enter_context(write_whole(self.out / name))
        self.text = self.open.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline=""))
        csv.writer(self.text).writerow(COLUMNS)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if outputs is not None:  # a method from elsewhere may count nothing
            csv.writer(self.text).writerows(outputs["counts"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.open.close()
        if trainer.world_size == 1:
            return
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self.out / f"per_image.{rank}.csv" for rank in range(trainer.world_size)]
            with write_whole(self.out / "per_image.csv") as file:
                for rank, part in enumerate(parts):
                    heading, rows = part.read_bytes().split(b"\n", 1)
                    file.write(rows if rank else heading + b"\n" + rows)
            for part in parts:
                part.unlink()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.open.__exit__(type(exception), exception, exception.__traceback__)


class CSVLog(Logger):
    """The log as `<save_dir>/log/metrics.csv`: a row as soon as it is there, empty where it has no value."""

    name, version = None, None

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "log" / "metrics.csv"
        self.columns: list[str] = []
        self.rows = 0

    @rank_zero_only
    def keep(self, rows: int) -> None:
        """Start with the first rows of what is there; the others belong to steps that will be made again."""
        kept = self._read()[:rows] if rows else []
        if len(kept) < rows:
            print(f"{self.path} is damaged: {rows - len(kept)} rows of earlier steps are lost")
        # as many columns as these rows fill, in the order in which they came
        self.columns = list(dict.fromkeys(key for row in kept for key, value in row.items() if value != ""))
        self._write(kept)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, **metrics}
        if new := [key for key in row if key not in self.columns]:
            rows = self._read() if self.rows else []
            self.columns += new
            self._write([*rows, row])
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(row)
            self.rows += 1

    @rank_zero_only
    def log_hyperparams(self, *params: Any, **more: Any) -> None:
        """They stand in config.yaml."""

    def _read(self) -> list[dict[str, Any]]:
        """The rows that are whole."""
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        rows = list(csv.DictReader(io.StringIO(text, newline=""))) if "\0" not in text else []
        return [row for row in rows if None not in row and None not in row.values() and row.get("step")]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore")  # columns of rows that are dropped
        writer.writeheader()
        writer.writerows(rows)
        with write_whole(self.path) as file:
            file.write(text.getvalue().encode())
        self.rows = len(rows)


class BestCheckpoint(Checkpoint):
    """Keeps `best-step-<n>.ckpt`, the checkpoint with the largest monitored figure, the first of equal ones.

    Unlike Lightning's own it also counts the evaluation that follows a training, which a run that was killed while
    it evaluated makes up for.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        self.folder, self.monitor = folder, monitor
        self.best: float | None = None
        self.name = ""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        figure = float(trainer.callback_metrics.get(self.monitor, torch.nan))
        if figure > (-math.inf if self.best is None else self.best):  # never if it is NaN
            former, self.best, self.name = self.name, figure, f"best-step-{trainer.global_step:06d}.ckpt"
            of_labels = self.monitor in pl_module.figures(has_masks=False)
            pl_module.origin["checkpoint_rule"] = f"best by {self.monitor if of_labels else f'masks ({self.monitor})'}"
            trainer.save_checkpoint(self.folder / self.name)
            if former not in ("", self.name):
                trainer.strategy.remove_checkpoint(self.folder / former)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "name": self.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.name = state_dict["best"], state_dict["name"]


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: before and after each evaluation, or every so many steps where nothing is evaluated.

    Before, so that an evaluation that fails or is killed costs no training: a run that goes on from there evaluates
    first. After, so that it has nothing to evaluate again, and knows the best checkpoint so far.

    A SIGTERM, as a scheduler sends it some time before it kills, ends the training with a checkpoint of the step that
    is under way, or an evaluation, before which there was one. All devices then end at the same step, whichever got it.
    """

    def __init__(self, path: Path, every: int | None) -> None:
        self.path, self.every, self.step = path, every, -1
        self.to_evaluate = self.terminated = False

    def save(self, trainer: pl.Trainer) -> None:
        self.step = trainer.global_step
        module: Any = trainer.lightning_module
        module.origin["checkpoint_rule"] = "last"
        trainer.save_checkpoint(self.path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # in the place of Lightning's, which waits for the other devices in the midst of a step; it takes it away again
        signal.signal(signal.SIGTERM, partial(self.terminate, trainer))
        if self.to_evaluate:  # as the training loop does after a step
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every is not None and (batch_idx + 1) % (self.every * trainer.accumulate_grad_batches) == 0:
            self.save(trainer)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.strategy.reduce_boolean_decision(self.terminated, all=False):
            self.terminated = True
            interval = trainer.val_check_batch
            evaluates = self.every is None and interval is not None and (batch_idx + 1) % interval == 0
            if not evaluates and trainer.global_step < trainer.max_steps:
                if self.step != trainer.global_step:
                    self.save(trainer)
                raise SIGTERMException

    def terminate(self, trainer: pl.Trainer, *_: Any) -> None:
        if not self.terminated and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)  # the processes that this one has started
        self.terminated = True

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.terminated:
            raise SIGTERMException

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.to_evaluate:
            self.to_evaluate = True
            self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.to_evaluate = False
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.step != trainer.global_step:
            self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"to_evaluate": self.to_evaluate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.to_evaluate = state_dict["to_evaluate"]


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a full disk or a kill leaves the former one.

    Lightning's own way writes to the folder of temporary files, often on another disk, from which it is copied.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        try:
            with write_whole(Path(path)) as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None  # torch's writer reports a full disk as its own failed assertion
            raise


class StepProgress(pl.Callback):
    """Progress in optimizer steps, with the losses of the last logged one, and in batches of an evaluation."""

    def __init__(self, log: RunLog | None = None) -> None:
        self.run_log = log
        self.steps: Meter | None = None
        self.batches: Meter | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = Meter("training", trainer.max_steps, "steps", trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        losses = self.run_log.losses if self.run_log is not None else {}
        if self.steps is not None:
            self.steps.update(trainer.global_step, " ".join(f"{key} {value:.3g}" for key, value in losses.items()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.steps is None:  # two bars would fight for the line
            self.batches = Meter("evaluating", int(sum(trainer.num_val_batches)), "batches")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.batches is not None:
            self.batches.update(batch_idx + 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.steps is None:
            self.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.end()

    def end(self) -> None:
        for meter in (self.steps, self.batches):
            if meter is not None:
                meter.close()
        self.steps = self.batches = None

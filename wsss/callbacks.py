"""Lightning callbacks of a training run."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from torch import Tensor

from wsss import RunError


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
                saved = [
                    c.last_model_path or c.best_model_path
                    for c in trainer.checkpoint_callbacks
                    if isinstance(c, ModelCheckpoint)
                ]
                last = next(filter(None, saved), None)
                raise RunError(
                    f"the loss is not finite at step {step} ({', '.join(f'{k} = {v}' for k, v in bad.items())}); "
                    + (f"the last good checkpoint is {last}" if last else "no checkpoint was saved before")
                    + "; lower method.lr or look at the images of that step"
                )


class Validated(pl.Callback):
    """Remembers the step of the last evaluation, so that the final one is not made twice."""

    step = -1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.step = trainer.global_step


class StepProgress(RichProgressBar):
    """Progress in optimizer steps with rate and every loss term; there are no epochs to count."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "training"

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {
            key.removeprefix("train/loss_").removeprefix("train/"): v for key, v in metrics.items() if key != "v_num"
        }

"""A training on recorded batches, one for each step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader


def fit(
    method: pl.LightningModule, batches: Sequence[Any], watching: pl.Callback, folder: Path, steps: int | None = None
) -> pl.Trainer:
    """The trainer behind its last step; `watching` sees each, and may end it before so many `steps` of a schedule."""
    trainer = pl.Trainer(
        max_steps=steps or len(batches),
        callbacks=watching,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(method, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer

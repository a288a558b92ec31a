"""`wsss-train`: fit a method on a data set, then evaluate it."""

import logging
import platform
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from wsss import InputError, __version__
from wsss.config import absolute_paths, build, call, plain, run_command

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from wsss.data.datamodule import DataModule


def train(cfg: DictConfig) -> float | None:
    """Train, evaluate, and leave a run directory; returns the monitored figure."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint

    from wsss.callbacks import FiniteLoss, StepProgress, Validated
    from wsss.evaluate import build_protocol, save_examples
    from wsss.report import print_figures, write_json

    started = time.perf_counter()
    quieten()
    run = HydraConfig.get()
    out, choices = Path(run.runtime.output_dir), run.runtime.choices
    if (
        run.mode == RunMode.MULTIRUN
        and str(cfg.trainer.strategy).startswith("ddp")
        and cfg.trainer.strategy != "ddp_spawn"
    ):
        raise InputError(
            "trainer.strategy=ddp starts this command anew on each device and would repeat the whole sweep there: "
            "use trainer.strategy=ddp_spawn, or Hydra's submitit launcher"
        )
    check_settings(cfg, out)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build_data(cfg)
    method = build(cfg.method, "method", num_classes=data.num_classes, classes=data.classes)
    method.protocol = build_protocol(cfg)
    figures_known = [f"val/{key}" for key in method.metrics]
    if cfg.monitor not in figures_known:
        raise InputError(f"monitor={cfg.monitor} is not a figure of {choices['method']}: {', '.join(figures_known)}")

    method.origin = {
        "method": choices["method"],
        "dataset": choices["dataset"],
        "dataset_values": absolute_paths(plain(cfg.dataset)),
    }
    validated = Validated()
    callbacks: list[pl.Callback] = [
        FiniteLoss(cfg.trainer.log_every_n_steps),
        validated,
        LearningRateMonitor(),
        ModelCheckpoint(
            out / "checkpoints",
            filename="last",
            every_n_train_steps=cfg.trainer.val_check_interval,
            enable_version_counter=False,
        ),
    ]
    if data.val is not None:
        best = ModelCheckpoint(
            out / "checkpoints",
            filename="best-step-{step:06d}",
            monitor=cfg.monitor,
            mode="max",
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        callbacks.append(best)
    if cfg.trainer.enable_progress_bar:
        callbacks.append(StepProgress())
    settings = plain(cfg.trainer, "trainer")
    settings["val_check_interval"] = min(settings["val_check_interval"], settings["max_steps"])
    trainer = build_trainer(
        settings,
        logger=build(cfg.logger, "logger") if cfg.logger else False,
        callbacks=callbacks,
        default_root_dir=out,
        use_distributed_sampler=False,  # the endless sampler shards itself
        num_sanity_val_steps=0,
    )
    if trainer.is_global_zero:
        (out / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        write_json(out / "run.json", provenance(cfg, list(run.overrides.task)))
        parameters = sum(p.numel() for p in method.parameters() if p.requires_grad)
        print(
            f"{choices['method']} ({parameters / 1e6:.1f} M parameters) on {choices['dataset']}: "
            f"{data.train_size} images of {data.num_classes} classes, {settings['max_steps']} steps -> {out}"
        )
    trainer.fit(method, data)
    trainer.save_checkpoint(out / "checkpoints" / "last.ckpt")
    if data.val is not None and validated.step != trainer.global_step:
        trainer.validate(method, data, verbose=False)

    figures = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    figures |= {"seconds": time.perf_counter() - started, "steps": trainer.global_step}
    figures["peak_memory_mb"] = (
        torch.cuda.max_memory_allocated() / 2**20
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    )
    if trainer.is_global_zero:
        notes = method.describe(data.val_name) if data.val is not None else {}
        write_json(out / "metrics.json", figures | {f"protocol/{key}": note for key, note in notes.items()})
        if data.val is not None:
            save_examples(out / "examples.png", method, data)
        print_figures({k: v for k, v in figures.items() if not k.startswith("val/iou/")}, notes, str(out))
    return figures.get(cfg.monitor)


def check_settings(cfg: DictConfig, out: Path) -> None:
    """Refuse what would fail late or overwrite an earlier run.

    Raises:
        InputError: a number out of range, or a run directory that is in use.
    """
    for key, least in (("seed", 0), ("trainer.max_steps", 1), ("trainer.val_check_interval", 1)):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{key} is {value!r}: expected a whole number of at least {least}")
    if (out / "run.json").exists():
        raise InputError(f"{out} already holds a run: give another hydra.run.dir, or remove it")


def build_trainer(settings: dict[str, Any], **extra: Any) -> "pl.Trainer":
    """A Lightning Trainer; what it refuses is the user's to mend."""
    import pytorch_lightning as pl
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        return call(pl.Trainer, settings, "trainer", enable_model_summary=False, **extra)
    except (ValueError, MisconfigurationException) as error:
        if isinstance(error, InputError):
            raise
        given = ", ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
        raise InputError(f"trainer ({given}): {' '.join(str(error).split())}") from error


def build_data(cfg: DictConfig) -> "DataModule":
    """The data module of a composed configuration."""
    from wsss.data.datamodule import DataModule

    transform = build(cfg.transform, "transform") if cfg.transform else None
    train_set, val_set = (build(cfg.dataset, "dataset", split=split) for split in ("train", "val"))
    return call(
        DataModule, plain(cfg.data, "data"), "data", train=train_set, val=val_set, transform=transform, seed=cfg.seed
    )


def provenance(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """What a reader of the run directory needs to repeat it."""
    import pytorch_lightning
    import timm
    import torch

    return {
        "overrides": overrides,
        "command": " ".join(sys.argv),
        "seed": cfg.seed,
        "wsss": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
        "timm": timm.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.cuda.device_count()} GPUs",
    }


def quieten() -> None:
    """Lightning's advice and device listing are not results."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers",
        ".*is deprecated, use `isinstance",
        "You have overridden `on_before_batch_transfer`",
    ):
        warnings.filterwarnings("ignore", message)


def main() -> None:
    run_command("train", train)

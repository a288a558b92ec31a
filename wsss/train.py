"""`wsss-train`: fit a method on a data set, then evaluate it."""

import fcntl
import json
import logging
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from wsss import InputError, RunError, __version__
from wsss.config import absolute_paths, build, call, plain, run_command

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from wsss.data.datamodule import DataModule


def train(cfg: DictConfig) -> float | None:
    """Train, evaluate, and leave a run directory; returns the monitored figure."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.callbacks import ModelCheckpoint

    from wsss.callbacks import FiniteLoss, LastCheckpoint, RunLog, StepProgress, StepSeed, WholeCheckpoints
    from wsss.evaluate import build_protocol, save_examples
    from wsss.report import print_figures, write_json

    started = time.perf_counter()
    quieten()
    run = HydraConfig.get()
    choices = run.runtime.choices
    if (
        run.mode == RunMode.MULTIRUN
        and str(cfg.trainer.strategy).startswith("ddp")
        and cfg.trainer.strategy != "ddp_spawn"
    ):
        raise InputError(
            "trainer.strategy=ddp starts this command anew on each device and would repeat the whole sweep there: "
            "use trainer.strategy=ddp_spawn, or Hydra's submitit launcher"
        )
    check_settings(cfg)
    out = choose_run(cfg, Path(run.runtime.output_dir))
    if (out / "metrics.json").exists():
        figures = json.loads((out / "metrics.json").read_text())
        print(f"{out} holds this run, finished: {cfg.monitor} {figures.get(cfg.monitor)}, nothing to do")
        return figures.get(cfg.monitor)
    last = out / "checkpoints" / "last.ckpt"
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data, skipped = build_data(cfg)
    method = build(cfg.method, "method", num_classes=data.num_classes, classes=data.classes)
    method.protocol = build_protocol(cfg)
    if not data.has_background:
        method.without_background()
    figures_known = [f"val/{key}" for key in method.metrics if data.has_masks or key.endswith("map")]
    if cfg.monitor not in figures_known:
        without = "" if data.has_masks else " without masks"
        known = ", ".join(figures_known)
        raise InputError(f"monitor={cfg.monitor} is not a figure of {choices['method']}{without}: known are {known}")
    if (out / "run.json").exists() and json.loads((out / "run.json").read_text()).get("data") != data.fingerprint:
        raise InputError(
            f"the images or classes of the data set are not those that {out} began with: restore them, or start anew"
        )

    method.origin = {
        "method": choices["method"],
        "dataset": choices["dataset"],
        "dataset_values": absolute_paths(plain(cfg.dataset)),
    }
    settings = plain(cfg.trainer, "trainer")
    settings["val_check_interval"] = min(settings["val_check_interval"], settings["max_steps"])
    log = RunLog(cfg.trainer.log_every_n_steps)
    callbacks: list[pl.Callback] = [FiniteLoss(cfg.trainer.log_every_n_steps), StepSeed(cfg.seed), log]
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
    callbacks.append(LastCheckpoint(last, settings["val_check_interval"] if data.val is None else None))
    if cfg.trainer.enable_progress_bar:
        callbacks.append(StepProgress())
    trainer = build_trainer(
        settings | {"accumulate_grad_batches": settings["accumulate_grad_batches"] or 1},
        logger=build(cfg.logger, "logger", save_dir=str(out)) if cfg.logger else False,
        callbacks=callbacks,
        plugins=[WholeCheckpoints()],
        default_root_dir=out,
        use_distributed_sampler=False,  # our samplers shard themselves
        num_sanity_val_steps=0,
    )
    passes = accumulation(cfg, trainer.world_size)
    trainer.accumulate_grad_batches = passes
    trainer.val_check_interval = settings["val_check_interval"] * passes  # Lightning counts batches, we count steps
    if trainer.is_global_zero:
        if not (out / "run.json").exists():
            (out / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
            write_json(out / "run.json", provenance(cfg, list(run.overrides.task)) | {"data": data.fingerprint})
        if skipped:
            write_skipped(out, skipped)
        parameters = sum(p.numel() for p in method.parameters() if p.requires_grad)
        print(
            f"{choices['method']} ({parameters / 1e6:.1f} M parameters) on {choices['dataset']}: "
            f"{data.train_size} images of {data.num_classes} classes, {settings['max_steps']} steps -> {out}"
        )
    trainer.fit(method, data, ckpt_path=last if last.exists() else None, weights_only=True)
    if data.val is not None and log.evaluated != trainer.global_step:
        trainer.validate(method, data, verbose=False)

    figures = log.figures | {"seconds": time.perf_counter() - started, "steps": trainer.global_step}
    figures["peak_memory_mb"] = (
        torch.cuda.max_memory_allocated() / 2**20
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    )
    if trainer.is_global_zero:
        notes = method.describe(data.val_name) if data.val is not None else {}
        save_examples(out / "examples.png", method, data)
        write_json(out / "metrics.json", figures | {f"protocol/{key}": note for key, note in notes.items()})
        print_figures({k: v for k, v in figures.items() if not k.startswith("val/iou/")}, notes, str(out))
    return figures.get(cfg.monitor)


def choose_run(cfg: DictConfig, out: Path) -> Path:
    """The run directory: Hydra's, or with `resume=auto` that of an interrupted run of the same configuration.

    It is locked until this process ends, however it ends.

    Raises:
        InputError: the directory holds a run already, or one of another configuration.
        RunError: another process is at work there.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # another process of a run whose first one has chosen
        return Path(os.environ.get("WSSS_RUN_DIR", out))
    if cfg.resume == "auto" and (out / "run.json").exists():
        if different := unlike(cfg, out):
            raise InputError(
                f"{out} holds a run of another configuration, different are {', '.join(different[:5])}: "
                "repeat its command, or give another hydra.run.dir"
            )
    elif cfg.resume == "auto" and HydraConfig.get().mode != RunMode.MULTIRUN:
        old = newest_unfinished(cfg, out.parent)
        if old is not None:
            out.rmdir()  # made by Hydra a moment ago
            out = old
        print(f"resume=auto: {f'going on with {old}' if old else f'no such run in {out.parent}, starting {out.name}'}")
    elif (out / "run.json").exists():
        raise InputError(f"{out} already holds a run: give another hydra.run.dir, add resume=auto, or remove it")
    if not lock(out):
        raise RunError(f"{out} is in use by another process: wait for its end, or give another hydra.run.dir")
    os.environ["WSSS_RUN_DIR"] = str(out)
    return out


def newest_unfinished(cfg: DictConfig, folder: Path) -> Path | None:
    """The run that began last among those of this configuration that have not ended and that nobody works on."""
    begun = sorted(folder.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    runs = (path.parent for path in begun if not path.with_name("metrics.json").exists())
    return next((run for run in runs if not unlike(cfg, run) and lock(run)), None)


LOCKS: dict[Path, int] = {}
"""Descriptors of the run directories of this process, open until it ends."""


def release() -> None:
    while LOCKS:
        os.close(LOCKS.popitem()[1])


os.register_at_fork(after_in_child=release)  # a loader's worker outlives a killed run by seconds


def lock(out: Path) -> bool:
    """Take a run directory for this process; False where another one has it."""
    if out not in LOCKS:
        descriptor = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        LOCKS[out] = descriptor
    return True


def unlike(cfg: DictConfig, run: Path) -> list[str]:
    """Keys whose values differ from those of the run in this directory; `resume` aside."""
    stored = OmegaConf.load(run / "config.yaml")
    ours, theirs = (flat(OmegaConf.to_container(config, resolve=True)) for config in (cfg, stored))
    return [key for key in ours | theirs if key != "resume" and ours.get(key, ...) != theirs.get(key, ...)]


def flat(node: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, their keys joined by dots."""
    if not isinstance(node, dict) or not node:
        return {key: node}
    return {k: v for name, value in node.items() for k, v in flat(value, f"{key}.{name}" if key else str(name)).items()}


def check_settings(cfg: DictConfig) -> None:
    """Refuse what would fail late.

    Raises:
        InputError: a number out of range.
    """
    intervals = ("trainer.max_steps", "trainer.val_check_interval", "trainer.log_every_n_steps")
    for key, least in (("seed", 0), *((key, 1) for key in intervals)):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{key} is {value!r}: expected a whole number of at least {least}")
    if cfg.resume not in (None, "auto"):
        raise InputError(f"resume is {cfg.resume!r}: expected auto or null; hydra.run.dir names the run to go on with")


def accumulation(cfg: DictConfig, devices: int) -> int:
    """Batches an optimizer step takes, so that `global_batch_size` images make one on any number of devices.

    Raises:
        InputError: no number of batches makes that many images, or the number given does not.
    """
    given, wanted = cfg.trainer.accumulate_grad_batches, cfg.global_batch_size
    images = cfg.data.batch_size * devices
    if wanted is None:
        return given or 1
    passes = given or max(1, wanted // images)
    if passes * images != wanted:
        times = f" x {given} batches a step" if given else ""
        raise InputError(
            f"data.batch_size={cfg.data.batch_size} x {devices} devices{times} does not make the recipe's "
            f"global_batch_size={wanted}: choose a batch that divides it, or set global_batch_size={passes * images}"
        )
    if passes > 1 and not given:
        print(
            f"an optimizer step takes {passes} batches of {cfg.data.batch_size} on {devices} "
            f"device{'s' if devices > 1 else ''}: the recipe's {wanted} images"
        )
    return passes


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


def build_data(cfg: DictConfig) -> tuple["DataModule", list[str]]:
    """The data module of a composed configuration, and a sentence for each image that it leaves out."""
    from wsss.data.datamodule import DataModule

    transform = build(cfg.transform, "transform") if cfg.transform else None
    (train_set, bad), (val_set, more) = (open_set(cfg, split) for split in ("train", "val"))
    if val_set is None:
        print(f"{HydraConfig.get().runtime.choices['dataset']} names no images to evaluate on: evaluation is left out")
    values = plain(cfg.data, "data")
    data = call(DataModule, values, "data", train=train_set, val=val_set, transform=transform, seed=cfg.seed)
    return data, [*bad, *more]


def open_set(cfg: DictConfig, split: str) -> tuple[Any, list[str]]:
    """A data set, None where it holds nothing; with `on_bad_image=skip` without the images that cannot be used."""
    from wsss.data.datamodule import Part
    from wsss.prepare import look

    if cfg.on_bad_image not in ("error", "skip"):
        raise InputError(f"on_bad_image is {cfg.on_bad_image!r}: expected error or skip")
    images = build(cfg.dataset, "dataset", split=split)
    bad: list[str] = []
    if cfg.on_bad_image == "skip":
        seen, bad = look(images, split, cfg.data.num_workers)
        if bad and not seen:
            raise InputError(f"none of the {len(bad)} images of {split} can be used: {bad[0]}")
        images = Part(images, list(seen)) if bad else images
    return (images if len(images) else None), bad


def write_skipped(out: Path, skipped: Sequence[str]) -> None:
    """Say how many images are left out, and list them in skipped.txt."""
    (out / "skipped.txt").write_text("".join(f"{sentence}\n" for sentence in skipped))
    print(f"{len(skipped)} images cannot be used and are left out, see {out / 'skipped.txt'}: {skipped[0]}")


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
        "Total length of `list` across ranks is zero",  # nothing to evaluate on, which we have said
        "You have overridden `on_before_batch_transfer`",
        "Found .* in eval mode at the start of training",  # a support network is meant to be
        "It is recommended to use .*sync_dist=True",  # torchmetrics has gathered the values already
        "Checkpoint directory .* exists and is not empty",  # a run that goes on
    ):
        warnings.filterwarnings("ignore", message)


def main() -> None:
    run_command("train", train)

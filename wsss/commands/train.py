"""`wsss-train`: fit a method on a data set, then evaluate it."""

import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from wsss import InputError, RunError
from wsss.commandline import message_of, run_command
from wsss.config import absolute_paths, build, plain_values

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from wsss.callbacks import Pace, RunLog
    from wsss.data.datamodule import DataModule
    from wsss.methods.stage import Stage


def train(cfg: DictConfig) -> float | None:
    """Train, evaluate, and leave a run directory; returns the monitored figure."""
    from pytorch_lightning.utilities import rank_zero_only

    from wsss.assemble import quieten
    from wsss.runs import choose_run, release

    quieten()
    if getattr(rank_zero_only, "rank", 0):  # one process speaks
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    check_settings(cfg)
    run = HydraConfig.get()
    sweep = run.mode == RunMode.MULTIRUN
    named = any(override.startswith("hydra.run.dir=") for override in run.overrides.hydra)
    try:
        return fit(cfg, choose_run(cfg, Path(run.runtime.output_dir), search=not sweep and not named))
    finally:
        if sweep:  # whose process goes on with other jobs, or waits for them
            release()


def fit(cfg: DictConfig, out: Path) -> float | None:
    """`train` in a directory of its own."""
    from wsss.runs import finished_figures, readable_checkpoint
    from wsss.trackers import ending

    started = time.perf_counter()
    if (figures := finished_figures(out)) is not None:
        print(f"{out} holds this run, finished: {cfg.monitor} {figures.get(cfg.monitor)}, nothing to do")
        return figures.get(cfg.monitor)
    method, data, skipped = prepare(cfg)
    trainer, log, pace = build_run(cfg, out, data)
    last = readable_checkpoint(out)
    if trainer.is_global_zero:
        announce(cfg, out, method, data, skipped)
    try:
        with ending():
            if method.losses:
                trainer.fit(method, data, ckpt_path=last, weights_only=True)
            else:  # it is complete as it is built
                method.origin["checkpoint_rule"] = "last"
                trainer.strategy.connect(method)
                trainer.save_checkpoint(out / "checkpoints" / "last.ckpt")
            if data.val is not None and log.evaluated != trainer.global_step:
                trainer.validate(method, data, verbose=False)
    except InputError as error:
        if (out / "checkpoints" / "last.ckpt").exists():
            raise RunError(f"{message_of(error)} {KEPT.format(out=out)}") from error
        raise
    cost = {"seconds": time.perf_counter() - started, "steps": trainer.global_step}
    figures = log.figures | cost | pace.figures
    if trainer.is_global_zero:
        report(out, method, data, figures | {"peak_memory_mb": peak_memory()})
    return figures.get(cfg.monitor)


KEPT = "(what was trained is kept in {out}: mend this, then the same command with resume=auto goes on)"


def check_settings(cfg: DictConfig) -> None:
    """Refuse what would fail late.

    Raises:
        InputError: a number out of range, or a strategy that would repeat a sweep on each device.
    """
    from wsss.runs import launched_by

    strategy = str(cfg.trainer.strategy)
    anew = "trainer.strategy=ddp starts" if strategy.startswith("ddp") and strategy != "ddp_spawn" else None
    anew = "torchrun and srun start" if launched_by() is not None else anew
    if HydraConfig.get().mode == RunMode.MULTIRUN and anew is not None:
        raise InputError(
            f"{anew} this command anew on each device and would repeat the whole sweep there: "
            "use trainer.strategy=ddp_spawn, or Hydra's submitit launcher"
        )
    intervals = ("trainer.max_steps", "trainer.val_check_interval", "trainer.log_every_n_steps")
    for key, least in (("seed", 0), *((key, 1) for key in intervals)):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{key} is {value!r}: expected a whole number of at least {least}")
    for key in ("per_image", "gather_losses"):
        if not isinstance(cfg[key], bool):
            raise InputError(f"{key} is {cfg[key]!r}: expected true or false")
    if cfg.resume not in (None, "auto"):
        raise InputError(f"resume is {cfg.resume!r}: expected auto or null; hydra.run.dir names the run to go on with")


def prepare(cfg: DictConfig) -> tuple["Stage", "DataModule", list[str]]:
    """The method and its data, and a sentence for each image that is left out.

    Raises:
        InputError: something of the configuration or the data cannot be used; the monitor is no figure of the method.
    """
    import pytorch_lightning as pl

    from wsss.assemble import build_data, build_method, check_supervision, check_views, fit_sizes, use_features
    from wsss.data.pseudo import FromFolder

    choices = HydraConfig.get().runtime.choices
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    data, skipped = build_data(cfg)
    if data.val is None:
        print(f"{choices['dataset']} names no images to evaluate on: evaluation is left out")
    method = build_method(cfg, data)
    if data.val is not None:
        data.val, small = fit_sizes(data.val, method, cfg.on_bad_image)
        skipped += small
    check_supervision(method, data, choices["method"])
    method.started_from += data.train.loaded if isinstance(data.train, FromFolder) else []
    known = method.figures(data.has_masks)
    if cfg.monitor is not None and cfg.monitor not in known:
        without = "" if data.has_masks else " without masks"
        raise InputError(
            f"monitor={cfg.monitor} is not a figure of {choices['method']}{without}: known are "
            f"{', '.join(known) or 'none'}; monitor=null keeps the last checkpoint alone"
        )
    if not known:
        data.val = None  # there is nothing to measure
    method.counts_images = cfg.per_image
    use_features(cfg, method, data)
    check_views(method, data, choices["method"], choices.get("transform"))
    dataset = plain_values(cfg.dataset, "dataset")
    method.origin = {
        "method": choices["method"],
        "dataset": choices["dataset"],
        "dataset_values": absolute_paths(dataset),
    }
    return method, data, skipped


def build_run(cfg: DictConfig, out: Path, data: "DataModule") -> tuple["pl.Trainer", "RunLog", "Pace"]:
    """The trainer of a run directory, and the callbacks that know the latest figures and how fast it is."""
    from pytorch_lightning.strategies import DDPStrategy

    from wsss.assemble import build_trainer
    from wsss.callbacks import (
        BestCheckpoint,
        CSVLog,
        FiniteLoss,
        GatherLosses,
        LastCheckpoint,
        Pace,
        PerImageCounts,
        RunLog,
        StepProgress,
        StepSeed,
        WholeCheckpoints,
    )
    from wsss.trackers import Showing

    settings = plain_values(cfg.trainer, "trainer")
    interval = min(settings["val_check_interval"], settings["max_steps"])
    log, pace = RunLog(cfg.trainer.log_every_n_steps), Pace()
    callbacks: list[pl.Callback] = [FiniteLoss(cfg.trainer.log_every_n_steps), StepSeed(cfg.seed), log]
    if cfg.gather_losses:
        callbacks.append(GatherLosses())
    if cfg.per_image:
        callbacks.append(PerImageCounts(out))
    if data.val is not None and cfg.monitor is not None:
        callbacks.append(BestCheckpoint(out / "checkpoints", cfg.monitor))
    callbacks.append(LastCheckpoint(out / "checkpoints" / "last.ckpt", interval if data.val is None else None))
    loggers = [build(cfg.logger, "logger", save_dir=str(out))] if cfg.logger else []
    if loggers and not isinstance(loggers[0], CSVLog):  # which there is beside others, for reports
        loggers.insert(0, CSVLog(str(out)))
        callbacks.append(Showing(data, cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))))
    if cfg.trainer.enable_progress_bar:
        callbacks.append(StepProgress(log))
    callbacks.append(pace)  # after what others do at the end of a step, which is no waiting
    trainer = build_trainer(
        settings
        | {
            "val_check_interval": interval,
            "accumulate_grad_batches": settings["accumulate_grad_batches"] or 1,
            "enable_progress_bar": False,  # ours counts steps
        },
        logger=loggers,
        callbacks=callbacks,
        plugins=[WholeCheckpoints()],
        default_root_dir=out,
        use_distributed_sampler=False,  # our samplers shard themselves
        num_sanity_val_steps=0,
    )
    if isinstance(trainer.strategy, DDPStrategy):
        # a loss that is left out, or starts late, leaves parameters without a gradient
        trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
    trainer.accumulate_grad_batches = accumulation(cfg, trainer.world_size)
    # Lightning's interval is of batches, ours of steps
    trainer.val_check_interval = interval * trainer.accumulate_grad_batches
    return trainer, log, pace


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


def announce(cfg: DictConfig, out: Path, method: "Stage", data: "DataModule", skipped: Sequence[str]) -> None:
    """Leave the run's record, and say what begins."""
    from wsss.runs import begin, write_skipped

    run = HydraConfig.get()
    begin(out, cfg, run.overrides.task, data.fingerprint)
    write_skipped(out, skipped)
    choices = run.runtime.choices
    parameters = sum(p.numel() for p in method.parameters() if p.requires_grad)
    print(
        f"{choices['method']} ({parameters / 1e6:.1f} M parameters) on {choices['dataset']}: "
        f"{data.train_size} images of {data.num_classes} classes, "
        f"{f'{cfg.trainer.max_steps} steps' if method.losses else 'nothing to learn'} -> {out}"
    )
    for key, step in method.loss_starts.items():
        if step > 0:
            never = f", and this run ends at step {cfg.trainer.max_steps}, before that"
            print(f"loss {key} takes part from step {step} on{never if step >= cfg.trainer.max_steps else ''}")
    if data.val is not None and not data.val.has_labels and str(cfg.monitor).endswith("map"):
        print(f"no evaluation image has a label: {cfg.monitor} is NaN, and there is no best checkpoint")


def report(out: Path, method: "Stage", data: "DataModule", figures: dict[str, Any]) -> None:
    """metrics.json, tags.json, a table of all figures but those of single classes, and pictures.

    Raises:
        RunError: no pictures could be made; all else is there.
    """
    from wsss.evaluation.protocol import write_figures
    from wsss.report.pictures import save_examples
    from wsss.report.tables import print_figures

    notes = method.describe(data.val_name) if data.val is not None else {}
    write_figures(out, figures, notes)
    print_figures({k: v for k, v in figures.items() if not k.startswith("val/iou/")}, notes, str(out))
    method.eval().float()  # trained in double or half precision it would not take images
    try:
        save_examples(out, [method.illustrate(batch) for batch in data.examples(8, method.smallest_side)])
    except (InputError, RuntimeError, MemoryError, OSError) as error:
        raise RunError(f"{out} is complete, but for its pictures: {' '.join(str(error).split())[:300]}") from error


def peak_memory() -> float:
    """MiB that this process held at most, on its GPU where it has one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    run_command("train", train)

"""`wsss-eval`: measure a checkpoint on a data set."""

import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from wsss import InputError, printable
from wsss.commandline import run_command
from wsss.config import call_checked, extra_directories, given_values, plain_values


def evaluate(cfg: DictConfig) -> dict[str, float]:
    """Evaluate, print a table, write metrics.json, tags.json, tables.json and pictures; returns the figures."""
    import pytorch_lightning as pl

    from wsss.assemble import build_trainer, fit_sizes, notes_on, open_images, quieten, use_features, with_classes
    from wsss.callbacks import PerImageCounts, StepProgress
    from wsss.checkpoints import checked_values, load_method, read_checkpoint
    from wsss.data.datamodule import DataModule
    from wsss.evaluation.protocol import write_figures
    from wsss.report.pictures import save_examples
    from wsss.report.tables import print_figures
    from wsss.runs import provenance, write_skipped
    from wsss.writing import write_json

    quieten()
    if not isinstance(cfg.detail, bool):
        raise InputError(f"detail is {cfg.detail!r}: expected true or false")
    run = HydraConfig.get()
    out = Path(run.runtime.output_dir)
    checkpoint = read_checkpoint(cfg.checkpoint, extra_directories())
    origin = checkpoint["wsss"]
    stored = origin.get("dataset_values", {}) if origin.get("dataset") == run.runtime.choices["dataset"] else {}
    values = checked_values(cfg, "dataset", stored)
    if "root" in stored and not given_values(run.overrides.task, "dataset.root"):
        print(f"dataset.root={values['root']}, as the checkpoint says")
    values = with_classes(cfg.dataset._target_, values, origin.get("classes", ()))
    val, skipped = open_images(cfg.dataset._target_, values, "val", cfg.on_bad_image, cfg.data.num_workers)
    if val is None:
        raise InputError("the data set names no images to evaluate on: add dataset.val=all, a list or a fraction")
    for note in notes_on(cfg.dataset._target_, values):
        print(f"note: {printable(note)}")
    data = call_checked(DataModule, plain_values(cfg.data, "data"), "data", train=None, val=val)
    method = load_method(cfg, checkpoint, data.classes, as_trained=False)
    if not method.figures(data.has_masks):
        raise InputError(f"{type(method).__name__} has no figure that could be measured: evaluate what it refines")
    if cfg.detail:
        method.measure_details()
    if run.runtime.choices["protocol"] == "honest" and "masks" in method.checkpoint_rule:
        print(f"note: masks have chosen this checkpoint ({method.checkpoint_rule}): last.ckpt is the honest one")
    data.val, small = fit_sizes(data.val, method, cfg.on_bad_image)
    use_features(cfg, method, data)
    write_skipped(out, [*skipped, *small])
    settings = plain_values(cfg.trainer, "trainer")
    callbacks: list[pl.Callback] = [StepProgress()] if settings["enable_progress_bar"] else []
    callbacks += [PerImageCounts(out)] if cfg.detail else []
    trainer = build_trainer(settings | {"enable_progress_bar": False}, logger=False, callbacks=callbacks)
    began = time.perf_counter()
    trainer.validate(method, data, verbose=False)
    rate = len(data.val) / (time.perf_counter() - began)
    figures = {key: value.item() for key, value in trainer.callback_metrics.items()}
    notes = method.describe(data.val_name)
    write_json(out / "run.json", provenance(cfg, run.overrides.task))
    write_figures(out, {"checkpoint": cfg.checkpoint} | figures, notes)
    write_json(out / "tables.json", method.tables)
    save_examples(out, [method.illustrate(batch) for batch in data.examples(8, method.smallest_side)])
    print_figures(figures, notes, f"{cfg.checkpoint} -> {out}, {rate:.1f} images/s")
    return figures


def prepare(arguments: list[str]) -> list[str]:
    from wsss.checkpoints import checkpoint_overrides

    return checkpoint_overrides(arguments)


def main() -> None:
    run_command("eval", evaluate, prepare)

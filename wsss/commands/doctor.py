"""`wsss-doctor`: whether a machine is fit, as something to paste into an issue."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig

from wsss import InputError, RunError, __version__, printable
from wsss.commandline import message_of, run_command
from wsss.config import check_arguments, class_named, plain_values

LITTLE_DISK = 2e9
"""Bytes: features, checkpoints and logs of a small run need less."""

LITTLE_SHARED = 256e6
"""Bytes of shared memory below which loader processes tend to die, as in containers that are given 64 MB."""

STEPS = 40
"""Of the training that is tried."""

DRIVER = Path("/proc/driver/nvidia/version")
"""There where a driver of NVIDIA is loaded."""


def doctor(cfg: DictConfig) -> None:
    """Print what this machine has and what does not fit.

    Raises:
        RunError: something does not fit.
    """
    print(f"wsss {__version__}, Python {platform.python_version()}, {platform.platform()}")
    problems = []
    for part in (packages, devices, room, weights, data, self_test):
        try:
            for line in part(cfg):
                print(printable(line), flush=True)
        except (InputError, RunError) as error:
            problems.append(f"{part.__name__.replace('_', '-')}: {message_of(error)}")
    for problem in problems:
        print(f"- {printable(problem)}")
    if problems:
        raise RunError(f"{len(problems)} problem{'s' * (len(problems) > 1)}, listed above")
    print("no problem found")


def packages(cfg: DictConfig) -> Iterator[str]:
    """Versions of what wsss declares, and the extras that are complete."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(line) for line in metadata.requires("wsss") or []]
    except metadata.PackageNotFoundError as error:
        root = Path(__file__).parents[2]
        raise InputError(f"wsss is run from {root} without being installed: pip install -e {root}") from error
    versions: dict[str, str | None] = {}
    for requirement in declared:
        try:
            versions[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            versions[requirement.name] = None

    def fits(requirement: Requirement) -> bool:
        version = versions[requirement.name]
        return version is not None and requirement.specifier.contains(version, prereleases=True)

    needed = [requirement for requirement in declared if requirement.marker is None]
    yield "packages: " + ", ".join(f"{one.name} {versions[one.name]}" for one in needed)
    extras: dict[str, bool] = {}
    for extra in metadata.metadata("wsss").get_all("Provides-Extra") or []:
        own = [one for one in declared if one.marker is not None and one.marker.evaluate({"extra": extra})]
        extras[extra] = all(map(fits, own))
    yield f"extras: {', '.join(name for name, complete in extras.items() if complete) or 'none'}"
    if wrong := [requirement for requirement in needed if not fits(requirement)]:
        found = ", ".join(f"{one.name}{one.specifier} (found {versions[one.name] or 'nothing'})" for one in wrong)
        raise InputError(f"wsss needs {found}: install it anew with pip install --upgrade wsss")


def devices(cfg: DictConfig) -> Iterator[str]:
    """Processors, memory, and what torch can train on."""
    import torch

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield f"machine: {cores} cores, {memory / 1e9:.0f} GB of memory, torch uses {torch.get_num_threads()} threads"
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus]
    if torch.backends.mps.is_available():
        names.append("mps")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield f"devices: {', '.join(names) or 'none but the processor'}; torch is built for {built}"
    try:
        from torchvision.ops import nms  # type: ignore[import-untyped]

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"torchvision does not fit torch {torch.__version__} ({' '.join(str(error).split())[:120]}): install both "
            "from one index in one command, pip install --upgrade torch torchvision"
        ) from error
    if DRIVER.exists() and not gpus:
        raise InputError(
            f"a driver of NVIDIA is loaded, but torch {torch.__version__} sees no GPU: its build ({built}) has to fit "
            "the driver (nvidia-smi shows which), and CUDA_VISIBLE_DEVICES must not hide it"
        )


def room(cfg: DictConfig) -> Iterator[str]:
    """Free disk where runs, features and temporary files go, and shared memory."""
    little = []
    features = Path(cfg.features.folder).expanduser()
    for name, place in (("here", Path.cwd()), ("features", features), ("temporary files", Path(tempfile.gettempdir()))):
        existing = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        writable = os.access(existing, os.W_OK)
        yield f"disk, {name}: {free / 1e9:.1f} GB free{'' if writable else ', not writable'} ({_short(place)})"
        if free < LITTLE_DISK or not writable:
            little.append(f"{_short(place)} ({f'{free / 1e9:.1f} GB' if writable else 'not writable'})")
    if (shared := Path("/dev/shm")).is_dir():
        size = shutil.disk_usage(shared).total
        note = "" if size >= LITTLE_SHARED else ": little; if loader processes die, data.num_workers=0 does without"
        yield f"shared memory: {size / 1e9:.1f} GB{note}"
    if little:
        raise InputError(f"less than {LITTLE_DISK / 1e9:.0f} GB can be written in {', '.join(little)}: make room there")


def _short(path: Path) -> str:
    """A path without the name of its user, since this is pasted elsewhere."""
    home = Path.home()
    return str(Path("~") / path.relative_to(home)) if path.is_relative_to(home) and home != Path("/") else str(path)


def weights(cfg: DictConfig) -> Iterator[str]:
    """Weights of ImageNet that are here; a damaged file is a problem, an absent one is not."""
    from wsss.networks.pretrained import PACKAGES, installed_file
    from wsss.networks.sources import weight_rows

    here = [f"{row.backbone} {row.name}" for row in weight_rows() if row.here.startswith("yes")]
    yield f"weights: {', '.join(here) or 'none'}; wsss-data weights tells where others come from"
    for package in PACKAGES.values():
        installed_file(package)


def data(cfg: DictConfig) -> Iterator[str]:
    """The data set, and its first image of each split."""
    from wsss.data.base import Images, as_images, both_splits

    target, values = class_named(cfg.dataset._target_), plain_values(cfg.dataset, "dataset")
    check_arguments(target, values, "dataset", given=("split",))
    inspection = target.inspection(**values) if issubclass(target, Images) else both_splits(target, values)
    for split, make in inspection.sets.items():
        images = as_images(make())
        shape = " x ".join(map(str, images[0]["image"].shape[1::-1])) if len(images) else "none"
        yield f"data, {split}: {len(images)} images of {len(images.classes)} classes, the first {shape}"
    if inspection.problems:
        raise InputError(f"{inspection.problems[0]} (wsss-data check lists all)")


def self_test(cfg: DictConfig) -> Iterator[str]:
    """A training of seconds on drawings, on the device that a run would take, and a prediction.

    Raises:
        RunError: torch refuses, or the loss does not fall.
    """
    import pytorch_lightning as pl
    import torch

    from wsss.assemble import quieten
    from wsss.data.datamodule import DataModule
    from wsss.data.shapes import Shapes
    from wsss.data.transforms import FlipCrop
    from wsss.methods.cam import CAM
    from wsss.predictor import Predictor

    class Losses(pl.Callback):
        values: ClassVar[list[float]] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.values.append(float(outputs["loss"]))

    quieten()
    started, noted = time.perf_counter(), Losses()
    torch.manual_seed(0)
    try:
        data = DataModule(Shapes("train", train_size=16, size=32), transform=FlipCrop(32), batch_size=16, num_workers=0)
        slim = {"width": 8, "frozen_stages": 0, "batch_norm_momentum": 0.1}
        method = CAM(data.num_classes, data.classes, backbone_args=slim, dropout=0.0, lr=0.02, momentum=0.9)
        off: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        trainer = pl.Trainer(devices=1, max_steps=STEPS, callbacks=[noted], **off)
        trainer.fit(method, data)
        Predictor(method).predict(Shapes("val", size=32)[0]["image"])
    except (RuntimeError, OSError) as error:
        raise RunError(f"a training of seconds fails: {' '.join(str(error).split())[:300]}") from error
    seconds = time.perf_counter() - started
    first, last = sum(noted.values[:5]) / 5, sum(noted.values[-5:]) / 5
    where = trainer.strategy.root_device
    yield f"self-test: {STEPS} steps in {seconds:.1f} s on {where}, loss {first:.2f} to {last:.2f}"
    if not last < 0.9 * first:
        raise RunError(
            f"the loss of a small training went from {first:.2f} to {last:.2f}, expected less than {0.9 * first:.2f}: "
            "the libraries of this machine compute something else, please report all of the above"
        )


def main() -> None:
    run_command("doctor", doctor)

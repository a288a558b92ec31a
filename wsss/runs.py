"""Run directories: chosen, locked, resumed, finished."""

import fcntl
import hashlib
import json
import os
import platform
import re
import sys
import textwrap
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from wsss import InputError, RunError, __version__
from wsss.config import flatten, key_of
from wsss.writing import write_json, write_whole

if TYPE_CHECKING:
    from lightning_fabric.plugins.environments import ClusterEnvironment

NO_MATTER = re.compile(
    r"features\..*|hydra\b.*|out|resume|logger\b.*|shards?|(data\.)?num_workers|trainer\.(accelerator|devices|"
    r"num_nodes|strategy|enable_progress_bar)"
)
"""Settings that the result of a command does not depend on: where and how it is made."""


def choose_run(cfg: DictConfig, out: Path, search: bool) -> Path:
    """The run directory: Hydra's, or with `resume=auto` that of an interrupted run of the same configuration.

    It is locked until this process ends, however it ends, or calls `release`. Of several processes the first one
    chooses for all.

    Args:
        cfg: the composed configuration.
        out: Hydra's directory.
        search: whether `resume=auto` may go on with another run beside `out`, which nobody has named.

    Raises:
        InputError: the directory holds a run already, or one of another configuration.
        RunError: another process is at work there; or the first process of this training is not to be reached.
    """
    if (launch := launched_by()) is not None:  # torchrun or srun has started several of this command
        return agree(launch, cfg, out, search)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # Lightning has started it from the process that has chosen
        return Path(os.environ.get("WSSS_RUN_DIR", out))
    return choose(cfg, out, search)


def choose(cfg: DictConfig, out: Path, search: bool) -> Path:
    """`choose_run` of the first process."""
    if cfg.resume == "auto" and (out / "config.yaml").exists():
        if different := differing_keys(cfg, out):
            raise InputError(
                f"{out} holds a run of another configuration, different are {', '.join(different[:5])}: "
                "repeat its command, or give another hydra.run.dir"
            )
    elif cfg.resume == "auto" and search:
        old = newest_unfinished(cfg, out.parent)
        if old is not None:
            out.rmdir()  # made by Hydra a moment ago
            out = old
        print(f"resume=auto: {f'going on with {old}' if old else f'no such run in {out.parent}, starting {out.name}'}")
    elif (out / "run.json").exists() or (out / "config.yaml").exists():
        raise InputError(f"{out} already holds a run: give another hydra.run.dir, add resume=auto, or remove it")
    if not lock(out):
        raise RunError(f"{out} is in use by another process: wait for its end, or give another hydra.run.dir")
    for temporary in out.rglob(".*.tmp"):  # of a process that was killed while it wrote
        temporary.unlink()
    os.environ["WSSS_RUN_DIR"] = str(out)
    return out


def launched_by() -> "ClusterEnvironment | None":
    """What has started this process as one of several of a training: torchrun or SLURM's srun; None where it is alone.

    Raises:
        InputError: srun was not told how many processes a node has.
    """
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    kinds: tuple[type[ClusterEnvironment], ...] = (TorchElasticEnvironment, SLURMEnvironment)
    kind = next((kind for kind in kinds if kind.detect()), None)
    try:
        environment = None if kind is None else kind()
    except RuntimeError as error:
        raise InputError(str(error)) from error
    return environment if environment is not None and environment.world_size() > 1 else None


WAIT = timedelta(minutes=10)
"""How long the processes of a training wait for each other at its beginning."""


def agree(launch: "ClusterEnvironment", cfg: DictConfig, out: Path, search: bool) -> Path:
    """What the first process chooses, told to the others over the network; as `choose_run`."""
    from torch.distributed import PrefixStore, TCPStore

    rank, port = launch.global_rank(), launch.main_port
    # torchrun keeps a store at the port, which outlives its processes; else that port is for Lightning later on
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = port if kept else port + (10_000 if port < 50_000 else -10_000)
    try:
        store: Any = TCPStore(launch.main_address, port, is_master=rank == 0 and not kept, timeout=WAIT)
        store = PrefixStore(f"wsss/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        if rank > 0:
            said = json.loads(store.get("run"))
            store.set(f"heard by {rank}", "yes")
        else:
            said = {}
            try:
                said["out"] = str(choose(cfg, out, search))
            except (InputError, RunError) as error:
                said[type(error).__name__] = str(error)
            store.set("run", json.dumps(said))
            store.wait([f"heard by {other}" for other in range(1, launch.world_size())], WAIT)
    except RuntimeError as error:  # torch's own
        raise RunError(
            f"the {launch.world_size()} processes of this training cannot meet at {launch.main_address}:{port} "
            f"({shorten(error)}): see that all of them were started and reach the first one's node"
        ) from error
    for kind in (InputError, RunError):
        if kind.__name__ in said:
            raise kind(said[kind.__name__])
    chosen = Path(said["out"])
    if rank > 0 and out != chosen:
        with suppress(OSError):
            out.rmdir()  # made by Hydra a moment ago
    return chosen


def newest_unfinished(cfg: DictConfig, folder: Path) -> Path | None:
    """The run that began last among those of this configuration that have not ended and that nobody works on."""
    begun = sorted(folder.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime, reverse=True)
    for run in (path.parent for path in begun):
        if finished_figures(run) is not None:
            continue
        try:
            different = differing_keys(cfg, run)
        except InputError as error:
            print(f"left alone: {error}")
            continue
        if not different and lock(run):
            return run
    return None


def differing_keys(cfg: DictConfig, run: Path) -> list[str]:
    """Keys whose values differ from those of the run in this directory, but for those that do not matter.

    Devices matter where `global_batch_size` does not say what an optimizer step takes.

    Raises:
        InputError: its config.yaml cannot be read.
    """
    path = run / "config.yaml"
    try:
        stored = OmegaConf.to_container(OmegaConf.load(path))  # written with all interpolations resolved
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise InputError(
            f"{path} cannot be read as the configuration of a run ({shorten(error)}): put it back, or give another "
            "hydra.run.dir"
        ) from error
    if not isinstance(stored, dict) or not stored:
        raise InputError(f"{path} holds no configuration of a run: put it back, or give another hydra.run.dir")
    ours, theirs = flatten(OmegaConf.to_container(cfg, resolve=True)), flatten(stored)
    if (read_json(run / "run.json") or {}).get("wsss") != __version__:  # which perhaps did not know all keys
        ours = {key: value for key, value in ours.items() if key in theirs}
    different = [key for key in ours | theirs if ours.get(key, ...) != theirs.get(key, ...)]
    fixed = () if ours.get("global_batch_size") else ("trainer.devices", "trainer.num_nodes")
    return [key for key in different if key in fixed or not NO_MATTER.fullmatch(key)]


def begin_sweep(out: Path, swept: Sequence[str], jobs: Mapping[str, Sequence[str]], search: bool) -> Path:
    """Leave a record of a sweep's jobs, `sweep.json`, in its directory, which is returned.

    Args:
        out: the directory.
        swept: keys that the sweep varies.
        jobs: overrides of each job by name, which is that of its directory.
        search: whether to go on with the newest unfinished sweep of the same jobs beside `out` instead.

    Raises:
        InputError: the sweep that is there has other settings, by which its jobs and these would be mixed up.
    """
    matter = _that_matter(jobs)
    if search:
        begun = sorted(out.parent.glob("*/sweep.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        same = (path.parent for path in begun if _that_matter((read_json(path) or {}).get("jobs")) == matter)
        old = next((sweep for sweep in same if any(finished_figures(sweep / name) is None for name in jobs)), None)
        print(
            f"resume=auto: {f'going on with {old}' if old else f'no such sweep in {out.parent}, starting {out.name}'}"
        )
        out = old or out
    record = read_json(out / "sweep.json") or {}
    varied = list(dict.fromkeys([*record.get("swept", ()), *swept]))
    for there, theirs in _that_matter(record.get("jobs")).items():
        for name, ours in matter.items():
            different = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
            if mixed := [key for key in different if name == there or key not in varied]:
                raise InputError(
                    f"the sweep in {out} has other settings ({', '.join(mixed[:3])}) in its job {there}: give another "
                    "hydra.sweep.dir, or sweep over the old values and the new"
                )
    write_json(
        out / "sweep.json",
        {
            "command": " ".join(sys.argv),
            "wsss": __version__,
            "swept": varied,
            "jobs": record.get("jobs", {}) | {name: list(overrides) for name, overrides in jobs.items()},
        },
    )
    return out


def _that_matter(jobs: Any) -> dict[str, dict[str, str]]:
    """Of jobs, as `sweep.json` has them, what their results depend on: values by key, but for `{}`, which sets none."""
    return {
        str(name): {
            key_of(override): value
            for override in given
            if (value := override.partition("=")[2]) != "{}" and not NO_MATTER.fullmatch(key_of(override))
        }
        for name, given in (jobs or {}).items()
    }


def finished_figures(run: Path) -> dict[str, Any] | None:
    """What a run that has ended has measured; None for one that has not, or whose metrics.json is damaged."""
    return read_json(run / "metrics.json")


def read_json(path: Path) -> dict[str, Any] | None:
    """An object that `write_json` has written; None where there is none, or something else, which is said."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:  # ValueError: no JSON, or no text
        content = shorten(error)
    if isinstance(content, dict) and content:
        return content
    print(f"{path} is damaged and is written anew")
    return None


def readable_checkpoint(out: Path) -> Path | None:
    """The checkpoint that a run goes on from: last.ckpt, else the newest best one; None where there is none.

    Raises:
        RunError: there are checkpoints, and none of them can be read.
    """
    folder = out / "checkpoints"
    candidates = [folder / "last.ckpt", *sorted(folder.glob("best-step-*.ckpt"), reverse=True)]
    damaged: list[str] = []
    for path in candidates:
        if path.exists():
            if is_whole(path):
                if damaged:
                    print(f"{', '.join(damaged)} cannot be read: going on from {path.name}")
                return path
            damaged.append(path.name)
    if damaged:
        raise RunError(f"{out} cannot go on, since {', '.join(damaged)} cannot be read: give another hydra.run.dir")
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is the archive that torch has written, every byte of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def begin(out: Path, cfg: DictConfig, overrides: Sequence[str], fingerprint: str) -> None:
    """Leave in a new run directory what is needed to repeat it; in one that goes on, see that the data is the same.

    Raises:
        InputError: the images, classes or labels are not those that the run began with.
    """
    record = read_json(out / "run.json")
    if record is None:
        with write_whole(out / "config.yaml") as file:
            file.write(OmegaConf.to_yaml(cfg, resolve=True).encode())
        write_json(out / "run.json", provenance(cfg, overrides) | {"fingerprint": fingerprint})
    # a run of version 0.1 has no fingerprint that knows the labels, and goes on without
    elif record.get("fingerprint", fingerprint) != fingerprint:
        raise InputError(
            f"the images, classes or labels of the data set are not those that {out} began with: restore them, or "
            "start anew"
        )


def provenance(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """What a reader of a directory needs to repeat its figures."""
    import pytorch_lightning
    import timm
    import torch

    return {
        "overrides": list(overrides),
        "command": " ".join(sys.argv),
        "seed": cfg.seed,
        "wsss": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pytorch_lightning": pytorch_lightning.__version__,
        "timm": timm.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.cuda.device_count()} GPUs",
    }


def write_skipped(out: Path, skipped: Sequence[str]) -> None:
    """Say how many images are left out, and list them in skipped.txt."""
    if skipped:
        (out / "skipped.txt").write_text("".join(f"{sentence}\n" for sentence in skipped))
        print(f"{len(skipped)} images cannot be used and are left out, see {out / 'skipped.txt'}: {skipped[0]}")


def shorten(error: Exception) -> str:
    """What a parser says, on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 120)


LOCKS: dict[Path, int] = {}
"""Descriptors of the run directories of this process, open until it ends."""


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


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def share(shards: Any, shard: Any) -> tuple[int, int]:
    """Number of this process, from 0, and how many there are: as given, else of torchrun, else of srun, else alone.

    Image i belongs to process i % world.

    Raises:
        InputError: values that are no number of a process among several.
    """
    if shards is not None or shard is not None:
        known = isinstance(shards, int) and isinstance(shard, int)
        if not known or not 0 <= shard < shards:
            raise InputError(
                f"shards is {shards} and shard is {shard}: expected a number of processes and that of this one, from 0"
            )
        return shard, shards
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


@contextmanager
def shared(out: Path) -> Iterator[None]:
    """Work in a folder together with other processes; one that finds nobody there removes what killed ones left."""
    LOCKS[out] = descriptor = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # others are at work, or the file system knows no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for temporary in out.rglob(".*.tmp"):
                temporary.unlink()
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(LOCKS.pop(out))


def release() -> None:
    """Let others have the run directories of this process."""
    while LOCKS:
        os.close(LOCKS.popitem()[1])


os.register_at_fork(after_in_child=release)  # a loader's worker outlives a killed run by seconds

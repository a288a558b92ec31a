"""Pipelines: commands one after another, each in a folder that says when it is finished."""

import hashlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wsss import InputError, RunError, __version__
from wsss.runs import NO_MATTER, read_json, sha256
from wsss.writing import write_json

MODULES = {"train": "train", "label": "label", "eval": "evaluate"}
"""By the name of a command that may be a stage the module of `wsss.commands` that holds it."""

OUTPUTS = {
    "train": {"checkpoint": "checkpoints/last.ckpt"},
    "label": {"masks": "masks", "scores": "scores"},
    "eval": {},
}
"""What later stages may name, by command, and where it lies in the folder of a stage."""

RESULT = {"train": "checkpoints/last.ckpt", "label": "manifest.json", "eval": "metrics.json"}
"""By command the file that tells a stage's result from others; a manifest lists the sha256 of all masks."""

REFERENCE = re.compile(r"\{(\w+)\.(\w+)\}")
"""`{stage.output}` in an override."""

CONTENT = {".csv", ".json", ".npy", ".txt"}
"""Suffixes of files of labels, which are hashed. All other files are known by name, size and time."""

OURS = ".labels.txt"
"""Ending of what `wsss.data.coco` keeps beside the labels."""

PATIENCE = 20.0
"""Seconds that a stage has to end itself before it is killed."""


@dataclass
class Stage:
    """One of our commands with its settings.

    Attributes:
        name: of the stage.
        command: one of MODULES.
        overrides: of its command line; `{stage.output}` stands for what an earlier stage has made.
        needs: names of the stages that have to be finished before.
        settings: all that its result depends on, resolved, by name.
        folder: where it works, see `place`.
        inputs: the names of the folders of the stages it needs.
    """

    name: str
    command: str
    overrides: list[str]
    needs: list[str]
    settings: dict[str, Any]
    folder: Path = Path()
    inputs: dict[str, str] = field(default_factory=dict)


def place(stages: Sequence[Stage], out: Path, data: Mapping[str, Any]) -> None:
    """Name the folder of each stage after its settings, the data, the version, and the folders that it needs."""
    folders: dict[str, Stage] = {}
    for stage in stages:
        stage.settings = {key: value for key, value in stage.settings.items() if not NO_MATTER.fullmatch(key)}
        stage.inputs = {need: folders[need].folder.name for need in stage.needs}
        content = [stage.command, stage.settings, stage.inputs, data, __version__]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]
        stage.folder = out / "stages" / f"{stage.name}-{digest}"
        stage.overrides = [
            REFERENCE.sub(
                lambda found: str(folders[found[1]].folder / OUTPUTS[folders[found[1]].command][found[2]]), override
            )
            for override in stage.overrides
        ]
        folders[stage.name] = stage


def data_fingerprint(values: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """What a change of the data changes: values of the data set, labels and lists, name, size and time of all files.

    Args:
        values: of the data set, whose paths are absolute or names in `root`.
        out: a folder that is left out, even where it lies among the data.
    """
    digests, count = {"labels": hashlib.sha256(), "files": hashlib.sha256()}, 0
    seen: set[Path] = set()
    root = values.get("root")
    places = {os.path.join(root, value) for value in values.values() if isinstance(value, str)} if root else set()
    for place in sorted(places):
        alone: list[tuple[str, list[str], list[str]]] = [(os.path.dirname(place), [], [os.path.basename(place)])]
        for folder, folders, names in alone if os.path.isfile(place) else os.walk(place, followlinks=True):
            inner = {name: Path(folder, name).resolve() for name in sorted(folders)}
            folders[:] = [name for name, path in inner.items() if path != out and path not in seen]
            seen |= {*inner.values()}
            for path in (Path(folder, name) for name in sorted(names)):
                if path in seen or not path.is_file() or path.name.endswith(OURS):
                    continue
                seen.add(path)
                name, status = os.fsencode(os.path.relpath(path, root)), path.stat()
                if path.suffix.lower() in CONTENT:
                    digests["labels"].update(name + sha256(path).encode())
                else:
                    count += 1
                    digests["files"].update(name + f" {status.st_size} {status.st_mtime_ns} ".encode())
    return {"values": dict(values), "count": count} | {key: digest.hexdigest() for key, digest in digests.items()}


def finished(stage: Stage, records: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a finished stage has left in done.json; None where it has to run.

    Args:
        stage: a placed one.
        records: of the stages before it.

    Raises:
        InputError: its result, or what it was made of, has been changed since.
    """
    done = read_json(stage.folder / "done.json")
    if done is None or not is_complete(stage):
        return None
    expected = {"stage": str, "sha256": str, "seconds": int | float, "figures": dict, "inputs": dict, "tries": list}
    if any(not isinstance(done.get(key), kind) for key, kind in expected.items()) or done["stage"] != stage.folder.name:
        return None
    result = stage.folder / RESULT[stage.command]
    if done["sha256"] != sha256(result):
        raise InputError(
            f"{result} is not what stage {stage.name} left there: put it back, or remove {stage.folder}, then repeat"
        )
    for need, consumed in done["inputs"].items():
        if consumed != consumed_from(records[need]):
            raise InputError(
                f"stage {stage.name} was made of another {consumed['file']} than that of stage {need}: remove "
                f"{stage.folder}, then repeat"
            )
    return done


def consumed_from(record: Mapping[str, Any]) -> dict[str, str]:
    """What tells the result of a stage from others."""
    return {"folder": record["stage"], "file": record["file"], "sha256": record["sha256"]}


def is_complete(stage: Stage) -> bool:
    """Whether what a stage makes is there: checkpoint, figures, or every mask as the manifest lists it."""
    if not (stage.folder / RESULT[stage.command]).is_file():
        return False
    if stage.command != "label":
        return True
    try:
        listed = json.loads((stage.folder / "manifest.json").read_bytes())["masks"]
        for name, entry in listed.items():
            mask = (stage.folder / "masks" / f"{name}.png").read_bytes()
            if hashlib.sha256(mask).hexdigest() != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def run_stages(
    stages: Sequence[Stage],
    out: Path,
    options: Sequence[str],
    show: Callable[[Mapping[str, Any]], None],
    start: int = 0,
) -> dict[str, Any]:
    """Run what is not finished, in order; after each stage `out/pipeline.json` and a call of `show` tell of all.

    Args:
        stages: placed ones.
        out: the folder of the pipeline, which nobody else works in.
        options: of every command line, in front of its overrides.
        show: is given the records of the stages so far, by name.
        start: index of the first one to run.

    Raises:
        InputError: a stage ended with exit code 2, or one before `start` is not finished.
        RunError: a stage failed.
    """
    records: dict[str, Any] = {}
    for index, stage in enumerate(stages):
        done, status = finished(stage, records), "skipped"
        if done is not None:
            print(f"stage {stage.name}: finished and unchanged in {stage.folder}, skipped", flush=True)
        elif stage.command == "eval" and not any(measured(records[need]) for need in stage.needs):
            print(f"stage {stage.name}: there is nothing to evaluate on, left out", flush=True)
            done, status = {"seconds": 0.0, "figures": {}}, "left out"
        elif index < start:
            raise InputError(
                f"stage {stage.name} is not finished with these settings and data, and start_from="
                f"{stages[start].name} would begin behind it: leave start_from out"
            )
        else:
            done, status = run_stage(stage, options, records), "ran"
        records[stage.name] = {"status": status, "folder": str(stage.folder)} | done
        write_json(out / "pipeline.json", {"out": str(out), "wsss": __version__, "stages": records})
        if status == "ran" or stage is stages[-1]:
            show(records)
    return records


def measured(record: Mapping[str, Any]) -> bool:
    """Whether a training has had images to evaluate on."""
    return any(key.startswith("val/") for key in record["figures"])


def run_stage(stage: Stage, options: Sequence[str], records: Mapping[str, Any]) -> dict[str, Any]:
    """Run a stage in a process group of its own, and leave done.json, which is returned.

    Raises:
        InputError: it ended with exit code 2.
        RunError: it failed otherwise.
        SystemExit: this process was interrupted or terminated; the stage is ended before.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    end_leftover(stage.folder)
    tries = earlier_tries(stage.folder)
    write_json(stage.folder / "running.json", {"tries": tries})
    (stage.folder / "done.json").unlink(missing_ok=True)
    where = [f"out={stage.folder}"]
    if stage.command != "label":
        where = [f"hydra.run.dir={stage.folder}", *(["resume=auto"] if stage.command == "train" else [])]
    arguments = [*options, *stage.overrides, *where]
    print(f"stage {stage.name}: wsss-{stage.command} {shlex.join(arguments)}", flush=True)
    code = run_process(stage, arguments, tries)
    if code != 0:
        raise failure(stage, code)
    if not is_complete(stage):
        raise RunError(
            f"stage {stage.name} ended without leaving all of its result: remove {stage.folder}, then repeat"
        )
    done = {
        "stage": stage.folder.name,
        "command": f"wsss-{stage.command} {shlex.join(arguments)}",
        "inputs": {need: consumed_from(records[need]) for need in stage.needs},
        "settings": stage.settings,
        "file": RESULT[stage.command],
        "sha256": sha256(stage.folder / RESULT[stage.command]),
        "seconds": round(sum(one["seconds"] for one in tries), 1),
        "peak_memory_mb": max(one.get("peak_memory_mb", 0.0) for one in tries),
        "tries": tries,
        "figures": read_json(stage.folder / "metrics.json") or {},
        "versions": {"wsss": __version__, "python": platform.python_version()},
    }
    write_json(stage.folder / "done.json", done)
    (stage.folder / "running.json").unlink(missing_ok=True)
    return done


def earlier_tries(folder: Path) -> list[dict[str, Any]]:
    """What is known of the tries of a stage before: the seconds of each, how it ended, and its memory.

    Of one whose end nobody has seen it is known that it lasted until the last of its files was written.
    """
    left = next((r for name in ("running.json", "done.json") if (r := read_json(folder / name)) is not None), {})
    tries = left.get("tries")
    known = isinstance(tries, list) and all(isinstance(o, dict) and isinstance(o.get("seconds"), float) for o in tries)
    tries = list(tries) if tries and known else []
    if isinstance(began := left.get("started"), float):
        last = max((path.stat().st_mtime for path in folder.rglob("*") if path.is_file()), default=began)
        tries.append({"seconds": round(max(last - began, 0.0), 1), "ended": "killed together with wsss-run"})
    return tries


def run_process(stage: Stage, arguments: Sequence[str], tries: list[dict[str, Any]]) -> int:
    """The exit code of a stage's command, which is ended when this process is; running.json tells of it meanwhile.

    The command waits until it stands there, and ends if this process does before: whoever finds the folder finds it.
    What the try has taken is added to `tries`, of its memory that of its largest process.
    """
    start = (
        f"import os, sys; os.read(0, 1) or sys.exit(1); from wsss.commands.{MODULES[stage.command]} import main; main()"
    )
    record, began = stage.folder / "running.json", time.time()
    with (stage.folder / "errors.txt").open("wb") as errors, terminable():
        go_on, told = os.pipe()
        process = subprocess.Popen(
            [sys.executable, "-c", start, *arguments], stdin=go_on, stderr=errors, process_group=0
        )
        os.close(go_on)
        code = None
        try:
            write_json(record, {"pid": process.pid, "started": began, "tries": tries})
            with suppress(BrokenPipeError):  # it has ended already
                os.write(told, b"1")
            code, peak = wait_for(process)
        except (KeyboardInterrupt, SystemExit) as error:
            said = "terminated" if isinstance(error, SystemExit) else "interrupted"
            raise SystemExit(f"{said} in stage {stage.name}: the same command goes on with it") from error
        finally:
            os.close(told)
            if code is None:
                end(process.pid, stage.folder)
                code, peak = wait_for(process)
            tries.append({"seconds": round(time.time() - began, 1), "peak_memory_mb": peak, "ended": ending(code)})
            write_json(record, {"tries": tries})
    return code


def wait_for(process: "subprocess.Popen[bytes]") -> tuple[int, float]:
    """Exit code of a child, or minus the signal that ended it, and MiB that its largest process held at most."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, round(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10), 1)


def ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit meanwhile."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_leftover(folder: Path) -> None:
    """End the process that a killed pipeline has left at work in the folder of a stage, if it is still there."""
    record = read_json(folder / "running.json") if (folder / "running.json").exists() else None
    pid = record.get("pid") if record else None
    if isinstance(pid, int) and is_alive(pid, folder):
        print(f"process {pid} of an earlier wsss-run is still at work in {folder}: it is ended", flush=True)
        end(pid, folder)


def end(pid: int, folder: Path) -> None:
    """End a stage with its group: it may end itself first."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, sent)
        limit = time.monotonic() + PATIENCE
        while is_alive(pid, folder) and time.monotonic() < limit:
            time.sleep(0.05)


def is_alive(pid: int, folder: Path) -> bool:
    """Whether a process runs that works in the folder of a stage; not one that has got its number later."""
    if Path("/proc/self/cmdline").exists():
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False
    else:
        line = subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True).stdout
    return os.fsencode(folder.name) in line


def failure(stage: Stage, code: int) -> Exception:
    """What is to be raised for a stage that has failed; a traceback is shown before."""
    lines = (stage.folder / "errors.txt").read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it said nothing"
    if not last.startswith("wsss-"):
        print("\n".join(lines[-20:]), file=sys.stderr)
    sentence = f"stage {stage.name} failed ({ending(code)}): {last} (what is finished stays, the same command goes on)"
    return (InputError if code == 2 else RunError)(sentence)


def leftovers(stages: Sequence[Stage], out: Path) -> list[Path]:
    """Folders of stages in `out` that are of none of these."""
    current = {stage.folder for stage in stages}
    found = sorted((out / "stages").glob("*-" + "[0-9a-f]" * 8))
    return [folder for folder in found if folder.is_dir() and folder not in current]

"""Tries the commands on a folder of odd data sets and says where they do not do what is right.

    python tests/cases.py DIR [NAME ...]

Each folder of DIR holds `photos`, perhaps masks in `truth`, and a README.txt. What is right says a case.json in it,
one object or a list of {"command": [...], "exit": [codes], "says": [words], "never": [words]}, or EXPECTED below; of
another folder the exit codes are only reported. In a command CASE, RUN, OUT and NET stand for the folder, the run
directory, a folder for masks and a network that trains in seconds. Exits with 1 where anything expected fails, and
wherever a traceback appears or a command takes more than two minutes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 120  # seconds
MODULES = {"eval": "evaluate"}
NET = [
    "method=toco", "method.backbone=vit_tiny_patch16_224", "method.weights=null",
    "method.backbone_args={img_size: 64, patch_size: 8, embed_dim: 64, depth: 2, num_heads: 2}", "method.aux_layer=-2",
    "method.phases=[]", "transform.crop_size=64", "method.local_crop_size=16", "method.warmup_steps=1",
    "trainer.max_steps=2", "data.batch_size=2", "data.num_workers=0", "hydra.run.dir=RUN",
]  # fmt: skip
CHECKPOINT = "checkpoint=RUN/checkpoints/last.ckpt"


class Step(NamedTuple):
    """A command and what is right: one of some exit codes, words that appear and others that do not."""

    command: list[str]
    exit: list[int] | None = None
    says: list[str] = []  # noqa: RUF012
    never: list[str] = []  # noqa: RUF012


def usual(exit: list[int] | None, *says: str, predict: bool = False, never: tuple[str, ...] = ()) -> list[Step]:
    """Check, train and, where training ends well, predict; `predict` says whether it says the same words."""
    told, silent = list(says), list(never)
    return [
        Step(["check", "dataset=folder", "dataset.root=CASE/photos", "MASKS", "VAL=all"], exit, told, silent),
        Step(["train", "dataset=folder", "dataset.root=CASE/photos", "NET", "MASKS", "VAL=0.5"], exit, told, silent),
        Step(
            ["predict", CHECKPOINT, "images=CASE/photos", "out=OUT"],
            exit if exit is None or 0 in exit else [0],
            told if predict else [],
        ),
    ]


EXPECTED = {
    "01-binary-masks-0-255": usual([2], "only 0 and 255", "1 lesion"),
    "02-pandas-index": usual([0], "pandas index"),
    "04-pipe-labels": usual([2], "|Nodule", "semicolons"),
    "06-row-per-object": usual([0], "1 rows name an image that another one names too"),
    "10-unread-suffixes": usual([0], "2 .heic", "IMG_0001.HEIC", predict=True),
    "11-training-testing-folders": usual([0], "Testing as val", "2 classes", never=("shows Training",)),
    "13-class-named-background": usual([2], "the class background"),
    "14-numeric-class-folders": usual([0], "2 in a mask is class 2"),
    "20-ls-data-key": usual([0], "2 classes"),
    "22-ls-absolute-local-files": usual([0], "2 classes"),
    "23-ls-json-min": usual([2], "JSON-MIN", "export as JSON"),
    "24-ls-two-controls": usual([2], "animal (cat, dog)", "quality", "dataset.classes"),
    "30-coco-roboflow-dummy": usual([0], "my-animals-x1 is a heading", "2 classes"),
    "33-via-json": usual([2], "VIA", "export its annotations as COCO"),
    "41-12-bit-xray": usual([0], "more than 8 bits of grey", predict=True),
    "43-odd-sizes": usual([0, 2]),
    "45-phone-photographs": usual([0]),
    "47-test-set-lacks-a-class": [
        Step(["train", "dataset=folder", "dataset.root=CASE/train", "NET"], [0]),
        Step(["eval", CHECKPOINT, "dataset.root=CASE/test", "dataset.val=all", "hydra.run.dir=OUT"], [0], ["shows 1"]),
    ],
    "49-labels-column-0-1": usual([2], "only 0 and 1", "called after the class"),
}  # fmt: skip


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    said: str
    seconds: float
    megabytes: float


def steps_of(case: Path) -> list[Step]:
    if (case / "case.json").is_file():
        content: Any = json.loads((case / "case.json").read_text(encoding="utf-8"))
        return [Step(**one) for one in (content if isinstance(content, list) else [content])]
    return EXPECTED.get(case.name) or usual(None)


def arguments_of(step: Step, case: Path, work: Path) -> list[str]:
    """The command line of a step, its words filled in; settings of masks are left out where there are none."""
    masks = (case / "truth").is_dir()
    arguments = []
    for word in step.command:
        if word == "NET":
            arguments += NET
        elif word == "MASKS":
            arguments += ["dataset.masks=CASE/truth"] if masks else []
        elif word.startswith("VAL="):
            arguments += [f"dataset.val={word[4:]}"] if masks else []
        else:
            arguments.append(word)
    places = {"CASE": case, "RUN": work / "run", "OUT": work / "out"}
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    return arguments


def run(arguments: list[str], work: Path) -> Outcome:
    """Runs a command as its installed script would."""
    name, *rest = arguments
    name, rest = ("data", ["check", *rest]) if name == "check" else (name, rest)
    call = f"from wsss.commands.{MODULES.get(name, name)} import main; main()"
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, "-c", call, *rest], cwd=work, stdout=output, stderr=output)
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            if time.perf_counter() - started > LIMIT:
                process.kill()
            time.sleep(0.05)
        process.returncode = os.waitstatus_to_exitcode(ended[1])  # else subprocess would wait for it again
        output.seek(0)
        said = output.read().decode(errors="replace")
    return Outcome(process.returncode, said, time.perf_counter() - started, ended[2].ru_maxrss / 1024)


def faults(step: Step, outcome: Outcome) -> list[str]:
    """What is not right."""
    found = ["traceback"] * ("Traceback" in outcome.said) + ["too long"] * (outcome.seconds > LIMIT)
    if step.exit is not None and outcome.code not in step.exit:
        found.append(f"exit {outcome.code}, not {' or '.join(map(str, step.exit))}")
    found += [f"does not say {word!r}" for word in step.says if word not in outcome.said]
    return found + [f"says {word!r}" for word in step.never if word in outcome.said]


def main() -> int:
    """Runs all cases, or those named; returns the exit code."""
    folder, *names = sys.argv[1:]
    wrong = 0
    print(f"{'case':28} {'command':8} {'exit':>4} {'s':>5} {'MB':>6}  what it said, or what is wrong")
    for case in sorted(path.resolve() for path in Path(folder).iterdir() if path.is_dir()):
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            for step in steps_of(case) if not names or case.name in names else ():
                if CHECKPOINT in step.command and not (work / "run/checkpoints/last.ckpt").is_file():
                    continue  # training was refused
                outcome = run(arguments_of(step, case, work), work)
                found = faults(step, outcome)
                wrong += bool(found)
                lines = [line for line in outcome.said.splitlines() if line.startswith(("wsss-", "note: ", "- "))]
                shown = f"WRONG: {'; '.join(found)}" if found else ""
                shown = " | ".join([shown, *lines[-1:]] if found else (lines[-1:] or outcome.said.splitlines()[:1]))
                figures = f"{outcome.code:4} {outcome.seconds:5.1f} {outcome.megabytes:6.0f}"
                print(f"{case.name:28} {step.command[0]:8} {figures}  {shown[:200]}", flush=True)
    print(f"{wrong} commands are not right" if wrong else "all are right")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

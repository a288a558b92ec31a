"""What a user waits for: the start of a command, and masks of photographs with and without the CRF.

    python -m tests.benchmarks.commands [CASE ...] [--before CHECKOUT] [--json FILE]

`predict` is of one photograph of 500 x 375 pixels: a thousand divided by its milliseconds is images a second.
`first step` is a whole `wsss-train` of one step on drawings, most of which is imports.
"""

import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

import numpy as np

import wsss
from tests.benchmarks.cases import method_of
from tests.benchmarks.harness import Case, main
from wsss.evaluation.protocol import Protocol
from wsss.predictor import Predictor

RUN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from wsss.commands.{} import main; main()"
IMPORT = "import sys; sys.path.insert(0, sys.argv.pop(1)); import {}"


def process(code: str, *arguments: str) -> Any:
    """A Python process with the library that this one has."""
    root = wsss.__file__.rsplit("/wsss/", 1)[0]
    return lambda: subprocess.run([sys.executable, "-c", code, root, *arguments], check=True, capture_output=True)


def first_step() -> Any:
    settings = ["trainer.max_steps=1", "monitor=null", "dataset.val_size=1", "trainer.enable_progress_bar=false"]
    small = ["dataset.train_size=8", "data.batch_size=2", "data.num_workers=0"]

    def run() -> None:
        with tempfile.TemporaryDirectory() as out:
            process(RUN.format("train"), *settings, *small, f"hydra.run.dir={out}/run")()

    return run


def predict(name: str, crf: dict[str, Any] | None, **arguments: Any) -> Any:
    method = method_of(name, **arguments)
    method.protocol = Protocol(crf=crf)
    predictor = Predictor(method)
    photograph = np.random.default_rng(0).integers(0, 255, (15, 20, 3), np.uint8).repeat(25, 0).repeat(25, 1)
    return lambda: predictor.predict(photograph)


CASES: dict[str, Case] = {
    "help": partial(process, RUN.format("train"), "--help"),
    "import losses": partial(process, IMPORT.format("wsss.losses")),
    "import evaluation": partial(process, IMPORT.format("wsss.assemble")),
    "first step": first_step,
    "predict toco": partial(predict, "toco", None),
    "predict toco crf": partial(predict, "toco", {}),
    "predict mctformer": partial(predict, "mctformer", None),
}

if __name__ == "__main__":
    main("tests.benchmarks.commands", CASES, __doc__)

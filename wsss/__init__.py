"""Weakly supervised semantic segmentation from image-level labels."""

from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wsss.predictor import Predictor

__version__ = "0.2.0"


class InputError(ValueError):
    """What the user gave cannot be used: a file, a config value, a label, a checkpoint.

    The message is one sentence that names the file or key, what was expected, what was found and what to do.
    The commands print it without a traceback and exit with code 2. It lives here, in the one module that
    imports nothing, so that every layer can raise it.
    """


class RunError(RuntimeError):
    """A run failed for a reason its user can act on, a diverged loss for instance.

    The commands print the message without a traceback and exit with code 1.
    """


def printable(text: str) -> str:
    """Text on one line that no terminal or file chokes on: names of files may hold anything but `/` and 0."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def load(path: "str | PathLike[str]", **options: Any) -> "Predictor":
    """A checkpoint ready to predict: `wsss.load("last.ckpt").predict("photograph.jpg").mask`.

    See `wsss.predictor.load` for the options, `wsss.predictor.Predictor` for what can be done with it.
    """
    from wsss import predictor  # imports torch and timm: nobody waits for them who only wants the losses

    return predictor.load(path, **options)

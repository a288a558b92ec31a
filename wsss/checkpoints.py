"""Checkpoints: reading them safely, and what they say about themselves."""

from pathlib import Path
from typing import Any

import torch

from wsss import InputError


def read_checkpoint(path: str) -> dict[str, Any]:
    """A checkpoint written by `wsss-train`, read without executing anything of it (weights_only).

    Beside Lightning's entries it holds `hyper_parameters`, the plain values of the method's constructor, and
    `wsss`: `method` and `dataset` (names of config options), `dataset_values`, `protocol`, `classes`, `mean`, `std`.

    Raises:
        InputError: the file is missing, damaged, or something else.
    """
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path} does not exist: give the .ckpt file of a run, e.g. checkpoints/last.ckpt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes in the unpickler
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"checkpoint {path} cannot be read as a file of tensors and plain values: {reason}") from error
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters", "wsss"} <= content.keys():
        raise InputError(f"checkpoint {path} was not written by wsss-train: it lacks what the method was built with")
    return content


def load_weights(method: torch.nn.Module, checkpoint: dict[str, Any], path: str) -> None:
    """Load a checkpoint's weights into a method built from its values.

    Raises:
        InputError: names or shapes differ; the first of each kind are named.
    """
    ours, theirs = method.state_dict(), checkpoint["state_dict"]
    faults = {
        "lacks": [key for key in ours if key not in theirs],
        "has unknown": [key for key in theirs if key not in ours],
        "has other shapes for": [k for k in ours if k in theirs and ours[k].shape != theirs[k].shape],
    }
    said = [f"{what} {', '.join(keys[:3])} ({len(keys)} in all)" for what, keys in faults.items() if keys]
    if said:
        raise InputError(f"checkpoint {path} does not fit {type(method).__name__}: it {' and '.join(said)}")
    method.load_state_dict(theirs)

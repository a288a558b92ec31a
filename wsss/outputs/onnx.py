"""ONNX: a network and all that has to be known to use it without wsss."""

import json
import logging
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wsss import InputError
from wsss.writing import write_whole

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
"""Of the extra export."""

OUTPUTS = ("logits", "cam", "seg")
TOLERANCE = 1e-3
"""Of a difference from torch, relative to the largest value; single precision stays far below it."""


class _Outputs(nn.Module):
    def __init__(self, method: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.method, self.names = method, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        output = self.method(image)
        return tuple(output[name] for name in self.names)


def write_onnx(out: Path, method: Any, name: str) -> list[str]:
    """One pass of a method over `image` (B, 3, H, W), any B, H and W; returns the names of its outputs.

    These are, as far as it has them, `logits` (B, C), `cam` (B, C, h, w), raw, and `seg` (B, 1 + C, h, w). The metadata
    hold `method`, the name, and as JSON `classes`, `mean` and `std`, of RGB in [0, 1], `smallest_side`, `max_side` and
    `size` of images in pixels, null for any, `has_background`, and `background_threshold` of normalised maps, null for
    a method without any.

    Raises:
        InputError: it makes no masks, or not in a single pass; a package is missing; torch cannot trace it for every
            size.
    """
    if not method.makes_masks:
        raise InputError(
            f"{type(method).__name__} makes no masks of its own, but helps a random walk to refine those of others, "
            "which is no network: export the checkpoint of a method that does"
        )
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise InputError(f'format=onnx needs {missing[0]}, which is not installed: pip install "wsss[export]"')
    method = method.eval().cpu()
    least = max(method.smallest_side, 16)
    image = torch.rand(2, 3, 2 * least + 8, 2 * least + 16)  # sides that differ, and no multiples of a patch
    with torch.no_grad():
        output = method(image)
    names = [key for key in OUTPUTS if output.get(key) is not None]
    if not {"cam", "seg"} & {*names}:
        raise InputError(
            f"{type(method).__name__} makes its maps by gradients, which no ONNX file holds: export a network that was "
            "trained on its masks"
        )
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Outputs(method, names).eval(),
                (image,),
                dynamo=True,
                input_names=["image"],
                output_names=names,
                dynamic_shapes={"image": dynamic},
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        said = " ".join(str(error.__cause__ or error).split())[:200]
        raise InputError(f"{type(method).__name__} with this backbone cannot be exported ({said})") from error
    assert program is not None  # it is where dynamo is
    program.model.metadata_props.update(metadata_of(method, name))
    content = program.model_proto.SerializeToString()
    # another size and batch than what was traced, and a square image
    check_equal(content, names, method, torch.rand(1, 3, 3 * least, 3 * least))
    with write_whole(out) as file:
        file.write(content)
    return names


def metadata_of(method: Any, name: str) -> dict[str, str]:
    """What `write_onnx` says of a method in its file."""
    protocol = method.protocol
    metadata = {
        "classes": method.classes,
        "mean": method.mean,
        "std": method.std,
        "smallest_side": method.smallest_side,
        "max_side": protocol.max_side,
        "size": protocol.size,
        "has_background": method.has_background,
        "background_threshold": getattr(method, "background_threshold", None),
    }
    return {"method": name} | {key: json.dumps(value) for key, value in metadata.items()}


def check_equal(content: bytes, names: Sequence[str], method: Any, image: Tensor) -> None:
    """Whether a file gives in onnxruntime what its method gives.

    Raises:
        InputError: it does not.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        output = method(image)
    for key, found in zip(names, session.run(names, {"image": image.numpy()}), strict=True):
        expected = output[key].numpy()
        if found.shape != expected.shape or abs(found - expected).max() > TOLERANCE * abs(expected).max():
            raise InputError(
                f"{type(method).__name__} with this backbone cannot be exported: at another size its {key} in "
                "onnxruntime are not those of torch"
            )

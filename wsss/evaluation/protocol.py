"""The protocol: how predictions are made before they are compared with masks, to be stated beside every figure."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wsss import InputError


@dataclass(frozen=True)
class Protocol:
    """How predictions are made before they are compared with the masks.

    Args:
        max_side: images with a longer side are reduced to it first, with antialiasing; what is found there is enlarged
            to the mask. It bounds time and memory. None reduces nothing, as the papers do; so it is in checkpoints
            from before this setting.
        size: the image is resized to a square of this side (its aspect is lost); None leaves it as it is.
            Predictions are always resized to the mask.
        scales: factors of that size at which the segmentation is computed.
        flip: how its scores of the image and the mirror image are fused: `none` (image alone), `sum` or `max`.
        fusion: how its scales are fused: `max` or `sum`.
        softmax: scores are fused as they are and softmax makes probabilities of them `after`, or they are brought to
            probabilities `before`; those of several scales then do not sum to 1.
        align_corners: how the image is resized to a scale.
        crf: arguments of `wsss.refine.crf.dense_crf` for the segmentation; None for no CRF.
        image_labels: `true`: CAMs are cut to the labels of the image, as the field does; `predicted`: to the
            classes with a probability above one half.
    """

    max_side: int | None = None
    size: int | None = None
    scales: Sequence[float] = (1.0,)
    flip: str = "none"
    fusion: str = "max"
    softmax: str = "after"
    align_corners: bool = False
    crf: Mapping[str, Any] | None = None
    image_labels: str = "true"

    def __post_init__(self) -> None:
        for name, known in (
            ("image_labels", ("true", "predicted")),
            ("flip", ("none", "sum", "max")),
            ("fusion", ("max", "sum")),
            ("softmax", ("after", "before")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"protocol.{name} is {getattr(self, name)!r}: expected {' or '.join(known)}")
        for name in ("max_side", "size"):
            if (side := getattr(self, name)) is not None and side < 1:
                raise InputError(f"protocol.{name} is {side}: expected a positive number of pixels or null")
        check_scales("protocol.scales", self.scales)

    def describe(self, split: str, cam_scales: Sequence[float], background_threshold: float) -> dict[str, str]:
        """For each kind of figure the sentence that has to stand beside it."""
        size = "image size" if self.size is None else f"resized to {self.size}x{self.size}"
        if self.max_side is not None:
            size += f", reduced to {self.max_side}" if self.size is None else f" from at most {self.max_side}"
        cam = f"{split}, scales {_listed(cam_scales)} with flip, {size}, {self.image_labels} image labels, no CRF"
        best = f"{cam}, best threshold of 0 to 0.99, chosen with these masks"
        if background_threshold < 0:  # then nothing is chosen
            best = f"{cam}, no background"
        cam += f", threshold {background_threshold:g}" if background_threshold >= 0 else ", no background"
        fusion = self.fusion if self.softmax == "after" else f"{self.fusion} of probabilities"
        seg = "single scale" if tuple(self.scales) == (1.0,) else f"scales {_listed(self.scales)} ({fusion})"
        seg += "" if self.flip == "none" else f" with flip ({self.flip})"
        crf = "no CRF" if self.crf is None else "CRF " + ", ".join(f"{k} {v}" for k, v in self.crf.items())
        return {
            "miou": f"{split}, {seg}, {size}, no image labels, {crf}",
            "cam_miou": cam,
            "aux_cam_miou": cam,
            "cam_best_miou": best,
            "aux_cam_best_miou": best,
            "map": f"{split}, single scale, {size}, macro average over the classes that occur",
            "image_map": f"{split}, single scale, {size}, average over the images (MCTformer's mAP)",
        }


def check_scales(key: str, scales: Sequence[float]) -> None:
    """Whether factors of an image's size are some that an evaluation can be made with.

    Raises:
        InputError: they are not; `key` names them.
    """
    if not 1 <= len(scales) <= 32 or not all(0 < scale <= 16 for scale in scales):
        raise InputError(f"{key} is {reprlib.repr(list(scales))}: expected 1 to 32 factors, each above 0 and up to 16")


def _listed(scales: Sequence[float]) -> str:
    return ", ".join(f"{scale:g}" for scale in scales)

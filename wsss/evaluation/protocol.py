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
        threshold: the rule that chooses the background threshold of CAMs before any mask is seen: `fixed` is the
            method's own, `otsu` and `area_prior` look at the values of all images, see
            `wsss.evaluation.metrics.CamIoU`. The others are measured beside it.
        area_prior: share of foreground that the rule of this name aims at, in images with a label; None leaves the
            rule out.
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
    threshold: str = "fixed"
    area_prior: float | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("image_labels", ("true", "predicted")),
            ("flip", ("none", "sum", "max")),
            ("fusion", ("max", "sum")),
            ("softmax", ("after", "before")),
            ("threshold", ("fixed", "otsu", "area_prior")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"protocol.{name} is {getattr(self, name)!r}: expected {' or '.join(known)}")
        for name in ("max_side", "size"):
            if (side := getattr(self, name)) is not None and side < 1:
                raise InputError(f"protocol.{name} is {side}: expected a positive number of pixels or null")
        check_scales("protocol.scales", self.scales)
        if self.area_prior is None and self.threshold == "area_prior":
            raise InputError("protocol.area_prior is not set, which protocol.threshold=area_prior needs: give a share")
        if self.area_prior is not None and not 0 < self.area_prior < 1:
            raise InputError(f"protocol.area_prior is {self.area_prior}: expected a share between 0 and 1")

    def rules(self, background_threshold: float) -> tuple[str, ...]:
        """The rules for the threshold that can be followed, the one of the protocol first."""
        if background_threshold < 0:
            return ("fixed",)
        known = ("fixed", "otsu") if self.area_prior is None else ("fixed", "otsu", "area_prior")
        return (self.threshold, *(rule for rule in known if rule != self.threshold))

    def describe(
        self, split: str, cam_scales: Sequence[float], background_threshold: float, cam_names: Sequence[str] = ("cam",)
    ) -> dict[str, str]:
        """For each kind of figure the sentence that has to stand beside it."""
        size = "image size" if self.size is None else f"resized to {self.size}x{self.size}"
        if self.max_side is not None:
            size += f", reduced to {self.max_side}" if self.size is None else f" from at most {self.max_side}"
        cam = f"{split}, scales {_listed(cam_scales)} with flip, {size}, {self.image_labels} image labels, no CRF"
        chosen = f"{cam}, best threshold of 0 to 0.99, chosen with these masks"
        first_drop = (
            f"{cam}, mean over all ids, threshold of 0 to 0.59 at the first drop, chosen with these masks (MCTformer)"
        )
        said = {
            "fixed": f"{cam}, threshold {background_threshold:g}",
            "otsu": f"{cam}, Otsu's threshold of each class over all images, chosen without masks",
            "area_prior": f"{cam}, threshold with {self.area_prior} of foreground, chosen without masks",
        }
        if background_threshold < 0:  # then nothing is chosen
            chosen = said["fixed"] = f"{cam}, no background"
        first, *others = self.rules(background_threshold)
        fusion = self.fusion if self.softmax == "after" else f"{self.fusion} of probabilities"
        seg = "single scale" if tuple(self.scales) == (1.0,) else f"scales {_listed(self.scales)} ({fusion})"
        seg += "" if self.flip == "none" else f" with flip ({self.flip})"
        crf = "no CRF" if self.crf is None else "CRF " + ", ".join(f"{k} {v}" for k, v in self.crf.items())
        seg = f"{split}, {seg}, {size}, no image labels, {crf}"
        logits = f"{split}, single scale, {size}"
        notes = _of_masks("", seg)
        for name in cam_names:
            notes |= _of_masks(f"{name}_", said["fixed"])
            notes |= _means(f"{name}_", said[first])
            notes |= {f"{name}_{rule}_miou": said[rule] for rule in others}
            notes |= {f"{name}_best_miou": chosen, f"{name}_first_drop_miou": first_drop}
            notes[f"{name}_area_under_curve"] = f"{cam}, mean over the thresholds 0 to 0.99"
            notes[f"{name}_absent"] = f"{said['fixed']}, of the foreground without image labels"
        return notes | {
            "map": f"{logits}, macro average over the classes that occur",
            "image_map": f"{logits}, average over the images (MCTformer's mAP)",
            "f1": f"{logits}, probability above 0.5, macro average over the classes that occur",
            "image_f1": f"{logits}, probability above 0.5, average over the images (ToCo's F1)",
            "over_smoothing": f"{logits}, mean cosine of the patch tokens after the last block",
        }


def _means(prefix: str, said: str) -> dict[str, str]:
    return {
        f"{prefix}miou": said,
        f"{prefix}miou_all": f"{said}, mean over all ids, 0 for those that occur nowhere",
        f"{prefix}foreground_miou": f"{said}, mean without the background",
    }


def _of_masks(prefix: str, said: str) -> dict[str, str]:
    """What is measured of masks that were made in one way."""
    return _means(prefix, said) | {
        f"{prefix}pixel_accuracy": said,
        f"{prefix}boundary_miou": f"{said}, inside of contours by 2 % of the diagonal (Boundary IoU)",
        f"{prefix}trimap_miou": f"{said}, 8 pixels round true contours",
        f"{prefix}small_miou": f"{said}, classes on less than 1 % of the image",
        f"{prefix}medium_miou": f"{said}, classes on 1 to 10 % of the image",
        f"{prefix}large_miou": f"{said}, classes on 10 % of the image or more",
        f"{prefix}cooccurrence": f"{said}, of pixels in images of several classes those taken for another of them",
        f"{prefix}absent": f"{said}, of the foreground what is given to classes that the image does not show",
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

"""The protocol: how predictions are made before they are compared with masks, to be stated beside every figure."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wsss import InputError

EXTRAS = ("scales", "flip", "fusion", "softmax", "align_corners", "crf")
"""Settings of a protocol that may be measured beside it."""


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
        threshold: the rule that chooses the background threshold of CAMs. Before any mask is seen: `fixed` is the
            method's own, `otsu` and `area_prior` look at the values of all images, see
            `wsss.evaluation.metrics.CamIoU`. `best` is what papers do, the threshold that the masks like best. The
            others are measured beside it.
        area_prior: share of foreground that the rule of this name aims at, in images with a label; None leaves the
            rule out.
        extras: what is done beyond this at test time, measured beside it in the same pass: `multiscale_miou` with its
            scales, flip, fusion, softmax and align_corners in the place of the above, and `crf_miou` with its crf upon
            that. None measures neither.
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
    extras: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("image_labels", ("true", "predicted")),
            ("flip", ("none", "sum", "max")),
            ("fusion", ("max", "sum")),
            ("softmax", ("after", "before")),
            ("threshold", ("fixed", "otsu", "area_prior", "best")),
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

        unknown = [name for name in self.extras or {} if name not in EXTRAS]
        if unknown:
            raise InputError(f"protocol.extras.{unknown[0]} does not exist: known are {', '.join(EXTRAS)}")
        self.steps()

    def steps(self) -> dict[str, "Protocol"]:
        """The protocol, and with its extras one after the other, by what the names of their figures begin with."""
        alone, extras = replace(self, extras=None) if self.extras else self, dict(self.extras or {})
        steps, crf = {"": alone}, extras.pop("crf", None)
        if extras:
            steps["multiscale_"] = alone = replace(alone, **extras)
        if crf is not None:
            steps["crf_"] = replace(alone, crf=crf)
        return steps

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
            "best": chosen,
        }
        if background_threshold < 0:  # then nothing is chosen
            chosen = said["fixed"] = f"{cam}, no background"
        first, *others = self.rules(background_threshold)
        logits = f"{split}, single scale, {size}"
        notes: dict[str, str] = {}
        for word, step in self.steps().items():
            notes |= _of_masks(word, f"{split}, {step._scales()}, {size}, no image labels, {step._crf()}")
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

    def _scales(self) -> str:
        """How the segmentation is fused."""
        fusion = self.fusion if self.softmax == "after" else f"{self.fusion} of probabilities"
        scales = "single scale" if tuple(self.scales) == (1.0,) else f"scales {_listed(self.scales)} ({fusion})"
        return scales if self.flip == "none" else f"{scales} with flip ({self.flip})"

    def _crf(self) -> str:
        return "no CRF" if self.crf is None else "CRF " + ", ".join(f"{k} {v}" for k, v in self.crf.items())


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


def extra_supervision(loaded: Sequence[str]) -> str:
    """What weights have seen beyond ImageNet-1k and image labels, if their names tell it.

    Args:
        loaded: in words which weights networks started from.
    """
    found = dict.fromkeys(name for tag, name in TAGS.items() for words in loaded if tag in words.lower())
    return f"extra supervision {' and '.join(found)}" if found else "no extra supervision known"


TAGS = {
    "in21k": "ImageNet-21k",
    "in22k": "ImageNet-22k",
    "in12k": "ImageNet-12k",
    "clip": "CLIP",
    "openai": "CLIP",
    "laion": "LAION",
    "lvd142m": "LVD-142M",
    "sa1b": "SA-1B",
}
"""Parts of the names of weights, and the data beyond ImageNet-1k that they tell of."""


def check_scales(key: str, scales: Sequence[float]) -> None:
    """Whether factors of an image's size are some that an evaluation can be made with.

    Raises:
        InputError: they are not; `key` names them.
    """
    if not 1 <= len(scales) <= 32 or not all(0 < scale <= 16 for scale in scales):
        raise InputError(f"{key} is {reprlib.repr(list(scales))}: expected 1 to 32 factors, each above 0 and up to 16")


def _listed(scales: Sequence[float]) -> str:
    return ", ".join(f"{scale:g}" for scale in scales)

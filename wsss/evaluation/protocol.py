"""The protocol: how predictions are made before they are compared with masks, to be stated beside every figure."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from wsss import InputError
from wsss.writing import write_json

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
        flip: how its scores of the image and the mirror image are fused: `none` (image alone), `sum`, `mean`
            or `max`.
        fusion: how its scales are fused: `max`, `sum` or `mean`.
        softmax: scores are fused as they are and softmax makes probabilities of them `after`, or they are brought to
            probabilities `before`; those of several scales then do not sum to 1.
        align_corners: how the image is resized to a scale.
        window: side in pixels of the square windows through which the segmentation sees an image of each scale; their
            scores are averaged where they overlap. None shows it the whole. CAMs are always of the whole.
        stride: from one window to the next.
        crf: arguments of `wsss.refine.crf.dense_crf` for the segmentation; None for no CRF.
        image_labels: `true`: CAMs are cut to the labels of the image, as the field does; `predicted`: to the
            classes with a probability above one half.
        segmentation_labels: `none`: the segmentation knows no labels; `true`: ids that the true labels of the image
            rule out are none of its candidates, as CoSA's paper measures it, which no prediction can be.
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
    window: int | None = None
    stride: int | None = None
    crf: Mapping[str, Any] | None = None
    image_labels: str | bool = "true"
    segmentation_labels: str | bool = "none"
    threshold: str = "fixed"
    area_prior: float | None = None
    extras: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("image_labels", "segmentation_labels"):
            if getattr(self, name) is True:  # as YAML and a command line read the word
                object.__setattr__(self, name, "true")
        for name, known in (
            ("image_labels", ("true", "predicted")),
            ("segmentation_labels", ("none", "true")),
            ("flip", ("none", "sum", "mean", "max")),
            ("fusion", ("max", "sum", "mean")),
            ("softmax", ("after", "before")),
            ("threshold", ("fixed", "otsu", "area_prior", "best")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"protocol.{name} is {getattr(self, name)!r}: expected {' or '.join(known)}")
        for name in ("max_side", "size", "window"):
            if (side := getattr(self, name)) is not None and side < 1:
                raise InputError(f"protocol.{name} is {side}: expected a positive number of pixels or null")
        check_scales("protocol.scales", self.scales)
        if (self.window is None) != (self.stride is None):
            raise InputError(
                f"protocol.window is {self.window} and protocol.stride {self.stride}: give both in pixels, or neither"
            )
        if self.window is not None and self.stride is not None and not self.window / 8 <= self.stride <= self.window:
            raise InputError(
                f"protocol.stride is {self.stride}: expected an eighth of protocol.window={self.window} to all of it"
            )
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

    @property
    def smallest_scale(self) -> float:
        """Of those at which images pass through the network, 1 included."""
        return min(1.0, *(scale for step in self.steps().values() for scale in step.scales))

    def rules(self, background_threshold: float) -> tuple[str, ...]:
        """The rules for the threshold that can be followed, the one of the protocol first."""
        if background_threshold < 0:
            return ("fixed",)
        known = ("fixed", "otsu") if self.area_prior is None else ("fixed", "otsu", "area_prior")
        return (self.threshold, *(rule for rule in known if rule != self.threshold))

    def describe(
        self,
        on: "Measured",
        cam_scales: Sequence[float],
        background_threshold: float,
        cam_names: Sequence[str] = ("cam",),
    ) -> dict[str, "Measured"]:
        """For each kind of figure what has to stand beside it.

        Args:
            on: the split, the checkpoint and its supervision.
            cam_scales: of the CAMs, which are always fused with those of mirror images.
            background_threshold: of the rule `fixed`; below 0 there is no background.
            cam_names: kinds of CAMs.
        """
        size = "image size" if self.size is None else f"resized to {self.size}x{self.size}"
        if self.max_side is not None:
            size += f", reduced to {self.max_side}" if self.size is None else f" from at most {self.max_side}"
        alone = replace(on, size=size)
        cam = replace(alone, scales=tuple(cam_scales), flip="always", labels_at_test=str(self.image_labels))
        values = {"fixed": background_threshold, "area_prior": self.area_prior}
        known = ("fixed", "otsu", "area_prior", "best", "first_drop", "every")
        said = {rule: replace(cam, threshold_rule=rule, threshold=values.get(rule)) for rule in known}
        if background_threshold < 0:  # then nothing is chosen
            said["fixed"] = said["best"] = replace(cam, threshold_rule="no background")
        first, *others = self.rules(background_threshold)
        notes: dict[str, Measured] = {}
        for word, step in self.steps().items():
            fusion = step.fusion if step.softmax == "after" else f"{step.fusion} of probabilities"
            fused = replace(alone, fusion=None if tuple(step.scales) == (1.0,) else fusion, flip=step.flip)
            fused = replace(fused, windows=(step.window, step.stride) if step.window and step.stride else None)
            fused = replace(
                fused, scales=tuple(step.scales), crf=step.crf, labels_at_test=str(self.segmentation_labels)
            )
            notes |= _of_masks(word, fused)
        for name in cam_names:
            notes |= _of_masks(f"{name}_", said["fixed"])
            notes |= _means(f"{name}_", said[first])
            notes |= {f"{name}_{rule}_miou": said[rule] for rule in others}
            dropped = replace(said["first_drop"], definition="mean over all ids (MCTformer)")
            notes |= {f"{name}_best_miou": said["best"], f"{name}_first_drop_miou": dropped}
            notes[f"{name}_area_under_curve"] = said["every"]
            notes[f"{name}_absent"] = replace(notes[f"{name}_absent"], labels_at_test="none")
        return notes | {
            key: replace(alone, definition=definition)
            for key, definition in {
                "map": "macro average over the classes that occur",
                "image_map": "average over the images (MCTformer's mAP)",
                "f1": "probability above 0.5, macro average over the classes that occur",
                "image_f1": "probability above 0.5, average over the images (ToCo's F1)",
                "over_smoothing": "mean cosine of the patch tokens after the last block",
            }.items()
        }


@dataclass(frozen=True)
class Measured:
    """How a figure was measured, which has to stand beside it; as text one sentence.

    Attributes:
        split: and its number of images.
        extra_supervision: what the networks' first weights have seen beyond ImageNet-1k and image labels, as far as
            their names tell.
        checkpoint_rule: which checkpoint of its training this is: `last`; `best by` a figure of image labels; `best by
            masks`, with the figure in brackets; `not known`.
        scales: of the image.
        flip: whether mirror images take part: `none`; `sum`, `mean` or `max`, how they are fused; `always`, as the
            method fuses CAMs.
        fusion: of the segmentation's scales; None for CAMs, and where there is one scale.
        size: of the image at scale 1.
        windows: side and stride of those through which the segmentation saw it; None where it saw the whole.
        labels_at_test: which labels of the image its classes were chosen by: `true`, `predicted` or `none`.
        crf: arguments of the dense CRF; None without.
        threshold_rule: of the background of CAMs, see `Protocol`; `first_drop`, MCTformer's sweep; `every`, the mean
            over all; `no background`; for pseudo masks their refinement. `best` and `first_drop` look at the masks.
            None where there are no CAMs.
        threshold: where the rule `fixed` has it, or the share of foreground of `area_prior`.
        definition: what else tells the figure from others, in words.
    """

    split: str
    extra_supervision: tuple[str, ...] = ()
    checkpoint_rule: str = "not known"
    scales: tuple[float, ...] = (1.0,)
    flip: str = "none"
    fusion: str | None = None
    size: str = "image size"
    windows: tuple[int, int] | None = None
    labels_at_test: str = "none"
    crf: Mapping[str, Any] | None = None
    threshold_rule: str | None = None
    threshold: float | None = None
    definition: str | None = None

    def parts(self) -> list[str]:
        """The sentence in pieces."""
        extra, scales = " and ".join(self.extra_supervision), ", ".join(f"{scale:g}" for scale in self.scales)
        scaled = "single scale" if tuple(self.scales) == (1.0,) else f"scales {scales}"
        fusion = f" ({self.fusion})" if self.fusion else ""
        flip = {"none": "", "always": " with flip"}.get(self.flip, f" with flip ({self.flip})")
        threshold = {
            "fixed": f"threshold {self.threshold}",
            "otsu": "Otsu's threshold of each class over all images, chosen without masks",
            "area_prior": f"threshold with {self.threshold} of foreground, chosen without masks",
            "best": "best threshold of 0 to 0.99, chosen with these masks",
            "first_drop": "threshold of 0 to 0.59 at the first drop, chosen with these masks",
            "every": "mean over the thresholds 0 to 0.99",
        }
        parts = [
            self.split,
            f"extra supervision {extra}" if extra else "no extra supervision known",
            "last checkpoint" if self.checkpoint_rule == "last" else f"checkpoint {self.checkpoint_rule}",
            f"{scaled}{fusion}{flip}",
            self.size,
            "windows of {} pixels every {}".format(*self.windows) if self.windows else None,
            f"{'no' if self.labels_at_test == 'none' else self.labels_at_test} image labels",
            "no CRF" if self.crf is None else "CRF " + ", ".join(f"{key} {value}" for key, value in self.crf.items()),
            threshold.get(self.threshold_rule, self.threshold_rule) if self.threshold_rule else None,
            self.definition,
        ]
        return [part for part in parts if part]

    def __str__(self) -> str:
        return ", ".join(self.parts())


TRUE_LABELS = "true image labels"
"""What is said of figures for which the test was told which classes an image shows."""


def write_figures(folder: Path, figures: Mapping[str, Any], notes: Mapping[str, Measured]) -> None:
    """`metrics.json`, figures and how they were measured in a sentence each; `tags.json`, the fields behind these."""
    said = {key: note for key, note in notes.items() if key in figures}
    write_json(folder / "tags.json", {key: asdict(note) for key, note in said.items()})
    write_json(folder / "metrics.json", {**figures, **{f"protocol/{key}": str(note) for key, note in said.items()}})


def _means(prefix: str, said: Measured) -> dict[str, Measured]:
    return {
        f"{prefix}miou": said,
        f"{prefix}miou_all": replace(said, definition="mean over all ids, 0 for those that occur nowhere"),
        f"{prefix}foreground_miou": replace(said, definition="mean without the background"),
    }


def _of_masks(prefix: str, said: Measured) -> dict[str, Measured]:
    """What is measured of masks that were made in one way."""
    defined = {
        "boundary_miou": "inside of contours by 2 % of the diagonal (Boundary IoU)",
        "trimap_miou": "8 pixels round true contours",
        "small_miou": "classes on less than 1 % of the image",
        "medium_miou": "classes on 1 to 10 % of the image",
        "large_miou": "classes on 10 % of the image or more",
        "cooccurrence": "of pixels in images of several classes those taken for another of them",
        "absent": "of the foreground what is given to classes that the image does not show",
    }
    means = _means(prefix, said) | {f"{prefix}pixel_accuracy": said}
    return means | {f"{prefix}{key}": replace(said, definition=definition) for key, definition in defined.items()}


def extra_supervision(loaded: Sequence[str]) -> tuple[str, ...]:
    """What weights have seen beyond ImageNet-1k and image labels, if their names tell it.

    Args:
        loaded: in words which weights networks started from.
    """
    return tuple(dict.fromkeys(name for tag, name in TAGS.items() for words in loaded if tag in words.lower()))


TAGS = {
    "in21k": "ImageNet-21k",
    "in22k": "ImageNet-22k",
    "in12k": "ImageNet-12k",
    "clip": "CLIP",
    "openai": "CLIP",
    "laion": "LAION",
    "lvd142m": "LVD-142M",
    "sa1b": "SA-1B (SAM)",
}
"""Parts of the names of weights, and the data beyond ImageNet-1k that they tell of."""


def check_scales(key: str, scales: Sequence[float]) -> None:
    """Whether factors of an image's size are some that an evaluation can be made with.

    Raises:
        InputError: they are not; `key` names them.
    """
    if not 1 <= len(scales) <= 32 or not all(0 < scale <= 16 for scale in scales):
        raise InputError(f"{key} is {reprlib.repr(list(scales))}: expected 1 to 32 factors, each above 0 and up to 16")

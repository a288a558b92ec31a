"""What the methods that localise classes by activation maps share beside `Stage`. No training logic."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsss.cam import (
    larger,
    min_max,
    multiscale_cam,
    reduce,
    reduced_size,
    rescale,
    rescale_photograph,
    resize,
    resize_ids,
)
from wsss.evaluation.metrics import evaluation
from wsss.evaluation.protocol import Measured, check_scales
from wsss.methods.stage import Stage
from wsss.refine.thresholds import cam_to_label


class OfficialCheckpoint(NamedTuple):
    """What a checkpoint of a paper's own code holds, in our words."""

    option: str  # name of our method in conf/method
    state_dict: dict[str, Tensor]
    values: dict[str, Any]  # the constructor's arguments that the file itself tells
    asks: tuple[str, ...] = ()  # those of `start_arguments` that it does not answer, so that the command gives them


class WSSSModule(Stage):
    """Base of the methods.

    A method gives `forward(image) -> {"logits": (B, C), "seg": (B, 1 + C, h, w) or None, <cam name>: (B, C, h, w)}`,
    one pass over the network with raw maps, and `training_step`, which ends with `self.combine(terms, weights)`.

    Args:
        num_classes: C, foreground classes only; `classes` are their names, numbers when None.
        background_threshold: up to this value a CAM means background in the evaluation.
        cam_scales: scales of the multi-scale CAM, in training and evaluation.
        losses: mapping from a loss key to its `weight` and arguments, or to None to leave the term out.
        computed: the loss keys this method computes.
    """

    cam_names: tuple[str, ...] = ("cam",)
    photographic_scales: bool = False
    """Other scales are those of the 8-bit photograph, as in code that loads it at several sizes; else of the tensor."""
    fuse: Callable[[Tensor, Tensor], Tensor] = staticmethod(larger)
    """How maps of image and mirror image become one."""
    normalise: Callable[[Tensor], Tensor] = staticmethod(min_max)
    """How the sum of the maps of all scales is brought to [0, 1]."""

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None,
        background_threshold: float,
        cam_scales: Sequence[float],
        losses: Mapping[str, Mapping[str, Any] | None],
        computed: Sequence[str],
    ) -> None:
        super().__init__(num_classes, classes, losses, computed)
        self.background_threshold = background_threshold
        check_scales("cam_scales", cam_scales)
        self.cam_scales = tuple(cam_scales)
        self.metrics = evaluation(num_classes, self.cam_names, background_threshold)

    @classmethod
    def read_official(cls, state: Mapping[str, Tensor], path: str) -> OfficialCheckpoint | None:
        """A checkpoint of the paper's own code; None where its names are not of this method.

        Raises:
            InputError: the names are this method's, but something is missing or does not fit; `path` names the file.
        """
        return None

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        # read while the labels are on the host, so that a step knows its number of maps without a sync
        return batch | {"max_labels": max(1, int(batch["label"].sum(1).max()))}

    def least_side(self, cell: int) -> int:
        """Of an image that has a cell of so many pixels at all scales of its CAMs and of the protocol."""
        return math.ceil(cell / min(self.protocol.smallest_scale, *self.cam_scales))

    def without_background(self) -> None:
        super().without_background()
        self.background_threshold = -1.0
        self.metrics = evaluation(self.num_classes, self.cam_names, self.background_threshold)

    def raw_cam(self, image: Tensor) -> Tensor:
        """(B, K*C, h, w): the raw maps of one pass, one group of C channels for each of `cam_names`."""
        output = self(image)
        return torch.cat([output[name] for name in self.cam_names], dim=1)

    def rescale(self, image: Tensor, scale: float) -> Tensor:
        """Normalised images at another scale."""
        if self.photographic_scales:
            return rescale_photograph(image, scale, self.mean, self.std)
        return rescale(image, scale)

    def multiscale(self, image: Tensor, first: Tensor | None = None) -> Tensor:
        """(B, K*C, H, W) in [0, 1]: `raw_cam` over `cam_scales` and mirror images; `first` is that of `image`."""
        how = (self.rescale, self.fuse, self.normalise)
        return multiscale_cam(self.raw_cam, image, self.cam_scales, first, *how)

    @torch.no_grad()
    def infer(self, image: Tensor, cams: bool = True) -> dict[str, Tensor]:
        """`forward` at the protocol's size; CAMs multi-scale, in [0, 1), of its size (if `cams`, or without seg)."""
        image = self.sized(image)
        output = self(image)
        if not cams and output["seg"] is not None:
            return output
        first = torch.cat([output[name] for name in self.cam_names], dim=1)
        maps = self.multiscale(image, first).chunk(len(self.cam_names), dim=1)
        return output | dict(zip(self.cam_names, maps, strict=True))

    def pseudo_label(self, image: Tensor, cam: Tensor, label: Tensor) -> Tensor:
        """(B, H, W) ids, 255 ignore: the pixel supervision a method makes from its CAM."""
        return cam_to_label(cam, label, self.background_threshold)

    def describe(self, split: str) -> dict[str, Measured]:
        on = self.measured_on(split)
        notes = self.protocol.describe(on, self.cam_scales, self.background_threshold, self.cam_names)
        return {f"val/{key}": note for key, note in notes.items()}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        with self.watching_tokens():
            output = self.infer_batch(batch)
        label = batch["label"]
        for key in ("map", "image_map", "f1"):
            self.metrics[key].update(output["logits"], label)
        if "mask" not in batch:
            return {"counts": []}
        counts, mask = [], batch["mask"]
        size = reduced_size(mask.shape[-2:], self.protocol.max_side)
        if output["seg"] is not None:
            for word, scores in self.segment_steps(batch["image"], size, output["seg"], label).items():
                ids = resize_ids(scores.argmax(1), mask.shape[-2:])
                self.metrics[f"{word}miou"].update(ids, mask)
                counts += self.compare(ids, batch, word)
        kept = label if self.protocol.image_labels == "true" else (output["logits"] > 0).to(label)
        # of a thousand classes only those of these images are enlarged; the first one where they show none
        shown = kept.any(0).nonzero()[:, 0] if kept.any() else torch.zeros(1, dtype=torch.long, device=kept.device)
        kept, ids_of = kept[:, shown], torch.cat([shown.new_zeros(1), shown + 1])
        for name in self.cam_names:
            cam = resize(output[name][:, shown], size)
            self.metrics[f"{name}_miou"].update(cam, kept, mask, shown)
            if self.counts_images or f"{name}_absent" in self.metrics:
                ids = resize_ids(ids_of[cam_to_label(cam, kept, self.background_threshold)], mask.shape[-2:])
                uncut = cam_to_label(output[name], torch.ones_like(label), self.background_threshold)
                counts += self.compare(ids, batch, f"{name}_", uncut)
        return {"counts": counts}

    @torch.no_grad()
    def illustrate(self, batch: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Image, CAM and pseudo label of the true labels, as in training, prediction and truth, where there are any.

        A method with class attention also shows where the tokens of the true classes look.
        """
        image, label = reduce(batch["image"], self.protocol.max_side).to(self.device), batch["label"].to(self.device)
        size, output = image.shape[-2:], self.infer_batch({"image": image, "label": label})
        cam = resize(output["cam"], size) * label[:, :, None, None]
        colours = self.colours(image)[0].round().clamp(0, 255).byte().permute(1, 2, 0)
        pictures = {"image": colours, "CAM": cam[0].amax(0), "pseudo label": self.pseudo_label(image, cam, label)[0]}
        if output["seg"] is not None:
            pictures["prediction"] = resize(output["seg"], size).argmax(1)[0]
        if "mask" in batch:
            pictures["truth"] = resize_ids(batch["mask"][0], size)
        shown = {"examples": pictures}
        if "attention" in output:
            maps = min_max(resize(output["attention"], size))[0]
            shown["attention"] = {"image": colours} | {
                self.classes[c]: maps[c] for c in label[0].nonzero()[:, 0].tolist()
            }
        return shown

"""From a checkpoint to masks in a few lines of Python: `wsss.load(path).predict(images)`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from wsss import InputError
from wsss.cam import resize, resize_ids, widened
from wsss.checkpoints import load_stage
from wsss.data.files import read_image
from wsss.data.pixels import Normalise, reduced
from wsss.refine.thresholds import cam_to_label

Photograph = str | PathLike[str] | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """What is seen in a photograph of H x W pixels.

    Attributes:
        mask: uint8 (H, W): 0 background, c + 1 for class c.
        scores: probability of every class, by name, that the classifier finds or the mask shows; of a network without
            a classifier the largest probability that a pixel of a single pass gives to a class.
        cams: class activation maps, float32 in [0, 1], of these classes by name; None unless asked for. They are
            (H, W) too, or of the reduced size where the photograph was reduced.
    """

    mask: np.ndarray
    scores: dict[str, float]
    cams: dict[str, np.ndarray] | None = None


class Predictor:
    """A trained method, and how photographs are prepared for it.

    Args:
        method: a method with its weights.
        class_threshold: probability above which the classifier, where there is one, calls a class present.
        max_side: larger photographs are reduced to this for the network, and their masks enlarged again. It takes
            the place of the protocol's.

    Raises:
        InputError: a stage that makes no masks.
    """

    def __init__(self, method: Any, class_threshold: float = 0.5, max_side: int = 1024) -> None:
        if not method.makes_masks:
            raise InputError(
                f"{type(method).__name__} makes no masks of its own: give the checkpoint of another method"
            )
        self.method = method.eval()
        method.protocol = replace(method.protocol, max_side=max_side)
        self.class_threshold, self.max_side = class_threshold, max_side
        self.normalise = Normalise(method.mean, method.std)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.method.classes

    def to(self, device: str | torch.device) -> "Predictor":
        """The same on another device."""
        self.method.to(device)
        return self

    def require_cams(self) -> None:
        """Raises InputError where the method makes no class activation maps."""
        if not self.method.cam_names:
            raise InputError(f"{type(self.method).__name__} makes no class activation maps: ask for masks alone")

    @overload
    def predict(self, images: Photograph, cams: bool = False) -> Prediction: ...

    @overload
    def predict(self, images: list[Photograph], cams: bool = False) -> list[Prediction]: ...

    def predict(self, images: Any, cams: bool = False) -> Prediction | list[Prediction]:
        """Masks of photographs, each at its own size.

        Args:
            images: a path, a PIL image or an array uint8 (H, W, 3) of RGB, or a list of them.
            cams: also give the class activation maps.

        Raises:
            InputError: something that is no photograph, or one too small for the network; maps of a method that makes
                none.
        """
        if isinstance(images, list | tuple):
            return [self.predict(image, cams) for image in images]
        image = _to_array(images)
        return self.predict_reduced(reduced(image, self.max_side), image.shape[:2], cams)

    @torch.no_grad()
    def predict_reduced(self, photo: np.ndarray, size: Sequence[int], cams: bool = False) -> Prediction:
        """`predict` of one photograph of a size (H, W) that is `reduced` to `max_side` already."""
        if cams:
            self.require_cams()
        image, work = self.normalise(photo)[None].to(self.method.device), photo.shape[:2]
        output = self.method.infer(image, cams=cams)
        if "logits" in output:
            probability = widened(output["logits"]).sigmoid()  # (1, C)
            present = probability > self.class_threshold
        if output["seg"] is not None:
            ids = self.method.segment(image, work, output["seg"]).argmax(1)
        else:
            ids = cam_to_label(resize(widened(output["cam"]), work), present.float(), self.method.background_threshold)
        shown = torch.bincount(ids.flatten(), minlength=1 + len(self.classes))[None, 1:] > 0
        if "logits" not in output:
            probability, present = output["seg"].softmax(1)[:, 1:].amax(dim=(-2, -1)), shown
        mask = resize_ids(ids[0].to(torch.uint8).cpu(), size).numpy()
        found = (present | shown)[0].nonzero()[:, 0].tolist()
        maps: dict[str, np.ndarray] | None = None
        if cams:
            resized = resize(output["cam"][:, found], work)[0] if found else output["cam"][0, :0]
            maps = dict(zip((self.classes[c] for c in found), resized.float().cpu().numpy(), strict=True))
        return Prediction(mask, {self.classes[c]: probability[0, c].item() for c in found}, maps)


def _to_array(image: Photograph) -> np.ndarray:
    if isinstance(image, str | PathLike):
        return read_image(image)
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3):
        found = f"an array {image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise InputError(f"images holds {found}: expected a path, a PIL image or an array uint8 (H, W, 3) of RGB")
    return image


def load(
    path: str | PathLike[str],
    classes: Sequence[str] | None = None,
    config_dir: str | PathLike[str] | None = None,
    class_threshold: float = 0.5,
    max_side: int = 1024,
    **arguments: Any,
) -> Predictor:
    """A checkpoint of `wsss-train`, or of the code of ToCo, MCTformer, PSA, SEAM or PPC, ready to predict.

    Nothing of the file is executed: its method is one of conf/, its weights are tensors, its settings plain values.

    Args:
        path: the file.
        classes: names, where the file has none: those of the original code are numbered then.
        config_dir: a directory of configuration beside ours, where the method is from elsewhere.
        class_threshold, max_side: see `Predictor`.
        arguments: of the method's constructor, over those of the file; a mapping changes what it names.

    Raises:
        InputError: the file cannot be read or does not fit its method; the sentence says what is wrong.
    """
    directories = [str(config_dir)] if config_dir is not None else []
    return Predictor(load_stage(str(path), classes, directories, **arguments), class_threshold, max_side)

"""From a checkpoint to masks in a few lines of Python: `wsss.load(path).predict(images)`."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from wsss import InputError
from wsss.assemble import build_protocol, built_with, read_checkpoint, restore
from wsss.cam import resize
from wsss.config import method_option, plain_values
from wsss.data.files import read_image
from wsss.data.pixels import Normalise
from wsss.refine.thresholds import cam_to_label

Photograph = str | PathLike[str] | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """What is seen in a photograph of H x W pixels.

    Attributes:
        mask: uint8 (H, W): 0 background, c + 1 for class c.
        scores: probability of every class, by name, that the classifier finds.
        cams: class activation maps, float32 (H, W) in [0, 1], of these classes by name; None unless asked for.
    """

    mask: np.ndarray
    scores: dict[str, float]
    cams: dict[str, np.ndarray] | None = None


class Predictor:
    """A trained method, and how photographs are prepared for it.

    Args:
        method: a method with its weights.
        class_threshold: probability above which the classifier calls a class present.
        max_side: larger photographs are reduced to this for the network, and their masks enlarged again.

    Raises:
        InputError: a number out of range, or a stage that makes no masks.
    """

    def __init__(self, method: Any, class_threshold: float = 0.5, max_side: int = 1024) -> None:
        if max_side < 1:
            raise InputError(f"max_side is {max_side!r}: expected a whole number of at least 1")
        if not hasattr(method, "infer"):
            raise InputError(
                f"{type(method).__name__} makes no masks of its own: give the checkpoint of another method"
            )
        self.method = method.eval()
        self.class_threshold, self.max_side = class_threshold, max_side
        self.normalise = Normalise(method.mean, method.std)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.method.classes

    def to(self, device: str | torch.device) -> "Predictor":
        """The same on another device."""
        self.method.to(device)
        return self

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
            InputError: something that is no photograph, or one too small for the network.
        """
        if isinstance(images, list | tuple):
            return [self.predict(image, cams) for image in images]
        return self.predict_normalised(self.normalise(_to_array(images)), cams)

    @torch.no_grad()
    def predict_normalised(self, photo: Tensor, cams: bool = False) -> Prediction:
        """`predict` of one photograph (3, H, W) that is normalised already."""
        size = (photo.shape[-2], photo.shape[-1])
        # a long strip keeps enough of its short side for a patch
        work = [max(min(side, 32), round(side * min(1, self.max_side / max(size)))) for side in size]
        image = photo[None].to(self.method.device)
        if max(size) > self.max_side:
            image = F.interpolate(image, size=work, mode="bilinear", antialias=True)
        output = self.method.infer(image, cams=cams)
        probability = output["logits"].sigmoid()  # (1, C)
        present = probability > self.class_threshold
        if output["seg"] is not None:
            ids = self.method.segment(image, work, output["seg"]).argmax(1)
        else:
            ids = cam_to_label(resize(output["cam"], work), present.float(), self.method.background_threshold)
        mask = Image.fromarray(ids[0].to(torch.uint8).cpu().numpy()).resize(size[::-1], Image.Resampling.NEAREST)
        found = present[0].nonzero()[:, 0].tolist()
        maps: dict[str, np.ndarray] | None = None
        if cams:
            shown = resize(output["cam"][:, found], size)[0] if found else output["cam"][0, :0]
            maps = dict(zip((self.classes[c] for c in found), shown.float().cpu().numpy(), strict=True))
        return Prediction(np.array(mask), {self.classes[c]: probability[0, c].item() for c in found}, maps)


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
    """A checkpoint of `wsss-train`, or of the original ToCo or MCTformer code, ready to predict.

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
    checkpoint = read_checkpoint(str(path), directories)
    if "method" not in checkpoint["wsss"]:
        raise InputError(
            f"checkpoint {path} was written without wsss-train and names no method: build the method, load its "
            "state_dict, and make a wsss.predictor.Predictor of it"
        )
    node = method_option(checkpoint["wsss"]["method"], directories)
    values = {**plain_values(node, "method"), **built_with(checkpoint, node._target_)}
    for name, value in arguments.items():
        merged = {**values[name], **value} if isinstance(value, dict) and isinstance(values.get(name), dict) else value
        values[name] = merged
    method = restore(node._target_, values, checkpoint, str(path), classes)
    method.protocol = build_protocol(checkpoint["wsss"].get("protocol", {}))
    return Predictor(method, class_threshold, max_side)

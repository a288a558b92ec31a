"""Pixel-adaptive refinement: pseudo labels that follow the colours of the image."""

import math
from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.cam import of_classes, present_classes, resize

TRITON = find_spec("triton") is not None  # torch comes with it where it comes with CUDA
OFFSETS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]


class PAR(nn.Module):
    """Pixel-adaptive refinement, AFA (Ru et al., CVPR 2022, arXiv 2203.02664, section 3.4), as released with ToCo.

    Each iteration replaces a mask value by a weighted mean of its neighbours' at the given dilations; weights are
    a softmax of the colour distance relative to the local standard deviation, plus `w2` times one of the position
    distance. They sum to 1 + w2, so values grow by that factor; an argmax over channels is not affected.

    Args:
        dilations: distances of the eight neighbours, in pixels.
        iterations: number of updates.
        w1: width of both kernels in standard deviations.
        w2: weight of the position kernel.
    """

    def __init__(
        self,
        dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
        iterations: int = 10,
        w1: float = 0.3,
        w2: float = 0.01,
    ) -> None:
        super().__init__()
        self.shifts = [(d * dy, d * dx) for d in dilations for dy, dx in OFFSETS]
        self.reach = max(dilations)
        self.iterations, self.w1, self.w2 = iterations, w1, w2
        distance = torch.tensor([math.hypot(dy, dx) for dy, dx in self.shifts])
        position = -((distance / (distance.std() + 1e-8) / w1) ** 2)
        self.position: Tensor
        self.register_buffer("position", w2 * position.softmax(0), persistent=False)  # (N,)
        self.offsets: Tensor
        self.register_buffer("offsets", torch.tensor(self.shifts, dtype=torch.int32), persistent=False)  # (N, 2)

    def neighbours(self, maps: Tensor) -> list[Tensor]:
        """Maps (B, K, h, w) seen from each neighbour: N views of one replicate-padded copy."""
        h, w = maps.shape[-2:]
        padded = F.pad(maps, [self.reach] * 4, mode="replicate")
        return [
            padded[..., self.reach + dy : self.reach + dy + h, self.reach + dx : self.reach + dx + w]
            for dy, dx in self.shifts
        ]

    def weights(self, image: Tensor) -> Tensor:
        """(B, N, h, w) weight of every neighbour for every pixel of images (B, 3, h, w) in [0, 1]."""
        # view by view: all of them at once would be read and written from memory several times
        around = self.neighbours(image)
        mean, squares = torch.zeros_like(image), torch.zeros_like(image)
        for view in around:
            mean += view
        mean /= len(around)
        for view in around:
            squares.addcmul_(difference := view - mean, difference)
        width = ((squares / (len(around) - 1)).sqrt_() + 1e-8) * self.w1
        colour = image.new_empty(len(around), len(image), *image.shape[-2:])
        for view, distance in zip(around, colour, strict=True):
            torch.mean(((view - image) / width).square_(), dim=1, out=distance)
        return (colour.neg_().softmax(dim=0) + self.position[:, None, None, None]).transpose(0, 1)

    @torch.no_grad()
    def forward(self, image: Tensor, masks: Tensor) -> Tensor:
        """
        Args:
            image: (B, 3, h, w) in [0, 1].
            masks: (B, K, ., .) scores, resized to the image (bilinear, align_corners=True).

        Returns:
            (B, K, h, w).
        """
        if masks.shape[-2:] != image.shape[-2:]:
            masks = F.interpolate(masks, size=image.shape[-2:], mode="bilinear", align_corners=True)
        if image.is_cuda and image.dtype == masks.dtype == torch.float32 and TRITON:
            from wsss.refine import kernels  # triton takes a second to import

            with torch.cuda.device(image.device):  # triton launches on the current one, which may be another
                together = kernels.weigh(image, self.offsets, self.position, self.w1)
                for _ in range(self.iterations):
                    masks = kernels.mix(masks, together, self.offsets)
            return masks
        weights = self.weights(image)[:, :, None].unbind(1)  # N of (B, 1, h, w), shared by the channels
        for _ in range(self.iterations):
            refined = torch.zeros_like(masks)
            for weight, neighbour in zip(weights, self.neighbours(masks), strict=True):
                refined.addcmul_(weight, neighbour)
            masks = refined
        return masks


@torch.no_grad()
def refine_cam(
    par: PAR | None,
    image: Tensor,
    cam: Tensor,
    label: Tensor,
    thresholds: Sequence[float | Tensor],
    valid: Tensor,
    max_labels: int,
    scale: float = 0.5,
    ignore_index: int = 255,
    classes: Tensor | None = None,
) -> Tensor:
    """Pseudo label from a CAM refined twice, with a high and a low constant background score (ToCo, AFA).

    Foreground is what survives the high background score, background what loses to the low one, the rest is
    ignored. An image without labels is background everywhere.

    Args:
        par: None leaves the scores as they are, so that the image tells no more than its size (CoSA).
        image: (B, 3, H, W) in [0, 1].
        cam: (B, C, H, W) in [0, 1].
        label: (B, C) 0 or 1.
        thresholds: (low, high) background scores, or a single one, which leaves no pixel undecided; each one number
            for all pixels, or (B, H, W).
        valid: (B, H, W) bool; the rest is ignored.
        max_labels: at least the largest number of labels of an image; PAR runs on so many maps only.
        scale: PAR's resolution relative to the image's.
        classes: (B, C) which class a map is of, where they are not all there are (see `present_classes`).

    Returns:
        (B, H, W) long.
    """
    size = image.shape[-2:]
    small = [max(1, int(side * scale)) for side in size]
    present, index = present_classes(label, max_labels)
    rows = torch.arange(len(label), device=label.device)[:, None]
    cam = resize(of_classes(cam, index, label.shape[1]), small)  # (B, K, h, w)
    cam = cam.masked_fill(present[:, :, None, None] == 0, -math.inf)
    backgrounds = [
        resize(t[:, None], small) if isinstance(t, Tensor) else torch.full_like(cam[:, :1], t) for t in thresholds
    ]
    scores = torch.cat([torch.cat([background, cam], dim=1).softmax(dim=1) for background in backgrounds], dim=1)
    index = index if classes is None else classes.gather(1, index)
    ids = torch.cat([torch.zeros_like(index[:, :1]), index + 1], dim=1)  # (B, 1 + K) class id of each channel
    scores = par(resize(image, small), scores) if par is not None else scores
    parts = resize(scores, size).chunk(len(backgrounds), dim=1)
    labels = [ids[rows[:, :, None], part.max(dim=1).indices] for part in parts]
    low, high = labels[0], labels[-1]
    result = torch.where(high != 0, high, torch.where(low == 0, 0, ignore_index))
    return torch.where(valid, result, ignore_index)

"""CLIP-ES (Lin et al., CVPR 2023, arXiv 2212.09506): pseudo masks by CLIP alone, without any training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss import InputError
from wsss.cam import min_max, resize_photograph
from wsss.evaluation.protocol import Measured
from wsss.methods.base import WSSSModule
from wsss.networks.cache import FeatureCache
from wsss.networks.clip import CLIPTower, Seen, embed_text
from wsss.refine.affinity import spread, transition


class GradientMaps(NamedTuple):
    """What makes the softmax Grad-CAM of P pairs of an image and a class."""

    logits: Tensor  # (P, C + M), -inf of the classes that the image does not show
    activation: Tensor  # (P, N, D), what the attention of the last block takes
    gradient: Tensor  # (P, N, D), of the probability of the class with respect to it
    raw: Tensor  # (P, N), activation times mean gradient


MAX_ENTRIES = 2**23
"""Entries of an attention, of all pairs of an image and a class whose gradients are computed at a time."""


def gradient_maps(
    tower: CLIPTower,
    text: Tensor,
    background: Tensor,
    scale: float,
    tokens: Tensor,
    label: Tensor,
    classes: Tensor,
) -> GradientMaps:
    """Softmax Grad-CAM (CLIP-ES, section 3.2): of each class the maps that raise its probability.

    The probability is of a softmax over the classes of the image and all words of the background; the image's embedding
    is the mean of its patches, not the class token. Weights of the channels are means of the gradient over patches.

    Args:
        text, background: (C, E) and (M, E).
        scale: of the cosines.
        tokens: (P, 1 + N, D), the input of the last block.
        label: (P, C) of the classes in each image.
        classes: (P,) the class of each pair.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # copies, since no graph takes what was made in inference mode
        tokens, label, classes = tokens.detach().clone(), label.clone(), classes.clone()
        normed = tower.first_norm(tokens).detach().requires_grad_()
        embedding = tower.embed(tower.last_block(tokens, normed))
        logits = scale * embedding @ torch.cat([text, background]).mT
        absent = F.pad(label == 0, (0, len(background)))
        logits = logits.masked_fill(absent, -torch.inf)
        chosen = logits.softmax(1).gather(1, classes[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, normed)
    activation, gradient = normed.detach()[:, 1:], gradient[:, 1:]
    return GradientMaps(logits.detach(), activation, gradient, torch.einsum("pnd,pd->pn", activation, gradient.mean(1)))


def unsaid(**weights: str | None) -> list[str]:
    """Arguments that no checkpoint may set: a command has to give weights and a cache that differ from conf/."""
    return [
        "cache_features",
        "cache_folder",
        "cache_folder_gb",
        *(name for name, value in weights.items() if value is not None),
    ]


class CLIPMaps(WSSSModule):
    """What the methods on a frozen CLIP share: tower, embeddings of names, maps of classes. No training logic."""

    start_arguments = ("text",)

    def build_tower(
        self,
        backbone: str,
        weights: str | None,
        arguments: Mapping[str, Any] | None,
        half_positions: bool,
        cache: tuple[float | None, str | None, float],
    ) -> None:
        """The frozen tower, and the checks of what depends on its depth; `cache` has what `FeatureCache` keeps."""
        self.tower = CLIPTower(backbone, weights, arguments, half_positions)
        self.cache = FeatureCache(f"{self.tower.digest} {backbone} {arguments} {half_positions}", *cache)
        layers, threshold = self.hparams.affinity_layers, self.hparams.box_threshold
        if not 1 <= layers <= self.tower.depth:
            raise InputError(f"affinity_layers is {layers}, but {backbone} has {self.tower.depth}: give 1 to that many")
        if threshold is not None and not 0 <= threshold < 1:
            raise InputError(f"box_threshold is {threshold}: expected a share from 0 up to 1, or null")

    def build_text(self, text: str | None, background: Sequence[str] | None) -> None:
        """The embeddings of the classes, `text` (C, E), and of what is behind them, `background_text` (M, E)."""
        if background is not None and len(background) == 0:
            raise InputError("method.background is empty: expected words for what is behind the classes, or null")
        if text is None:
            names = list(background or ["background"])
            drawn = torch.randn(
                self.num_classes + len(names), self.tower.embedding, generator=torch.Generator().manual_seed(0)
            )
            rows, behind = F.normalize(drawn, dim=1).split([self.num_classes, len(names)])
        else:
            rows, behind, names = embed_text(text, self.classes, background)
            if rows.shape[1] != self.tower.embedding:
                raise InputError(
                    f"method.text={text} has embeddings of {rows.shape[1]} numbers, those of the image tower have "
                    f"{self.tower.embedding}: give the text of the same CLIP"
                )
        self.hparams.background = list(names)  # so that a checkpoint tells how many there are
        self.text: Tensor
        self.background_text: Tensor
        self.register_buffer("text", rows.clone())
        self.register_buffer("background_text", behind.clone())

    @property
    def smallest_side(self) -> int:
        return self.least_side(self.tower.patch)

    @property
    def transformer(self) -> None:
        """Nothing in here learns to smooth its tokens."""

    def see(self, image: Tensor) -> Seen:
        """What the tower sees, from the cache where it is there."""
        return self.cache(image, self.tower)

    def infer(self, image: Tensor, cams: bool = True) -> dict[str, Tensor]:
        return self.infer_batch({"image": image}, cams)

    def sought(self, batch: Mapping[str, Any], logits: Tensor) -> Tensor:
        """(B, C) of which classes maps are made: the true labels, if the protocol knows them, else those found."""
        known = self.protocol.image_labels == "true" and "label" in batch
        return batch["label"] if known else (logits > 0).to(logits)

    @torch.no_grad()
    def cam(self, seen: Seen, label: Tensor, attention: Tensor, weights: Tensor | None = None) -> Tensor:
        """(B, C, h, w) in [0, 1]: the maps of the classes of each image after they were spread, 0 of all others.

        Args:
            seen: of the images.
            label: (B, C) of the classes that are sought.
            attention: (B, N, N) by which they are spread.
            weights: (B, C, h, w) that they are multiplied by before.
        """
        image, classes = label.nonzero(as_tuple=True)
        result = torch.zeros(*label.shape, *seen.size, device=label.device)
        if len(image):
            with torch.autocast(label.device.type, enabled=False):  # gradients of 1e-5 do not bear half precision
                matrix = transition(attention.float())
                seeds = self.seeds(seen.blocks[-1].float(), label, seen.size)
                seeds = seeds if weights is None else seeds * weights[image, classes]
                maps = spread(seeds, matrix[image], self.hparams.box_threshold)
            result[image, classes] = min_max(maps, 1e-7)
        return result

    def attention(self, seen: Seen) -> Tensor:
        """(B, N, N), the mean of the last layers."""
        return seen.attention[-self.hparams.affinity_layers :, :, 1:, 1:].mean(0)

    def seeds(self, tokens: Tensor, label: Tensor, size: Sequence[int]) -> Tensor:
        """(P, h, w) in [0, 1]: the gradient maps of the P classes of all images, image by image.

        Args:
            tokens: (B, 1 + N, D), the input of the last block.
            label: (B, C) of which classes are sought.
            size: (h, w).
        """
        image, classes = label.nonzero(as_tuple=True)
        text = (self.text, self.background_text, self.hparams.logit_scale)
        pairs = max(1, MAX_ENTRIES // tokens.shape[1] ** 2)
        parts = zip(image.split(pairs), classes.split(pairs), strict=True)
        raw = torch.cat([gradient_maps(self.tower, *text, tokens[i], label[i], c).raw for i, c in parts])
        maps = raw.unflatten(1, tuple(size)).relu()
        return min_max(min_max(maps, 1e-7), 1e-7)  # twice, as released: a map far below 1e-7 gets nearer to 1

    def describe(self, split: str) -> dict[str, Measured]:
        """No mirror image takes part in the maps."""
        notes = super().describe(split)
        return {key: replace(note, flip="none") if note.flip == "always" else note for key, note in notes.items()}


class CLIPES(CLIPMaps):
    """Gradient maps of CLIP's scores of the classes of an image, spread by the attention of its transformer.

    The score of a class is its probability among the classes that the image shows and words for what is behind them,
    so that maps depend on which classes are known to be there: in wsss-label, and in an evaluation with true image
    labels and its pictures, the true ones, else those that CLIP finds. It calls a class present that alone beats all
    words of the background together (`logits` above 0); that rule is ours, the paper's masks are of images with labels.

    The maps are those of the released code on a CPU. Not reproduced are its half precision on a GPU, the files of half
    precision it keeps between its steps, and the wrapped colours that it gives to its CRF.

    Nothing is learnt: `wsss-train` writes a checkpoint with the embeddings of the classes and the sha256 of the tower,
    which every other command takes, and evaluates it. The tower itself is not in it: where `weights` is a file, it has
    to be given again.

    Args:
        num_classes: C, foreground classes only.
        classes: their names, which the text tower reads.
        backbone: timm name of CLIP's image tower.
        weights: see `CLIPTower`.
        backbone_args: arguments of timm's constructor.
        text: see `embed_text`; None takes random embeddings of a fixed seed, or those of a checkpoint.
        background: words for what is behind the classes; None takes all of the file of `text`, or those of VOC that no
            class is called after.
        logit_scale: of the cosine of image and text, 100 in OpenAI's weights.
        affinity_layers: so many last layers give the attention that spreads maps.
        box_threshold: share of a map's maximum round which boxes are drawn, that it spreads from; None spreads from
            everywhere.
        background_threshold: up to this value a CAM means background in the evaluation.
        half_positions: round the resized position table to half precision, as the released code does.
        cache_features: GB of memory for what the tower sees in images, which are looked at one by one then; null or 0
            keeps nothing. It saves time where an image comes again as it was.
        cache_folder: keep it in files of this folder, too, for later runs; null keeps none.
        cache_folder_gb: that the files may take; an image of 512x512 pixels takes 85 MB with ViT-B/16.
    """

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "vit_base_patch16_clip_quickgelu_224",
        weights: str | None = "openai",
        backbone_args: Mapping[str, Any] | None = None,
        text: str | None = "ViT-B-16-quickgelu/openai",
        background: Sequence[str] | None = None,
        logit_scale: float = 100.0,
        affinity_layers: int = 8,
        box_threshold: float | None = 0.4,
        background_threshold: float = 0.5,
        half_positions: bool = False,
        cache_features: float | None = None,
        cache_folder: str | None = None,
        cache_folder_gb: float = 20.0,
    ) -> None:
        super().__init__(num_classes, classes, background_threshold, (1.0,), {}, ())
        self.save_hyperparameters(ignore=unsaid(weights=weights))
        self.build_tower(
            backbone, weights, backbone_args, half_positions, (cache_features, cache_folder, cache_folder_gb)
        )
        self.build_text(text, background)
        self.mean, self.std = self.tower.mean, self.tower.std

    def sized(self, image: Tensor) -> Tensor:
        """Images at the protocol's size, enlarged to whole patches: bicubic, of the 8-bit photograph."""
        image, patch = super().sized(image), self.tower.patch
        size = [-(-side // patch) * patch for side in image.shape[-2:]]
        return resize_photograph(image, size, self.mean, self.std)

    def forward(self, image: Tensor) -> dict[str, Any]:
        """(B, 3, H, W) -> logits (B, C), the log odds of each class against the background; seg None."""
        return {"logits": self.classify(self.see(image)), "seg": None}

    @torch.no_grad()
    def classify(self, seen: Seen) -> Tensor:
        """`logits` of `forward`."""
        tokens = seen.blocks[-1]
        embedding = self.tower.embed(self.tower.last_block(tokens, self.tower.first_norm(tokens)))
        classes, behind = (self.hparams.logit_scale * embedding @ t.mT for t in (self.text, self.background_text))
        return classes - behind.logsumexp(1, keepdim=True)

    @torch.no_grad()
    def infer_batch(self, batch: Mapping[str, Any], cams: bool = True) -> dict[str, Tensor]:
        """`forward`, and cam (B, C, h, w) in [0, 1] of the true labels, if the protocol knows them, or those found."""
        seen = self.see(self.sized(batch["image"]))
        logits = self.classify(seen)
        label = self.sought(batch, logits)
        return {"logits": logits, "cam": self.cam(seen, label, self.attention(seen)), "seg": None}  # type: ignore[dict-item]

    def configure_optimizers(self) -> None:
        """Nothing is learnt."""

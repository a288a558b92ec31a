"""PSA: learning which neighbouring pixels belong together from image-level labels (Ahn and Kwak, CVPR 2018)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from wsss import InputError
from wsss.methods.stage import Stage
from wsss.networks.affinity import AffinityNet, pair_affinity
from wsss.networks.weights import start_backbone
from wsss.optim import sgd_poly
from wsss.pairs import CELL, fitting_radius, source_size
from wsss.refine.pseudo import Refined
from wsss.refine.random_walk import pad_to_cells, refine_scores, with_background_score


class Affinity(Stage):
    """The affinity network of PSA (arXiv 1803.10464), whose random walk refines the CAM of any method.

    It learns from `affinity_label`, cells of which a dense CRF is sure (`wsss.data.pseudo.PseudoScores`). Nothing is
    evaluated, because all that could be compared is pixels: the last checkpoint is the result.

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone: `resnet38`, or the timm name of a convolutional network.
        weights: None; of ResNet38 MXNet's `.params` file or a `.pth` file; else a timm tag, the name of
            an installed package (`efficientnet_lite0`), or a file.
        backbone_args: arguments of `ResNet38` or of timm's constructor.
        init_checkpoint: a checkpoint of a method with this backbone, e.g. cam, to start it from.
        losses: weight and arguments of affinity, whose radius is that of the walk, too.
        lr: learning rate of the backbone's weights; the head learns ten times as fast.
        weight_decay: of weights.
        momentum: of SGD. The released code means 0.9, but its optimizer takes the weight decay for the momentum.
        power: of the polynomial decay.
    """

    start_arguments = ("weights", "init_checkpoint")
    makes_masks = False
    supervision = "pseudo_scores"

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "resnet38",
        weights: str | None = None,
        backbone_args: Mapping[str, Any] | None = None,
        init_checkpoint: str | None = None,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        momentum: float = 5e-4,
        power: float = 0.9,
    ) -> None:
        losses = {"affinity": {"weight": 1.0, "radius": 5}} if losses is None else losses
        super().__init__(num_classes, classes, losses, ("affinity",))
        self.save_hyperparameters()
        loss: Any = self.losses["affinity"]
        self.radius: int = loss.radius
        if not isinstance(self.radius, int) or self.radius < 2:
            raise InputError(f"losses.affinity.radius is {self.radius!r}: expected a whole number of at least 2")
        self.network = AffinityNet(backbone, weights, backbone_args)
        self.mean, self.std = self.network.backbone.normalisation or (self.mean, self.std)
        if init_checkpoint is not None:
            self.start_as(start_backbone(self.network.backbone, init_checkpoint))

    @property
    def views(self) -> tuple[str, ...]:
        return ("image", "affinity_label")

    def forward(self, image: Tensor) -> dict[str, Any]:
        """(B, 3, H, W) -> affinity (B, K, n) of the pairs of cells; a smaller radius where the map is too small."""
        features = self.network(image)
        return {"affinity": pair_affinity(features, fitting_radius(features.shape[-2:], self.radius))}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        features = self.network(batch["image"])
        if 0 in source_size(features.shape[-2:], self.radius):
            h, w = features.shape[-2:]
            raise InputError(
                f"a crop of {h} x {w} cells of {CELL} pixels holds no pair of losses.affinity.radius={self.radius}: "
                f"set transform.crop_size to at least {CELL * (2 * self.radius - 1)}"
            )
        affinity = pair_affinity(features, self.radius)
        term = self.losses["affinity"](affinity, batch["affinity_label"])
        return self.combine({"affinity": term}, self.loss_weights)

    @torch.no_grad()
    def refine(
        self,
        image: Tensor,
        cam: Tensor,
        label: Tensor,
        background: float | None = None,
        alpha: float = 16.0,
        beta: float = 8.0,
        logt: int = 8,
    ) -> Tensor:
        """Class scores (B, 1 + C, H, W) from CAMs after a random walk of 2 ** logt steps; absent classes score 0.

        The defaults are PSA's. SEAM takes alpha 6 and logt 6, AEFT alpha 19 and logt 6, MCTformer a background of 0.39
        and logt 6, PPC one of 0.27.

        Args:
            image: (B, 3, H, W) normalised.
            cam: (B, C, H, W) in [0, 1].
            label: (B, C) 0 or 1.
            background: score of the background; None takes (1 - max cam) ** alpha.
            alpha: see there.
            beta: exponent of the affinities: the larger, the fewer of them lead anywhere.
            logt: binary logarithm of the number of steps.
        """
        padded = pad_to_cells(image)
        radius = fitting_radius([side // CELL for side in padded.shape[-2:]], self.radius)
        affinity = pair_affinity(self.network(padded), radius)
        # the present classes of each image in order: the maps of others are 0, and stay so
        count = int((label > 0).sum(dim=1).max())
        index = label.sort(dim=1, descending=True, stable=True).indices[:, :count]
        rows = torch.arange(len(label), device=label.device)[:, None]
        present = (cam * (label > 0)[:, :, None, None])[rows, index] if count else cam[:, :1] * 0
        scores = with_background_score(present, background, alpha)
        walked = refine_scores(affinity, scores, radius, beta, logt)
        result = walked.new_zeros(len(label), 1 + self.num_classes, *cam.shape[-2:])
        result[rows, index + 1], result[:, 0] = walked[:, 1 : 1 + count], walked[:, 0]
        return result if self.has_background else torch.cat([result[:, :1] - torch.inf, result[:, 1:]], dim=1)

    @torch.no_grad()
    def walk(
        self,
        image: Tensor,
        cam: Tensor,
        background: float | None = None,
        alpha: float = 16.0,
        beta: float = 8.0,
        logt: int = 8,
    ) -> Refined:
        """`refine` of one image for wsss-label: colours (3, H, W), 0..255, and maps (n, H, W) of its n classes."""
        if alpha <= 0 or beta <= 0 or not 0 <= logt <= 16:
            raise InputError(
                f"refine has alpha={alpha}, beta={beta} and logt={logt}: expected alpha and beta above 0, logt 0 to 16"
            )
        label = torch.ones_like(cam[None, :, 0, 0])
        scores = self.refine(self.normalised(image[None]), cam[None], label, background, alpha, beta, logt)
        return Refined(scores[0, : 1 + len(cam)].argmax(dim=0))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        settings = {name: self.hparams[name] for name in ("lr", "weight_decay", "momentum", "power")}
        return sgd_poly(self, [self.network.head], self.total_steps, **settings)

"""IRN: class boundaries and centres of objects from image-level labels (Ahn, Cho and Kwak, CVPR 2019)."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import SGD

from wsss import InputError
from wsss.cam import resize, resize_ids
from wsss.methods.stage import Stage
from wsss.networks.irn import IRNet
from wsss.networks.weights import start_backbone
from wsss.optim import stepwise, warmup_poly
from wsss.pairs import EDGE_CELL, cells_of, path_affinity, source_size
from wsss.refine.instances import cluster, find_centroids, separate
from wsss.refine.pseudo import Refined
from wsss.refine.random_walk import edge_walk
from wsss.refine.thresholds import cam_to_label


class IRN(Stage):
    """The network of IRN (arXiv 1904.05044), whose random walk refines the CAM of any method and tells objects apart.

    It learns from `pseudo_mask` (B, H, W), labels of which a dense CRF is sure (`wsss.refine.pseudo.label_crf`), 255
    where it is not. A boundary is where the labels of two cells on both of its sides differ; the displacement of a cell
    points to the centre of its object. Nothing is evaluated, because all that could be compared is pixels: the last
    checkpoint is the result.

    Args:
        num_classes: C, foreground classes only.
        classes: their names.
        backbone: `resnet38`, or the timm name of a convolutional network; it does not learn.
        weights: None; of ResNet38 MXNet's `.params` file or a `.pth` file; else a timm tag or a file.
        backbone_args: arguments of `ResNet38` or of timm's constructor.
        init_checkpoint: a checkpoint of method=cam to take the backbone from.
        losses: weight and arguments of affinity, which boundaries learn from, and displacement. Masks alone need no
            displacement, and a null leaves its branch as it is.
        least_side: in the inference images are padded to it, as crops are in the training, because group norm sees all
            of an image.
        lr: learning rate of the boundaries.
        displacement_lr_factor: the displacements learn this much faster.
        weight_decay: of all weights.
        momentum: of SGD. The released code means 0.9, but its optimizer takes the weight decay for the momentum.
        power: of the polynomial decay.
    """

    start_arguments = ("weights", "init_checkpoint")
    makes_masks = False
    supervision = "pseudo_masks"

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None = None,
        backbone: str = "resnet50",
        weights: str | None = None,
        backbone_args: Mapping[str, Any] | None = None,
        init_checkpoint: str | None = None,
        losses: Mapping[str, Mapping[str, Any] | None] | None = None,
        least_side: int = 512,
        lr: float = 0.1,
        displacement_lr_factor: float = 10.0,
        weight_decay: float = 1e-4,
        momentum: float = 1e-4,
        power: float = 0.9,
    ) -> None:
        if losses is None:
            losses = {"affinity": {"weight": 1.0, "radius": 10}, "displacement": {"weight": 1.0, "radius": 10}}
        super().__init__(num_classes, classes, losses, ("affinity", "displacement"))
        self.save_hyperparameters()
        self.radii: dict[str, int] = {key: loss.radius for key, loss in self.losses.items()}  # type: ignore[misc]  # of a module any attribute may be a tensor
        for key, radius in self.radii.items():
            if not isinstance(radius, int) or radius < 2:
                raise InputError(f"losses.{key}.radius is {radius!r}: expected a whole number of at least 2")
        self.network = IRNet(backbone, weights, backbone_args)
        self.mean, self.std = self.network.backbone.normalisation or (self.mean, self.std)
        self.network.edge.requires_grad_("affinity" in self.losses)
        self.network.displacement.requires_grad_("displacement" in self.losses)
        if weights is None and init_checkpoint is None:
            warnings.warn(
                f"{backbone} starts from random weights, and it does not learn: set method.weights or "
                "method.init_checkpoint",
                stacklevel=2,
            )
        if init_checkpoint is not None:
            self.start_as(start_backbone(self.network.backbone, init_checkpoint))

    @property
    def views(self) -> tuple[str, ...]:
        return ("image", "pseudo_mask")

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> the probability of a boundary `edge` (B, 1, h, w), and `displacement` (B, 2, h, w) in cells.

        h x w is ceil(H / 4) x ceil(W / 4). Boundaries are the mean of the image and its mirror image.
        """
        height, width = image.shape[-2:]
        h, w = cells_of((height, width), EDGE_CELL)
        stride, least = max(self.network.strides), self.hparams.least_side
        rows, columns = cells_of((max(height, least), max(width, least)), stride)
        around = (0, stride * columns - width, 0, stride * rows - height)
        stages, size = self.network.stages(F.pad(torch.cat([image, image.flip(-1)]), around))
        plain, mirrored = self.network.edge(stages, size)[..., :h, :w].chunk(2)
        displacement = self.network.displacement([stage[: len(image)] for stage in stages], size)[..., :h, :w]
        return {"edge": ((plain + mirrored.flip(-1)) / 2).sigmoid(), "displacement": displacement}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        stages, size = self.network.stages(batch["image"])
        radius = max(self.radii.values())
        if 0 in source_size(size, radius):
            raise InputError(
                f"a crop of {size[0]} x {size[1]} cells of {EDGE_CELL} pixels holds no pair of radius {radius}: "
                f"set transform.crop_size to at least {EDGE_CELL * (2 * radius - 1)}"
            )
        label, terms = resize_ids(batch["pseudo_mask"], size), {}
        if "affinity" in self.losses:
            edge = self.network.edge(stages, size).sigmoid()
            terms["affinity"] = self.losses["affinity"](path_affinity(edge, self.radii["affinity"]), label)
        if "displacement" in self.losses:
            terms["displacement"] = self.losses["displacement"](self.network.displacement(stages, size), label)
        return self.combine(terms, self.loss_weights)

    @torch.no_grad()
    def walk(
        self,
        image: Tensor,
        cam: Tensor,
        radius: int = 5,
        background: float = 0.25,
        beta: float = 10.0,
        logt: int = 8,
        instances: bool = False,
    ) -> Refined:
        """The mask of an image after a random walk of its CAMs that class boundaries stop, and its instances.

        Args:
            image: colours (3, H, W), 0..255.
            cam: (n, H, W) in [0, 1], of the n >= 1 classes that it shows.
            radius: of the pairs of cells that a step connects.
            background: what a score, divided by the largest of the image, has to exceed.
            beta: exponent of the affinities: the larger, the fewer of them lead anywhere.
            logt: binary logarithm of the number of steps.
            instances: also tell the objects of a class apart.
        """
        if radius < 2 or beta <= 0 or not 0 <= logt <= 16:
            raise InputError(
                f"refine has radius={radius}, beta={beta} and logt={logt}: expected a radius of at least 2, beta above "
                "0, logt 0 to 16"
            )
        if instances and "displacement" not in self.losses:
            raise InputError("instances need displacements, and this network was trained without (losses.displacement)")
        height, width = cam.shape[-2:]
        field = self(self.normalised(image[None]))
        edge, displacement = field["edge"], field["displacement"][0]
        cells = resize(cam[None], edge.shape[-2:])  # (1, n, h, w)

        def spread(maps: Tensor) -> Tensor:
            walked = edge_walk(edge, maps, radius, beta, logt)
            return resize(walked, [EDGE_CELL * side for side in edge.shape[-2:]])[..., :height, :width]

        scores = spread(cells)
        label = torch.ones_like(cam[None, :, 0, 0])
        mask = cam_to_label(scores / scores.max().clamp(min=1e-30), label, background)[0]
        if not instances:
            return Refined(mask)
        clusters = cluster(find_centroids(displacement), displacement)
        return Refined(mask, instances=separate(cells[0], clusters, spread, (height, width), background))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        lr, branches = self.hparams.lr, (self.network.edge, self.network.displacement)
        rates = (lr, lr * self.hparams.displacement_lr_factor)
        groups = [
            {"params": list(branch.parameters()), "lr": rate} for branch, rate in zip(branches, rates, strict=True)
        ]
        optimizer = SGD(groups, momentum=self.hparams.momentum, weight_decay=self.hparams.weight_decay)
        return stepwise(optimizer, warmup_poly(self.total_steps, warmup_steps=0, power=self.hparams.power))

"""What all stages of a recipe share: loss terms, protocol, figures, checkpoint contents. No training logic."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from wsss import InputError
from wsss.cam import denormalise, multiscale_seg, reduce, resize, widened, windowed, with_background
from wsss.evaluation.details import OverSmoothing, mask_details, per_image
from wsss.evaluation.metrics import SegmentationIoU, figures_of, tables_of
from wsss.evaluation.protocol import Measured, Protocol, extra_supervision
from wsss.losses import build
from wsss.refine.crf import dense_crf
from wsss.writing import check_classes


class Stage(pl.LightningModule):
    """Base of everything that is trained. A subclass saves its constructor's plain values as `hparams`.

    It gives `forward(image)`, a dict with the scores `seg` (B, 1 + C, h, w) if it is to predict masks, and
    `training_step`, which ends with `self.combine(terms, weights)`. It gives what it can of `metrics`, which are logged
    and reset after an evaluation, `describe` and `illustrate`.

    Args:
        num_classes: C, foreground classes only; `classes` are their names, numbers when None.
        losses: mapping from a loss key to its `weight` and arguments, or to None to leave the term out.
        computed: the loss keys this stage computes; without any it learns nothing and is complete as it is built.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    has_background: bool = True
    cam_names: tuple[str, ...] = ()
    """The kinds of class activation maps that it makes."""
    start_arguments: tuple[str, ...] = ("weights",)
    """Arguments of the constructor that name files or tags to start from; None where a checkpoint gives the weights."""
    makes_masks: bool = True
    """Whether `infer` gives maps of classes that a photograph's mask can be made of."""
    supervision: str | None = None
    """The setting of `wsss-train` that names the pixels this stage learns from; None for a stage without any."""
    counts_images: bool = False
    """Whether evaluations return rows of per_image.csv; those in detail do anyway."""
    learns_from: str = "image"
    """What training batches hold: `image`, or `mean` or `maps`, features of the images by the network `frozen`."""
    hparams: Any  # Lightning's property, whose type hides the names in it

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[str] | None,
        losses: Mapping[str, Mapping[str, Any] | None],
        computed: Sequence[str],
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.classes = tuple(classes or map(str, range(num_classes)))
        if len(self.classes) != num_classes:
            raise InputError(f"classes has {len(self.classes)} names for num_classes={num_classes}")
        check_classes(self.classes)
        self.protocol = Protocol()
        self.metrics: Any = nn.ModuleDict()
        self.tables: dict[str, Any] = {}  # of the last evaluation, see `wsss.evaluation.metrics.tables_of`
        self.started_from: list[str] = []  # `told` by the checkpoint that it comes from, and behind its pseudo masks
        self.checkpoint_rule = "last"  # of the training that a checkpoint comes from, see `Measured`
        self.origin: dict[str, Any] = {}  # names of method and data set, for those who load a checkpoint
        self.losses = nn.ModuleDict()
        self.loss_weights: dict[str, float] = {}
        for key, settings in losses.items():
            if key not in computed:
                raise InputError(f"losses.{key}: {type(self).__name__} does not compute it, only {', '.join(computed)}")
            if settings is not None:
                if not isinstance(settings, Mapping) or not isinstance(settings.get("weight", 1.0), int | float):
                    raise InputError(f"losses.{key} is {settings}: expected {{weight: number, ...}} or null")
                arguments = dict(settings)
                self.loss_weights[key] = float(arguments.pop("weight", 1.0))
                self.losses[key] = build(key, **arguments)
        if computed and not self.losses:
            raise InputError("losses: every term is null, so there is nothing to learn")

    def without_background(self) -> None:
        """For data whose classes tile the image: no pixel of a prediction or a label made here is background."""
        self.has_background = False

    @property
    def loaded(self) -> list[str]:
        """From which weights the networks in here started, each told once; none where all are random."""
        told = (getattr(module, "loaded", None) for module in self.modules() if module is not self)
        return list(dict.fromkeys(filter(None, told)))

    @property
    def told(self) -> list[str]:
        """From which weights all began that is in here: its networks, and those that made what it has learnt from."""
        return list(dict.fromkeys([*self.loaded, *self.started_from]))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training, which schedules divide."""
        return int(self.trainer.estimated_stepping_batches)

    def combine(self, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Any]:
        """Weighted sum of the loss terms, shown with its parts; what `training_step` returns and RunLog logs."""
        total = torch.stack([weights[key] * term for key, term in terms.items()]).sum()
        self.log("train/loss", total.detach(), prog_bar=True, logger=False)
        parts = {key: term.detach() for key, term in terms.items()}
        self.log_dict({f"train/loss_{key}": term for key, term in parts.items()}, prog_bar=True, logger=False)
        return {"loss": total, "terms": parts}

    def start_as(self, origin: Mapping[str, Any]) -> None:
        """Takes `mean`, `std` and first weights from what a checkpoint that it starts from says of itself."""
        self.mean, self.std = (tuple(origin.get(key, getattr(self, key))) for key in ("mean", "std"))
        told = origin.get("loaded", ())
        self.started_from = [name for name in told if isinstance(name, str)] if isinstance(told, list | tuple) else []

    def complete(self, state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
        """The weights of a paper's own checkpoint that `asks`, with what no such file holds.

        Raises:
            InputError: they do not belong to what the command gave; `path` names the file.
        """
        return dict(state)

    def colours(self, image: Tensor) -> Tensor:
        """Undoes the normalisation: (B, 3, H, W) colours 0..255, float."""
        return denormalise(image, self.mean, self.std)

    def normalised(self, colours: Tensor) -> Tensor:
        """The inverse of `colours`: (B, 3, H, W) 0..255 -> normalised images."""
        mean, std = (colours.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (colours / 255 - mean) / std

    def sized(self, image: Tensor) -> Tensor:
        """Images at the protocol's size."""
        image, side = reduce(image, self.protocol.max_side), self.protocol.size
        return image if side is None else resize(image, (side, side))

    @torch.no_grad()
    def infer(self, image: Tensor, cams: bool = True) -> dict[str, Tensor]:
        """`forward` at the protocol's size; a stage that makes CAMs also gives those, if `cams`."""
        return self(self.sized(image))

    def infer_batch(self, batch: Mapping[str, Any], cams: bool = True) -> dict[str, Tensor]:
        """`infer` of the images of a batch, whose features, or labels, may be known already."""
        return self.infer(batch["image"], cams)

    def segment(self, image: Tensor, size: Sequence[int], seg: Tensor) -> Tensor:
        """Class scores (B, 1 + C, *size) under the protocol, from images as loaded and the `seg` of one pass over them.

        `seg` (B, 1 + C, h, w) is what `self(image)` gives at the protocol's size.
        """
        return self._refine(image, self._fuse(image, size, seg, self.protocol), self.protocol)

    def segment_steps(self, image: Tensor, size: Sequence[int], seg: Tensor, label: Tensor) -> dict[str, Tensor]:
        """`segment` for each of the protocol's `steps`; the CRF takes the scores that were fused before it.

        `label` (B, C) are the true labels, which the protocol may let rule out classes.
        """
        results: dict[str, Tensor] = {}
        for name, protocol in self.protocol.steps().items():
            if name != "crf_":  # which comes last
                scores = self._fuse(image, size, seg, protocol)
                if protocol.segmentation_labels == "true":
                    absent = with_background(label)[:, :, None, None] == 0
                    scores = scores.masked_fill(absent, 0.0 if protocol.softmax == "before" else -1e5)
            results[name] = self._refine(image, scores, protocol)
        return results

    def _fuse(self, image: Tensor, size: Sequence[int], seg: Tensor, protocol: Protocol) -> Tensor:
        """Scores, or probabilities, of all scales."""
        before = protocol.softmax == "before"
        if tuple(protocol.scales) == (1.0,) and protocol.flip == "none" and protocol.window is None:
            scores = resize(widened(seg), size)
            return scores.softmax(1) if before else scores
        how = (protocol.scales, protocol.flip, protocol.fusion, before, protocol.align_corners)
        return multiscale_seg(self.scores(protocol), self.sized(image), size, *how)

    def scores(self, protocol: Protocol) -> Callable[[Tensor], Tensor]:
        """`seg` of images (B, 3, H, W), through the windows of a protocol, if it has any."""
        window, stride = protocol.window, protocol.stride
        if window is None or stride is None:
            return lambda image: widened(self(image)["seg"])
        return lambda image: windowed(lambda part: widened(self(part)["seg"]), image, window, stride)

    def _refine(self, image: Tensor, scores: Tensor, protocol: Protocol) -> Tensor:
        """What the CRF makes of scores, if there is one, without background if there is none."""
        if protocol.crf is not None:
            probability = scores if protocol.softmax == "before" else scores.softmax(1)
            colours = self.colours(reduce(image, protocol.max_side))
            scores = dense_crf(resize(colours, scores.shape[-2:]), probability, **protocol.crf)
        return scores if self.has_background else torch.cat([scores[:, :1] - torch.inf, scores[:, 1:]], dim=1)

    @property
    def views(self) -> tuple[str, ...]:
        """What the transform has to make for a training batch."""
        return ("image",)

    @property
    def smallest_side(self) -> int:
        """Of an image that the network can take, in pixels."""
        return 1

    @property
    def loss_starts(self) -> dict[str, int]:
        """The optimizer steps from which the loss terms take part."""
        return dict.fromkeys(self.losses, 0)

    def figures(self, has_masks: bool) -> list[str]:
        """What an evaluation logs, which is what a run can be monitored by; without masks only what labels tell."""
        without_masks = ("map", "image_map", "f1")
        return [f"val/{key}" for key in self.metrics if has_masks or key in without_masks]

    def measured_on(self, split: str) -> Measured:
        """What all figures of a split share: which checkpoint this is, and what its first weights tell of."""
        return Measured(split, extra_supervision(self.told), self.checkpoint_rule)

    def describe(self, split: str) -> dict[str, Measured]:
        """For each evaluated figure what it was measured on and under which protocol."""
        return {}

    def illustrate(self, batch: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """Pictures of a batch of one evaluation image, by the name of a file and by title.

        Bytes (H, W, 3) are colours, floats (H, W) in [0, 1] heat upon `image`, integers (H, W) ids, 255 undecided.
        """
        return {}

    def measure_details(self) -> None:
        """From now on an evaluation also gives what takes time to measure."""
        for prefix in ("", *(f"{name}_" for name in self.cam_names)):
            if f"{prefix}miou" in self.metrics:
                self.metrics.update(mask_details(self.num_classes, prefix))
        if (transformer := self.transformer) is not None:
            self.metrics["over_smoothing"] = OverSmoothing(len(transformer.blocks))

    @property
    def transformer(self) -> Any:
        """The first network in here with timm's `blocks` and `num_prefix_tokens`; None without any that learns."""
        if self.learns_from != "image":
            return None
        named = (m for m in self.modules() if hasattr(m, "blocks") and hasattr(m, "num_prefix_tokens"))
        return next(named, None)

    @contextmanager
    def watching_tokens(self) -> Iterator[None]:
        """Counts the patch tokens of the first pass through each block, if they are measured."""
        if "over_smoothing" not in self.metrics:
            yield
            return
        blocks, prefix = self.transformer.blocks, self.transformer.num_prefix_tokens
        seen: list[Tensor] = []

        attended: list[Tensor] = []

        # some methods run the parts of a block themselves, for its attention: what it puts out is the sum of these two
        def before(norm: nn.Module, inputs: Any) -> None:
            attended[:] = inputs

        def after(drop: nn.Module, inputs: Any, output: Tensor) -> None:
            if len(seen) < len(blocks):
                seen.append((attended[0] + output)[:, prefix:])

        hooks = [block.norm2.register_forward_pre_hook(before) for block in blocks]
        hooks += [block.drop_path2.register_forward_hook(after) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.metrics["over_smoothing"].update(seen)

    def compare(
        self, ids: Tensor, batch: Mapping[str, Any], prefix: str = "", uncut: Tensor | None = None
    ) -> list[tuple[str, str, int, int, int, int]]:
        """Counts predicted masks in detail, where that was asked for; returns rows of per_image.csv, if wanted.

        Args:
            ids: (B, H, W).
            batch: of the same images, with masks.
            prefix: what the names of their figures begin with.
            uncut: (B, h, w) what was predicted without image labels, if `ids` were made with them.
        """
        if f"{prefix}size_miou" in self.metrics:
            for key in ("boundary_miou", "trimap_miou", "size_miou"):
                self.metrics[f"{prefix}{key}"].update(ids, batch["mask"])
            self.metrics[f"{prefix}cooccurrence"].update(ids, batch["mask"], batch["label"])
            self.metrics[f"{prefix}absent"].update(ids if uncut is None else uncut, batch["label"])
        elif not self.counts_images:
            return []
        return per_image(f"{prefix}miou", batch["id"], ids, batch["mask"], 1 + self.num_classes)

    def on_validation_start(self) -> None:
        for name in self.protocol.steps():  # the protocol is known only now
            if "miou" in self.metrics and f"{name}miou" not in self.metrics:
                self.metrics[f"{name}miou"] = SegmentationIoU(1 + self.num_classes).to(self.device)
        for metric in self.metrics.values():
            metric.reset()  # here: what an evaluation in inference mode has left cannot be changed in a training

    def on_validation_epoch_end(self) -> None:
        figures = figures_of(self.metrics, self.classes, self.protocol)
        self.tables = tables_of(self.metrics, self.classes)
        self.log_dict({f"val/{key}": value for key, value in figures.items()}, logger=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        images = {"classes": list(self.classes), "mean": list(self.mean), "std": list(self.std)}
        images |= {"has_background": self.has_background, "loaded": self.told}
        checkpoint["wsss"] = images | {"protocol": asdict(self.protocol)} | self.origin

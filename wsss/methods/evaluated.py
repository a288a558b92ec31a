"""How stages that make masks are evaluated: the network on one batch, beside it the CRF of those before."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wsss.cam import reduced_size, resize_ids
from wsss.methods.stage import Stage
from wsss.threads import Beside

Row = tuple[str, str, int, int, int, int]
"""Of per_image.csv."""


class Inferred(NamedTuple):
    """What a network says of an evaluation batch: `infer_batch`, and segmentations by `Protocol.steps`, if measured."""

    output: dict[str, Tensor]
    scores: dict[str, Tensor]


class Evaluated(Stage):
    """Base of stages whose masks are measured. A subclass gives `count`."""

    beside: Beside[dict[str, Any], Inferred] | None = None
    """Refines batches of a running evaluation, if that has a CRF on the processor."""

    def count(self, batch: dict[str, Any], inferred: Inferred) -> list[Row]:
        """Updates the metrics by a batch and its refined segmentations; returns rows of per_image.csv, if wanted."""
        raise NotImplementedError

    def infer_steps(self, batch: dict[str, Any]) -> Inferred:
        """All passes through the network that an evaluation batch needs."""
        with self.watching_tokens():
            output = self.infer_batch(batch)
        if "mask" not in batch or output["seg"] is None:
            return Inferred(output, {})
        size = reduced_size(batch["mask"].shape[-2:], self.protocol.max_side)
        return Inferred(output, self.fused_steps(batch["image"], size, output["seg"], batch["label"]))

    @torch.no_grad()  # which belongs to a thread
    def refine_steps(self, batch: dict[str, Any], inferred: Inferred) -> Inferred:
        """The same with the segmentations that the CRF makes of these."""
        return inferred._replace(scores=self.refined_steps(batch["image"], inferred.scores))

    def count_segmentations(self, batch: Mapping[str, Any], scores: Mapping[str, Tensor]) -> list[Row]:
        """Updates the metrics of the protocol's steps."""
        rows: list[Row] = []
        for word, refined in scores.items():
            ids = resize_ids(refined.argmax(1), batch["mask"].shape[-2:])
            self.metrics[f"{word}miou"].update(ids, batch["mask"])
            rows += self.compare(ids, batch, word)
        return rows

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Counts a batch, or, where CRFs run in threads, those before it that are finished; with the last one all."""
        if self.beside is None:
            return {"counts": self.count(batch, self.refine_steps(batch, self.infer_steps(batch)))}
        self.beside.add(batch, self.refine_steps, self.infer_steps)
        rows: list[Row] = []
        for earlier, ended in self.beside.ended(rest=batch_idx + 1 == self.trainer.num_val_batches[0]):
            rows += self.count(earlier, ended.result())
        return {"counts": rows}

    def on_validation_start(self) -> None:
        super().on_validation_start()
        refined = any(protocol.crf is not None for protocol in self.protocol.steps().values())
        self.beside = Beside() if refined and self.device.type == "cpu" else None

    def on_validation_epoch_end(self) -> None:
        if self.beside is not None:
            self.beside.__exit__(None)
            self.beside = None
        super().on_validation_epoch_end()

"""What all metrics of an evaluation share: they count, and give figures and tables of it."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from wsss.evaluation.protocol import Protocol

LISTED = 100
"""Of the confused pairs of classes, those that the tables list, the most frequent first."""


def add_ones(state: Tensor, place: Tensor) -> None:
    """Adds 1 at flat places, long, to the cells of a state. Only those are touched: its size costs no time."""
    state.view(-1).scatter_add_(0, place, torch.ones_like(place))


def rates(hits: Tensor, predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    """What (K,) pixels of each of K ids predicted rightly, predicted, and true come to; NaN for 0 of 0.

    `iou`, `precision` and `recall`; the false positive rate `fpr`, of the pixels that are not of the id, and the false
    negative rate `fnr`, of those that are; `over` and `under`, the false positives and negatives as shares of the
    union, so that iou + over + under = 1 (the FP and FN of MCTformer's evaluation).
    """
    hits = hits.double()
    union = predicted + true - hits
    return {
        "iou": hits / union,
        "precision": hits / predicted,
        "recall": hits / true,
        "fpr": (predicted - hits) / (true.sum() - true),
        "fnr": (true - hits) / true,
        "over": (predicted - hits) / union,
        "under": (true - hits) / union,
    }


def plain(values: Tensor) -> list[float | None]:
    """A list of numbers; JSON knows no NaN, which becomes None."""
    return [None if value != value else value for value in values.tolist()]


def by_class(columns: dict[str, Tensor], names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Rows by name of columns (K,)."""
    values = {key: plain(column) for key, column in columns.items()}
    return {name: {key: column[row] for key, column in values.items()} for row, name in enumerate(names)}


def listed_pairs(counts: Tensor, names: Sequence[str], other: Sequence[str]) -> list[tuple[str, str, Any]]:
    """The largest positive entries of a table, with the names of their row and column."""
    values, places = counts.flatten().topk(min(LISTED, counts.numel()))
    rows = zip(values.tolist(), places.tolist(), strict=True)
    return [(names[p // len(other)], other[p % len(other)], value) for value, p in rows if value > 0]


class Measure(Metric):
    """A metric of an evaluation. Its states are sums over images, and so over processes."""

    full_state_update = False

    def count(self, name: str, *shape: int, dtype: torch.dtype = torch.long) -> None:
        """Adds a state of zeros, which is summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    @abstractmethod
    def figures(self, key: str, classes: Sequence[str], protocol: Protocol) -> dict[str, Any]:
        """Numbers by the name of the figure.

        Args:
            key: what the metric is called.
            classes: names of the foreground classes.
            protocol: that of the evaluation.
        """

    def tables(self, classes: Sequence[str]) -> dict[str, Any]:
        """Plain values that are more than a number: by class, by threshold."""
        return {}

"""Training images and labels made worse on purpose, to measure what a method makes of them."""

from typing import Any

import numpy as np

from wsss import InputError
from wsss.data.base import Images, ImageSubset, digest


class Worse(ImageSubset):
    """Fewer images of a data set, some labels missing, some wrong.

    What is drawn depends on the seed and the number of images alone, and what a smaller share takes a larger one takes
    as well: 0.1 of the images are among 0.3 of them.

    Args:
        source: images without masks.
        kept: share of the images that is kept, above 0 and up to 1, at least one image.
        missing: share of the labels, 0 to 1, that is removed; an image may be left without any.
        wrong: share of the labels, 0 to 1, that is replaced by a class that the image has no label of. `missing` and
            `wrong` are shares of all labels of the images kept and concern different ones: together at most 1.
        seed: of what is drawn, from 0 on.

    Raises:
        InputError: a share out of range.
    """

    def __init__(
        self, source: Images, kept: float = 1.0, missing: float = 0.0, wrong: float = 0.0, seed: int = 0
    ) -> None:
        if not 0 < kept <= 1:
            raise InputError(f"worse.kept is {kept}: expected a share above 0 and up to 1")
        if not (missing >= 0 and wrong >= 0 and missing + wrong <= 1):  # NaN, too
            raise InputError(f"worse.missing={missing} and worse.wrong={wrong}: expected shares of together at most 1")
        if seed < 0:
            raise InputError(f"worse.seed is {seed}: expected a whole number of at least 0")
        order = np.random.default_rng([seed, 0]).permutation(len(source))
        super().__init__(source, sorted(order[: max(1, round(kept * len(source)))].tolist()))
        self.labels = self._spoil(np.stack([source.label(index) for index in self.indices]), missing, wrong, seed)

    @staticmethod
    def _spoil(labels: np.ndarray, missing: float, wrong: float, seed: int) -> np.ndarray:
        """labels: (N, C) of zeros and ones."""
        shown = np.argwhere(labels > 0)
        rng = np.random.default_rng([seed, 1])
        order = rng.permutation(len(shown))
        places = rng.random(len(shown))  # one for each label, whether it is used or not
        gone = round(missing * len(shown))
        false = min(round(wrong * len(shown)), len(shown) - gone)  # both may have been rounded up
        spoilt = labels.copy()
        spoilt[tuple(shown[order[:gone]].T)] = 0
        for number in order[::-1][:false]:  # from the other end, where none are gone
            image, label = shown[number]
            others = np.flatnonzero((labels[image] == 0) & (spoilt[image] == 0))
            if len(others):  # else the image shows all classes there are
                spoilt[image, label], spoilt[image, others[int(places[number] * len(others))]] = 0, 1
        return spoilt

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"label": self.label(index)}

    def label(self, index: int) -> np.ndarray:
        assert self.labels is not None
        return self.labels[index].copy()

    @property
    def has_labels(self) -> bool:
        return self.labels is not None and bool(self.labels.any())

    @property
    def fingerprint(self) -> str:
        assert self.labels is not None
        return digest(super().fingerprint, self.labels.tolist())

"""How good the CAMs behind pseudo masks are, where there are true masks. Nothing is chosen by these figures."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from wsss.evaluation.metrics import CamIoU


def count_cam(cam: Mapping[int, np.ndarray], truth: np.ndarray, background_threshold: float) -> dict[str, np.ndarray]:
    """What `CamIoU` keeps of one image, for the ids that it or its truth shows.

    Args:
        cam: by id the maps (H, W) in [0, 1] of the classes of the image.
        truth: uint8 (H, W), 255 ignored.
        background_threshold: of the method.

    Returns:
        `ids` (K,), the background first, and of these the states of the metric, `pixels` (T + 1, 4, K - 1) and
        `targets` (K,).
    """
    shown = {*cam, *np.unique(truth).tolist()} - {0, 255} or {1}  # an image may show nothing
    ids = np.array([0, *sorted(shown)])
    maps = np.stack([cam.get(c, np.zeros(truth.shape, np.float32)) for c in ids[1:].tolist()])
    place = np.full(256, 255)
    place[ids] = np.arange(len(ids))
    metric = CamIoU(len(ids) - 1, background_threshold)
    known = torch.tensor([[c in cam for c in ids[1:].tolist()]])
    metric.update(torch.from_numpy(maps)[None], known, torch.from_numpy(place[truth])[None])
    counts = {name: getattr(metric, name).numpy().astype(np.uint32) for name in ("pixels", "targets")}
    return {"ids": ids} | counts


def cam_figures(
    counts: Iterable[Mapping[str, np.ndarray]], num_classes: int, background_threshold: float
) -> dict[str, float]:
    """`cam_miou` at the threshold, and the best of the sweep with its threshold, from `count_cam` of all images."""
    total = CamIoU(num_classes, background_threshold)
    for one in counts:
        ids = torch.from_numpy(one["ids"].astype(np.int64))
        total.pixels[..., ids[1:] - 1] += torch.from_numpy(one["pixels"].astype(np.int64))
        total.targets[ids] += torch.from_numpy(one["targets"].astype(np.int64))
    best, threshold = total.best()
    figures = {"cam_miou": total.curve()[total.fixed], "cam_best_miou": best, "cam_best_threshold": threshold}
    return {name: value.item() for name, value in figures.items()}

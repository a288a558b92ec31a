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
        `ids` (K,), and pixels by number of thresholds below the value and by id, `hits` and `found` (T + 1, K), and
        by id, `targets` (K,).
    """
    shown = {*cam, *np.unique(truth).tolist()} - {0, 255} or {1}  # an image may show nothing
    ids = np.array([0, *sorted(shown)])
    maps = np.stack([cam.get(c, np.zeros(truth.shape, np.float32)) for c in ids[1:].tolist()])
    place = np.full(256, 255)
    place[ids] = np.arange(len(ids))
    metric = CamIoU(len(ids) - 1, background_threshold)
    known = torch.tensor([[c in cam for c in ids[1:].tolist()]])
    metric.update(torch.from_numpy(maps)[None], known, torch.from_numpy(place[truth])[None])
    counts = {name: getattr(metric, name).numpy().astype(np.uint32) for name in ("hits", "found", "targets")}
    return {"ids": ids} | counts


def cam_figures(
    counts: Iterable[Mapping[str, np.ndarray]], num_classes: int, background_threshold: float
) -> dict[str, float]:
    """`cam_miou` at the threshold, and the best of the sweep with its threshold, from `count_cam` of all images."""
    total = CamIoU(num_classes, background_threshold)
    for one in counts:
        ids = torch.from_numpy(one["ids"].astype(np.int64))
        for name in ("hits", "found", "targets"):
            getattr(total, name)[..., ids] += torch.from_numpy(one[name].astype(np.int64))
    best, threshold = total.best()
    figures = {"cam_miou": total.at_threshold(), "cam_best_miou": best, "cam_best_threshold": threshold}
    return {name: value.item() for name, value in figures.items()}

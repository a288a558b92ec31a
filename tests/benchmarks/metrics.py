"""What metrics cost: an image at 20 and at 1,000 classes, at one and at 1,000 thresholds, and their memory.

    python -m tests.benchmarks.metrics

Maps of 500 x 375 pixels, of which three classes are shown; the time of an update is the least of many.
"""

import resource
import time

import numpy as np
import torch
from torch import Tensor

from wsss.evaluation.details import mask_details
from wsss.evaluation.measure import Measure
from wsss.evaluation.metrics import CamIoU, SegmentationIoU

SIZE = (375, 500)
SHOWN = 3


def images(classes: int, number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Maps (1, C, H, W), labels (1, C) and masks (1, H, W), -1 ignored: 255 is an id of a thousand."""
    rng, made = np.random.default_rng(0), []
    for _ in range(number):
        shown = rng.choice(classes, SHOWN, replace=False)
        cam, label = torch.rand(1, classes, *SIZE), torch.zeros(1, classes)
        label[0, shown] = 1
        mask = torch.from_numpy(np.repeat(np.repeat(rng.choice([-1, 0, *(shown + 1)], (1, 15, 20)), 25, 1), 25, 2))
        made.append((cam, label, mask))
    return made


def milliseconds(metric: Measure, *arguments: Tensor) -> float:
    """The least time of an update."""
    times = []
    for _ in range(15):
        start = time.perf_counter()
        metric.update(*arguments)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def by_metric(classes: int) -> dict[str, float]:
    """Milliseconds of an update."""
    cam, label, mask = images(classes, 1)[0]
    prediction = mask.roll(5, -1).clamp(min=0)
    metrics = mask_details(classes) | {
        "cam_miou": CamIoU(classes, 0.45, ignore_index=-1),
        "miou": SegmentationIoU(classes + 1, ignore_index=-1),
    }
    given = {
        "cam_miou": (cam, label, mask),
        "absent": (prediction, label),
        "cooccurrence": (prediction, mask, label),
    }
    times = {}
    for name, metric in metrics.items():
        metric.ignore_index = -1
        times[name] = milliseconds(metric, *given.get(name, (prediction, mask)))
    return times


def main() -> None:
    torch.set_num_threads(1)
    few, many = by_metric(20), by_metric(1000)
    print(f"{'ms an image':16} {'20 classes':>12} {'1,000 classes':>14} {'times':>6}")
    for name, time_of_few in few.items():
        print(f"{name:16} {time_of_few:12.2f} {many[name]:14.2f} {many[name] / time_of_few:6.2f}")
    given = images(20, 1)[0]
    sweeps = [[0.5], [step / 1000 for step in range(1000)]]
    one, thousand = (milliseconds(CamIoU(20, 0.5, ignore_index=-1, sweep=sweep), *given) for sweep in sweeps)
    print(f"CamIoU at one threshold {one:.2f} ms, at 1,000 {thousand:.2f} ms: {thousand / one:.2f} times")
    cam, label, mask = given
    metric = CamIoU(20, 0.5, ignore_index=-1)
    for number in (10, 1000):
        for _ in range(number):
            metric.update(cam, label, mask)
        held = sum(state.numel() * state.element_size() for state in metric.metric_state.values())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"after {number:4} images more: CamIoU holds {held / 1024:.0f} KiB, the process at most {peak:.0f} MiB")


if __name__ == "__main__":
    main()

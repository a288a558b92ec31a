"""Every metric of masks and maps against loops in float64, on random maps of several kinds, and as two processes."""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from wsss.evaluation.classification import ClassificationF1, ClassificationMAP, ImageMAP
from wsss.evaluation.details import (
    AbsentClasses,
    BoundaryIoU,
    Cooccurrence,
    OverSmoothing,
    SizeIoU,
    TrimapIoU,
    mask_details,
)
from wsss.evaluation.measure import Measure
from wsss.evaluation.metrics import CamIoU, SegmentationIoU, evaluation, figures_of, tables_of
from wsss.evaluation.protocol import Protocol

# number of classes, those that occur, ignored id, values of the maps
KINDS: dict[str, tuple[int, Sequence[int], int, int]] = {
    "all occur": (4, range(4), 255, 1000),
    "some are absent": (6, (0, 3), 255, 1000),
    "ties": (3, range(3), 255, 4),
    "one class": (1, (0,), 255, 100),
    "a thousand": (1000, (0, 7, 254, 999), -1, 100),
}
NAN = float("nan")


class Images:
    """Six images: maps (1, C, 9, 12) in [0, 1], labels (1, C), masks and predictions (1, 9, 12)."""

    def __init__(self, kind: str) -> None:
        self.classes, occurring, self.ignored, levels = KINDS[kind]
        rng = np.random.default_rng(len(kind))
        self.parts = []
        for number in range(6):
            shown = rng.choice(occurring, min(len(occurring), number % 4), replace=False)  # the first has none
            label = np.zeros((1, self.classes), np.float32)
            label[0, shown] = 1
            cam = (rng.integers(0, levels + 1, (1, self.classes, 9, 12)) / levels).astype(np.float32)
            ids = [0, *(shown + 1)]
            mask = np.repeat(rng.choice([*ids, self.ignored], (1, 9, 6)), 2, axis=2)
            prediction = np.repeat(rng.choice([*ids, 1 + occurring[0], self.ignored], (1, 3, 12)), 3, axis=1)
            self.parts.append((cam, label, mask, prediction))

    def __iter__(self) -> Iterator[tuple[np.ndarray, ...]]:
        return iter(self.parts)

    def tensors(self) -> list[tuple[Tensor, ...]]:
        return [tuple(torch.from_numpy(array) for array in part) for part in self.parts]


@pytest.fixture(params=KINDS)
def images(request: pytest.FixtureRequest) -> Images:
    return Images(request.param)


def counted(masks: Sequence[tuple[np.ndarray, np.ndarray]], num_ids: int, ignored: int) -> list[tuple[int, int, int]]:
    """Of each id pixels that are predicted rightly, predicted, and true, in pairs of prediction and truth."""
    pairs = [(p[t != ignored], t[t != ignored]) for p, t in masks]
    p, t = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return [(int(((p == i) & (t == i)).sum()), int((p == i).sum()), int((t == i).sum())) for i in range(num_ids)]


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else NAN


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else NAN


def mious(counts: Sequence[tuple[int, int, int]]) -> tuple[float, float, float]:
    """Over the ids that are true, over all, and over the true ones without the background."""
    iou = [ratio(h, p + t - h) for h, p, t in counts]
    occurring = [i for i, (_, _, t) in enumerate(counts) if t]
    return mean([iou[i] for i in occurring]), mean(np.nan_to_num(iou)), mean([iou[i] for i in occurring if i])


def close(ours: Any, expected: Any) -> None:
    ours = ours.numpy() if isinstance(ours, Tensor) else np.array(ours, dtype=float)
    np.testing.assert_allclose(ours, np.array(expected, dtype=float), rtol=0, atol=1e-12)


def exact(metric: Measure, key: str, classes: int, protocol: Protocol | None = None) -> dict[str, float]:
    """Figures before they are rounded to float32."""
    figures = metric.figures(key, tuple(map(str, range(classes))), protocol or Protocol())
    return {name: float(value) for name, value in figures.items()}


def test_masks(images: Images) -> None:
    metric = SegmentationIoU(images.classes + 1, images.ignored)
    for _, _, mask, prediction in images.tensors():
        metric.update(prediction, mask)
    counts = counted([(p, t) for *_, t, p in images], images.classes + 1, images.ignored)
    figures, miou = exact(metric, "miou", images.classes), mious(counts)
    close([figures["miou"], figures["miou_all"], figures["foreground_miou"]], miou)
    close(metric.compute(), miou[0])
    total, hits = sum(t for *_, t in counts), sum(h for h, *_ in counts)
    close(figures["pixel_accuracy"], hits / total)
    assert [figures[f"iou/{name}"] for name in ("background", "0")] == pytest.approx(
        [ratio(h, p + t - h) for h, p, t in counts[:2]], nan_ok=True
    )
    table = metric.tables(tuple(map(str, range(images.classes))))
    assert len(table["classes"]) == len(counts)
    for row, (h, p, t) in zip(table["classes"].values(), counts, strict=True):
        union = p + t - h
        expected = {
            "iou": ratio(h, union),
            "precision": ratio(h, p),
            "recall": ratio(h, t),
            "fpr": ratio(p - h, total - t),
            "fnr": ratio(t - h, t),
            "over": ratio(p - h, union),
            "under": ratio(t - h, union),
        }
        assert row.keys() == expected.keys()
        close([NAN if value is None else value for value in row.values()], list(expected.values()))
    names, most = ("background", *map(str, range(images.classes))), table["confused"][0]
    pairs = {
        (i, j): sum(int(((t == i) & (p == j)).sum()) for *_, t, p in images)
        for i, j in itertools.product({*np.unique([t for *_, t, _ in images])} - {images.ignored}, repeat=2)
        if i != j
    }
    if pairs:
        assert most[2] >= max(pairs.values())
    true, found = (names.index(name) for name in most[:2])
    assert most[2] == sum(int(((t == true) & (p == found)).sum()) for *_, t, p in images)


def labelled(cam: np.ndarray, label: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(1, H, W) ids of maps under a threshold for each class, pixel by pixel; the first of equal maps wins."""
    ids = np.zeros(cam.shape[2:], int)
    shown = np.flatnonzero(label[0])
    for y, x in np.ndindex(ids.shape):
        if len(shown):
            best = shown[cam[0, shown, y, x].argmax()]
            ids[y, x] = best + 1 if cam[0, best, y, x] > thresholds[best] else 0
    return ids[None]


def largest(images: Images, c: int) -> np.ndarray:
    """The values of the pixels where a class is the largest of its image's."""
    values = [
        cam[0, c, y, x]
        for cam, label, *_ in images
        if label[0, c]
        for y, x in np.ndindex(cam.shape[2:])
        if np.flatnonzero(label[0])[cam[0, np.flatnonzero(label[0]), y, x].argmax()] == c
    ]
    return np.array(values, dtype=np.float32)


def otsu_of(values: np.ndarray, thresholds: np.ndarray) -> float:
    """The threshold with the largest variance between the parts, of values rounded to the middle between thresholds."""
    ends = np.concatenate([[0.0], thresholds.astype(float), [1.0]])
    middles = (ends[1:] + ends[:-1]) / 2
    rounded = middles[[int((thresholds < value).sum()) for value in values]] if len(values) else values
    best, chosen = 0.0, thresholds[0]
    for threshold in thresholds:
        low, high = rounded[values <= threshold], rounded[values > threshold]
        if len(low) and len(high):
            weight = len(low) * len(high) / len(values) ** 2
            between = weight * (low.mean() - high.mean()) ** 2
            if between > best * (1 + 1e-9) + 1e-15:  # not by rounding alone
                best, chosen = between, threshold
    return float(chosen)


def cam_metric(images: Images, threshold: float = 0.355) -> CamIoU:
    metric = CamIoU(images.classes, threshold, images.ignored)
    for cam, label, mask, _ in images.tensors():
        metric.update(cam, label, mask)
    return metric


def test_maps(images: Images) -> None:
    metric, (classes, ignored) = cam_metric(images), (images.classes, images.ignored)
    thresholds = metric.thresholds.numpy()

    def of(chosen: np.ndarray) -> list[tuple[int, int, int]]:
        return counted([(labelled(c, la, chosen), t) for c, la, t, _ in images], classes + 1, ignored)

    tables = [of(np.full(classes, threshold, np.float32)) for threshold in thresholds]
    curve, curve_all, _ = np.array([mious(counts) for counts in tables]).T
    close(metric.curve(), curve)
    close(metric.curve_all(), curve_all)
    fixed = int(np.abs(thresholds - 0.355).argmin())
    figures = exact(metric, "cam_miou", classes, Protocol(area_prior=0.3))
    close([figures[f"cam_{k}"] for k in ("miou", "miou_all", "foreground_miou")], mious(tables[fixed]))
    close([figures["cam_best_miou"], figures["cam_best_threshold"]], [curve.max(), thresholds[curve.argmax()]])
    close(figures["cam_gap"], curve.max() - curve[fixed])
    sweep = np.delete(np.arange(101), fixed)
    area = sum(
        (curve[a] + curve[b]) / 2 * (float(thresholds[b]) - float(thresholds[a])) for a, b in itertools.pairwise(sweep)
    )
    close(figures["cam_area_under_curve"], area / float(thresholds[sweep[-1]]))
    best, at = -1.0, 0.0
    for i in sweep[:60]:  # the released sweep, as the recording prints it
        if curve_all[i] <= best:
            break
        best, at = curve_all[i], thresholds[i]
    close([figures["cam_first_drop_miou"], figures["cam_first_drop_threshold"]], [best, at])
    # thresholds without masks
    shown = {c for _, label, *_ in images for c in np.flatnonzero(label[0])}
    by_otsu = np.full(classes, 2.0, np.float32)
    for c in shown:
        by_otsu[c] = otsu_of(largest(images, c), thresholds)
    told = metric.tables(tuple(map(str, range(classes))))
    assert {int(c): t for c, t in told["otsu_thresholds"].items() if t is not None} == {
        int(c): float(by_otsu[c]) for c in shown if len(largest(images, c))
    }
    close(figures["cam_otsu_miou"], mious(of(by_otsu))[0])
    close(figures["cam_otsu_gap"], curve.max() - mious(of(by_otsu))[0])
    values = np.concatenate([largest(images, c) for c in shown])
    shares = np.array([(values > threshold).mean() for threshold in thresholds])
    chosen = int(np.abs(shares - 0.3).round(12).argmin())
    close(figures["cam_area_prior_threshold"], thresholds[chosen])
    close(figures["cam_area_prior_miou"], curve[chosen])
    # as the protocol's own rule
    figures = exact(metric, "cam_miou", classes, Protocol(threshold="otsu"))
    close([figures["cam_miou"], figures["cam_fixed_miou"]], [mious(of(by_otsu))[0], curve[fixed]])


def test_maps_of_some_classes(images: Images) -> None:
    """Only the maps of the classes in the batch are given."""
    metric = CamIoU(images.classes, 0.355, images.ignored)
    for cam, label, mask, _ in images.tensors():
        shown = label.any(0).nonzero()[:, 0]
        if len(shown):
            metric.update(cam[:, shown], label[:, shown], mask, shown)
        else:
            metric.update(cam[:, :1], label[:, :1], mask, torch.tensor([0]))
    for ours, whole in zip(metric.counts(), cam_metric(images).counts(), strict=True):
        assert torch.equal(ours, whole)


def test_thresholds_are_looked_up_as_by_bucketize() -> None:
    rng = np.random.default_rng(0)
    for sweep in ([0.5], [0.0, 0.1, 0.1000001, 0.10001], list(rng.random(1000)), [-1.0, 0.0, 1.0]):
        metric = CamIoU(1, 0.3, sweep=sweep)
        value = torch.from_numpy(rng.random(5000)).float()
        value = torch.cat([value, metric.thresholds, metric.thresholds.nextafter(torch.tensor(2.0)), -value[:9]])
        assert torch.equal(metric.below(value), torch.bucketize(value, metric.thresholds))


def near(mask: np.ndarray, width: int, beyond: int | None) -> np.ndarray:
    """(H, W) whether another id is up to `width` rows and columns away; all outside of the image is `beyond`."""
    result = np.zeros(mask.shape, bool)
    for y, x in np.ndindex(mask.shape):
        for dy, dx in itertools.product(range(-width, width + 1), repeat=2):
            inside = 0 <= y + dy < mask.shape[0] and 0 <= x + dx < mask.shape[1]
            other = mask[y + dy, x + dx] if inside else beyond
            result[y, x] |= other is not None and other != mask[y, x]
    return result


@pytest.mark.parametrize("ratio_", [0.02, 0.15])
def test_boundary(images: Images, ratio_: float) -> None:
    metric, ids = BoundaryIoU(images.classes + 1, ratio_, images.ignored), images.classes + 1
    counts, width = np.zeros((ids, 3), int), max(1, round(ratio_ * 15))  # 9 x 12 has a diagonal of 15
    for _, _, mask, prediction in images:
        metric.update(torch.from_numpy(prediction), torch.from_numpy(mask))
        truth, found = mask[0].copy(), prediction[0].copy()
        found[(found == images.ignored) | (truth == images.ignored)] = -1
        truth[truth == images.ignored] = -1
        band_truth, band_found = (near(part, width, -2) for part in (truth, found))
        for i in range(ids):
            t, p = (truth == i) & band_truth, (found == i) & band_found
            counts[i] += [(t & p).sum(), p.sum(), t.sum()]
    close(metric.compute(), mious(list(map(tuple, counts)))[0])


def test_trimap(images: Images) -> None:
    metric, pairs = TrimapIoU(images.classes + 1, 2, images.ignored), []
    for _, _, mask, prediction in images:
        metric.update(torch.from_numpy(prediction), torch.from_numpy(mask))
        pairs.append((prediction, np.where(near(mask[0], 2, None)[None], mask, images.ignored)))
    close(metric.compute(), mious(counted(pairs, images.classes + 1, images.ignored))[0])
    assert exact(metric, "trimap_miou", images.classes).keys() == {"trimap_miou"}


def test_sizes(images: Images) -> None:
    metric, sums = SizeIoU(images.classes, images.ignored), np.zeros((3, images.classes, 3), int)
    for _, _, mask, prediction in images:
        scattered = mask.copy()
        scattered[0, 4] = np.where(scattered[0, 4] > 0, 0, scattered[0, 4])
        scattered[0, 4, 5] = images.classes  # a small object
        metric.update(torch.from_numpy(prediction), torch.from_numpy(scattered))
        counts = counted([(prediction, scattered)], images.classes + 1, images.ignored)
        total = (scattered != images.ignored).sum()
        for c, row in enumerate(counts[1:]):
            if row[2]:
                group = 0 if row[2] / total < 0.01 else 1 if row[2] / total < 0.1 else 2
                sums[group, c] += row
    expected = [mean([ratio(h, p + t - h) for h, p, t in group if t]) for group in sums.tolist()]
    close(metric.compute(), expected)
    close([*exact(metric, "cam_size_miou", images.classes).values()], expected)
    assert list(exact(metric, "cam_size_miou", 1)) == ["cam_small_miou", "cam_medium_miou", "cam_large_miou"]


def test_cooccurrence(images: Images) -> None:
    metric, (confused, pixels) = Cooccurrence(images.classes, images.ignored), (np.zeros(2, int), {})
    shares: dict[tuple[int, int], np.ndarray] = {}
    for _, label, mask, prediction in images:
        metric.update(torch.from_numpy(prediction), torch.from_numpy(mask), torch.from_numpy(label))
        shown = [c + 1 for c in np.flatnonzero(label[0])]
        for a, b in itertools.product([0, *shown], shown):
            if a != b:
                true = mask == a
                shares[a, b] = shares.get((a, b), 0) + np.array([(true & (prediction == b)).sum(), true.sum()])
        if len(shown) > 1:
            for a in shown:
                wrong = np.isin(prediction, [b for b in shown if b != a])
                confused += [((mask == a) & wrong).sum(), (mask == a).sum()]
    close(metric.compute(), ratio(*confused))
    table = metric.tables(tuple(map(str, range(images.classes))))["confused"]
    names = {"background": 0} | {str(c): c + 1 for c in range(images.classes)}
    told = {(names[a], names[b]): share for a, b, share in table}
    expected = {pair: h / n for pair, (h, n) in shares.items() if h}
    assert told.keys() == expected.keys()
    close([told[pair] for pair in expected], list(expected.values()))
    assert pixels == {}


def test_absent(images: Images) -> None:
    metric, (absent, found) = AbsentClasses(images.classes), (0, 0)
    for _, label, mask, _ in images:
        predicted = np.roll(mask, 1, axis=1)
        predicted[0, 0] = images.classes  # of the last class
        metric.update(torch.from_numpy(predicted), torch.from_numpy(label))
        for c in range(images.classes):
            count = int((predicted == c + 1).sum())
            found, absent = found + count, absent + (0 if label[0, c] else count)
    close(metric.compute(), ratio(absent, found))


def test_over_smoothing() -> None:
    rng = np.random.default_rng(0)
    metric, expected = OverSmoothing(2), np.zeros(2)
    for _ in range(3):
        blocks = rng.normal(size=(2, 2, 5, 4)).astype(np.float32) + 1
        metric.update([torch.from_numpy(tokens) for tokens in blocks])
        for number, images in enumerate(blocks.astype(float)):
            for tokens in images:
                pairs = [
                    a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                    for i, a in enumerate(tokens)
                    for j, b in enumerate(tokens)
                    if i != j
                ]
                expected[number] += np.mean(pairs) / 6
    close(metric.compute(), expected)
    close(exact(metric, "over_smoothing", 1)["over_smoothing"], expected[1])
    same = OverSmoothing(1)
    same.update([torch.ones(1, 3, 4)])
    close(same.compute(), [1.0])


@pytest.mark.parametrize("classes", [1, 5, 1000])
def test_classification(classes: int) -> None:
    rng = np.random.default_rng(classes)
    logits = rng.normal(size=(12, classes)).astype(np.float32).round(1)  # ties
    labels = (rng.random((12, classes)) < 0.3).astype(np.float32)
    labels[:, 2:4], labels[5] = 0, 0  # absent classes, and an image without any
    metrics: list[Measure] = [ClassificationMAP(), ImageMAP(), ClassificationF1(classes)]
    for part in (slice(0, 1), slice(1, 7), slice(7, 12)):
        for metric in metrics:
            metric.update(torch.from_numpy(logits[part]), torch.from_numpy(labels[part]))

    def precision(scores: np.ndarray, truth: np.ndarray) -> float:
        value = last = 0.0
        for threshold in np.unique(scores)[::-1]:
            kept = scores >= threshold
            value += (truth[kept].sum() / truth.sum() - last) * (truth[kept].sum() / kept.sum())
            last = truth[kept].sum() / truth.sum()
        return value

    def f1(predicted: np.ndarray, true: np.ndarray) -> float:
        return 2 * (predicted & true).sum() / max(1, predicted.sum() + true.sum())

    scores, truth = logits.astype(float), labels.astype(float)
    close(metrics[0].compute(), mean([precision(s, t) for s, t in zip(scores.T, truth.T, strict=True) if t.any()]))
    close(metrics[1].compute(), mean([precision(s, t) for s, t in zip(scores, truth, strict=True) if t.any()]))
    figures = exact(metrics[2], "f1", classes)
    close(figures["f1"], mean([f1(s > 0, t > 0) for s, t in zip(scores.T, truth.T, strict=True) if t.any()]))
    close(figures["image_f1"], mean([f1(s > 0, t > 0) for s, t in zip(scores, truth, strict=True)]))


# --- several processes ------------------------------------------------------------------------------------------------


def measured(images: Images, which: Sequence[int]) -> torch.nn.ModuleDict:
    """All metrics of some of the images."""
    metrics = evaluation(images.classes, ["cam"], 0.355)
    metrics.update(mask_details(images.classes))
    metrics["over_smoothing"] = OverSmoothing(1)
    for number in which:
        cam, label, mask, prediction = images.tensors()[number]
        inputs = {
            "absent": (prediction, label),
            "cooccurrence": (prediction, mask, label),
            "cam_miou": (cam, label, mask),
        }
        inputs |= dict.fromkeys(("map", "image_map", "f1"), (cam.mean((2, 3)) - 0.5, label))
        inputs["over_smoothing"] = ([cam.flatten(2)],)
        for key, metric in metrics.items():
            metric.update(*inputs.get(key, (prediction, mask)))
    return metrics


def results(metrics: torch.nn.ModuleDict) -> dict[str, Any]:
    names = ("a", "b", "c", "d")
    figures = figures_of(metrics, names, Protocol(area_prior=0.3))
    return {"figures": {k: float(v) for k, v in figures.items()}, "tables": tables_of(metrics, names)}


def one_process(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(results(measured(Images("all occur"), range(rank, 6, 2))), folder / f"{rank}.pt")
    torch.distributed.barrier()  # both have saved
    os._exit(0)  # gloo of torch 2.4 sometimes waits for ever when its group is taken down


def test_two_processes_are_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_process, (tmp_path,), nprocs=2)
    whole = results(measured(Images("all occur"), range(6)))
    for rank in range(2):
        part = torch.load(tmp_path / f"{rank}.pt")
        assert part["figures"].keys() == whole["figures"].keys()
        close(list(part["figures"].values()), list(whole["figures"].values()))
        assert part["tables"].keys() == whole["tables"].keys()
        close(part["tables"]["cam_miou"]["curve"], whole["tables"]["cam_miou"]["curve"])
        for key in ("miou", "cooccurrence"):
            assert sorted(part["tables"][key]["confused"]) == sorted(whole["tables"][key]["confused"])


def test_memory_is_constant() -> None:
    sizes = []
    for number in (1, 30):
        metrics = measured(Images("all occur"), [n % 6 for n in range(number)])
        held = {k: m.metric_state for k, m in metrics.items() if k != "map"}  # which keeps all scores, and says so
        sizes.append({k: [s.numel() for s in states.values()] for k, states in held.items()})
    assert sizes[0] == sizes[1]

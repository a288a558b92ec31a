"""Metrics against straightforward references."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wsss import InputError
from wsss.evaluation.classification import ClassificationMAP, ImageMAP
from wsss.evaluation.metrics import CamIoU, SegmentationIoU, evaluation, figures_of, tables_of
from wsss.evaluation.protocol import Measured, Protocol, extra_supervision, write_figures
from wsss.report.tables import print_figures


def iou_reference(predictions: np.ndarray, targets: np.ndarray, num_ids: int) -> list[float]:
    """IoU per id over all pixels of all images; NaN where an id never occurs."""
    predictions, targets = predictions[targets != 255], targets[targets != 255]
    values = []
    for i in range(num_ids):
        union = np.count_nonzero((predictions == i) | (targets == i))
        values.append(np.count_nonzero((predictions == i) & (targets == i)) / union if union else np.nan)
    return values


@pytest.mark.parametrize(
    ("predicted", "true"),
    [
        ((0, 1, 2, 3), (0, 1, 2, 3, 255)),
        ((0, 1, 2, 255), (0, 1, 3, 255)),  # predictions of no class, classes that occur on one side only
        ((0,), (1,)),
        ((255,), (0, 1)),
        ((0, 1), (0, 1)),
    ],
)
def test_iou_reference(predicted: tuple[int, ...], true: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    predictions, targets = rng.choice(predicted, (6, 7, 5)), rng.choice(true, (6, 7, 5))
    metric = SegmentationIoU(4)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):  # the split into batches makes no difference
        metric.update(torch.from_numpy(predictions[part]), torch.from_numpy(targets[part]))
    expected = iou_reference(predictions, targets, 4)
    np.testing.assert_allclose(metric.iou().numpy(), expected, rtol=1e-12)
    occurring = [i for i in range(4) if (targets == i).any()]
    assert metric.compute().item() == pytest.approx(np.mean([expected[i] for i in occurring]), rel=1e-12)


def test_iou_of_small_integers() -> None:
    mask = torch.tensor([[0, 200, 255]], dtype=torch.uint8)
    metric = SegmentationIoU(201)
    metric.update(mask, mask)
    assert metric.compute() == 1
    assert metric.iou()[[0, 200]].tolist() == [1, 1]


def test_iou_before_any_target_is_nan() -> None:
    metric = SegmentationIoU(3)
    metric.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), 255))
    assert metric.iou().isnan().all()
    assert metric.compute().isnan()


def test_figures_name_every_class() -> None:
    metrics = evaluation(2, ["cam"], 0.5)
    ids = torch.tensor([[[0, 2], [2, 255]]])
    metrics["miou"].update(ids, ids)
    cam = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]], [[0.1, 0.7], [0.3, 0.0]]]])
    metrics["cam_miou"].update(cam, torch.tensor([[0.0, 1.0]]), ids)
    figures = {key: float(value) for key, value in figures_of(metrics, ("cat", "dog")).items()}
    area = (0.09 / 3 + 0.19 + 0.39 / 2 + 0.29 / 6) + 0.01 * (1 / 3 + 2 * 1 + 2 * 0.5 + 1 / 6) / 2  # levels, and falls
    assert figures == pytest.approx(
        {
            "iou/background": 1,
            "iou/cat": float("nan"),  # nowhere
            "iou/dog": 1,
            "miou": 1,
            "miou_all": 2 / 3,
            "foreground_miou": 1,
            "pixel_accuracy": 1,
            "cam_miou": 0.5,  # one pixel of three is taken for background
            "cam_miou_all": 1 / 3,
            "cam_foreground_miou": 0.5,
            "cam_gap": 0.5,
            "cam_otsu_miou": 0.5,  # three values of four on one side, of which the mask ignores one
            "cam_otsu_gap": 0.5,
            "cam_best_miou": 1,
            "cam_best_threshold": 0.1,
            "cam_first_drop_miou": 2 / 9,  # nothing improves between 0 and 0.1
            "cam_first_drop_threshold": 0,
            "cam_area_under_curve": area / 0.99,
        },
        nan_ok=True,
    )
    assert set(tables_of(metrics, ("cat", "dog"))) == {"miou", "cam_miou"}


def test_cam_iou_is_that_of_every_threshold() -> None:
    rng = np.random.default_rng(1)
    target = torch.from_numpy(rng.integers(0, 4, (3, 2, 5, 7)))
    target[:, :, 0] = 255
    cam = torch.from_numpy(rng.integers(0, 101, (3, 2, 3, 5, 7)) / 100).float()  # ties, and values on thresholds
    label = torch.tensor([[[1.0, 0, 1], [0, 0, 1]], [[0, 0, 0], [1, 1, 1]], [[0, 1, 0], [1, 0, 0]]])
    metric = CamIoU(3, 0.395)
    for values in zip(cam, label, target, strict=True):
        metric.update(*values)
    curve = metric.curve()
    for threshold, miou in zip(metric.thresholds.tolist(), curve.tolist(), strict=True):
        reference = SegmentationIoU(4)
        for values, labels, ids in zip(cam, label, target, strict=True):
            value, index = (values * labels[:, :, None, None]).max(1)
            reference.update(torch.where(value > torch.tensor(threshold), index + 1, 0), ids)
        assert miou == pytest.approx(reference.compute().item(), abs=1e-12)
    assert len(curve) == 101
    assert metric.compute() == curve[40]
    best, threshold = metric.best()
    assert curve[metric.thresholds == threshold] == best == curve.max()


def dense_counts(
    metric: CamIoU, cam: torch.Tensor, label: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What `CamIoU.counts` gives, from a whole confusion matrix at each threshold."""
    value, index = cam.masked_fill(label[:, :, None, None] == 0, -torch.inf).max(1)
    tables = torch.zeros(len(metric.thresholds), metric.num_ids, metric.num_ids, dtype=torch.long)
    for table, threshold in zip(tables, metric.thresholds, strict=True):
        predicted = torch.where(value > threshold, index + 1, 0)[target != 255]
        table.view(-1).add_(torch.bincount(target[target != 255] * len(table) + predicted, minlength=table.numel()))
    return tables.diagonal(dim1=1, dim2=2), tables.sum(1), tables.sum(2)


@pytest.mark.parametrize("threshold", [0.4, 0.395, -1.0])
@pytest.mark.parametrize("classes", [1, 4, 254])
def test_cam_iou_counts_as_confusion_matrices_do(classes: int, threshold: float) -> None:
    rng = np.random.default_rng(classes)
    metrics = [CamIoU(classes, threshold) for _ in range(2)]
    shown = rng.choice(classes, min(classes, 3), replace=False)  # the others never occur
    images = []
    for number in range(6):
        cam = torch.from_numpy(rng.integers(0, 101, (2, classes, 5, 7)) / 100).float()  # ties, values on thresholds
        label = torch.zeros(2, classes)
        if number:  # else without any
            label[torch.tensor([[0], [1]]), torch.from_numpy(shown[: number % 3 + 1])] = 1
        target = torch.from_numpy(rng.choice([0, 255, *(shown + 1)], (2, 5, 7)))
        metrics[number % 2].update(cam, label, target)
        images.append((cam, label, target))
    whole = CamIoU(classes, threshold)  # maps that are smaller than their masks are enlarged
    whole.update(cam, label, target.repeat_interleave(3, 1).repeat_interleave(2, 2))
    single = CamIoU(classes, threshold)
    single.update(cam, label, target)
    assert torch.equal(torch.stack(whole.counts()), 6 * torch.stack(single.counts()))
    cams, labels, targets = (torch.cat(parts) for parts in zip(*images, strict=True))
    one, other = metrics
    for name, reduce in one._reductions.items():  # as two processes do
        setattr(one, name, reduce(torch.stack([getattr(one, name), getattr(other, name)])))
    hits, predicted, true = one.counts()
    for ours, dense in zip((hits, predicted, true), dense_counts(one, cams, labels, targets), strict=True):
        assert torch.equal(ours, dense)
    occurring = true[0] > 0
    expected = (hits.double() / (predicted + true - hits))[:, occurring].mean(1)
    assert torch.equal(one.curve(), expected)


def test_cam_iou_of_many_classes_is_small() -> None:
    states = CamIoU(5000, 0.4).metric_state
    assert sum(state.numel() for state in states.values()) < 102 * 4 * 5001 * 1.01


def test_image_map_is_the_mean_over_labelled_images() -> None:
    rng = np.random.default_rng(2)
    scores, labels = rng.normal(size=(6, 5)), (rng.random((6, 5)) < 0.4).astype(float)
    labels[2] = 0
    metric = ImageMAP()
    for part in (slice(0, 3), slice(3, 6)):
        metric.update(torch.from_numpy(scores[part]), torch.from_numpy(labels[part]))
    expected = [average_precision(s, t) for s, t in zip(scores, labels, strict=True) if t.any()]
    assert metric.compute().item() == pytest.approx(np.mean(expected), abs=1e-12)
    metric.reset()
    metric.update(torch.zeros(1, 5), torch.zeros(1, 5))
    assert not metric.update_called or metric.compute().isnan()


def average_precision(score: np.ndarray, label: np.ndarray) -> float:
    """Sum over distinct thresholds of (recall step) * precision, in float64."""
    value, recall = 0.0, 0.0
    for threshold in np.unique(score)[::-1]:
        kept = score >= threshold
        hits = label[kept].sum()
        value += (hits / label.sum() - recall) * hits / kept.sum()
        recall = hits / label.sum()
    return float(value)


def test_map_reference() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 5)).astype(np.float32).round(1)  # with ties
    label = (rng.random((40, 5)) < 0.3).astype(np.float32)
    label[:, 3] = 0  # a class that no image has
    metric = ClassificationMAP()
    for part in np.array_split(np.arange(40), 7):
        metric.update(torch.from_numpy(logits[part]), torch.from_numpy(label[part]))
    expected = np.mean([average_precision(logits[:, c], label[:, c].astype(float)) for c in range(5) if c != 3])
    assert metric.compute().item() == pytest.approx(expected, abs=1e-12)


def test_map_reference_is_sklearns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    score, label = rng.random(30).round(1), rng.random(30) < 0.4
    assert average_precision(score, label) == pytest.approx(metrics.average_precision_score(label, score))


def test_map_ranks_confident_logits() -> None:
    metric = ClassificationMAP()
    metric.update(torch.tensor([[30.0], [20.0], [25.0]]), torch.tensor([[1.0], [0.0], [0.0]]))
    assert metric.compute() == 1  # a float32 sigmoid makes all three equal


def test_map_without_any_label_is_nan() -> None:
    metric = ClassificationMAP()
    metric.update(torch.randn(3, 2), torch.zeros(3, 2))
    assert metric.compute().isnan()


def figures_of_all() -> dict[str, float]:
    """Every figure there is."""
    metrics, ids = evaluation(1, ["cam", "aux_cam"], 0.5), torch.zeros(1, 2, 2, dtype=torch.long)
    for key, metric in metrics.items():
        logits, label = torch.zeros(1, 1), torch.ones(1, 1)
        inputs = {"miou": (ids, ids)} | dict.fromkeys(("map", "image_map", "f1"), (logits, label))
        metric.update(*inputs.get(key, (torch.zeros(1, 1, 2, 2), label, ids)))
    return figures_of(metrics, ("cat",))


def test_protocol_is_said() -> None:
    on = Measured("val, 4 images", ("CLIP",), "best by val/map")
    notes = Protocol().describe(on, (1.0, 0.5), 0.45, ("cam", "aux_cam"))
    unsaid = {key for key in figures_of_all() if key not in notes}
    assert all(key.startswith("iou/") or key.endswith(("threshold", "gap")) for key in unsaid)
    assert "chosen with these masks" in str(notes["cam_best_miou"])
    said = "val, 4 images, extra supervision CLIP, checkpoint best by val/map"
    assert str(notes["miou"]) == f"{said}, single scale, image size, no image labels, no CRF"
    maps = "scales 1, 0.5 with flip, image size, true image labels, no CRF, threshold 0.45"
    assert str(notes["cam_miou"]) == f"{said}, {maps}"
    other = Protocol(size=448, image_labels="predicted").describe(Measured("test"), (1.0,), 0.5)
    assert "resized to 448x448, no" in str(other["miou"])
    cut = Protocol(segmentation_labels="true").describe(Measured("val"), (1.0,), 0.5)
    assert "single scale, image size, true image labels, no CRF" in str(cut["miou"])
    reduced = Protocol(max_side=1024).describe(Measured("val", checkpoint_rule="last"), (1.0,), 0.5)
    known = "val, no extra supervision known, last checkpoint"
    assert str(reduced["miou"]) == f"{known}, single scale, image size, reduced to 1024, no image labels, no CRF"
    assert all("image size, reduced to 1024" in str(note) for note in reduced.values())
    both = Protocol(max_side=1024, size=448).describe(Measured("val"), (1.0,), 0.5)
    assert "resized to 448x448 from at most 1024," in str(both["map"])
    assert "predicted image labels" in str(other["cam_miou"])


def test_how_a_figure_was_measured_in_fields() -> None:
    """What the sentence says can be looked up, and which figures were given labels or masks."""
    protocol = Protocol(
        threshold="otsu", area_prior=0.3, scales=(1.0, 0.5), flip="sum", fusion="sum", softmax="before", crf={"a": 1}
    )
    notes = protocol.describe(Measured("val", ("SAM",), "last"), (1.0,), 0.4)
    assert notes["miou"] == Measured(
        "val", ("SAM",), "last", (1.0, 0.5), "sum", "sum of probabilities", crf={"a": 1}, labels_at_test="none"
    )
    assert "scales 1, 0.5 (sum of probabilities) with flip (sum)" in str(notes["miou"])
    cams = {key: note for key, note in notes.items() if key.startswith("cam_")}
    assert {key for key, note in cams.items() if note.labels_at_test != "true"} == {"cam_absent"}
    assert {key for key, note in notes.items() if note.labels_at_test == "true"} == cams.keys() - {"cam_absent"}
    rules = {key: (note.threshold_rule, note.threshold) for key, note in cams.items() if key.endswith("_miou")}
    expected = {"fixed": 0.4, "otsu": None, "area_prior": 0.3, "best": None, "first_drop": None}
    for key, figure in (("cam_miou", "otsu"), ("cam_foreground_miou", "otsu"), ("cam_fixed_miou", "fixed")):
        assert rules[key] == (figure, expected[figure])
    for rule in ("area_prior", "best", "first_drop"):
        assert rules[f"cam_{rule}_miou"] == (rule, expected[rule])
    assert notes["cam_area_under_curve"].threshold_rule == "every"
    assert all(note.threshold_rule is None for key, note in notes.items() if key not in cams)
    seen = Protocol(window=480, stride=320).describe(Measured("val"), (1.0,), 0.5)
    assert "image size, windows of 480 pixels every 320, no image labels" in str(seen["miou"])
    assert "windows" not in str(seen["cam_miou"])
    alone = Protocol(threshold="best").describe(Measured("val"), (1.0,), -1.0)
    assert alone["cam_miou"].threshold_rule == alone["cam_best_miou"].threshold_rule == "no background"


def test_figures_are_written_with_fields_and_sentences(tmp_path: Path) -> None:
    note = Measured("val", ("CLIP", "SAM"), crf={"iterations": 3})
    write_figures(tmp_path, {"a": 0.5, "steps": 3}, {"a": note, "b": note})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 0.5, "steps": 3, "protocol/a": str(note)}
    tags = json.loads((tmp_path / "tags.json").read_text())
    assert tags.keys() == {"a"}
    assert tags["a"]["extra_supervision"] == ["CLIP", "SAM"]
    assert tags["a"]["crf"] == {"iterations": 3}
    assert str(Measured(**tags["a"])) == str(note)  # which a report makes of them


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 0},
        {"size": -3},
        {"max_side": 0},
        {"window": 0, "stride": 1},
        {"window": 480},
        {"stride": 320},
        {"stride": 30, "window": 480},
        {"stride": 500, "window": 480},
        {"image_labels": "none"},
        {"segmentation_labels": "predicted"},
    ],
)
def test_protocol_refuses(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        Protocol(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"threshold": "guessed"}, "fixed or otsu or area_prior or best"),
        ({"threshold": "area_prior"}, "area_prior is not set"),
        ({"area_prior": 1.5}, "between 0 and 1"),
        ({"extras": {"sizes": [1]}}, "protocol.extras.sizes does not exist"),
        ({"extras": {"flip": "up"}}, "protocol.flip is 'up'"),
    ],
)
def test_protocol_refuses_rules_and_extras(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Protocol(**arguments)


def test_protocol_with_extras_has_three_steps() -> None:
    crf = {"iterations": 3}
    protocol = Protocol(max_side=99, extras={"scales": [1.0, 0.5], "flip": "max", "crf": crf})
    steps = protocol.steps()
    assert list(steps) == ["", "multiscale_", "crf_"]
    assert steps[""] == Protocol(max_side=99)
    assert steps["multiscale_"] == Protocol(max_side=99, scales=[1.0, 0.5], flip="max")
    assert steps["crf_"] == Protocol(max_side=99, scales=[1.0, 0.5], flip="max", crf=crf)
    assert list(Protocol(extras={"crf": crf}).steps()) == ["", "crf_"]
    notes = protocol.describe(Measured("val"), (1.0,), 0.5)
    assert "single scale" in str(notes["miou"])
    said = "scales 1, 0.5 (max) with flip (max), image size, reduced to 99, no image labels, no CRF"
    assert said in str(notes["multiscale_miou"])
    assert "CRF iterations 3" in str(notes["crf_miou_all"])
    assert protocol.smallest_scale == 0.5


def test_extra_supervision_is_told_by_the_names_of_weights() -> None:
    told = ["all tensors of timm weights vit_base_patch16_224.orig_in21k_ft_in1k", "x of vit_base_patch16_clip.openai"]
    assert extra_supervision(told) == ("ImageNet-21k", "CLIP")
    assert extra_supervision(["timm weights deit_small.fb_in1k"]) == ()
    assert "extra supervision ImageNet-21k and CLIP" in str(Measured("val", extra_supervision(told)))


def test_table_of_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """What all figures share stands once, rules beside what the masks would have added, true labels in red."""
    maps = Measured("val", labels_at_test="true", threshold_rule="fixed", threshold=0.4)
    notes = {"a_miou": maps, "a_miou_all": replace(maps, definition="all ids"), "b": Measured("val")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "120")
        patch.setenv("FORCE_COLOR", "1")
        print_figures({"a_miou": 0.5, "a_gap": 0.125, "a_miou_all": 0.25, "b": 0.75, "steps": 3}, notes, "title")
    coloured = capsys.readouterr().out
    assert "\x1b[1;31mtrue image labels" in coloured
    assert "\x1b[1;31mas above" in coloured
    printed = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert "+0.1250" in printed
    assert "a_gap" not in printed
    assert "as above, all ids" in printed
    shared = "all on val, no extra supervision known, checkpoint not known, single scale, image size, no CRF"
    assert shared in " ".join(printed.split())
    assert printed.count("image size") == 1
    figures = {"val/miou": 0.5, "val/multiscale_miou": 0.625, "val/crf_miou": 0.6875, "val/iou/a": 0.1}
    protocol = Protocol(extras={"scales": [1.0, 0.5], "crf": {"iterations": 3}})
    notes = {f"val/{key}": note for key, note in protocol.describe(Measured("val"), (1.0,), 0.5).items()}
    print_figures(figures | {"val/crf_iou/a": 0.2}, notes, "title")
    lines = capsys.readouterr().out.splitlines()
    assert any(all(word in line for word in ("val/miou", "0.5000", "0.6250", "0.6875")) for line in lines)
    assert any("val/iou/a" in line and "0.2000" in line for line in lines)
    assert not any("multiscale_" in line or "crf_" in line for line in lines)
    assert re.search(r"\+ CRF: .*CRF iterations 3", " ".join(" ".join(lines).split()))


@pytest.mark.parametrize("key", ["image_labels", "segmentation_labels"])
def test_true_as_a_command_line_reads_it(key: str) -> None:
    arguments: list[dict[str, Any]] = [{key: value} for value in (True, "true", False)]
    assert Protocol(**arguments[0]) == Protocol(**arguments[1])
    with pytest.raises(InputError, match=f"protocol.{key} is False"):
        Protocol(**arguments[2])

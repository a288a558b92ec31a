"""CoSA: what teaches whom, its teacher, its warm-up, what it computes and refuses."""

import math
from typing import Any

import pytest
import torch
from kill import compare, settings
from test_resume import interrupted
from tiny import COSA, COSA_OVERRIDES, Ended, call
from torch import Tensor

from wsss import InputError
from wsss.cam import resize, with_background
from wsss.evaluation.protocol import Protocol
from wsss.losses import build as build_loss
from wsss.methods.cosa import CoSA
from wsss.refine.thresholds import mixture_thresholds

KEYS = ("cls", "aux_cls", "seg", "swap_cam", "dense_energy")


def build(**arguments: Any) -> CoSA:
    torch.manual_seed(0)
    method = CoSA(3, **{**COSA, "loss_warmup_steps": -1, **arguments})
    method.log = method.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return method


@pytest.fixture
def batch() -> dict[str, Any]:
    torch.manual_seed(1)
    image, strong = torch.randn(2, 3, 3, 32, 32)
    label = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])
    box = torch.tensor([[0, 32, 0, 32], [8, 32, 0, 24], [0, 32, 0, 32]])
    return {"image": image, "strong_view": strong, "label": label, "image_box": box}


def only(*keys: str) -> dict[str, Any]:
    return {"losses": {key: {"weight": 1.0} if key in keys else None for key in KEYS}}


@pytest.mark.parametrize(
    ("key", "reached"),
    [
        ("cls", {"encoder", "classifier"}),
        ("aux_cls", {"encoder", "aux_classifier"}),
        ("seg", {"encoder", "decoder"}),
        ("swap_cam", {"encoder", "classifier"}),
        ("dense_energy", {"encoder", "decoder"}),
    ],
)
def test_gradients_reach_what_they_should(batch: dict[str, Any], key: str, reached: set[str]) -> None:
    method = build(**only(key))
    assert torch.isfinite(method.training_step(batch, 0)["loss"]).all()
    method.training_step(batch, 0)["loss"].backward()
    found = {n.split(".")[1] for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert found == reached
    assert all(p.grad is None for p in method.teacher.parameters())


def test_warmup_multiplies_by_zero_or_leaves_out(batch: dict[str, Any]) -> None:
    """The first steps are plain classification, whatever becomes of the other terms."""
    plain, zero, null = (
        build(loss_warmup_steps=5, **more)
        for more in (
            only("cls", "aux_cls"),
            {"losses": {key: {"weight": 1.0} for key in KEYS}},
            {"losses": {key: {"weight": 1.0} for key in KEYS}, "warmup_weights": dict.fromkeys(KEYS[2:])},
        )
    )
    results = [method.training_step(batch, 0) for method in (plain, zero, null)]
    assert [tuple(result["terms"]) for result in results] == [KEYS[:2], KEYS, KEYS[:2]]
    for result in results:
        torch.testing.assert_close(result["loss"], results[0]["loss"])
        result["loss"].backward()
    for own, other in zip(plain.student.encoder.parameters(), zero.student.encoder.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    assert all(p.grad is not None and (p.grad == 0).all() for p in zero.student.decoder.parameters())
    assert all(p.grad is None for p in null.student.decoder.parameters())
    assert zero.weights_at(5)["seg"] == 0
    assert zero.weights_at(6)["seg"] == 1
    assert null.loss_starts == {"cls": 0, "aux_cls": 0, "seg": 6, "swap_cam": 6, "dense_energy": 6}


def test_the_teacher_is_an_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """After k steps a share m^k of what it was is left, of all parameters, frozen ones among them."""
    method = build(ema_momentum=0.8)
    before = [p.clone() for p in method.teacher.parameters()]
    monkeypatch.setattr("pytorch_lightning.LightningModule.optimizer_step", lambda self, *args, **kwargs: None)
    for _ in range(3):
        method.optimizer_step(0, 0, None)
    for old, new, student in zip(before, method.teacher.parameters(), method.student.parameters(), strict=True):
        torch.testing.assert_close(new, 0.8**3 * old + (1 - 0.8**3) * student)
    assert any((old != student).any() for old, student in zip(before, method.student.parameters(), strict=True))
    copied = build(copy_teacher=True)
    for teacher, student in zip(copied.teacher.parameters(), copied.student.parameters(), strict=True):
        assert torch.equal(teacher, student)
        assert not teacher.requires_grad
    assert not copied.train().teacher.training
    assert copied.student.training
    assert copied.transformer is copied.teacher.encoder.vit  # whose tokens an evaluation measures


def test_assignments_against_a_plain_computation(batch: dict[str, Any]) -> None:
    image = batch["image"]
    for released in (False, True):
        method = build(cam_scales=(1.0, 0.5, 1.5), released_behaviour=released).eval()
        sums: dict[str, list[Tensor]] = {"cam": [], "aux_cam": [], "seg": []}
        for size in (32, 16, 48):
            view = resize(image, (size, size))
            plain, mirrored = method.teacher(view), method.teacher(view.flip(-1))
            for key, found in sums.items():
                pair = [resize(plain[key], (32, 32)), resize(mirrored[key], (32, 32)).flip(-1)]
                found.append(pair[0] + pair[1] if key == "seg" else torch.stack(pair).amax(0).clamp(min=0))
        expected = []
        for key in ("cam", "aux_cam"):
            total = sums[key][-1] if released and key == "aux_cam" else torch.stack(sums[key]).sum(0)
            total = total - total.flatten(2).min(-1).values[..., None, None]
            expected.append(total / (total.flatten(2).max(-1).values[..., None, None] + 1e-5))
        cam, aux_cam, seg = method.assign(image)
        torch.testing.assert_close(cam, expected[0])
        torch.testing.assert_close(aux_cam, expected[1])
        torch.testing.assert_close(seg, torch.stack(sums["seg"]).sum(0))


def test_targets_know_the_labels_alone(batch: dict[str, Any]) -> None:
    method = build()
    found = method.probabilities(torch.randn(3, 4, 8, 8), batch["label"])
    torch.testing.assert_close(found.sum(1), torch.ones(3, 8, 8))
    assert (found[with_background(batch["label"]) == 0] == 0).all()
    assert (found[2, 0] == 1).all()
    pseudo = method.pseudo_label(batch["image"], torch.rand(3, 3, 32, 32), batch["label"], batch["image_box"])
    assert (pseudo[2] == 0).all()
    assert set(pseudo[1].unique().tolist()) <= {0, 2, 255}
    assert (pseudo[1, :8] == 255).all()
    method.without_background()
    assert (method.probabilities(torch.randn(2, 4, 8, 8), batch["label"][:2])[:, 0] == 0).all()
    assert (method.pseudo_label(batch["image"], torch.rand(3, 3, 32, 32), batch["label"]) != 0).all()


@pytest.mark.parametrize("form", ["relu", "min_max", "ids"])
def test_swap_cam_against_its_formula(form: str) -> None:
    torch.manual_seed(0)
    cam = torch.randn(2, 2, 3, 4, dtype=torch.double, requires_grad=True)
    target = torch.randn(2, 3, 6, 8, dtype=torch.double).softmax(1)
    found = build_loss("swap_cam", form=form, certainty=0.4)(cam, target)
    c = cam.clamp(min=0)
    if form != "relu":
        c = c - c.amin((2, 3), keepdim=True)
        c = c / (c.amax((2, 3), keepdim=True) + 1e-4)
    if form == "ids":
        logits = resize(torch.cat([1 - c.amax(1, keepdim=True), c], 1), (6, 8)).log_softmax(1)
        sums: dict[bool, list[Tensor]] = {False: [], True: []}
        for image, row, column in ((i, y, x) for i in range(2) for y in range(6) for x in range(8)):
            certainty, k = target[image, :, row, column].max(0)
            if certainty > 0.4:
                sums[bool(k > 0)].append(-logits[image, k, row, column])
        expected = sum(0.5 * torch.stack(values).mean() for values in sums.values())
    else:
        t = resize(target[:, 1:], (3, 4))
        expected = -(t * c.sigmoid().log() + (1 - t) * (-c).sigmoid().log()).mean()
    torch.testing.assert_close(found, expected)
    (gradient,), (reference,) = (torch.autograd.grad(value, cam, retain_graph=True) for value in (found, expected))
    torch.testing.assert_close(gradient, reference)
    assert (gradient[cam < 0] == 0).all()


def test_thresholds_of_a_mixture() -> None:
    torch.manual_seed(0)
    parts = [0.1 + 0.01 * torch.randn(200), 0.5 + 0.01 * torch.randn(200), 0.9 + 0.01 * torch.randn(200)]
    low, high = mixture_thresholds(torch.cat(parts), tolerance=1e-6)
    assert (low, high) == pytest.approx((parts[0].max().item(), parts[2].min().item()))
    assert mixture_thresholds(torch.empty(0)) == (0.0, 1.0)
    assert all(math.isfinite(value) for value in mixture_thresholds(torch.full((5,), 0.3)))


def test_dynamic_thresholds_follow_the_values(batch: dict[str, Any]) -> None:
    """Against a plain computation in double precision; main and auxiliary CAM apart, two batches remembered."""
    given = {"batches": 2, "least": 0.05, "momentum": 0.9}
    method, still = build(dynamic_thresholds=given), build()
    expected = {"cam": [0.25, 0.7], "aux_cam": [0.25, 0.7]}
    seen: dict[str, list[Tensor]] = {"cam": [], "aux_cam": []}
    for _ in range(3):
        image = torch.randn(3, 3, 32, 32)
        maps = dict(zip(("cam", "aux_cam", "seg"), method.assign(image), strict=True))
        for name, bounds in expected.items():
            cells = resize(maps[name].double() * batch["label"][:, :, None, None], (4, 4)).amax(1).flatten()
            seen[name].append(cells[cells > 0.05])
            found = mixture_thresholds(torch.cat(seen[name][-2:]))
            expected[name] = [0.9 * old + 0.1 * new for old, new in zip(bounds, found, strict=True)]
        loss = method.training_step(batch | {"image": image}, 0)["loss"]
        assert method.dynamic is not None
        for name, bounds in expected.items():
            assert method.dynamic[name].bounds.tolist() == pytest.approx(bounds, abs=1e-6)
        assert loss != still.training_step(batch | {"image": image}, 0)["loss"]  # of labels that they have made
    assert expected["cam"] != expected["aux_cam"]
    state, other = method.state_dict(), build(dynamic_thresholds={})
    assert {"dynamic.cam.bounds", "dynamic.aux_cam.bounds"} == state.keys() - still.state_dict().keys()
    checkpoint: dict[str, Any] = {}
    method.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert other.dynamic is not None
    assert [len(values) for values in other.dynamic["cam"].values] == [len(values) for values in seen["cam"][-2:]]


def test_dynamic_thresholds_are_resumed(tmp_path: Any) -> None:
    arguments = [*settings("cosa", steps=6, workers=0), "recipe=null", "method.dynamic_thresholds={batches: 3}"]
    assert call("train", *arguments, f"hydra.run.dir={tmp_path / 'a'}") == 0
    again = [*arguments, f"hydra.run.dir={tmp_path / 'b'}", "resume=auto"]
    for step in (3, 5):
        interrupted(*again, step=step, method="wsss.methods.cosa.CoSA")
    assert call("train", *again) == 0
    agreeing, different = compare(tmp_path / "a", tmp_path / "b")
    assert different == []
    assert agreeing > 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dynamic_thresholds": {"queue": 3}}, "dynamic_thresholds.queue does not exist: known are batches, least"),
        ({"dynamic_thresholds": {"batches": 0}}, "dynamic_thresholds.batches is 0: expected a whole number"),
        ({"dynamic_thresholds": {"least": "x"}}, "dynamic_thresholds.least is 'x': expected 0 to 1"),
        ({"low_threshold": 0.8}, "low_threshold=0.8 and high_threshold=0.7: expected 0 <= low <= high <= 1"),
        ({"aux_high_threshold": 0.1}, "aux_low_threshold=0.25 and aux_high_threshold=0.1"),
        ({"temperature": 0}, "temperature is 0: expected more than 0"),
        ({"ema_momentum": 1.5}, "ema_momentum is 1.5: expected the share of the teacher that stays, 0 to 1"),
        ({"warmup_weights": {"ptc": 0.0}}, "warmup_weights.ptc is 0.0: expected a number or null for one of cls"),
        ({"warmup_weights": {"seg": "no"}}, "warmup_weights.seg is no"),
        ({"losses": {"ptc": {}}}, "losses.ptc: CoSA does not compute it"),
        ({"losses": {"swap_cam": {"form": "max"}}}, "losses.swap_cam.form is 'max': expected relu, min_max or ids"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as refused:
        build(**arguments)
    assert said in str(refused.value)


def test_true_labels_rule_out_classes_where_the_protocol_says_so() -> None:
    method, image = build().eval(), torch.randn(2, 3, 40, 36)
    label = torch.tensor([[0.0, 1, 0], [0, 0, 0]])
    method.protocol = Protocol(size=32, scales=(1.0, 0.5), flip="sum", fusion="sum")
    seg = method.infer(image, cams=False)["seg"]
    (free,) = method.segment_steps(image, (40, 36), seg, label).values()
    torch.testing.assert_close(free, method.segment(image, (40, 36), seg))
    method.protocol = Protocol(size=32, scales=(1.0, 0.5), flip="sum", fusion="sum", segmentation_labels="true")
    (cut,) = method.segment_steps(image, (40, 36), seg, label).values()
    assert torch.equal(cut[0, [0, 2]], free[0, [0, 2]])
    assert set(cut[0].argmax(0).unique().tolist()) <= {0, 2}
    assert (cut[1].argmax(0) == 0).all()


def test_under_the_commands(command: Any, tmp_path: Any) -> None:
    """Trained, evaluated honestly and as the paper does, asked for pseudo masks and masks."""
    run, quiet = tmp_path / "run", ["trainer.accelerator=cpu", "data.num_workers=0", "data.eval_batch_size=2"]
    ended: Ended = command("train", "method=cosa", *COSA_OVERRIDES, f"hydra.run.dir={run}")
    assert ended.code == 0, ended.err
    checkpoint = f"checkpoint={run / 'checkpoints/last.ckpt'}"
    for protocol in ("honest", "paper"):
        ended = command(
            "eval", checkpoint, f"protocol={protocol}", "detail=true", *quiet, f"hydra.run.dir={tmp_path / protocol}"
        )
        assert ended.code == 0, ended.err
    assert command("label", checkpoint, "out=LABELS", "num_workers=0").code == 0
    ended = command("predict", checkpoint, "images=LABELS/masks", "out=MASKS", "num_workers=0")
    assert ended.code == 0, ended.err

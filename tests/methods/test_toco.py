"""ToCo's training step: which losses reach what, phases, what released behaviour changes."""

from typing import Any

import pytest
import torch
from tiny import METHOD

from wsss import InputError
from wsss.losses import LOSSES
from wsss.methods.toco import ToCo

KEYS = ("cls", "aux_cls", "ptc", "ctc", "seg", "dense_energy")


def build(**arguments: Any) -> ToCo:
    torch.manual_seed(0)
    method = ToCo(num_classes=3, **(METHOD | arguments))
    method.log = method.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return method


@pytest.fixture
def batch() -> dict[str, Any]:
    torch.manual_seed(1)
    image, second, third = torch.randn(3, 2, 3, 32, 32)
    label = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    box = torch.tensor([[0, 32, 0, 32], [8, 32, 0, 24]])
    return {"image": image, "global_view": second, "local_source": third, "label": label, "image_box": box}


def only(*keys: str) -> dict[str, Any]:
    return {"losses": {key: {"weight": 1.0} if key in keys else None for key in KEYS}}


def test_every_term_is_finite_and_summed(batch: dict[str, Any]) -> None:
    method = build()
    result = method.training_step(batch, 0)
    assert tuple(result["terms"]) == KEYS
    expected = sum(method.loss_weights[key] * term for key, term in result["terms"].items())
    torch.testing.assert_close(result["loss"].detach(), expected)
    assert torch.isfinite(result["loss"])


@pytest.mark.parametrize(
    ("key", "reached"),
    [
        ("cls", {"encoder", "classifier"}),
        ("aux_cls", {"encoder", "aux_classifier"}),
        ("ptc", {"encoder"}),
        ("ctc", {"encoder", "projector"}),
        ("seg", {"encoder", "decoder"}),
        ("dense_energy", {"encoder", "decoder"}),
    ],
)
def test_gradients_reach_what_they_should(batch: dict[str, Any], key: str, reached: set[str]) -> None:
    method = build(**only(key))
    method.training_step(batch, 0)["loss"].backward()
    found = {n.partition(".")[0] for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert found == reached


def test_weight_zero_multiplies_and_null_leaves_out(batch: dict[str, Any]) -> None:
    losses = only("cls")["losses"]
    zero = build(losses=losses | {"seg": {"weight": 0.0}})
    zero.training_step(batch, 0)["loss"].backward()
    assert all((p.grad == 0).all() for p in zero.decoder.parameters() if p.grad is not None)
    assert zero.decoder.conv8.weight.grad is not None
    null = build(losses=losses)
    null.training_step(batch, 0)["loss"].backward()
    assert null.decoder.conv8.weight.grad is None


def test_phases_end_after_their_step(batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    method = build(phases=[{"until": 3, "weights": {"seg": None, "ctc": 0.0}}])
    for step, keys in ((0, set(KEYS) - {"seg"}), (3, set(KEYS) - {"seg"}), (4, set(KEYS))):
        monkeypatch.setattr(ToCo, "global_step", step)
        assert set(method.training_step(batch, 0)["terms"]) == keys


def test_a_phase_can_take_the_auxiliary_cam(batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for source in ("cam", "aux_cam"):
        method = build(**only("seg"), phases=[{"until": 0, "weights": {}, "pseudo_label_from": source}])
        original = method.pseudo_label
        monkeypatch.setattr(method, "pseudo_label", lambda *a, f=original: seen.append(a[1]) or f(*a))
        method.training_step(batch, 0)
    assert not torch.equal(*seen)


def test_released_behaviour_takes_the_box_for_patch_indices(batch: dict[str, Any]) -> None:
    cam = torch.rand(2, 3, 32, 32)
    mended, released = (
        build(released_behaviour=flag).token_label(cam, batch["label"], batch["image_box"]) for flag in (False, True)
    )
    assert torch.equal(mended[0], released[0])  # a full box cuts nothing either way
    assert (mended[1] == 255)[0].all()  # rows 0 to 8 are padding: the first row of patches
    assert (mended[1] == 255)[:, 3].all()  # and the last column
    assert (released[1] == 255).all()  # pixel row 8 lies beyond all four rows of patches


def test_released_behaviour_truncates_colours(batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    for flag in (False, True):
        method = build(released_behaviour=flag)
        monkeypatch.setattr(method.par, "forward", lambda image, masks: seen.append(image) or masks)
        method.hparams.par_scale = 1.0
        method.pseudo_label(batch["image"].clamp(-1.5, 2), torch.rand(2, 3, 32, 32), batch["label"])
    assert 0 < (seen[0] - seen[1]).max() < 1 / 255 + 1e-6
    torch.testing.assert_close(seen[1] * 255, (seen[1] * 255).round())


def test_teacher_follows_the_projector() -> None:
    method = build(ema_momentum=0.75)
    start = [p.clone() for p in method.teacher_projector.parameters()]
    with torch.no_grad():
        for parameter in method.projector.parameters():
            parameter.add_(1)
    method.update_teacher()
    for before, teacher in zip(start, method.teacher_projector.parameters(), strict=True):
        torch.testing.assert_close(teacher, before + 0.25)
        assert not teacher.requires_grad


def test_images_without_labels_train(batch: dict[str, Any]) -> None:
    result = build().training_step(batch | {"label": torch.zeros(2, 3)}, 0)
    assert torch.isfinite(result["loss"])


def test_pseudo_labels_do_not_depend_on_the_room_for_classes(batch: dict[str, Any]) -> None:
    method, cam = build(), torch.rand(2, 3, 32, 32)
    few, many = (method.pseudo_label(batch["image"], cam, batch["label"], None, slots) for slots in (2, 3))
    assert torch.equal(few, many)
    present = {(0, 1, 3), (0, 2)}
    for image, ids in zip(few, sorted(present, key=len, reverse=True), strict=True):
        assert set(image.unique().tolist()) <= {*ids, 255}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"losses": {"rcm": {"weight": 1}}}, "rcm"),
        ({"low_threshold": 0.8}, "low_threshold"),
        ({"phases": [{"until": 1, "weights": {"rcm": 0}}]}, "rcm"),
        ({"phases": [{"until": 1, "weights": {}, "pseudo_label_from": "seg"}]}, "pseudo_label_from"),
        ({"classes": ["one"]}, "classes"),
        ({"backbone": "resnet18"}, "resnet18"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build(**arguments)


def test_crops_have_to_fit(batch: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="local_crop_size is 32"):
        build(local_crop_size=32).training_step(batch, 0)


def test_default_losses_are_registered() -> None:
    assert set(build().losses) == set(KEYS)
    assert set(KEYS) <= LOSSES.keys()


def test_classes_that_tile_the_image(batch: dict[str, Any]) -> None:
    """Without a background no pixel of CAM, pseudo label or prediction is 0, and what looks like it is undecided."""
    method = build(low_threshold=0.3, high_threshold=0.6)
    image, label = batch["image"], batch["label"]
    cam = torch.rand(2, 3, 32, 32)
    with_background = method.pseudo_label(image, cam * label[..., None, None], label)
    assert (with_background == 0).any()
    method.without_background()
    without = method.pseudo_label(image, cam * label[..., None, None], label)
    assert torch.equal(without, with_background.masked_fill(with_background == 0, 255))
    assert not (method.token_label(cam, label, batch["image_box"]) == 0).any()
    output = method.infer(image)
    assert method.segment(image, (32, 32), output["seg"]).argmax(1).min() == 1
    mask = torch.ones(2, 32, 32, dtype=torch.long)
    method.validation_step({"image": image, "label": label, "mask": mask}, 0)
    predicted = method.metrics["cam_miou"].counts()[1][0]  # threshold -1
    assert predicted[0] == 0
    assert predicted.sum() == mask.numel()
    assert "no background" in str(method.describe("val")["val/cam_miou"])
    assert torch.isfinite(method.training_step(batch, 0)["loss"])


def test_maps_of_the_classes_that_are_there(batch: dict[str, Any]) -> None:
    """The numbers of a step do not depend on how many maps of absent classes are made."""
    found = []
    for more in ({}, {"max_labels": 2}):
        method = build()
        torch.manual_seed(2)
        result = method.training_step(batch | more, 0)
        result["loss"].backward()
        found.append((result["terms"], [p.grad for p in method.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-8)

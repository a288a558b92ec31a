"""ToCo against arrays recorded from the released implementation: values, gradients, whole training runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from wsss.checkpoints import toco_from_official, toco_to_official
from wsss.lattice import PermutohedralLattice
from wsss.losses import build
from wsss.methods import toco
from wsss.metrics import SegmentationIoU
from wsss.optim import warmup_poly
from wsss.refine.cam import box_mask, cam_to_label, cut_crops, draw_crops, multiscale_cam, region_map
from wsss.refine.par import PAR, refine_cam

# What no array holds.
HEADS, EMA, WARMUP, TRAJECTORY_WARMUP = 3, 0.9, 1500, 4
THRESHOLDS = {"voc": (0.5, 0.25, 0.7), "coco": (0.45, 0.25, 0.65)}  # background, low, high
STEPS = {"lr_voc": 20000, "lr_coco": 80000}
ZERO = {"ptc": 0.0, "ctc": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "voc": {"temperature": 0.5, "phases": [{"until": 5, "weights": {"seg": 0.0, "dense_energy": 0.0}}]},
    "coco": {
        "temperature": 1.0,
        "phases": [
            {"until": 5, "weights": ZERO | {"seg": 0.0, "dense_energy": 0.0}, "pseudo_label_from": "aux_cam"},
            {"until": 11, "weights": ZERO, "pseudo_label_from": "aux_cam"},
        ],
    },
}

Arrays = dict[str, Any]


@pytest.fixture(scope="session")
def load(golden: Path) -> Callable[[str], Arrays]:
    def read(name: str) -> Arrays:
        path = golden / "toco" / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"{path.parent} has no {path.name}")
        arrays = np.load(path, allow_pickle=False)
        return {k: torch.from_numpy(np.array(v)) if v.dtype.kind in "fiu" else v for k, v in arrays.items()}

    return read


def close(found: Tensor, expected: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)


def method(state: Arrays, **arguments: Any) -> toco.ToCo:
    """Our ToCo of the recorded sizes with the recorded weights."""
    ours = toco_from_official(state)
    width = len(ours["encoder.vit.norm.bias"])
    patch = ours["encoder.vit.patch_embed.proj.weight"].shape[-1]
    side = int((ours["encoder.vit.pos_embed"].shape[1] - 1) ** 0.5)
    hidden, bottleneck = ours["projector.mlp.2.weight"].shape[0], ours["projector.mlp.4.bias"].shape[0]
    depth = len({key.split(".")[3] for key in ours if ".blocks." in key})
    network = toco.ToCo(
        num_classes=len(ours["classifier.weight"]),
        backbone="vit_tiny_patch16_224",
        backbone_args={
            "img_size": side * patch, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": HEADS,
        },
        decoder_channels=len(ours["decoder.conv6.weight"]),
        projector={
            "hidden": hidden, "bottleneck": bottleneck,
            "out": len(ours["projector.last_layer.parametrizations.weight.original0"]),
        },
        ema_momentum=EMA,
        released_behaviour=True,
        **arguments,
    )  # fmt: skip
    network.load_state_dict(ours)
    return network


@pytest.fixture(scope="session")
def tiny(load: Callable[[str], Arrays]) -> toco.ToCo:
    return method(load("tiny_model")).eval()


def test_official_weights_survive_the_round_trip(load: Callable[[str], Arrays], tiny: toco.ToCo) -> None:
    official = load("tiny_model")
    back = toco_to_official(tiny.state_dict())
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], official[key]) for key in official if "encoder.head." not in key)


@pytest.mark.parametrize("image", ["a", "b"])
@torch.no_grad()
def test_forward(load: Callable[[str], Arrays], tiny: toco.ToCo, image: str) -> None:
    recorded = load("forward")
    images = recorded[f"imgs_{image}"]
    close(tiny.encoder.embed(images)[0], recorded[f"prep_tokens_{image}"])
    tokens = tiny.encoder(images)
    close(tokens.class_token, recorded[f"enc_cls_{image}"])
    close(tokens.patches.flatten(2).mT, recorded[f"enc_patch_{image}"])
    close(tokens.aux_patches.flatten(2).mT, recorded[f"enc_aux_{image}"])
    close(tokens.patches, recorded[f"fmap_{image}"])
    close(tiny.classify(tiny.aux_classifier, tokens.aux_patches), recorded[f"cls_aux_{image}"])
    output = tiny(images)
    for ours, theirs in {"logits": "cls", "seg": "seg", "cam": "cam", "aux_cam": "cam_aux"}.items():
        close(output[ours], recorded[f"{theirs}_{image}"])


@torch.no_grad()
def test_projector_and_teacher(load: Callable[[str], Arrays]) -> None:
    recorded, network = load("forward"), method(load("tiny_model"))
    network.update_teacher()
    tokens = network.encoder(recorded["crops_global"].flatten(0, 1)).class_token
    close(network.teacher_projector(tokens), recorded["out_t"])
    tokens = torch.cat([tokens, network.encoder(recorded["crops_local"].flatten(0, 1)).class_token])
    close(network.projector(tokens), recorded["out_s"])
    after = toco_to_official(network.state_dict())
    for key, value in recorded.items():
        if key.startswith("after_ema/"):
            close(after[key.removeprefix("after_ema/")], value, atol=1e-6)


@torch.no_grad()
def test_multiscale_cam(load: Callable[[str], Arrays], tiny: toco.ToCo) -> None:
    recorded = load("multiscale_cam")
    for suffix, images, scales in (
        ("", "imgs", (1.0, 0.5, 1.5)),
        ("_s1", "imgs", (1.0,)),
        ("_s05_only", "imgs", (0.5,)),
        ("_b", "imgs_b", (1.0, 0.5, 1.5)),
    ):
        for first in (None, tiny.raw_cam(recorded[images])):
            cams = multiscale_cam(tiny.raw_cam, recorded[images], scales, first)
            for found, name in zip(cams.chunk(2, dim=1), ("cam", "cam_aux"), strict=True):
                step = 4 if suffix else 1
                close(found[..., ::step, ::step], recorded[name + suffix], rtol=0, atol=2e-5)


def test_cam_labels(load: Callable[[str], Arrays]) -> None:
    recorded = load("cam_label")
    cam, label = recorded["cam"], recorded["cls_label"]
    inside = box_mask(recorded["img_box"], cam.shape[-2:])
    for name, found in {
        "label_nobox": cam_to_label(cam, label, 0.5),
        "label_box_mid": cam_to_label(cam, label, 0.5, THRESHOLDS["voc"][1:], inside),
        "label_box_nomid": cam_to_label(cam, label, 0.5, None, inside),
        "label_box_mid_coco": cam_to_label(cam, label, 0.45, THRESHOLDS["coco"][1:], inside),
        "ignore_img_box": torch.where(inside, recorded["label_nobox"], 255),
        "roi_mask": region_map(cam, label, *THRESHOLDS["voc"][1:]),
        "valid_cam": cam * label[:, :, None, None],
    }.items():
        assert torch.equal(found, recorded[name]), name


def test_patch_token_pairs(load: Callable[[str], Arrays]) -> None:
    """The loss of tokens that are orthonormal but for one pair tells how the loss counts that pair."""
    recorded = load("cam_label")
    labels, pairs = recorded["aff_input"].flatten(1), recorded["aff_mask"]
    n = labels.shape[1]
    for image in range(len(labels)):
        positives, negatives = ((pairs[image] == kind).sum().double() for kind in (1, 0))
        for i, j in [(0, 1), (2, 7), (n - 1, 3), (5, 4)]:
            tokens = torch.eye(n, dtype=torch.double)
            tokens[j] = tokens[i]
            kind = pairs[image, i, j]
            expected = 0.5 * (1 - 2 * (kind == 1) / (positives + 1)) + 0.5 * 2 * (kind == 0) / (negatives + 1)
            close(build("ptc")(tokens[None], labels[image : image + 1]), expected, 1e-9, 1e-9)


def test_local_crops(load: Callable[[str], Arrays], tiny: toco.ToCo) -> None:
    recorded = load("roi_crops")
    size = int(recorded["crop_size"])
    for prefix, images in (("", recorded["images"]), ("cam_", None)):
        region = recorded[f"{prefix}roi_mask"]
        corners = recorded["cam_topleft" if prefix else "crop_topleft"]
        if images is not None:
            assert torch.equal(cut_crops(images, corners, size), recorded["crops"])
        mean = cut_crops(region.float(), corners, size).mean(dim=(-2, -1)).T
        assert torch.equal((mean > tiny.negative_ratio).float(), recorded[f"{prefix}flags"][:, 2:])
        assert (recorded[f"{prefix}flags"][:, :2] == 1).all()
        count, margin = int(recorded["crop_num"]), size // 2
        drawn = draw_crops(region, size, count)
        for image, centres in zip(region, drawn, strict=True):
            window = image[margin:-margin, margin:-margin] <= 1
            assert len({tuple(c) for c in centres.tolist()}) == count
            if window.sum() >= count:
                assert window[centres[:, 0], centres[:, 1]].all()


def test_cam_crops_are_cut_from_the_region(load: Callable[[str], Arrays]) -> None:
    crops, cams, images = load("roi_crops"), load("multiscale_cam"), load("forward")
    label = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 0]])
    assert torch.equal(region_map(cams["cam_aux"], label, *THRESHOLDS["voc"][1:]), crops["cam_roi_mask"])
    found = cut_crops(images["imgs_a"], crops["cam_topleft"], int(crops["crop_size"]))
    assert torch.equal(found, crops["cam_crops"])


def test_par(load: Callable[[str], Arrays], tiny: toco.ToCo) -> None:
    recorded = load("par")
    for name, par in {"out": PAR(), "out_1iter": PAR(iterations=1), "out_small": PAR((1, 2), 3)}.items():
        close(par(recorded["imgs"], recorded["masks"]), recorded[name])
    close(PAR()(recorded["const_img"], recorded["const_mask"]), recorded["const_out"])
    close(torch.stack(PAR((1, 2)).neighbours(recorded["imgs"]), 2), recorded["dilated_neighbors"], 0, 0)
    distance = torch.tensor([np.hypot(*shift) for shift in PAR().shifts])
    close(distance, recorded["pos"].flatten())
    truncated = tiny.colours(recorded["refine_inputs_norm"]).to(torch.uint8)
    assert torch.equal(truncated, recorded["denorm_uint8"])
    close(truncated / 255, recorded["refine_inputs_denorm01"], 0, 1e-7)
    cam, label = recorded["refine_cam"], recorded["refine_cls_label"]
    inside = box_mask(recorded["refine_box"], cam.shape[-2:])
    for name, data in (("refined", "voc"), ("refined_coco", "coco")):
        for slots in (int(label.sum(1).max()), label.shape[1]):
            found = refine_cam(tiny.par, truncated / 255, cam, label, THRESHOLDS[data][1:], inside, slots)
            assert (found != recorded[name]).double().mean() <= 1e-3


def test_token_losses(load: Callable[[str], Arrays]) -> None:
    recorded = load("losses")
    ignored = torch.full_like(recorded["ptc_label"], 255)
    for prefix, label in (("ptc", recorded["ptc_label"]), ("ptc_allignore", ignored)):
        fmap = recorded[f"{prefix}_fmap"].requires_grad_()
        loss = build("ptc")(fmap.flatten(2).mT, label)
        loss.backward()
        close(loss, recorded[f"{prefix}_loss"], 1e-5, 0)
        close(fmap.grad, recorded[f"{prefix}_grad"], 1e-4, 1e-9)
    flags, batch = recorded["ctc_flags"], len(recorded["ctc_flags"])
    for suffix, temperature in (("", 0.5), ("_t1", 1.0)):
        student = recorded["ctc_student"].clone().requires_grad_()
        teacher = recorded["ctc_teacher"].clone().requires_grad_()
        loss = build("ctc", temperature=temperature)(
            student.unflatten(0, (-1, batch)), teacher.unflatten(0, (-1, batch)), flags
        )
        loss.backward()
        close(loss, recorded[f"ctc_loss{suffix}"], 1e-5, 0)
        close(student.grad, recorded[f"ctc_grad_s{suffix}"], 1e-4, 1e-7)
        assert teacher.grad is None


@pytest.mark.parametrize("case", ["", "_nobg", "_nofg", "_none"])
def test_segmentation_loss(load: Callable[[str], Arrays], case: str) -> None:
    recorded = load("losses")
    label = recorded["seg_label"].clone()
    label[{"": label < 0, "_nobg": label == 0, "_nofg": label > 0, "_none": label >= 0}[case]] = 255
    logits = recorded["seg_pred"].clone().requires_grad_()
    loss = build("seg")(logits, label)
    loss.backward()
    if torch.isfinite(recorded[f"seg_loss{case}"]):
        close(loss, recorded[f"seg_loss{case}"], 1e-5, 0)
    assert torch.isfinite(loss)
    close(logits.grad, recorded[f"seg_grad{case}"], 1e-4, 1e-9)


def test_classification_loss(load: Callable[[str], Arrays]) -> None:
    recorded = load("losses")
    logits = recorded["cls_logit"].requires_grad_()
    loss = build("cls")(logits, recorded["cls_label"])
    loss.backward()
    close(loss, recorded["cls_loss"], 1e-5, 0)
    close(logits.grad, recorded["cls_grad"], 1e-4, 1e-9)


@pytest.mark.parametrize(("case", "arguments"), [("reg", {}), ("reg1", {"strength": 1.0, "scale": 1.0})])
def test_energy_loss(load: Callable[[str], Arrays], tiny: toco.ToCo, case: str, arguments: dict[str, float]) -> None:
    recorded = load("losses")
    logits = recorded["reg_logit"].clone().requires_grad_()
    image = tiny.colours(recorded["reg_img"])
    loss = build("dense_energy", **arguments)(image, logits, recorded["reg_label"], recorded["reg_box"])
    loss.backward()
    close(loss, recorded[f"{case}_loss"][0], 1e-5, 0)
    scale = recorded[f"{case}_grad"].abs().max()
    close(logits.grad / scale, recorded[f"{case}_grad"] / scale, 1e-4, 1e-5)


@pytest.mark.parametrize("case", ["bf", "bf_odd"])
def test_lattice(load: Callable[[str], Arrays], case: str) -> None:
    recorded = load("losses")
    image, signal = recorded[f"{case}_img"], recorded[f"{case}_in"]
    h, w = image.shape[-2:]
    y, x = (grid / recorded["bf_sigma_xy"] for grid in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    position = torch.stack([x, y]).float().expand(len(image), -1, -1, -1)
    features = torch.cat([position, image / recorded["bf_sigma_rgb"].float()], 1).flatten(2).mT
    found = PermutohedralLattice(features)(signal.flatten(2).mT).mT.view_as(signal)
    close(found, recorded[f"{case}_out"])


def test_learning_rates(load: Callable[[str], Arrays]) -> None:
    recorded = load("lr")
    for name, steps in STEPS.items():
        factor = warmup_poly(steps, WARMUP)
        exact = np.array([[base * factor(int(t)) for base in (6e-5, 6e-4)] for t in recorded["iters"]])
        np.testing.assert_allclose(exact, recorded[name].numpy(), rtol=1e-10)


def test_scores(load: Callable[[str], Arrays]) -> None:
    recorded = load("evaluate")
    for predictions, prefix in (("preds", ""), ("preds_ignore", "p_")):
        metric = SegmentationIoU(len(recorded["iou"]))
        target, predicted = recorded["gts"].clone(), recorded[predictions]
        if prefix:  # the released pseudo-label score leaves out pixels that a pseudo label ignores
            target[predicted == 255] = 255
        metric.update(predicted, target)
        np.testing.assert_allclose(metric.iou().numpy(), recorded[f"{prefix}iou"].numpy(), atol=1e-12)
        np.testing.assert_allclose(float(metric.compute()), recorded[f"{prefix}miou"].numpy(), atol=1e-7)


class Recorder(pl.Callback):
    """Keeps what a training run did in every step."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.terms, self.rates, self.norms = names, [], [], []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.terms.append({k: float(v) for k, v in outputs["terms"].items()} | {"total": float(outputs["loss"])})

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
        gradients = {k: v for k, v in toco_to_official(gradients).items() if "encoder.head." not in k}
        self.norms.append([float(gradients[k].norm()) if k in gradients else -1.0 for k in self.names])


@pytest.mark.parametrize("data", ["voc", "coco"])
def test_training_run(load: Callable[[str], Arrays], data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of the released training loop through our own training step and optimizer."""
    recorded, settings = load(f"train_{data}"), SETTINGS[data]
    weights = {"cls": 1.0, "aux_cls": 1.0, "ptc": 0.2, "ctc": 0.5, "seg": 0.1, "dense_energy": 0.05}
    losses: dict[str, dict[str, float]] = {key: {"weight": weight} for key, weight in weights.items()}
    losses["ctc"]["temperature"] = settings["temperature"]
    background, low, high = THRESHOLDS[data]
    network = method(
        load("train_init"), losses=losses, phases=settings["phases"], warmup_steps=TRAJECTORY_WARMUP,
        background_threshold=background, low_threshold=low, high_threshold=high, local_crop_size=32,
    )  # fmt: skip
    names = [str(name) for name in recorded["names"]]
    start = toco_to_official({k: v.double() for k, v in network.state_dict().items()})
    sums = torch.stack([start[k].sum() for k in names if "encoder.head." not in k])
    kept = torch.tensor(["encoder.head." not in k for k in names])
    close(sums, recorded["init_sum"][kept], 1e-6, 1e-5)

    seen: dict[str, list[Tensor]] = {"refined": [], "ptc_label": [], "cam": [], "cam_aux": [], "flags": []}
    mean, std = (torch.tensor(values)[:, None, None] for values in (network.mean, network.std))

    def batch(index: int) -> dict[str, Any]:
        part = {k.split("/")[1]: v for k, v in recorded.items() if k.startswith(f"batch{index}/")}
        views = {"image": "inputs255", "global_view": "global2_255", "local_source": "local_255"}
        images = {name: (part[key].float() / 255 - mean) / std for name, key in views.items()}
        return images | {"label": part["cls_label"], "image_box": part["img_box"].long()}

    def watch(
        name: str, function: Callable[..., Any], pick: Callable[[Any], Tensor] = lambda x: x
    ) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            result = function(*arguments)
            seen[name].append(pick(result))
            return result

        return wrapped

    def recorded_crops(region: Tensor, size: int, count: int) -> Tensor:
        step = network.global_step
        counts = torch.tensor([(region == value).sum() for value in range(3)])
        assert torch.equal(counts, recorded["rec/roi_hist"][step])
        return recorded["rec/topleft"][step]

    def watched_cam(*arguments: Any) -> Tensor:
        cams = multiscale_cam(*arguments)
        for name, cam in zip(("cam", "cam_aux"), cams.chunk(2, dim=1), strict=True):
            seen[name].append(cam.mean(dim=(-2, -1)))
        return cams

    monkeypatch.setattr(toco, "draw_crops", recorded_crops)
    monkeypatch.setattr(toco, "multiscale_cam", watched_cam)
    monkeypatch.setattr(network, "pseudo_label", watch("refined", network.pseudo_label))
    monkeypatch.setattr(network, "token_label", watch("ptc_label", network.token_label))
    monkeypatch.setattr(network, "cut_local_crops", watch("flags", network.cut_local_crops, lambda x: x[1].float()))
    recorder = Recorder(names)
    trainer = pl.Trainer(
        max_steps=int(recorded["n_iter"]), accelerator="cpu", logger=False, callbacks=[recorder],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(network, DataLoader([batch(int(i)) for i in recorded["batch_order"]], batch_size=None))

    keys = {
        "cls": "cls_loss", "aux_cls": "cls_loss_aux", "ptc": "ptc_loss", "ctc": "ctc_loss", "seg": "seg_loss",
        "dense_energy": "reg_loss", "total": "total",
    }  # fmt: skip
    for ours, theirs in keys.items():
        found, expected = torch.tensor([terms[ours] for terms in recorder.terms]), recorded[f"rec/{theirs}"]
        finite = torch.isfinite(expected)
        # CTC without negatives is about 1e-4: there float32 rounds the recorded value in its fourth digit
        close(found[finite], expected[finite], 1e-4, {"dense_energy": 1e-9}.get(ours, 1e-7))
        assert torch.isfinite(found).all()
    rates = recorded["rec/lr"]
    np.testing.assert_allclose(np.array(recorder.rates)[:, [0, 0, 1, 1]], rates.numpy(), rtol=1e-10)
    close(torch.tensor(recorder.norms), recorded["rec/grad_norm"], 1e-3, 1e-6)
    for name in ("flags", "ptc_label"):
        assert torch.equal(torch.stack(seen[name]).double(), recorded[f"rec/{name}"].double()), name
    refined = torch.stack(seen["refined"])
    assert (refined != recorded["rec/refined"]).double().mean() <= 1e-3
    ids = [*range(recorded["rec/refined_hist"].shape[1] - 1), 255]
    hist = torch.stack([(refined == i).sum(dim=(1, 2, 3)) for i in ids], dim=1)
    assert (hist - recorded["rec/refined_hist"]).abs().max() <= 1e-3 * refined[0].numel()
    for name in ("cam", "cam_aux"):
        close(torch.stack(seen[name]), recorded[f"rec/{name}_mean"])
    final = toco_to_official(network.state_dict())
    for key, value in recorded.items():
        if key.startswith("final/"):
            close(final[key.removeprefix("final/")], value, 0, 1e-4)
    for index, name in enumerate(names):
        if "encoder.head." not in name:  # the third of the keys in a qkv bias has no gradient but Adam's noise
            atol = 2e-3 if name.endswith("attn.qkv.bias") else 1e-4
            close(final[name].double().sum(), recorded["final_sum"][index], 1e-4, atol * 5)
            close(final[name].double().norm(), recorded["final_norm"][index], 1e-4, atol)

"""CoSA against recordings of the original code: every array of `--golden DIR`/cosa."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from official import cosa_to_official, toco_from_official
from omegaconf import OmegaConf
from PIL import Image
from recorded import fit
from torch import Tensor, nn

import wsss
from wsss.cam import resize
from wsss.config import config_dir
from wsss.data import pixels
from wsss.data.transforms import OPERATIONS
from wsss.evaluation.protocol import Protocol
from wsss.losses import build
from wsss.methods.cosa import CoSA
from wsss.optim import warmup_poly
from wsss.refine.crf import dense_crf
from wsss.refine.thresholds import MixtureThresholds, cam_to_label, mixture_thresholds

Arrays = dict[str, Any]
WEIGHTS, FORWARD, LOSSES, GRADIENTS, TRAINING, STRONG, INFERENCE, RATES = (
    f"cosa/cosa_{name}"
    for name in ("weights", "forward", "masks_losses", "gradients", "training", "strong", "inference", "lr")
)

# What no array tells. Shapes, classes, depth, heads, steps and thresholds come from the arrays.
SETTINGS: dict[str, Any] = {
    "scales": {"teacher": (1.0, 0.5, 1.5), "eval": (1.0, 0.5, 1.5, 0.75, 1.25)},
    "dilation": 5,
    "gradients": {"low_threshold": 0.25, "high_threshold": 0.7, "aux_low_threshold": 0.25, "aux_high_threshold": 0.7},
    "cam_forms": {"cam_loss": "relu", "cam_loss_v2": "min_max", "cam_loss_v3": "ids"},
    "gmm_least": 0.05,
    "cam_threshold": 0.5,
    "lr": {"base": 6e-5, "warmup": 1500, "max": {"voc": 32_000, "coco": 60_000}},
}
NAMES = {"cls": "cls", "aux_cls": "aux", "seg": "seg", "swap_cam": "cam", "dense_energy": "reg"}
"""Our loss keys and the recorded ones."""

EXCEPTED = (
    (WEIGHTS, "on/encoder.head.* an/encoder.head.*", "unused parameter, not imported"),
    (WEIGHTS, "num_classes depth heads img_size patch aux_layer", "input"),
    (WEIGHTS, "frozen group?", "names"),
    (FORWARD, "*/images_u8 map_stride", "input"),
    (LOSSES, "cam label box thresholds_* seg_sum cam_raw seg_logits reg_images_u8 gmm_values", "input"),
    (LOSSES, "seg_loss_none", "0 where nothing is counted: compared, but no factor changes it"),
    (GRADIENTS, "names", "names"),
    (TRAINING, "batch*/* max_iters lr_warmup loss_warmup momentum base_lr thresholds", "input"),
    (TRAINING, "names", "names"),
    (TRAINING, "final_on/encoder.head.*", "unused parameter, not imported"),
    (STRONG, "photo photo_name", "input"),
    (INFERENCE, "image_u8 label gt crop_size", "input"),
    (RATES, "*/step", "input"),
)


def normalised(images: Tensor) -> Tensor:
    """Bytes (B, H, W, 3) -> (B, 3, H, W)."""
    return ((images.float() / 255 - torch.tensor(CoSA.mean)) / torch.tensor(CoSA.std)).permute(0, 3, 1, 2)


def build_method(recordings: Any, **given: Any) -> CoSA:
    arrays = recordings(WEIGHTS)
    width = arrays["on/encoder.cls_token"].shape[-1]
    backbone = {
        "img_size": arrays["img_size"].item(),
        "patch_size": arrays["patch"].item(),
        "embed_dim": width,
        "depth": arrays["depth"].item(),
        "num_heads": arrays["heads"].item(),
        "mlp_ratio": len(arrays["on/encoder.blocks.0.mlp.fc1.bias"]) / width,
    }
    method = CoSA(
        arrays["num_classes"].item(),
        backbone="vit_tiny_patch16_224",
        backbone_args=backbone,
        aux_layer=arrays["aux_layer"].item(),
        decoder_channels=len(arrays["on/decoder.conv6.weight"]),
        decoder_dilation=SETTINGS["dilation"],
        released_behaviour=True,
        **{"cam_scales": SETTINGS["scales"]["teacher"], **given},
    )
    for theirs, stream in (("on/", method.student), ("an/", method.teacher)):
        recorded = {key.removeprefix(theirs): t for key, t in arrays.items() if key.startswith(theirs)}
        stream.load_state_dict(toco_from_official(recorded))
    method.log = method.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return method


@pytest.fixture(scope="session")
def method(recordings: Any) -> CoSA:
    return build_method(recordings).eval().requires_grad_(False)


def test_weights_come_back(recordings: Any, match: Any, method: CoSA) -> None:
    arrays = recordings(WEIGHTS)
    for theirs, stream in (("on/", method.student), ("an/", method.teacher)):
        state = cosa_to_official(stream.state_dict())
        recorded = {key for key in arrays if key.startswith(theirs) and "encoder.head." not in key}
        assert {f"{theirs}{name}" for name in state} == recorded
        for name, tensor in state.items():
            match(WEIGHTS, f"{theirs}{name}", tensor)


def test_groups_of_the_optimizer(recordings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = recordings(WEIGHTS)
    monkeypatch.setattr(CoSA, "total_steps", 10)
    method = build_method(recordings)
    frozen = {n for n, p in method.student.named_parameters() if not p.requires_grad}
    assert set(cosa_to_official(dict.fromkeys(frozen))) == set(arrays["frozen"].tolist())
    configured: Any = method.configure_optimizers()
    named = cosa_to_official(dict(method.student.named_parameters()))
    of_encoder, of_heads = (
        {name for name, p in named.items() if any(p is q for q in group["params"])}
        for group in configured["optimizer"].param_groups
    )
    still = {"encoder.head.weight", "encoder.head.bias", *arrays["frozen"].tolist()}  # grouped, but nothing moves them
    groups = [set(arrays[f"group{i}"].tolist()) - still for i in range(4)]
    assert of_encoder == groups[0] | groups[1]
    assert of_heads == groups[2] | groups[3]


# --- the network and the teacher --------------------------------------------------------------------------------------


def test_forward(recordings: Any, match: Any, method: CoSA) -> None:
    arrays = recordings(FORWARD)
    step = arrays["map_stride"].item()
    for name in dict.fromkeys(key.split("/")[0] for key in arrays if "/" in key):
        image = normalised(arrays[f"{name}/images_u8"])
        student = method.student(image)
        ours = {
            "cls": student["logits"],
            "cls_aux": student["aux_logits"],
            "tokens": method.student.encoder(image).patches,
            "seg": student["seg"],
            "cam": student["cam"],
            "cam_aux": student["aux_cam"],
        }
        for kind, scales in SETTINGS["scales"].items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(method, "cam_scales", scales)
                cam, aux_cam, seg = method.assign(image)
                torch.testing.assert_close(method.multiscale(image), torch.cat([cam, aux_cam], dim=1))
            maps = {"cam": cam, "cam_aux": aux_cam, "seg": seg}
            ours |= {f"{kind}_{key}": m[..., ::step, ::step] for key, m in maps.items()}
            sizes = [[int(scale * side) for side in image.shape[-2:]] for scale in scales]
            views = [view for size in sizes for one in [resize(image, size)] for view in (one, one.flip(-1))]
            outputs = [method(view) for view in views]
            ours |= {
                f"{kind}_{key}": torch.stack([output[logits] for output in outputs]).sum(0)
                for key, logits in (("cls_sum", "logits"), ("cls_aux_sum", "aux_logits"))
            }
        for key in (key.removeprefix(f"{name}/") for key in arrays if key.startswith(f"{name}/")):
            if key != "images_u8":
                match(FORWARD, f"{name}/{key}", ours[key], rtol=1e-5, atol=2e-5)


def test_a_file_of_the_original(recordings: Any, match: Any, tmp_path: Path) -> None:
    """The state dict of the teacher, by way of what a user calls."""
    arrays, weights = recordings(FORWARD), recordings(WEIGHTS)
    path = tmp_path / "best_seg.pth"
    torch.save({f"module.{key[3:]}": tensor for key, tensor in weights.items() if key.startswith("an/")}, path)
    told = {"backbone_args": {"num_heads": weights["heads"].item()}, "aux_layer": weights["aux_layer"].item()}
    scales, step = SETTINGS["scales"]["teacher"], arrays["map_stride"].item()
    method = wsss.load(path, **told, released_behaviour=True, cam_scales=scales).method
    assert isinstance(method, CoSA)
    found = dict(zip(("cam", "cam_aux", "seg"), method.assign(normalised(arrays["rect/images_u8"])), strict=True))
    for key, maps in found.items():
        match(FORWARD, f"rect/teacher_{key}", maps[..., ::step, ::step], rtol=1e-5, atol=2e-5)


# --- pseudo labels, targets, losses -----------------------------------------------------------------------------------


def test_pseudo_labels(recordings: Any, match: Any, method: CoSA) -> None:
    arrays = recordings(LOSSES)
    cam, label, box = arrays["cam"], arrays["label"], arrays["box"]
    kinds = [key.removeprefix("thresholds_") for key in arrays if key.startswith("thresholds_")]
    for kind, scale in [*((kind, 0.5) for kind in kinds), ("nodownscale", 1.0)]:
        high, low = arrays[f"thresholds_{kind if kind in kinds else 'default'}"].tolist()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (("low_threshold", low), ("high_threshold", high), ("label_scale", scale)):
                patch.setitem(method.hparams, name, value)
            match(LOSSES, f"mask_{kind}", method.pseudo_label(cam, cam, label, box))


def test_soft_targets(recordings: Any, match: Any, method: CoSA) -> None:
    arrays = recordings(LOSSES)
    found = method.probabilities(arrays["seg_sum"], arrays["label"])
    step = -(-found.shape[-1] // arrays["seg_prob"].shape[-1])
    match(LOSSES, "seg_prob", found[..., ::step, ::step], atol=1e-6)
    match(LOSSES, "T", resize(found[:, 1:], arrays["T"].shape[-2:]), atol=1e-6)


@pytest.mark.parametrize("key", SETTINGS["cam_forms"])
def test_losses_of_cams(recordings: Any, match: Any, method: CoSA, key: str) -> None:
    arrays = recordings(LOSSES)
    cam = arrays["cam_raw"].clone().requires_grad_()
    target = method.probabilities(arrays["seg_sum"], arrays["label"])
    loss = build("swap_cam", form=SETTINGS["cam_forms"][key])(cam, target)
    loss.backward()
    match(LOSSES, key, loss, rtol=1e-5)
    match(LOSSES, f"{key}_grad", cam.grad, rtol=1e-5, atol=1e-6 * arrays[f"{key}_grad"].abs().max())


def test_losses_of_the_segmentation(recordings: Any, match: Any) -> None:
    arrays = recordings(LOSSES)
    mask = arrays["mask_default"].long()
    without = {
        "seg_loss": mask,
        "seg_loss_nofg": mask.masked_fill((mask > 0) & (mask < 255), 255),
        "seg_loss_nobg": mask.masked_fill(mask == 0, 255),
        "seg_loss_none": torch.full_like(mask, 255),
    }
    for key, ids in without.items():
        logits = arrays["seg_logits"].clone().requires_grad_()
        loss = build("seg")(logits, ids)
        match(LOSSES, key, loss, rtol=1e-5)
        if key == "seg_loss":
            loss.backward()
            match(LOSSES, "seg_loss_grad", logits.grad, rtol=1e-5, atol=1e-6 * arrays["seg_loss_grad"].abs().max())
    logits = arrays["seg_logits"].clone().requires_grad_()
    image = arrays["reg_images_u8"].permute(0, 3, 1, 2).float()
    loss = build("dense_energy")(image, logits, mask, arrays["box"])
    loss.backward()
    match(LOSSES, "reg_loss", loss[None], rtol=1e-4)
    match(LOSSES, "reg_grad", logits.grad, rtol=1e-3, atol=1e-4 * arrays["reg_grad"].abs().max())


def test_thresholds_of_a_mixture(recordings: Any, match: Any) -> None:
    values = recordings(LOSSES)["gmm_values"].flatten()
    low, high = mixture_thresholds(values[values > SETTINGS["gmm_least"]])
    match(LOSSES, "gmm_thresholds", torch.tensor([low, high], dtype=torch.double), atol=1e-6)
    following = MixtureThresholds(0.25, 0.7, batches=1, least=SETTINGS["gmm_least"], momentum=0.0)
    following(recordings(LOSSES)["gmm_values"])
    match(LOSSES, "gmm_thresholds", following.bounds, atol=1e-6)


# --- training ---------------------------------------------------------------------------------------------------------


def batches(arrays: Arrays) -> list[dict[str, Any]]:
    count = len({key.split("/")[0] for key in arrays if key.startswith("batch")})
    return [
        {
            "image": normalised(arrays[f"batch{k}/weak_u8"]),
            "strong_view": normalised(arrays[f"batch{k}/strong_u8"]),
            "label": arrays[f"batch{k}/labels"],
            "image_box": arrays[f"batch{k}/box"],
        }
        for k in range(count)
    ]


def norms_of(method: CoSA, names: list[str]) -> Tensor:
    """Of the gradients of the student by the recorded names, -1 where there is none."""
    named = cosa_to_official(dict(method.student.named_parameters()))
    found = {name: p.grad.double().norm() for name, p in named.items() if p.grad is not None}
    return torch.stack([found.get(name, torch.tensor(-1.0, dtype=torch.double)) for name in names])


def test_gradients(recordings: Any, match: Any) -> None:
    arrays, batch = recordings(GRADIENTS), batches(recordings(TRAINING))[0]
    method = build_method(recordings, loss_warmup_steps=-1, **SETTINGS["gradients"]).train()
    names, losses, weights = arrays["names"].tolist(), dict(method.losses), method.loss_weights
    for ours, theirs in NAMES.items():
        method.zero_grad()
        method.losses, method.loss_weights = nn.ModuleDict({ours: losses[ours]}), {ours: 1.0}
        loss = method.training_step(batch, 0)["loss"]
        loss.backward()
        match(GRADIENTS, f"loss/{theirs}", loss, rtol=1e-4)
        match(GRADIENTS, f"grad_norm/{theirs}", norms_of(method, names), rtol=2e-4, atol=1e-8)
    method.zero_grad()
    method.losses, method.loss_weights = nn.ModuleDict(losses), weights
    loss = method.training_step(batch, 0)["loss"]
    loss.backward()
    match(GRADIENTS, "loss/total", loss, rtol=1e-5)
    named = cosa_to_official(dict(method.student.named_parameters()))
    for key in (key for key in arrays if key.startswith("grad/")):
        atol = 2e-5 * arrays[key].abs().max().item() + 1e-9
        match(GRADIENTS, key, named[key.removeprefix("grad/")].grad, rtol=1e-4, atol=atol)
    cam, aux_cam, _ = method.assign(batch["image"])
    for key, maps, kind in (("mask_main", cam, ""), ("mask_aux", aux_cam, "aux_")):
        ids = method.pseudo_label(batch["image"], maps, batch["label"], batch["image_box"], kind=kind)
        match(GRADIENTS, key, ids, share=1e-3)


@dataclass
class Steps(pl.Callback):
    """A training step by step."""

    names: list[str]
    logged: list[dict[str, Any]] = field(default_factory=list)

    def on_before_optimizer_step(self, trainer: pl.Trainer, method: pl.LightningModule, optimizer: Any) -> None:
        assert isinstance(method, CoSA)
        rates = [group["lr"] for group in optimizer.param_groups]
        self.logged.append({"lr": rates, "grad_norm": norms_of(method, self.names)})

    def on_train_batch_end(self, trainer: pl.Trainer, method: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.logged[-1] |= {"tot": outputs["loss"].detach(), **outputs["terms"]}


def test_training(recordings: Any, match: Any, tmp_path: Path) -> None:
    """As the original's main() trains: batches in turn, warm-ups of rates and losses, the teacher after each step."""
    arrays = recordings(TRAINING)
    high, low, aux_high, aux_low = arrays["thresholds"].tolist()
    method = build_method(
        recordings,
        low_threshold=low,
        high_threshold=high,
        aux_low_threshold=aux_low,
        aux_high_threshold=aux_high,
        lr=arrays["base_lr"].item(),
        warmup_steps=arrays["lr_warmup"].item(),
        loss_warmup_steps=arrays["loss_warmup"].item(),
        ema_momentum=arrays["momentum"].item(),
    )
    masks: list[Tensor] = []
    proper = method.pseudo_label

    def keeping(*args: Any) -> Tensor:
        masks.append(proper(*args))
        return masks[-1]

    method.pseudo_label = keeping  # type: ignore[method-assign]
    names, count, data = arrays["names"].tolist(), arrays["max_iters"].item(), batches(arrays)
    steps = Steps(names)
    order = [data[step % len(data)] for step in range(count)]
    fit(method, order, steps, tmp_path)
    for key, theirs in (NAMES | {"tot": "tot"}).items():
        # in which cell of the lattice equal colours lie hangs on the last bit of their normalisation
        rtol = 1e-3 if key == "dense_energy" else 1e-4
        match(TRAINING, f"step/{theirs}", torch.stack([one[key] for one in steps.logged]), rtol=rtol, atol=1e-9)
    rates = torch.tensor([one["lr"] for one in steps.logged], dtype=torch.double)
    match(TRAINING, "step/lr", rates.repeat_interleave(2, dim=1), rtol=1e-9)  # encoder, norms, classifiers, decoder
    match(TRAINING, "step/mask_main", torch.stack(masks[::2]), share=1e-3)
    match(TRAINING, "step/mask_aux", torch.stack(masks[1::2]), share=1e-3)
    norms = torch.stack([one["grad_norm"] for one in steps.logged])
    match(TRAINING, "grad_norm", norms, rtol=2e-3, atol=1e-7)
    decoder = [name.startswith("decoder.") for name in names]
    assert (norms[: arrays["loss_warmup"].item() + 1, decoder] == 0).all()

    first = recordings(WEIGHTS)
    share = arrays["momentum"].item() ** count  # of what never moves
    for stream, key, start in ((method.student, "final_on", "on/"), (method.teacher, "final_an", "an/")):
        state = cosa_to_official(stream.state_dict())
        for name in ("encoder.head.weight", "encoder.head.bias"):
            still = first[f"on/{name}"].double()
            state[name] = still if start == "on/" else share * first[f"an/{name}"] + (1 - share) * still
        for recorded in (recorded for recorded in arrays if recorded.startswith(f"{key}/")):
            name = recorded.removeprefix(f"{key}/")
            # the gradient of the bias of the keys is 0 but for rounding, and Adam makes steps of it, either way
            atol = torch.full(arrays[recorded].shape, 2e-5, dtype=torch.double)
            if name.endswith("qkv.bias"):
                atol[len(atol) // 3 : -len(atol) // 3] = 2 * arrays["base_lr"].item() * count
            match(TRAINING, recorded, state[name], atol=atol)
        if start == "an/":
            values = [state[name].double() for name in names]
            # sums cancel, so that their error is measured by that of a weight
            loose = torch.tensor([1e-3 if name.endswith("qkv.bias") else 1e-6 for name in names], dtype=torch.double)
            sizes = torch.tensor([value.numel() for value in values])
            match(TRAINING, "final_an_sum", torch.stack([v.sum() for v in values]), rtol=1e-5, atol=loose * sizes)
            match(
                TRAINING, "final_an_norm", torch.stack([v.norm() for v in values]), rtol=1e-5, atol=loose * sizes**0.5
            )


@pytest.mark.parametrize("data", SETTINGS["lr"]["max"])
def test_learning_rates(recordings: Any, match: Any, data: str) -> None:
    settings = SETTINGS["lr"]
    rate = warmup_poly(settings["max"][data], settings["warmup"])
    rates = [settings["base"] * rate(int(step)) for step in recordings(RATES)[f"{data}/step"]]
    match(RATES, f"{data}/lr", torch.tensor(rates, dtype=torch.double), rtol=1e-9)


# --- views and evaluation ---------------------------------------------------------------------------------------------


def test_strong_views(recordings: Any, match: Any) -> None:
    arrays = recordings(STRONG)
    photo = arrays["photo"].numpy()
    seen = set()
    for key in (key for key in arrays if "/" in key):
        operation, amount = key.split("/")
        if operation == "blur":
            match(STRONG, key, torch.tensor(pixels.blur(photo, float(amount))))
        else:
            seen.add(operation)
            picture = OPERATIONS[operation](Image.fromarray(photo), int(amount))
            match(STRONG, key, torch.from_numpy(np.array(picture)))
    assert seen == set(OPERATIONS)


def test_evaluation(recordings: Any, match: Any, method: CoSA, monkeypatch: pytest.MonkeyPatch) -> None:
    """conf/protocol/cosa.yaml, with the true labels and without."""
    arrays = recordings(INFERENCE)
    settings: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "protocol" / "cosa.yaml"))
    settings["size"] = arrays["crop_size"].item()
    image, label, size = normalised(arrays["image_u8"][None]), arrays["label"], arrays["gt"].shape
    scores: dict[str, dict[str, Tensor]] = {}
    for labels in ("none", "true"):
        monkeypatch.setattr(method, "protocol", Protocol(**settings | {"segmentation_labels": labels}))
        scores[labels] = method.segment_steps(image, size, method.infer(image)["seg"], label)
    match(INFERENCE, "seg_ps", scores["none"][""][0].argmax(0), share=1e-3)
    match(INFERENCE, "seg_vd", scores["true"][""][0].argmax(0), share=1e-3)
    probability = scores["true"][""].softmax(1)
    match(INFERENCE, "crf_probability_in", probability[0], atol=2e-5)

    monkeypatch.setattr(method, "cam_scales", settings["scales"])
    sized = method.sized(image)
    cam, aux_cam, summed = method.assign(sized)
    step = -(-sized.shape[-1] // arrays["seg_sum"].shape[-1])
    match(INFERENCE, "seg_sum", summed[0, :, ::step, ::step], rtol=1e-5, atol=5e-5)
    for key, maps in (("cam_label", cam), ("cam_aux_label", aux_cam)):
        match(INFERENCE, key, cam_to_label(resize(maps, size), label, SETTINGS["cam_threshold"])[0], share=1e-3)

    # the original's CRF sees a photograph of which some values have lost a level, by the last bit; ours sees it whole
    photo, seen = arrays["image_u8"], arrays["crf_image_u8"]
    lost = seen.int() == photo.int() - 1
    assert lost.double().mean() < 0.08
    match(INFERENCE, "crf_image_u8", torch.where(lost, seen, photo))
    crf = {name: value for name, value in settings["extras"]["crf"].items() if name != "backend"}
    truncated = arrays["crf_image_u8"].permute(2, 0, 1)[None].float()
    match(INFERENCE, "seg_vd_crf", dense_crf(truncated, probability, **crf)[0].argmax(0), share=1e-3)
    match(INFERENCE, "seg_vd_crf", scores["true"]["crf_"][0].argmax(0), share=2e-3)

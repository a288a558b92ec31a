"""CLIP-ES and WeCLIP against recordings of the original code: every array of `--golden DIR`/clip."""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import wsss
from wsss import InputError
from wsss.cam import min_max, resize
from wsss.data.pixels import Normalise
from wsss.evaluation.protocol import Protocol
from wsss.losses import build as build_loss
from wsss.losses.weclip import near_pairs, pair_relations
from wsss.methods.clip_es import CLIPES, gradient_maps
from wsss.methods.weclip import Decoded, WeCLIP, official_name, rescale_by_factor
from wsss.networks.clip import Seen
from wsss.optim import warmup_poly
from wsss.refine.affinity import agreeing_layers, box_masks, boxes, refined_attention, spread, transition
from wsss.refine.crf import dense_crf
from wsss.refine.pseudo import crf

Arrays = dict[str, Any]

# What no array tells. Shapes, classes, depth and steps come from the arrays.
VOC, COCO = 0.4, 0.7  # box thresholds
CRF = {"gaussian": (1.0, 3.0), "bilateral": (67.0, 3.0, 4.0)}

PAR_ITERATIONS = 20
HALF = {"fused_F": 5e-3, "seg": 1e-2, "P_image0": 5e-3}  # tolerances of what is in half precision
WECLIP_LR = {"lr": 2e-3, "warmup": 50, "voc": 30_000, "coco": 80_000}
REFINED = {"voc": {"refine_layers": 6, "box_threshold": VOC}, "coco": {"refine_layers": 10, "box_threshold": COCO}}
PROTOCOL = {"scales": (1.0, 0.75), "flip": "mean", "fusion": "mean"}
WECLIP_CRF = {"gaussian": (3.0, 3.0), "bilateral": (64.0, 5.0, 4.0)}

EXCEPTED = (
    # files, arrays, why they are left alone
    ("clip/weclip_weights", "sd/* embedding_dim num_classes_with_background decoder_heads decoder_blocks", "input"),
    ("clip/weclip_forward", "images_u8 labels train_mode/keep_channels", "input"),
    ("clip/weclip_crafted", "image_u8 classes */P */maps peaky*/A", "input"),
    ("clip/weclip_losses", "radius Y ignore/Y grad_names", "input"),
    ("clip/weclip_losses", "all_background/seg_loss", "NaN, which no factor changes"),
    ("clip/weclip_training", "batch*/* keep_channels rfm_first_step warmup_iter max_iters base_lr", "input"),
    ("clip/weclip_inference", "image_u8 labels resize_long crf_prob", "input"),
    ("clip/weclip_lr", "*/step", "input"),
    ("clip/clip_weights", "sd/* heads layers patch input_resolution logit_scale fg_text bg_text", "input"),
    ("clip/clipes_image", "*/image */labels", "input"),
    ("clip/clipes_boxes", "*/map */lambda */act */grad upsample/width_height", "input"),
    ("clip/clipes_crf", "*/wrapped_bgr", "input"),
)


def tower_arguments(arrays: Arrays) -> dict[str, Any]:
    return {
        "embed_dim": arrays["sd/conv1.weight"].shape[0],
        "depth": int(arrays["layers"]),
        "num_heads": int(arrays["heads"]),
        "patch_size": int(arrays["patch"]),
        "img_size": int(arrays["input_resolution"]),
    }


@pytest.fixture(scope="module")
def tower_file(recordings: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded tower as a file with OpenAI's names."""
    arrays, path = recordings("clip/clip_weights"), tmp_path_factory.mktemp("clip") / "tower.safetensors"
    state = {f"visual.{key[3:]}": tensor.contiguous() for key, tensor in arrays.items() if key.startswith("sd/")}
    save_file(state | {"logit_scale": arrays["logit_scale"].log()}, path)
    return path


@pytest.fixture(scope="module")
def text_file(recordings: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arrays, path = recordings("clip/clip_weights"), tmp_path_factory.mktemp("clip") / "text.npz"
    rows, behind = arrays["fg_text"].numpy(), arrays["bg_text"].numpy()
    np.savez(
        path,
        classes=np.array([str(c) for c in range(len(rows))]),
        embeddings=rows,
        background=np.array([f"b{c}" for c in range(len(behind))]),
        background_embeddings=behind,
    )
    return path


def build(target: Any, arrays: Arrays, tower_file: Path, text_file: Path, **settings: Any) -> Any:
    given = {
        "num_classes": len(arrays["fg_text"]),
        "weights": str(tower_file),
        "backbone_args": tower_arguments(arrays),
        "text": str(text_file),
        "logit_scale": arrays["logit_scale"].item(),
    }
    return target(**given | settings).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def clip_es(recordings: Any, tower_file: Path, text_file: Path) -> CLIPES:
    return build(CLIPES, recordings("clip/clip_weights"), tower_file, text_file)


@pytest.fixture(scope="module")
def half_positions(recordings: Any, tower_file: Path, text_file: Path) -> CLIPES:
    return build(CLIPES, recordings("clip/clip_weights"), tower_file, text_file, half_positions=True)


def normalise(image: Tensor, method: Any) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W), as our data module does."""
    return Normalise(method.mean, method.std)(image.numpy())[None]


def multi_hot(classes: Tensor, count: int) -> Tensor:
    return F.one_hot(classes.long(), count).sum(0)[None].float()


def as_recorded(found: np.ndarray, recorded: Tensor) -> Tensor:
    """Boxes in the order of the recorded ones, if they are the same set."""
    ours = {tuple(map(int, box)) for box in found} or {(0, 0, 0, 0)}
    theirs = [tuple(box) for box in recorded.tolist()]
    return torch.tensor(theirs if ours == set(theirs) else [*sorted(ours), (-1, -1, -1, -1)])[: len(theirs)]


def with_holes(cam: Tensor, threshold: float) -> np.ndarray:
    """`boxes`, and those of the outlines of holes, which the original draws too: they lie within the others."""
    ours = boxes(cam, threshold)
    values = (cam.numpy() * 255).astype(np.uint8)
    above = (values > int(threshold * values.max())).astype(np.uint8)
    outlines, hierarchy = cv2.findContours(above, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    rects = [cv2.boundingRect(o) for o, h in zip(outlines, hierarchy[0], strict=True) if h[3] >= 0] if outlines else []
    h, w = above.shape
    holes = [(x, y, min(x + dx, w - 1), min(y + dy, h - 1)) for x, y, dx, dy in rects]
    return np.concatenate([ours, np.array(holes, ours.dtype).reshape(-1, 4)])


# --- CLIP-ES ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["img0", "img1"])
def test_clip_es(recordings: Any, match: Any, clip_es: CLIPES, name: str) -> None:
    file, arrays = "clip/clipes_image", recordings("clip/clipes_image")
    image, classes = normalise(arrays[f"{name}/image"], clip_es), arrays[f"{name}/labels"].long()
    label = multi_hot(classes, clip_es.num_classes)
    size, tower = arrays[f"{name}/image"].shape[:2], clip_es.tower
    sized = clip_es.sized(image)
    match(file, f"{name}/network_input", sized, atol=1e-6)
    seen = tower(sized)
    match(file, f"{name}/positions_resized", tower.positions(seen.size), atol=1e-6)
    match(file, f"{name}/attn_heads_mean", seen.attention[:, 0], atol=1e-5)
    match(file, f"{name}/tokens_block11", seen.blocks[-1, 0], atol=2e-4)
    if f"{name}/block_outputs" in arrays:
        last = tower.last_block(seen.blocks[-1], tower.first_norm(seen.blocks[-1]))
        match(file, f"{name}/block_outputs", torch.cat([seen.blocks, last[None]])[:, 0], atol=2e-4)

    text = (clip_es.text, clip_es.background_text, clip_es.hparams.logit_scale)
    rows = [0] * len(classes)
    maps = gradient_maps(tower, *text, seen.blocks[-1][rows], label[rows], classes)
    shown = torch.cat([classes, clip_es.num_classes + torch.arange(len(clip_es.background_text))])
    match(file, f"{name}/logits", maps.logits[0, shown], atol=1e-4)
    match(file, f"{name}/prob", maps.logits.softmax(1)[0, shown], atol=1e-5)
    grid = [tensor.mT.unflatten(2, seen.size) for tensor in (maps.activation, maps.gradient)]
    match(file, f"{name}/act", grid[0][0], atol=5e-5)
    match(file, f"{name}/grad", grid[1], rtol=1e-4, atol=1e-4 * grid[1].abs().max().item())
    weight = maps.gradient.mean(1)
    match(file, f"{name}/weight", weight, rtol=1e-4, atol=1e-4 * weight.abs().max().item())
    match(file, f"{name}/cam_raw", maps.raw.unflatten(1, seen.size), atol=1e-6)

    seeds = clip_es.seeds(seen.blocks[-1], label, seen.size)
    order = classes.argsort().argsort()  # ours are ascending
    match(file, f"{name}/cam", seeds[order], atol=5e-5)
    mean = clip_es.attention(seen)
    match(file, f"{name}/affinity_mean", mean[0], atol=1e-6)
    matrix = transition(mean)
    match(file, f"{name}/T", matrix[0], atol=1e-6)
    match(file, f"{name}/refined_grid", spread(seeds, matrix, VOC)[order], atol=2e-6)
    match(file, f"{name}/refined_grid_nomask", spread(seeds, matrix, None)[order], atol=2e-6)
    for prefix, threshold in (("", VOC), ("coco_", COCO)):
        recorded = arrays[f"{name}/{prefix}boxes"].split(arrays[f"{name}/{prefix}box_counts"].tolist())
        found = [with_holes(cam, threshold) for cam in seeds[order]]
        match(file, f"{name}/{prefix}box_counts", [max(1, len(one)) for one in found])  # a map without any has one of 0
        match(file, f"{name}/{prefix}boxes", torch.cat([*map(as_recorded, found, recorded)]))
        clip_es.hparams.box_threshold = threshold
        full = resize(clip_es.cam(seen, label, clip_es.attention(seen)), size)[0, classes]
        clip_es.hparams.box_threshold = VOC
        match(file, f"{name}/{prefix}refined_full", full, atol=2e-4)
    empty = resize(min_max(spread(seeds * 0, matrix, VOC), 1e-7)[None], size)[0]
    match(file, f"{name}/refined_full_emptymask", empty[order])

    full = resize(clip_es.infer_batch({"image": image, "label": label})["cam"], size)[0]
    match(file, f"{name}/saved_half", full[classes].half(), atol=1e-3)
    match(file, f"{name}/keys", label[0].nonzero()[order, 0])


@pytest.mark.parametrize("name", ["img0", "img1"])
def test_clip_es_with_half_positions(recordings: Any, match: Any, half_positions: CLIPES, name: str) -> None:
    file, arrays = "clip/clipes_image", recordings("clip/clipes_image")
    classes = arrays[f"{name}/labels"].long()
    label, order = multi_hot(classes, half_positions.num_classes), classes.argsort().argsort()
    seen = half_positions.see(half_positions.sized(normalise(arrays[f"{name}/image"], half_positions)))
    match(file, f"{name}/half_positions_resized", half_positions.tower.positions(seen.size), atol=1e-6)
    match(file, f"{name}/half_cam", half_positions.seeds(seen.blocks[-1], label, seen.size)[order], atol=5e-5)
    full = resize(half_positions.cam(seen, label, half_positions.attention(seen)), arrays[f"{name}/image"].shape[:2])[
        0, classes
    ]
    match(file, f"{name}/half_refined_full", full, atol=2e-4)


def test_clip_es_boxes(recordings: Any, match: Any) -> None:
    file, arrays = "clip/clipes_boxes", recordings("clip/clipes_boxes")
    for name in arrays["names"].tolist():
        cam, threshold = arrays[f"{name}/map"], arrays[f"{name}/lambda"].item()
        match(file, f"{name}/mask", box_masks(cam[None], threshold)[0])
        match(file, f"{name}/boxes", as_recorded(with_holes(cam, threshold), arrays[f"{name}/boxes"]))


def test_clip_es_min_max(recordings: Any, match: Any) -> None:
    file, arrays = "clip/clipes_boxes", recordings("clip/clipes_boxes")
    cases = sorted({key.partition("/")[0] for key in arrays if key.startswith("minmax_")})
    assert cases
    for name in cases:
        raw = torch.einsum("dhw,d->hw", arrays[f"{name}/act"], arrays[f"{name}/grad"].mean((1, 2))).relu()
        once = min_max(raw, 1e-7)
        match(file, f"{name}/once", once, atol=5e-5)
        match(file, f"{name}/cam", min_max(once, 1e-7), atol=5e-5)
    width, height = arrays["upsample/width_height"].tolist()
    enlarged = resize(min_max(arrays["upsample/map"][None, None], 1e-7), (height, width))[0, 0]
    match(file, "upsample/out", enlarged, atol=1e-6)


@pytest.mark.parametrize("name", ["img0", "img1"])
def test_clip_es_crf(recordings: Any, match: Any, name: str) -> None:
    """Half precision and the wrapped image of the released call are made here: the library has no use for them."""
    file, arrays = "clip/clipes_crf", recordings("clip/clipes_crf")
    scores, image = arrays[f"{name}/scores_half"], recordings("clip/clipes_image")[f"{name}/image"]
    half = torch.cat([1 - scores.amax(0, keepdim=True), scores])
    match(file, f"{name}/prob_in", half)
    match("clip/clipes_image", f"{name}/saved_half", scores, atol=1e-3)
    colours = image.permute(2, 0, 1)
    probability = dense_crf(colours[None], half[None], **CRF)[0]
    match(file, f"{name}/crf_clean", probability, atol=1e-3)
    ids = torch.arange(256)
    ids[: 1 + len(scores)] = F.pad(recordings("clip/clipes_image")[f"{name}/labels"].long() + 1, (1, 0))

    mask = crf(colours.float(), scores.float(), alpha=1.0, confidence=0.95, **CRF).mask
    decided = torch.where(probability.amax(0) < 0.95, 255, probability.argmax(0))
    for ours in (mask, decided):
        match(file, f"{name}/mask_clean", ids[ours], share=1e-3)
    wrapped = arrays[f"{name}/wrapped_bgr"].permute(2, 0, 1)
    energy = half.clamp(min=1e-5).log()  # in half precision
    probability = dense_crf(wrapped[None], energy.float().exp()[None], **CRF)[0]
    match(file, f"{name}/crf_released", probability, atol=1e-3)
    decided = torch.where(probability.amax(0) < 0.95, 255, probability.argmax(0))
    match(file, f"{name}/mask_released", ids[decided], share=1e-3)


# --- WeCLIP -----------------------------------------------------------------------------------------------------------


def build_weclip(recordings: Any, tower_file: Path, text_file: Path, **settings: Any) -> WeCLIP:
    arrays = recordings("clip/weclip_weights")
    given = {
        "channels": int(arrays["embedding_dim"]),
        "decoder_depth": int(arrays["decoder_blocks"]),
        "decoder_heads": int(arrays["decoder_heads"]),
        "par": {"iterations": PAR_ITERATIONS},
        "long_side": None,
    }
    method = build(WeCLIP, recordings("clip/clip_weights"), tower_file, text_file, **given | settings)
    learnt = {n for n, _ in method.named_parameters() if not n.startswith("tower.")}
    state = {name: arrays[f"sd/{official_name(name)}"] for name in learnt}
    assert len(state) == sum(key.startswith("sd/") for key in arrays)
    method.load_state_dict(state, strict=False)
    return method


@pytest.fixture(scope="module")
def weclip(recordings: Any, tower_file: Path, text_file: Path) -> WeCLIP:
    return build_weclip(recordings, tower_file, text_file)


def test_a_file_of_the_original(recordings: Any, match: Any, tower_file: Path, text_file: Path, tmp_path: Path) -> None:
    """All of a checkpoint, the tower in half precision among it, by way of what a user calls."""
    tower, learnt = recordings("clip/clip_weights"), recordings("clip/weclip_weights")
    state = {key[3:]: tensor for key, tensor in learnt.items() if key.startswith("sd/")}
    state |= {f"encoder.visual.{key[3:]}": t.half() for key, t in tower.items() if key.startswith("sd/")}
    state |= {"encoder.visual.positional_embedding_new": torch.zeros(5, 48), "encoder.logit_scale": torch.ones(())}
    path = tmp_path / "weclip.pth"
    torch.save(state, path)
    given = {"weights": str(tower_file), "text": str(text_file), "backbone_args": tower_arguments(tower)}
    given |= {"decoder_heads": int(learnt["decoder_heads"]), "long_side": None}
    names = [str(index) for index in range(len(tower["fg_text"]))]
    method = wsss.load(path, classes=names, **given).method
    assert isinstance(method, WeCLIP)
    torch.testing.assert_close(method.text, tower["fg_text"], rtol=0, atol=1e-4)
    arrays = recordings("clip/weclip_forward")
    match("clip/weclip_forward", "seg", method(normalise_all(arrays["images_u8"], method))["seg"], atol=5e-5)

    other = {name: tensor + 1 if name.endswith("visual.proj") else tensor for name, tensor in state.items()}
    torch.save(other, path)
    with pytest.raises(
        InputError, match=r"weclip\.pth was trained on another image tower of CLIP than method\.weights"
    ):
        wsss.load(path, classes=names, **given)


def normalise_all(images: Tensor, method: Any) -> Tensor:
    return torch.cat([normalise(image, method) for image in images])


def test_weclip_weights(recordings: Any, match: Any, weclip: WeCLIP) -> None:
    for name, tensor in weclip.named_parameters():
        if not name.startswith("tower."):
            match("clip/weclip_weights", f"sd/{official_name(name)}", tensor)


@pytest.fixture(scope="module")
def seen(recordings: Any, weclip: WeCLIP) -> tuple[Tensor, Tensor, Seen, Decoded]:
    """Images, labels, and what is seen in them."""
    arrays = recordings("clip/weclip_forward")
    image, label = normalise_all(arrays["images_u8"], weclip), arrays["labels"].float()
    seen, _ = weclip.look(image)
    return image, label, seen, weclip.decode(seen, None)


def test_weclip_forward(recordings: Any, match: Any, weclip: WeCLIP, seen: Any) -> None:
    file = "clip/weclip_forward"
    image, label, found, decoded = seen
    match(file, "tokens_11", found.blocks[:, 0, 1:].mT.unflatten(2, found.size), atol=2e-4)
    match(file, "fused_F", weclip.fusion(found.blocks[:, :, 1:], found.size), atol=2e-5)
    match(file, "P", decoded.affinity, atol=2e-5)
    match(file, "seg", decoded.seg, atol=5e-5)
    match(file, "seg", weclip(image)["seg"], atol=5e-5)
    match(file, "attn_last", found.attention[-1, :1], atol=1e-5)
    match(file, "cam_grid", weclip.seeds(found.blocks[-1], label, found.size), atol=5e-5)


@pytest.mark.parametrize("case", ["static", "rfm", "coco_static", "coco_rfm"])
def test_weclip_pseudo_labels(recordings: Any, match: Any, weclip: WeCLIP, seen: Any, case: str) -> None:
    file, arrays = "clip/weclip_forward", recordings("clip/weclip_forward")
    image, label, found, decoded = seen
    settings, refine = REFINED["coco" if case.startswith("coco") else "voc"], case.endswith("rfm")
    method = deepcopy(weclip)
    method.hparams.update(settings)
    attention = method.attention(found)
    if refine:
        layers = found.attention[-settings["refine_layers"] :, :, 1:, 1:]
        distance, kept = agreeing_layers(layers, decoded.affinity)
        match(file, f"{case}/d", distance, rtol=1e-5)
        match(file, f"{case}/keep", kept)
        attention = refined_attention(layers, decoded.affinity)
    match(file, f"{case}/A", attention, atol=5e-6)
    matrix = transition(attention)
    if f"{case}/T" in arrays:
        match(file, f"{case}/T", matrix, atol=5e-6)
    seeds, rows = method.seeds(found.blocks[-1], label, found.size), label.nonzero()[:, 0]
    boxed = [with_holes(cam, settings["box_threshold"]) for cam in seeds]
    recorded = arrays[f"{case}/boxes"].split(arrays[f"{case}/box_counts"].tolist())
    match(file, f"{case}/box_counts", [max(1, len(one)) for one in boxed])
    match(file, f"{case}/boxes", torch.cat([*map(as_recorded, boxed, recorded)]))
    match(file, f"{case}/refined_grid", spread(seeds, matrix[rows], settings["box_threshold"]), atol=2e-6)
    cam = method.refined_cam(found, label, decoded, refine)
    full = resize(cam, image.shape[-2:])[label > 0]
    stride = image.shape[-1] // arrays[f"{case}/refined"].shape[-1]
    match(file, f"{case}/refined", full[:, ::stride, ::stride], atol=1e-4)
    match(file, f"{case}/Y", method.pseudo_label(image, cam, label, image.shape[-2:]), share=1e-3)
    if f"{case}/par_image0" in arrays:
        own = resize(cam, image.shape[-2:])[0, label[0] > 0]
        scores = torch.cat([1 - own.amax(0, keepdim=True), own])
        match(file, f"{case}/par_image0", method.par(image[:1], scores[None])[0], atol=1e-4)


def test_weclip_in_half_precision(recordings: Any, match: Any, weclip: WeCLIP, seen: Any) -> None:
    """What the released code gives, whose output projections are in half precision: ours comes near it."""
    file, arrays = "clip/weclip_forward", recordings("clip/weclip_forward")
    image, label, found, decoded = seen
    ours = {
        "fused_F": weclip.fusion(found.blocks[:, :, 1:], found.size),
        "seg": decoded.seg,
        "P_image0": decoded.affinity[0],
    }
    for key, value in ours.items():
        match(file, f"half_out_proj/{key}", value, atol=HALF[key])
        assert (value - arrays[f"half_out_proj/{key}"]).abs().mean() < 2e-3
    match(file, "half_out_proj/Y", weclip.online_label(image, label, found, decoded), share=5e-3)


class Kept(nn.Module):
    """Channel dropout with recorded channels (B, D)."""

    def __init__(self, keep: Tensor, probability: float) -> None:
        super().__init__()
        self.keep, self.probability = keep, probability

    def forward(self, maps: Tensor) -> Tensor:
        return maps * self.keep[:, :, None, None] / (1 - self.probability)


def test_weclip_forward_with_dropout(recordings: Any, match: Any, weclip: WeCLIP, seen: Any) -> None:
    file, arrays = "clip/weclip_forward", recordings("clip/weclip_forward")
    method, found = deepcopy(weclip), seen[2]
    method.fusion.dropout = Kept(arrays["train_mode/keep_channels"], method.hparams.dropout)
    decoded = method.decode(found, None)
    match(file, "train_mode/seg", decoded.seg, atol=5e-5)
    match(file, "train_mode/P_image0", decoded.affinity[0], atol=2e-5)
    layers = found.attention[-method.hparams.refine_layers :, :, 1:, 1:]
    match(file, "train_mode/rfm_d", agreeing_layers(layers, decoded.affinity)[0], rtol=1e-5)


@pytest.mark.parametrize("data", ["voc", "coco"])
def test_weclip_refinement(recordings: Any, match: Any, weclip: WeCLIP, data: str) -> None:
    file, arrays = "clip/weclip_crafted", recordings("clip/weclip_crafted")
    image, label = normalise(arrays["image_u8"], weclip), multi_hot(arrays["classes"], weclip.num_classes)
    layers, affinity = arrays[f"{data}/maps"][:, None], arrays[f"{data}/P"][None]
    distance, kept = agreeing_layers(layers, affinity)
    match(file, f"{data}/d", distance[0], rtol=1e-5)
    match(file, f"{data}/keep", kept[0])
    attention = refined_attention(layers, affinity)
    match(file, f"{data}/A", attention[0], atol=2e-6)
    matrix = transition(attention)
    match(file, f"{data}/T", matrix[0], atol=2e-6)
    found = weclip.see(image)
    seeds = weclip.seeds(found.blocks[-1], label, found.size)
    match(file, f"{data}/refined_grid", spread(seeds, matrix, REFINED[data]["box_threshold"]), atol=2e-6)


def test_transition(recordings: Any, match: Any) -> None:
    file, arrays = "clip/weclip_crafted", recordings("clip/weclip_crafted")
    cases = sorted({key.partition("/")[0] for key in arrays if key.startswith("peaky")})
    assert cases
    for name in cases:
        match(file, f"{name}/T", transition(arrays[f"{name}/A"]), atol=2e-6)


def test_weclip_losses(recordings: Any, match: Any, weclip: WeCLIP, seen: Any) -> None:
    file, arrays = "clip/weclip_losses", recordings("clip/weclip_losses")
    image, label, found, _ = seen
    radius = int(arrays["radius"])
    method = deepcopy(weclip).requires_grad_(True)
    method.tower.requires_grad_(False)
    decoded = method.decode(found, None)
    pseudo = method.online_label(image, label, found, decoded)
    match(file, "Y", pseudo, share=1e-3)
    affinity_loss, seg_loss = build_loss("aff", radius=radius), build_loss("seg")

    def cells(ids: Tensor) -> Tensor:
        return F.interpolate(ids[:, None].float(), size=found.size, mode="nearest")[:, 0].long()

    def relations(ids: Tensor) -> Tensor:
        same, different = pair_relations(cells(ids), radius)
        return torch.where(same, 1, torch.where(different, 0, 255))

    near = near_pairs(*found.size, radius)
    match(file, "radius_mask", near)
    for key in (key for key in arrays if key.startswith("radius_mask_")):
        height, width, own = map(int, re.fullmatch(r"radius_mask_(\d+)x(\d+)_r(\d+)", key).groups())
        match(file, key, near_pairs(height, width, own))
    recorded = arrays["Y"].long()
    match(file, "affinity_label", relations(recorded))
    same, different = pair_relations(cells(recorded), radius)
    match(file, "pos_count", same.sum() + 1)
    match(file, "neg_count", different.sum() + 1)
    seg, affinity = seg_loss(decoded.seg, recorded), affinity_loss(decoded.affinity, cells(recorded))
    total = seg + 0.1 * affinity
    for key, value in {"seg_loss": seg, "aff_loss": affinity, "loss": total}.items():
        match(file, key, value, rtol=1e-5)

    learnt = {official_name(n): p for n, p in method.named_parameters() if not n.startswith("tower.")}
    listed = arrays["grad_names"].tolist()
    assert set(listed) == set(learnt)
    ordered = [learnt[name] for name in listed]
    for key, value in {"grad_norm_seg": seg, "grad_norm_aff": affinity}.items():
        found_ = torch.autograd.grad(value, ordered, retain_graph=True, allow_unused=True)
        match(file, key, [-1.0 if g is None else g.norm().item() for g in found_], rtol=1e-4, atol=1e-7)
    for name, gradient in zip(listed, torch.autograd.grad(total, ordered), strict=True):
        scale = arrays[f"grad/{name}"].abs().max().item()
        match(file, f"grad/{name}", gradient, rtol=1e-4, atol=max(1e-5 * scale, 2e-6 * ("in_proj_bias" in name)))

    ignoring = arrays["ignore/Y"].long()
    match(file, "ignore/affinity_label", relations(ignoring))
    match(file, "ignore/aff_loss", affinity_loss(decoded.affinity, cells(ignoring)), rtol=1e-5)
    match(file, "ignore/seg_loss", seg_loss(decoded.seg, ignoring), rtol=1e-5)
    background = torch.zeros_like(recorded)
    assert arrays["all_background/seg_loss"].isnan()
    half_mean = 0.5 * F.cross_entropy(resize(decoded.seg, background.shape[-2:]), background)
    torch.testing.assert_close(seg_loss(decoded.seg, background), half_mean)
    match(file, "all_background/aff_loss", affinity_loss(decoded.affinity, cells(background)), rtol=1e-5)


@pytest.mark.parametrize("data", ["voc", "coco"])
def test_weclip_schedule(recordings: Any, match: Any, data: str) -> None:
    steps = recordings("clip/weclip_lr")[f"{data}/step"].tolist()
    factor = warmup_poly(WECLIP_LR[data], WECLIP_LR["warmup"], 1e-6, 1.0)
    rates = torch.tensor([WECLIP_LR["lr"] * factor(step) for step in steps], dtype=torch.double)
    match("clip/weclip_lr", f"{data}/lr", rates, rtol=1e-12)


def test_weclip_training(
    recordings: Any, match: Any, tower_file: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of the recorded training, by a plain loop with the method's own optimizer and schedule."""
    file, arrays = "clip/weclip_training", recordings("clip/weclip_training")
    steps = int(arrays["max_iters"])
    losses = {"seg": {"weight": 1.0}, "aff": {"weight": 0.1, "radius": int(recordings("clip/weclip_losses")["radius"])}}
    method = build_weclip(
        recordings, tower_file, text_file, static_steps=int(arrays["rfm_first_step"]), losses=losses,
        lr=10 * arrays["base_lr"].item(), warmup_steps=int(arrays["warmup_iter"]),
    )  # fmt: skip
    for name, parameter in method.named_parameters():
        parameter.requires_grad_(not name.startswith("tower."))
    method.train()
    method.log = method.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign]
    monkeypatch.setattr(WeCLIP, "total_steps", steps)
    configured = method.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    batches = len({key.partition("/")[0] for key in arrays if key.startswith("batch")})
    found: dict[str, list[Any]] = {key: [] for key in ("seg_loss", "attn_loss", "lr", "Y", "rfm_keep")}
    proper = method.online_label

    def watched(image: Tensor, label: Tensor, seen: Seen, decoded: Decoded, max_labels: int) -> Tensor:
        layers = seen.attention[-method.hparams.refine_layers :, :, 1:, 1:]
        kept = agreeing_layers(layers, decoded.affinity)[1].float()
        early = method.global_step < method.hparams.static_steps
        found["rfm_keep"].append(kept * 0 - 1 if early else kept)
        found["Y"].append(proper(image, label, seen, decoded, max_labels))
        return arrays["Y"][method.global_step].long()  # a pixel at a tie would change the losses

    monkeypatch.setattr(method, "online_label", watched)
    for step in range(steps):
        monkeypatch.setattr(WeCLIP, "global_step", step)
        method.fusion.dropout = Kept(arrays["keep_channels"][step], method.hparams.dropout)
        batch = f"batch{step % batches}"
        image, label = normalise_all(arrays[f"{batch}/images_u8"], method), arrays[f"{batch}/labels"].float()
        found["lr"].append(optimizer.param_groups[0]["lr"])
        result = method.training_step({"image": image, "label": label}, step)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        schedule.step()
        found["seg_loss"].append(result["terms"]["seg"].item())
        found["attn_loss"].append(result["terms"]["aff"].item())
    match(file, "seg_loss", found["seg_loss"], rtol=1e-4)
    match(file, "attn_loss", found["attn_loss"], rtol=1e-4)
    match(file, "lr", torch.tensor(found["lr"], dtype=torch.double), rtol=1e-12)
    match(file, "Y", torch.stack(found["Y"]), share=1e-3)
    match(file, "rfm_keep", torch.stack(found["rfm_keep"]))
    for name, tensor in method.named_parameters():
        if not name.startswith("tower."):
            name = official_name(name)
            match(file, f"final/{name}", tensor, atol=5e-3 if name.endswith("in_proj_bias") else 1e-5)


def test_weclip_inference(recordings: Any, match: Any, weclip: WeCLIP, tower_file: Path, text_file: Path) -> None:
    file, arrays = "clip/weclip_inference", recordings("clip/weclip_inference")
    method = deepcopy(weclip)
    method.hparams.long_side = int(arrays["resize_long"])
    method.protocol = Protocol(**PROTOCOL)
    size, image = arrays["image_u8"].shape[:2], normalise(arrays["image_u8"], method)
    sized = method.sized(image)
    match(file, "network_input_scale1", sized, atol=1e-5)
    scaled = [sized, rescale_by_factor(sized, PROTOCOL["scales"][1], False)]
    pairs = [torch.cat([one, one.flip(-1)]) for one in scaled]
    match(file, "network_input_shapes", [list(pair.shape) for pair in pairs])
    for number, pair in enumerate(pairs):
        match(file, f"seg_scale{number + 1}_and_flip", method(pair)["seg"], atol=5e-5)
    seg = method.infer(image, cams=False)["seg"]
    match(file, "segs", seg, atol=5e-5)
    scores = method.segment(image, size, seg)
    fused = method._fuse(image, seg.shape[-2:], seg, method.protocol)
    match(file, "msc_segs", fused, atol=5e-5)
    match(file, "pred_msc", scores.argmax(1)[0], share=1e-3)
    match(file, "pred_single", resize(seg, size).argmax(1)[0], share=1e-3)

    label = multi_hot(arrays["labels"], method.num_classes).expand(2, -1)
    seen, _ = method.look(pairs[0])
    cam = method.refined_cam(seen, label, method.decode(seen, None), refine=True)
    match(file, "cam_label_scale1", method.pseudo_label(pairs[0], cam, label, size), share=1e-3)

    colours = arrays["image_u8"].permute(2, 0, 1)[None]
    stored = resize(arrays["msc_segs"], size).softmax(1)
    refined = dense_crf(colours, stored, **WECLIP_CRF)[0]
    match(file, "crf_prob", refined, atol=1e-3)
    match(file, "crf_pred", refined.argmax(0), share=1e-3)
    method.protocol = Protocol(**PROTOCOL, crf={"iterations": 10} | WECLIP_CRF)
    match(file, "crf_pred", method.segment(image, size, seg).argmax(1)[0], share=5e-3)

    half = build_weclip(recordings, tower_file, text_file, half_positions=True)
    match(file, "half_positions/seg_scale1", half(sized)["seg"], atol=5e-5)
    match(file, "half_positions_and_out_proj/seg_scale1", half(sized)["seg"], atol=HALF["seg"])

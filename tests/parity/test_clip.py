"""CLIP-ES and WeCLIP against recordings of the original code: every array of `--golden DIR`/clip."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from wsss.cam import min_max, resize
from wsss.data.pixels import Normalise
from wsss.methods.clip_es import CLIPES, gradient_maps
from wsss.refine.affinity import box_masks, boxes, spread, transition
from wsss.refine.crf import dense_crf
from wsss.refine.pseudo import crf

Arrays = dict[str, Any]

# What no array tells. Shapes, classes, depth and steps come from the arrays.
VOC, COCO = 0.4, 0.7  # box thresholds
CRF = {"gaussian": (1.0, 3.0), "bilateral": (67.0, 3.0, 4.0)}

EXCEPTED = (
    # files, arrays, why they are left alone
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
        full = resize(clip_es.cam(seen, label), size)[0, classes]
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
    full = resize(half_positions.cam(seen, label), arrays[f"{name}/image"].shape[:2])[0, classes]
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

"""PSA's affinity stage against recordings of the original code.

`--golden DIR`: DIR/resnet38/psa_functions and DIR/mctformer/psa, psa_train; features of the network itself are in
test_resnet38.py.
"""

import zlib
from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsss.data.pixels import Normalise
from wsss.data.pseudo import PseudoScores, pixel_tensors
from wsss.data.transforms import JitterCrop
from wsss.losses.affinity import AffinityLoss, pair_labels, pair_loss
from wsss.methods.affinity import Affinity
from wsss.networks.affinity import AffinityNet, pair_affinity
from wsss.pairs import affinity_labels, pair_offsets, pair_views
from wsss.refine.random_walk import (
    dense_affinity,
    pad_to_cells,
    random_walk,
    refine_scores,
    transition,
    with_background_score,
)

pytestmark = pytest.mark.filterwarnings("ignore:ResNet38 starts from random weights")

FUNCTIONS, PSA, TRAIN = "resnet38/psa_functions", "mctformer/psa", "mctformer/psa_train"
FOREGROUND = (3, 8)
"""Rows of the CAM stack, the background being row 0, that psa_functions fills."""

EXCEPTED = (
    # files, arrays, why perturb.py leaves them alone
    (FUNCTIONS, "afflabel_in affloss_aff merge_la merge_ha rw_sparse_aff rw_cam_fg", "input"),
    (PSA, "aff_label/in data/img/* affds/*/crop_x_y_flip affds/*/la affds/*/ha affds/keys", "input"),
    (PSA, "aff_fwd/in_u8 infer/img/* infer/cam/* infer/cam_classes rw/aff rw/cam", "input"),
    (TRAIN, "step?/img_u8 step?/label_*", "input"),
    (TRAIN, "step?/img_u8_maxdiff", "how well the recorded bytes are the recorded image"),
)


# --- pairs and labels -------------------------------------------------------------------------------------------------


def pair_indices(size: tuple[int, int], radius: int) -> tuple[Tensor, Tensor]:
    start, ends = pair_views(torch.arange(size[0] * size[1]).view(size), radius)
    return start.flatten(), torch.cat([end.flatten() for end in ends])


@pytest.mark.parametrize(("radius", "size"), [(5, (12, 13)), (3, (6, 8))])
def test_pairs_of_psa(match: Any, radius: int, size: tuple[int, int]) -> None:
    start, end = pair_indices(size, radius)
    match(FUNCTIONS, f"pairs_r{radius}_{size[0]}x{size[1]}_from", start)
    match(FUNCTIONS, f"pairs_r{radius}_{size[0]}x{size[1]}_to", end)


def test_pairs_of_a_crop_of_448(match: Any) -> None:
    start, end = pair_indices((56, 56), 5)
    ends = [int(x) for x in (start[0], start[-1], end[0], end[-1])]
    summary = [len(start), len(end), int(start.sum()), int(end.sum()), *ends]
    match(FUNCTIONS, "pairs_r5_56x56_summary", torch.tensor(summary))
    match(PSA, "pairs_56x56/shape", torch.tensor([len(start), len(end)]))
    weighted = (end * (torch.arange(len(end)) % 97)).sum()
    match(PSA, "pairs_56x56/sums", torch.stack([start.sum(), end.sum(), weighted]))


@pytest.mark.parametrize(
    ("name", "radius", "size"), [("12x14", 5, (12, 14)), ("10x13", 5, (10, 13)), ("r3_6x8", 3, (6, 8))]
)
def test_pairs_of_mctformer(match: Any, name: str, radius: int, size: tuple[int, int]) -> None:
    start, end = pair_indices(size, radius)
    match(PSA, f"pairs_{name}/from", start)
    match(PSA, f"pairs_{name}/to", end)


def test_order_of_the_offsets(match: Any) -> None:
    match(PSA, "search_dist_r5", torch.tensor(pair_offsets(5)))


@pytest.mark.parametrize("radius", [3, 5])
def test_pair_labels_of_psa(recordings: Any, match: Any, radius: int) -> None:
    masks = pair_labels(recordings(FUNCTIONS)["afflabel_in"][None], radius)
    for key, mask in zip(("bg", "fg", "neg"), masks, strict=True):
        match(FUNCTIONS, f"afflabel_r{radius}_{key}", mask[0])


def test_pair_labels_of_mctformer(recordings: Any, match: Any) -> None:
    masks = pair_labels(recordings(PSA)["aff_label/in"][None], 5)
    for key, mask in zip(("bg_pos", "fg_pos", "neg"), masks, strict=True):
        match(PSA, f"aff_label/{key}", mask[0])


def test_merged_labels(recordings: Any, match: Any) -> None:
    arrays = recordings(FUNCTIONS)
    match(FUNCTIONS, "merge_label", affinity_labels(arrays["merge_la"][None], arrays["merge_ha"][None])[0])


class Drawn:
    """Stands in for a generator: what the original code drew."""

    def __init__(self, integers: Sequence[int], mirrored: bool) -> None:
        self.given, self.mirrored = chain([0], integers), mirrored  # first the seed of the jitter, which is none

    def integers(self, _: int) -> int:
        return next(self.given)

    def random(self) -> float:
        return 0.0 if self.mirrored else 1.0


@pytest.mark.parametrize("name", ["2007_000032", "2007_000039"])
def test_training_items(recordings: Any, match: Any, name: str) -> None:
    arrays, crop = recordings(PSA), 128
    image = arrays[f"data/img/{name}"].numpy()
    (x, y, flip), (height, width) = arrays[f"affds/{name}/crop_x_y_flip"].tolist(), image.shape[:2]
    tall, wide = height > crop, width > crop  # then the offset is that of the window, else that of the image
    places = (0 if tall else y, 0 if wide else x, y if tall else 0, x if wide else 0)
    scores = np.concatenate([arrays[f"affds/{name}/{key}"].numpy() for key in ("la", "ha")]).transpose(1, 2, 0)
    rng: Any = Drawn(places, bool(flip))
    transform = JitterCrop(crop)
    transform.colour.transforms[0].p = 0.0
    views = transform({"image": image, "affinity_scores": scores}, rng)
    normalise = Normalise(Affinity.mean, Affinity.std)
    match(PSA, f"affds/{name}/img_chw", normalise(views["image"])[:, ::4, ::4], atol=1e-6)
    images = object.__new__(PseudoScores)
    ids = arrays["affds/keys"][1:].tolist()
    label = pixel_tensors(images, {"ids": ids}, views)["affinity_label"]
    index = torch.full((256,), 255)
    index[torch.tensor([0, *ids])] = torch.arange(1 + len(ids))
    match(PSA, f"affds/{name}/label", index[label])
    counts = [mask.sum().double() for mask in pair_labels(label[None], 5)]
    match(PSA, f"affds/{name}/counts", torch.stack(counts), atol=2e-5)


# --- loss -------------------------------------------------------------------------------------------------------------


def test_loss(recordings: Any, match: Any) -> None:
    arrays = recordings(FUNCTIONS)
    affinity, label = arrays["affloss_aff"].clone().requires_grad_(), arrays["afflabel_in"][None]
    loss = AffinityLoss(5)(affinity, label)
    loss.backward()
    masks = pair_labels(label, 5)
    counts = [mask.sum() + 1e-5 for mask in masks]
    match(FUNCTIONS, "affloss_values", torch.stack([loss, *pair_loss(affinity, masks), *counts]).double(), rtol=1e-6)
    match(FUNCTIONS, "affloss_grad", affinity.grad, atol=1e-6 * float(arrays["affloss_grad"].abs().max()))


# --- random walk ------------------------------------------------------------------------------------------------------


def test_walk_of_psa(recordings: Any, match: Any) -> None:
    arrays, size = recordings(FUNCTIONS), (12, 13)
    affinity = arrays["rw_sparse_aff"][None]
    dense = dense_affinity(affinity, size, 5)
    match(FUNCTIONS, "rw_dense_aff", dense[0], atol=1e-6)
    matrix = transition(dense, 8)
    match(FUNCTIONS, "rw_trans_1", matrix[0], atol=1e-6)
    match(FUNCTIONS, "rw_trans_logt3", torch.linalg.matrix_power(matrix, 8)[0], atol=1e-6)
    height, width = arrays["rw_label_logt3"].shape
    cam = torch.zeros(1, 20, height, width)
    cam[0, [row - 1 for row in FOREGROUND]] = arrays["rw_cam_fg"]
    scores = with_background_score(cam, alpha=16)
    pooled = F.avg_pool2d(pad_to_cells(scores), 8)
    match(FUNCTIONS, "rw_pooled", pooled[0], atol=1e-6)
    for logt, tolerance in ((3, 1e-6), (8, 2e-5)):
        for form in (True, False):
            out = random_walk(affinity, pooled, 5, 8, logt, dense=form)
            match(FUNCTIONS, f"rw_out_logt{logt}", out[0], atol=tolerance)
            label = refine_scores(affinity, scores, 5, 8, logt, dense=form).argmax(1)
            match(FUNCTIONS, f"rw_label_logt{logt}", label[0])


def test_walk_of_mctformer(recordings: Any, match: Any) -> None:
    arrays = recordings(PSA)
    matrix = torch.linalg.matrix_power(transition(arrays["rw/aff"][None], 8)[0], 2**6)
    match(PSA, "rw/trans_after", matrix, atol=5e-6)
    match(PSA, "rw/out", arrays["rw/cam"] @ matrix, atol=5e-6)


# --- network and training ---------------------------------------------------------------------------------------------


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("()[] ").replace(",", " ").split())


def recorded_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """By the recipe of the recordings, which depends on the name."""
    draw = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    last = name.rpartition(".")[2]
    if "bn" in name:
        draw = 0.1 * (np.abs(draw) if last == "running_var" else draw) + (last in ("weight", "running_var"))
    else:
        factor = 8 if name == "f9.weight" else 0.5 if "conv_branch2b" in name else 1
        draw = draw * factor / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(draw.astype(np.float32))


def official(network: AffinityNet) -> dict[str, Tensor]:
    """Our tensors under the names of the original code."""
    return {**network.backbone.body.state_dict(), **network.head.state_dict()}


@pytest.fixture(scope="module")
def method() -> Affinity:
    with torch.device("meta"):  # the weights come next
        module = Affinity(20, backbone_args={"dropout": (0.0, 0.0)})
    module.to_empty(device="cpu")
    for name, tensor in official(module.network).items():
        recorded = 0 if name.endswith("num_batches_tracked") else recorded_weight(name, tuple(tensor.shape))
        tensor.copy_(torch.as_tensor(recorded))
    return module.eval()


def test_names_and_weights(recordings: Any, match: Any) -> None:
    arrays = recordings(PSA)
    with torch.device("meta"):
        ours = official(AffinityNet())
    shapes = [shape_of(text) for text in arrays["aff_shapes"]]
    assert [(n, tuple(t.shape)) for n, t in ours.items()] == list(zip(arrays["aff_keys"].tolist(), shapes, strict=True))
    names = arrays["recipe_check/names"].tolist()
    first = [recorded_weight(name, tuple(ours[name].shape)).flatten()[:4] for name in names]
    match(PSA, "recipe_check/first4", torch.stack(first), rtol=1e-6)


def test_forward(recordings: Any, match: Any, method: Affinity) -> None:
    image = recordings(PSA)["aff_fwd/in_u8"].float() / 128 - 1
    network = method.network
    with torch.no_grad():
        conv4, conv5, conv6 = stages = network.stages(image)
        affinity = pair_affinity(network(image), 5)
    for name, stage, step in (("conv4", conv4, 64), ("conv5", conv5, 128), ("conv6", conv6, 512)):
        match(PSA, f"aff_fwd/{name}_slice", stage[0, ::step], atol=1e-4)
    match(PSA, "aff_fwd/conv4_stats", torch.stack([conv4.double().mean(), conv4.double().square().mean()]), rtol=1e-4)
    match(PSA, "aff_fwd/scales", torch.stack([stage.double().mean() for stage in stages]), rtol=1e-4)
    match(PSA, "aff_fwd/aff", affinity, atol=1e-4)
    match(PSA, "aff_fwd/aff_dense", dense_affinity(affinity, (12, 14), 5)[0], atol=1e-4)


@pytest.mark.parametrize("name", ["2007_000032", "2007_000039"])
def test_inference(recordings: Any, match: Any, method: Affinity, name: str) -> None:
    arrays = recordings(PSA)
    classes = arrays["infer/cam_classes"].tolist()
    image = Normalise(method.mean, method.std)(arrays[f"infer/img/{name}"].numpy())[None]
    cam, label = torch.zeros(1, 20, *image.shape[-2:]), torch.zeros(1, 20)
    cam[0, classes], label[0, classes] = arrays[f"infer/cam/{name}"], 1.0
    scores = method.refine(image, cam, label, background=0.39, beta=8, logt=6)
    match(PSA, f"infer/{name}/pred", scores.argmax(1)[0], share=1e-3)
    with torch.no_grad():
        affinity = pair_affinity(method.network(pad_to_cells(image)), 5)
    pooled = F.avg_pool2d(pad_to_cells(with_background_score(cam, 0.39)), 8)
    size = (pooled.shape[-2], pooled.shape[-1])
    match(PSA, f"infer/{name}/aff_dense_diagblock", dense_affinity(affinity, size, 5)[0, :40, :40], atol=2e-4)
    for form in (True, False):
        walked = random_walk(affinity, pooled, 5, 8, 6, dense=form)
        match(PSA, f"infer/{name}/cam_rw_small", walked, atol=2e-4)


@pytest.mark.slow
def test_training(recordings: Any, match: Any, method: Affinity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of the original script."""
    arrays, method = recordings(TRAIN), deepcopy(method)
    monkeypatch.setattr(Affinity, "total_steps", len(arrays["steps"]))
    configured: Any = method.train().configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    network = method.network
    before = {name: tensor.clone() for name, tensor in official(network).items()}
    parameters = {**dict(network.backbone.body.named_parameters()), **dict(network.head.named_parameters())}
    rows, rates = [], []
    for step in range(len(arrays["steps"])):
        normalise = Normalise(method.mean, method.std)
        image = torch.stack([normalise(u8.permute(1, 2, 0).numpy()) for u8 in arrays[f"step{step}/img_u8"]])
        masks = recorded_masks(arrays, step)
        affinity = pair_affinity(network(image), method.radius)
        background, foreground, different = terms = pair_loss(affinity, masks)
        loss = background / 4 + foreground / 4 + different / 2
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            compare_gradients(recordings, match, parameters)
        groups = optimizer.param_groups
        rates.append([g["lr"] for g in groups] + [groups[0]["momentum"], *(g["weight_decay"] for g in groups[:2])])
        optimizer.step()
        schedule.step()
        named = {"loss": loss, **dict(zip(("bg_loss", "fg_loss", "neg_loss"), terms, strict=True))}
        named |= {f"{key}_cnt": m.sum() + 1e-5 for key, m in zip(("bg", "fg", "neg"), masks, strict=True)}
        rows.append([named[column].item() for column in arrays["columns"]])
    match(TRAIN, "steps", torch.tensor(rows, dtype=torch.double), atol=2e-5, rtol=1e-7)
    match(TRAIN, "lr_mom_wd", torch.tensor(rates, dtype=torch.double), rtol=1e-9)
    moved = {name: (tensor - before[name]).double() for name, tensor in official(network).items()}
    deltas = [moved[name] for name in arrays["delta_names"].tolist()]
    norms = torch.stack([delta.norm() for delta in deltas])
    match(TRAIN, "delta_l2", norms, rtol=1e-3)
    # a sum of as many numbers of both signs is as sure as their length
    lengths = torch.stack([delta.numel() ** 0.5 * delta.norm() for delta in deltas])
    match(TRAIN, "delta_sum", torch.stack([delta.sum() for delta in deltas]), rtol=1e-3, atol=1e-4 * lengths)
    first = network.head.f9.weight.flatten(1)[:16]
    match(TRAIN, "final/f9_first16rows", first, atol=2e-5)


def recorded_masks(arrays: dict[str, Any], step: int) -> list[Tensor]:
    shape = tuple(arrays[f"step{step}/label_shape"].tolist())
    packed = [arrays[f"step{step}/label_{key}_bits"].numpy() for key in ("bg", "fg", "neg")]
    return [torch.from_numpy(np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape) > 0) for bits in packed]


def compare_gradients(recordings: Any, match: Any, parameters: dict[str, nn.Parameter]) -> None:
    """Squared norms by the groups that the original script builds, where frozen parameters (-1) are in, too."""
    for group in range(4):
        names = recordings(PSA)[f"aff_groups_as_built_by_script/{group}"]
        gradients = [parameters[name].grad for name in (names.tolist() if len(names) else [])]
        squares = [-1.0 if g is None else g.double().square().sum().item() for g in gradients]
        match(TRAIN, f"step0_gradsq_group{group}", torch.tensor(squares, dtype=torch.double), rtol=1e-3)


def test_groups(recordings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = recordings(PSA)
    monkeypatch.setattr(Affinity, "total_steps", 1)
    with torch.device("meta"):
        module = Affinity(20)
    configured: Any = module.configure_optimizers()
    parts = (module.network.backbone.body, module.network.head)
    own = {id(p): name for part in parts for name, p in part.named_parameters()}
    groups = [[own[id(p)] for p in group["params"]] for group in configured["optimizer"].param_groups]
    recorded = [arrays[f"aff_groups_after_train/{group}"] for group in range(4)]
    assert groups == [names.tolist() if len(names) else [] for names in recorded]

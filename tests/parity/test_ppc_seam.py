"""Losses of SEAM and PPC against recordings of the original code: `--golden DIR`/ppc_seam, but for the networks.

The networks are replaced by up-sampling of small maps, the leaves, whose gradients were recorded.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wsss.cam import inference_norm, max_norm
from wsss.losses import PixelPrototypeContrastLoss, build
from wsss.losses.ppc import View, score_maps
from wsss.losses.seam import max_onehot, view_cam

Arrays = dict[str, Any]

# What no array tells. Shapes, classes and numbers of pixels come from the arrays.
SETTINGS: dict[str, Any] = {
    "seam": "ppc_seam/seam_losses",
    "ppc": "ppc_seam/ppc_losses",
    "ecr": {"fraction": 0.2},
    "contrast": {"temperature": 0.1, "background_score": 0.2, "negatives": 10},
    "weights": {"cross_prototype": 0.1, "cross_label": 0.1, "intra": 0.1},
}

EXCEPTED = (
    ("ppc_seam/seam_losses", "img1 label cam?_low rv?_low", "input"),
    ("ppc_seam/seam_losses", "max_norm_in minpool_in infer_sum_cam", "input"),
    ("ppc_seam/ppc_losses", "label cam?_low rv?_low f_proj? img_hw view_sizes", "input"),
    ("ppc_seam/ppc_losses", "rand_view*", "input: what the original drew"),
    ("ppc_seam/seam_losses ppc_seam/ppc_losses", "loss_names", "names"),
)


def shrink(maps: Tensor, size: Any) -> Tensor:
    """Both ways: up to an image, down to a view."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def leaves(arrays: Arrays) -> dict[str, Tensor]:
    names = [name for name in arrays if name.removesuffix("_low")[:-1] in ("cam", "rv", "f_proj")]
    return {name: arrays[name].clone().requires_grad_() for name in names}


def seam_terms(arrays: Arrays, at: dict[str, Tensor]) -> dict[str, Tensor]:
    """SEAM's loss and its parts by the names of the recordings."""
    label = arrays["label"]
    sizes = [size[2:].tolist() for size in arrays["view_sizes"]]
    cams, revised = ([shrink(at[f"{kind}{v}_low"], sizes[v - 1]) for v in (1, 2)] for kind in ("cam", "rv"))
    parts = {}
    for v in (0, 1):
        parts[f"loss_cls{v + 1}"] = build("cls")(cams[v][:, 1:].mean(dim=(-2, -1)), label)
        parts[f"loss_rvmin{v + 1}"] = build("rvmin")(revised[v], label)
    first, second = (view_cam(cam, label, sizes[1]) for cam in cams)
    first_revised, second_revised = (view_cam(cam, label, sizes[1]) for cam in revised)
    parts["loss_er"] = build("er")(first, second)
    cross = build("ecr", **SETTINGS["ecr"])
    parts["loss_ecr1"], parts["loss_ecr2"] = cross(first_revised, second), cross(second_revised, first)
    parts["loss_ecr"] = parts["loss_ecr1"] + parts["loss_ecr2"]
    halves = [parts[f"loss_{kind}{v}"] / 2 for kind in ("cls", "rvmin") for v in (1, 2)]
    parts["loss_cls"] = torch.stack(halves).sum()
    return parts | {"loss": parts["loss_cls"] + parts["loss_er"] + parts["loss_ecr"]}


def match_values(match: Any, file: str, arrays: Arrays, parts: dict[str, Tensor]) -> None:
    values = torch.stack([parts[name] for name in arrays["loss_names"].tolist()])
    match(file, "loss_values", values, rtol=1e-5)


def match_gradient(match: Any, file: str, key: str, recorded: Tensor, gradient: Tensor) -> None:
    """Every n-th channel was recorded."""
    step = -(-gradient.shape[1] // recorded.shape[1])
    match(file, key, gradient[:, ::step], atol=1e-4 * recorded.abs().max())


# --- SEAM -------------------------------------------------------------------------------------------------------------


def test_functions_of_cams(recordings: Any, match: Any) -> None:
    file = SETTINGS["seam"]
    arrays = recordings(file)
    cam = arrays["max_norm_in"]
    match(file, "max_norm_out", max_norm(cam), atol=1e-5)
    match(file, "max_onehot_out", max_onehot(cam), atol=1e-5)
    match(file, "infer_norm_cam", inference_norm(arrays["infer_sum_cam"]), atol=1e-5)


def test_min_pooling(recordings: Any, match: Any) -> None:
    file = SETTINGS["seam"]
    maps = recordings(file)["minpool_in"]
    without_background = F.pad(maps, (0, 0, 0, 0, 1, 0))  # the recorded maps are all pooled
    match(file, "minpool_out", build("rvmin")(without_background, torch.ones(maps.shape[:2])), rtol=1e-5)


def test_seam(recordings: Any, match: Any) -> None:
    file = SETTINGS["seam"]
    arrays = recordings(file)
    match(file, "view_sizes", torch.tensor([arrays["img1"].shape, arrays["img2"].shape]))
    match(file, "img2", shrink(arrays["img1"], arrays["img2"].shape[2:]), atol=1e-5)
    at = leaves(arrays)
    parts = seam_terms(arrays, at)
    match_values(match, file, arrays, parts)
    for term in ("total", "loss_er", "loss_ecr"):
        loss = parts["loss" if term == "total" else term]
        gradients = torch.autograd.grad(loss, list(at.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(at, gradients, strict=True):
            key = f"grad_{term}_{name}"
            if gradient is None:
                match(file, key, torch.zeros(1))  # how "no path" was recorded
            else:
                match_gradient(match, file, key, arrays[key], gradient)


# --- PPC --------------------------------------------------------------------------------------------------------------


class Replayed(PixelPrototypeContrastLoss):
    """Chooses the pixels that the recorded run chose."""

    def __init__(self, arrays: Arrays) -> None:
        pixels = arrays["top_indices1"].shape[1]
        super().__init__(prototype_pixels=pixels, **SETTINGS["contrast"], **SETTINGS["weights"])
        self.arrays = arrays
        self.of_view = self.drawn_in = 0
        self.scores: dict[int, Tensor] = {}
        self.chosen: dict[int, Tensor] = {}

    def top_pixels(self, scores: Tensor) -> Tensor:
        self.of_view = self.of_view % 2 + 1
        self.scores[self.of_view], self.chosen[self.of_view] = scores, super().top_pixels(scores)
        return self.arrays[f"top_indices{self.of_view}"]

    def draw(self, label: Tensor) -> Tensor:
        self.drawn_in = self.drawn_in % 2 + 1
        order = torch.ones(label.shape)
        prefix = f"rand_view{self.drawn_in}_class"
        for key in (key for key in self.arrays if key.startswith(prefix)):
            of_class = (label == int(key.removeprefix(prefix))).nonzero()[:, 0]
            order[of_class[self.arrays[key]]] = 0
        return order


def views(loss: Replayed, arrays: Arrays, at: dict[str, Tensor]) -> list[View]:
    size = arrays["norm_rv2_16"].shape[2:]
    return [loss.view(at[f"f_proj{v}"], at[f"rv{v}_low"], arrays["label"], size) for v in (1, 2)]


def test_prototypes(recordings: Any, match: Any) -> None:
    file = SETTINGS["ppc"]
    arrays = recordings(file)
    random = recordings.folder / Path(file).parent / "ppc_random.json"
    drawn = json.loads(random.read_text()) if random.is_file() else {}
    loss = Replayed(arrays)
    for number, view in enumerate(views(loss, arrays, arrays), start=1):
        maps = shrink(arrays[f"rv{number}_low"], arrays["norm_rv2_16"].shape[2:])
        scores = score_maps(maps, SETTINGS["contrast"]["background_score"])
        match(file, f"norm_rv{number}_16", scores, atol=1e-5)
        match(file, f"pseudo_label{number}", view.label)
        match(file, f"prototypes{number}", view.prototypes, atol=1e-5)
        for what, found in zip(("classes", "counts"), view.label.unique(return_counts=True), strict=True):
            key = f"{what}_view{number}"
            assert drawn.get(key, found.tolist()) == found.tolist()
        scores, chosen = loss.scores[number], loss.chosen[number]
        match(file, f"top_values{number}", scores.gather(1, chosen), atol=1e-5)
        # the pixels of the background are tied, those of a class are a set
        recorded = arrays[f"top_indices{number}"]
        match(file, f"top_indices{number}", as_sets(torch.cat([recorded[:1], chosen[1:]]), recorded))
        torch.testing.assert_close(scores.gather(1, recorded), arrays[f"top_values{number}"], rtol=0, atol=1e-5)


def as_sets(ours: Tensor, recorded: Tensor) -> Tensor:
    """Each row in the order of the recorded one."""
    result = torch.empty_like(ours)
    return result.scatter_(1, recorded.argsort(dim=1), ours.sort(dim=1).values)


def test_ppc(recordings: Any, match: Any) -> None:
    file = SETTINGS["ppc"]
    arrays = recordings(file)
    at = leaves(arrays)
    parts = seam_terms(arrays, at)
    loss = Replayed(arrays)
    one, two = views(loss, arrays, at)
    for key, term in (
        ("loss_nce1", loss.nce(one, two.prototypes, one.label)),
        ("loss_nce2", loss.nce(two, one.prototypes, two.label)),
        ("loss_cross_nce2_1", loss.nce(one, one.prototypes, two.label)),
        ("loss_cross_nce2_2", loss.nce(two, two.prototypes, one.label)),
        ("loss_intra_nce1", loss.intra_view(one)),
        ("loss_intra_nce2", loss.intra_view(two)),
    ):
        parts[key] = term
    inputs = ((at["f_proj1"], at["f_proj2"]), (at["rv1_low"], at["rv2_low"]), arrays["label"])
    terms = loss.terms(*inputs)
    names = {"loss_cross_nce": "cross_prototype", "loss_cross_nce2": "cross_label", "loss_intra_nce": "intra"}
    assert terms.keys() == set(names.values())
    parts |= {theirs: terms[ours] for theirs, ours in names.items()} | {"loss_nce": loss(*inputs)}
    parts["loss"] = parts["loss"] + parts["loss_nce"]
    match_values(match, file, arrays, parts)

    for term in (*names, "loss_er", "loss_ecr", "loss"):
        gradients = torch.autograd.grad(parts[term], list(at.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(at, gradients, strict=True):
            key = f"grad_{term}_{name}"
            if gradient is None:
                match(file, f"{key}_isnone", torch.tensor(1))
            else:
                match_gradient(match, file, key, arrays[key], gradient)

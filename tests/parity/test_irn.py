"""IRN against recordings of the original code: `--golden DIR`/resnet38/irn_functions."""

from typing import Any

import torch
from torch import Tensor

from wsss.losses import build
from wsss.losses.affinity import pair_labels, pair_loss
from wsss.losses.irn import displacement_terms, pair_displacement
from wsss.pairs import EDGE_CELL, cells_of, pair_offsets, pair_paths, pair_views, path_affinity
from wsss.refine.instances import find_centroids
from wsss.refine.random_walk import edge_walk

FILE = "resnet38/irn_functions"
IGNORED = 21
"""From this value on a recorded label is none of a class."""
CENTROID_STEPS = 100

EXCEPTED = ((FILE, "edge prop_edge prop_x irn_edge_logit irn_dp cent_disp", "input"),)


def recorded_order(radius: int) -> list[int]:
    """Of our pairs, in the original code by the length of their paths first."""
    paths = pair_paths(radius)
    return sorted(range(len(paths)), key=lambda k: len(paths[k]))


def map_size(radius: int, start: Tensor, ends: Tensor) -> tuple[int, int]:
    """Of the map whose cells have these flat indices."""
    below = [pair_offsets(radius)[k] for k in recorded_order(radius)].index((1, 0))
    width = int(ends[below, 0] - start[0])
    return len(start) // (width - 2 * (radius - 1)) + radius - 1, width


def test_paths(recordings: Any, match: Any) -> None:
    arrays = recordings(FILE)
    for radius in (5, 10):
        order, paths = recorded_order(radius), pair_paths(radius)
        size = map_size(radius, *(arrays[f"path_r{radius}_{kind}_indices"] for kind in ("src", "dst")))
        match(FILE, f"path_r{radius}_dst", torch.tensor(pair_offsets(radius))[order])
        start, ends = pair_views(torch.arange(size[0] * size[1]).view(size), radius)
        match(FILE, f"path_r{radius}_src_indices", start.flatten())
        match(FILE, f"path_r{radius}_dst_indices", torch.stack([ends[k].flatten() for k in order]))
        lengths = [len(paths[k]) for k in order]
        groups = list(dict.fromkeys(lengths))
        match(FILE, f"path_r{radius}_lengths", torch.tensor([[n, lengths.count(n)] for n in groups]))
        for i, length in enumerate(groups):
            if f"path_r{radius}_coords_{i}" in arrays:
                cells = torch.tensor([paths[k] for k in order if len(paths[k]) == length])  # (paths, points, 2)
                match(FILE, f"path_r{radius}_coords_{i}", cells)
                indices = start.flatten() + (cells @ torch.tensor([size[1], 1]))[..., None]
                match(FILE, f"path_r{radius}_indices_{i}", indices)


def test_affinities_along_paths(recordings: Any, match: Any) -> None:
    match(FILE, "edge_affinity", path_affinity(recordings(FILE)["edge"], 5)[:, recorded_order(5)], atol=1e-7)


def labels(recordings: Any) -> Tensor:
    recorded = recordings(FILE)["seg"].long()
    return recorded.masked_fill(recorded >= IGNORED, 255)[None]


def test_pair_labels(recordings: Any, match: Any) -> None:
    for key, mask in zip(("bg", "fg", "neg"), pair_labels(labels(recordings), 5), strict=True):
        match(FILE, f"seg_{key}", mask[0, recorded_order(5)])


def test_losses(recordings: Any, match: Any) -> None:
    arrays, label = recordings(FILE), labels(recordings)
    edge, displacement = (arrays[key].clone().requires_grad_() for key in ("irn_edge_logit", "irn_dp"))
    label = label.expand(len(edge), -1, -1)
    match(FILE, "irn_pair_disp", pair_displacement(displacement, 5)[:, :, recorded_order(5)], atol=1e-7)
    affinity = path_affinity(edge.sigmoid(), 5)
    total = build("affinity", radius=5)(affinity, label) + build("displacement", radius=5)(displacement, label)
    background, foreground, different = pair_loss(affinity, pair_labels(label, 5))
    terms = [total, (background + foreground) / 2, different, *displacement_terms(displacement, label, 5)]
    match(FILE, "irn_loss_values", torch.stack(terms).double(), rtol=1e-6)
    total.backward()
    match(FILE, "irn_grad_edge", edge.grad, atol=1e-6 * float(arrays["irn_grad_edge"].abs().max()))
    match(FILE, "irn_grad_dp", displacement.grad, atol=1e-6 * float(arrays["irn_grad_dp"].abs().max()))


def test_walk(recordings: Any, match: Any) -> None:
    arrays = recordings(FILE)
    for key in [key for key in arrays if key.startswith("prop_out_b")]:
        beta, logt = key.removeprefix("prop_out_b").split("_t")
        for form in (True, False):
            out = edge_walk(arrays["prop_edge"][None], arrays["prop_x"][None], 5, float(beta), int(logt), dense=form)
            match(FILE, key, out[0, :, None], atol=3e-5 if int(logt) > 4 else 1e-5)


def test_centroids(recordings: Any, match: Any) -> None:
    match(FILE, "cent_out", find_centroids(recordings(FILE)["cent_disp"], CENTROID_STEPS))


def test_sizes(recordings: Any, match: Any) -> None:
    rows = recordings(FILE)["strided_sizes"].tolist()
    found = [[h, w, *cells_of((h, w), EDGE_CELL), *(16 * side for side in cells_of((h, w), 16))] for h, w, *_ in rows]
    match(FILE, "strided_sizes", torch.tensor(found))

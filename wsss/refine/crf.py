"""The dense conditional random field: labels that agree with their neighbours in place and colour."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from wsss import InputError
from wsss.lattice import PermutohedralLattice


@torch.no_grad()
def dense_crf(
    image: Tensor,
    probability: Tensor,
    iterations: int = 10,
    gaussian: Sequence[float] = (1.0, 1.0),
    bilateral: Sequence[float] = (121.0, 5.0, 4.0),
    backend: str = "torch",
) -> Tensor:
    """Mean-field inference in a fully connected CRF (Kraehenbuehl and Koltun, NeurIPS 2011).

    Potts compatibility, two Gaussian kernels with symmetric normalisation, filtered on the permutohedral lattice
    with the pixel itself included, as the authors' C++ code (pydensecrf) does. With U = -log p:

        Q = softmax(-U), then `iterations` times  Q = softmax(-U + sum_m w_m n_m K_m (n_m Q)),
        n_m = (K_m 1 + 1e-20) ** -1/2

    Args:
        image: (B, 3, H, W) colours 0..255.
        probability: (B, K, H, W) of any number of labels, clipped to at least 1e-5.
        iterations: of the mean field.
        gaussian: sigma_xy in pixels and weight of the smoothness kernel.
        bilateral: sigma_xy in pixels, sigma_rgb in grey levels and weight of the appearance kernel.
        backend: `torch`, on the inputs' device, or `pydensecrf`, the C++ code on the CPU (the extra `crf`).

    Returns:
        (B, K, H, W) probabilities.

    Raises:
        InputError: an unknown backend, or one that is not installed.
    """
    if backend == "pydensecrf":
        pairs = zip(image, probability, strict=True)
        return torch.stack([_pydensecrf(i, p, iterations, gaussian, bilateral) for i, p in pairs]).to(probability)
    if backend != "torch":
        raise InputError(f"crf backend {backend!r} does not exist: known are torch, pydensecrf")
    batch, _, h, w = probability.shape
    sigma_xy, sigma_rgb, weight = bilateral
    colour = image.float().flatten(2).mT / sigma_rgb
    place = _places(h, w, image.device).expand(batch, -1, -1) / sigma_xy
    appearance = PermutohedralLattice(torch.cat([place, colour], dim=-1)).normalise(weight)
    smoothness = _smoothness(batch, h, w, float(gaussian[0]), float(gaussian[1]), image.device)
    unary = probability.float().clamp(min=1e-5).log().flatten(2).mT.contiguous()  # (B, H*W, K)
    q = _softmax(unary)
    for _ in range(iterations):
        q = _softmax(smoothness(q).add_(appearance(q)).add_(unary))
    return q.mT.unflatten(2, (h, w))


def _softmax(rows: Tensor) -> Tensor:
    """Softmax of (B, N, K) along K, contiguous; of few values torch is thirty times slower along rows than columns."""
    return rows.softmax(-1) if rows.shape[-1] > 8 else rows.mT.contiguous().softmax(1).mT.contiguous()


def _places(h: int, w: int, device: torch.device) -> Tensor:
    """(1, h * w, 2) columns and rows of all pixels."""
    y, x = torch.meshgrid(*(torch.arange(n, device=device, dtype=torch.float32) for n in (h, w)), indexing="ij")
    return torch.stack([x, y], dim=-1).view(1, h * w, 2)


@lru_cache(maxsize=2)
def _smoothness(batch: int, h: int, w: int, sigma: float, weight: float, device: torch.device) -> PermutohedralLattice:
    """The smoothness kernel, which depends on nothing of an image but its size; images of one size come in rows."""
    return PermutohedralLattice((_places(h, w, device) / sigma).expand(batch, -1, -1)).normalise(weight)


def _pydensecrf(
    image: Tensor, probability: Tensor, iterations: int, gaussian: Sequence[float], bilateral: Sequence[float]
) -> Tensor:
    """`dense_crf` of one image (3, H, W) by the C++ code."""
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise InputError("crf backend pydensecrf is not installed: pip install pydensecrf2, or use torch") from error
    labels, h, w = probability.shape
    crf = DenseCRF2D(w, h, labels)
    unary = -probability.float().clamp(min=1e-5).log().flatten(1)
    crf.setUnaryEnergy(unary.cpu().contiguous().numpy())
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    colours = image.round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous().numpy()
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=colours, compat=bilateral[2])
    return torch.from_numpy(np.array(crf.inference(iterations))).view(labels, h, w)

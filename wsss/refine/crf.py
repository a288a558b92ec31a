"""The dense conditional random field: labels that agree with their neighbours in place and colour."""

from collections.abc import Sequence

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
    batch, labels, h, w = probability.shape
    y, x = torch.meshgrid(*(torch.arange(n, device=image.device, dtype=torch.float32) for n in (h, w)), indexing="ij")
    place = torch.stack([x, y], dim=-1).view(1, h * w, 2).expand(batch, -1, -1)
    colour = image.float().flatten(2).mT
    sigma_xy, sigma_rgb, weight = bilateral
    kernels = [
        (gaussian[1], PermutohedralLattice(place / gaussian[0])),
        (weight, PermutohedralLattice(torch.cat([place / sigma_xy, colour / sigma_rgb], dim=-1))),
    ]
    ones = torch.ones(batch, h * w, 1, device=image.device)
    norms = [(kernel(ones) + 1e-20).rsqrt() for _, kernel in kernels]
    unary = probability.float().clamp(min=1e-5).log().flatten(2).mT  # (B, H*W, K)
    q = unary.softmax(dim=-1)
    for _ in range(iterations):
        message = unary.clone()
        for (strength, kernel), norm in zip(kernels, norms, strict=True):
            message += strength * norm * kernel(norm * q)
        q = message.softmax(dim=-1)
    return q.mT.reshape(batch, labels, h, w)


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

"""The permutohedral lattice: Gaussian filtering in many dimensions, in time linear in the number of points.

Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010,
in the un-normalised form of dense CRFs (Kraehenbuehl and Koltun, NeurIPS 2011). The lattice is coarse, its
response clearly weaker than the exact Gaussian sum: an exact bilateral filter does not replace it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class PermutohedralLattice:
    """Approximates out_i ~ sum_j exp(-|f_i - f_j|^2 / 2) v_j, the point itself (j = i) included.

    Built once from the features, then applied to any number of value tensors. No gradient flows through it.

    Args:
        features: (B, N, d) positions in units of the kernel's standard deviation (x / sigma_x, ...), no size
            0. float64 gives a filter in double precision, anything else one in float32. The B sets of points
            do not mix. The order of the features matters slightly: the blur takes one axis after another.
        compact: on a GPU, wait for the number of vertices, which are a fraction of those there can be: a filter then
            takes a fraction of the time. False never waits, as a training step should not.

    Features that are not finite, or spread too far for 64-bit vertex numbers, raise a ValueError on the CPU.
    On a GPU, where looking would stall the stream, the filter then returns NaN.
    """

    @torch.no_grad()
    def __init__(self, features: Tensor, compact: bool = True) -> None:
        batch, points, d = features.shape
        total, device = batch * points, features.device
        dtype = torch.promote_types(features.dtype, torch.float32)

        # Embed the points in the plane sum(x) = 0 of R^(d+1). From here on the layout is (d+1, B*N).
        axes = torch.arange(d + 1, device=device)
        # rounded where the C++ code rounds: one unit in the last place decides ranks, and so which vertices exist
        deviation = torch.tensor((2 / 3) ** 0.5 * (d + 1), dtype=dtype).item()
        scale = (deviation / (axes[1:] * (axes[1:] + 1)).double().sqrt()).to(dtype)
        scaled = features.reshape(total, d).to(dtype).t() * scale[:, None]
        elevated = F.pad(scaled.flip(0).cumsum(0).flip(0), (0, 0, 0, 1))
        elevated[1:] -= axes[1:, None] * scaled

        # The enclosing simplex: its remainder-0 vertex, and the rank of the offsets from it, largest first.
        origin = (elevated / (d + 1)).round() * (d + 1)
        offset = elevated - origin
        rank = torch.stack(
            [(offset[i] < offset[i + 1 :]).sum(0) + (offset[:i] >= offset[i]).sum(0) for i in range(d + 1)]
        )
        rank += (origin.sum(0) / (d + 1)).round().long()  # rounding may leave the plane: wrap back into it
        wrapped = rank.remainder(d + 1)
        origin += wrapped - rank

        # Barycentric weights of the vertices r = 0..d: differences of neighbours in the sorted offsets.
        ascending = torch.empty_like(offset).scatter_(0, wrapped, (elevated - origin) / (d + 1)).flip(0)
        barycentric = ascending - ascending.roll(1, 0)
        barycentric[0] += 1

        # One int64 per vertex: its first d coordinates (the last one follows) and the batch index are the
        # digits of a mixed-radix number. 3d spare values per digit, for a vertex is up to d to either side of
        # its origin and a neighbour d further: no two places share a number.
        low, high = origin[:d].aminmax(dim=1)
        radix = (high - low).double() + (3 * d + 1)
        fits = radix.prod() * batch < 2.0**62
        if device.type == "cpu" and not fits:
            raise ValueError("cannot number the lattice: its features are not finite or spread too far")
        stride = F.pad(radix.long().cumprod(0), (1, 0), value=1)
        base = ((origin[:d] - low[:, None]).long() * stride[:d, None]).sum(0).view(batch, points)
        base = base + torch.arange(batch, device=device)[:, None] * stride[d]
        # A step along axis j: d to coordinate j, -1 to the others. The simplex is a walk against these steps.
        step = F.pad(stride[:d] * (d + 1), (0, 1)) - stride[:d].sum()
        walk = torch.empty_like(wrapped).scatter_(0, wrapped, step[:, None].expand_as(wrapped)).flip(0)
        keys, order = torch.cat([base.view(1, total), -walk[:-1]]).cumsum(0).flatten().sort()

        # A vertex is a run of equal keys. Where their count is not read back there is room for as many as there can
        # be: the rows beyond stand for the last vertex once more, and nothing refers to them.
        begins = keys[1:] != keys[:-1]
        run = F.pad(begins.cumsum(0), (1, 0))
        if compact:
            starts = F.pad(begins.nonzero()[:, 0] + 1, (1, 0))
            vertex = torch.arange(len(starts), device=device)
        else:
            vertex = torch.arange(len(run), device=device)
            starts = torch.searchsorted(run, vertex)
            vertex = vertex.clamp(max=run[-1])
        size = len(starts)
        # numbers of 32 bits, where they suffice, are half of what a filter reads
        number = torch.int32 if len(run) < 2**31 else torch.int64
        self._starts, self._splat_points = starts.to(number), (order % total).to(number)
        self._splat_weights = barycentric.flatten()[order]
        corners = torch.empty_like(run).scatter_(0, order, run).view(d + 1, total)
        self._slice_vertices = corners.t().to(number).contiguous()
        barycentric = torch.where(fits, barycentric / (1 + 2.0**-d), torch.nan)
        self._slice_weights = barycentric.t().contiguous()

        # Along each axis (V, 3): self, ahead, behind. Whom I have ahead has me behind, so one search finds
        # both, and row `size` takes what does not exist: such a neighbour is the vertex itself, at weight 0.
        self._blurs: list[tuple[Tensor, Tensor]] = []
        kernel = 0.5 ** torch.arange(3, dtype=dtype, device=device).clamp(max=1)  # 1, 1/2, 1/2
        places = keys[starts[vertex]]
        for j in range(d + 1):
            wanted = places + step[j]
            ahead = torch.searchsorted(places, wanted).clamp_(max=size - 1)
            ahead = torch.where(places[ahead] == wanted, ahead, size)
            behind = torch.full((size + 1,), size, device=device).scatter_(0, ahead, vertex)[:size]
            index = torch.stack([vertex, ahead, behind], 1)
            exists = index < size
            self._blurs.append((torch.where(exists, index, vertex[:, None]).to(number), exists * kernel))

    @torch.no_grad()
    def normalise(self, strength: float = 1.0) -> "PermutohedralLattice":
        """Turns the filter K into strength * n K n with n = (K 1 + 1e-20) ** -1/2, which costs no more to apply."""
        ones = torch.ones(len(self._slice_weights), dtype=self._slice_weights.dtype, device=self._slice_weights.device)
        norm = (self(ones[None, :, None]).flatten() + 1e-20).rsqrt()
        self._splat_weights = self._splat_weights * norm[self._splat_points]
        self._slice_weights = self._slice_weights * (strength * norm)[:, None]
        return self

    @torch.no_grad()
    def __call__(self, values: Tensor) -> Tensor:
        """Filters values (B, N, C) in the lattice's precision. Returns (B, N, C), not normalised."""
        # Sums over bags of weighted rows: sparse matrices times `out`, without atomics, hence reproducible.
        out = values.flatten(0, 1).to(self._slice_weights.dtype)
        out = F.embedding_bag(self._splat_points, out, self._starts, mode="sum", per_sample_weights=self._splat_weights)
        for index, weights in self._blurs:
            out = F.embedding_bag(index, out, mode="sum", per_sample_weights=weights)
        out = F.embedding_bag(self._slice_vertices, out, mode="sum", per_sample_weights=self._slice_weights)
        return out.view(values.shape)

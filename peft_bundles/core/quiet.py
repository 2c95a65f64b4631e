"""How loud bundles are on kept states of calibration text: what `BundleModel.quiet_loss` sums up (docs/learning.md).

U is orthonormal, so bundles are as loud in its coordinates as in the stream: with the states kept as x = ((h - mu) /
sigma) U, no product with U is left, and all layers of one size are looked at in the same few kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .basis import align
from .functional import activate, activate_backward
from .layer import BundleLayer


Span: TypeAlias = tuple[int, int]  # start and number of hidden units
DRAW = 512  # of the states kept by calibration, so many are looked at a step


def loudness(layers: Sequence[BundleLayer], adapter: str, names: list[str]) -> Tensor:
    """Mean |what the named bundles add|^2 on kept states, over the states' variance, summed over layers; a scalar.

    Bundles that learn from the same signals count together: many that add the same are as loud as one large one.
    """
    alike: dict[Any, list[BundleLayer]] = {}
    for layer in layers:
        states = layer.bundle_states[adapter]
        # On a CPU kernels are not what costs: one layer's tensors stay in its caches, those of all are fresh memory.
        alone = layer if states.device.type == "cpu" else None
        alike.setdefault((layer.packing(adapter), states.device, states.shape, alone), []).append(layer)
    parts = [_loudness(group, adapter, names) for group in alike.values()]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _loudness(layers: list[BundleLayer], adapter: str, names: list[str]) -> Tensor:
    """`loudness` of layers of one size, on one device."""
    first, state = layers[0], layers[0].state
    packing, device = first.packing(adapter), first.bundle_states[adapter].device
    kept = [layer.bundle_states[adapter] for layer in layers]
    if len(kept[0]) > DRAW:
        drawn = torch.randint(len(kept[0]), (len(kept), DRAW), device=device)
        kept = [states.index_select(0, rows) for states, rows in zip(kept, drawn)]
    # Autocast's dtype, as the forward has it: they share what they make of the weights (packing.py).
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
    states = _stacked(kept).to(dtype)
    with torch.autocast(device.type, enabled=False):
        if packing.full:  # those see the whole stream, so D and E are needed as they are
            folded = [layer.fold(adapter, dtype, None, names) for layer in layers]
            maps, factor = _stacked([torch.stack((D.T, E)) for D, E in folded]), 1.0
        else:
            given = device, dtype, names
            maps = _stacked([packing.maps(*layer.tables(adapter), *given, layer.joined(adapter)) for layer in layers])
            factor = state.configs[adapter].scaling ** 2
        ours = None
        if not set(packing.names) <= set(names):
            owner = packing.index(device)["owner"]
            ours = state.call.cached(
                (packing, "learns", tuple(names)),
                maps,
                lambda: torch.tensor([float(n in names) for n in packing.names], device=device, dtype=dtype)[owner],
            )
        groups = [spans for members, spans in packing.groups if not set(members).isdisjoint(names)]
        total = _Energy.apply(states, maps, ours, packing.nonlinear, groups)
        variance = torch.stack([layer.bundle_scale[adapter] for layer in layers]).square().sum(-1)
        return (total / variance).sum() * (factor / states.shape[1])


class _Energy(torch.autograd.Function):
    """sum over groups of hidden units and rows of |a E|^2, for a = act(x D) * ours; x is (L, N, R): (L,).

    `maps` are D and E, (L, 2, H, R). A group's sum is (a E E^T) a^T: it has fewer units than rows, and than R.
    One node for all of it: with one for every group and slice, a CPU is busy with zeros that are added up.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, maps: Tensor, ours: Tensor | None, nonlinear: int, groups: Sequence[Sequence[Span]]
    ) -> Tensor:
        reads, writes = maps.unbind(1)
        s = x @ reads.mT
        a = activate(s, nonlinear) if ours is None else activate(s, nonlinear) * ours
        total, products = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32)), []
        for spans in groups:
            units, E = _taken(a, spans, 2), _taken(writes, spans, 1)
            products.append(units @ (E @ E.mT))
            total += (products[-1] * units).sum((1, 2), dtype=total.dtype)
        ctx.save_for_backward(x, maps, ours, s, a, *products)
        ctx.nonlinear, ctx.groups = nonlinear, groups
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, maps, ours, s, a, *products = ctx.saved_tensors
        da, d_maps, writes = torch.zeros_like(a), torch.zeros_like(maps), maps[:, 1]
        twice = (2 * grad[:, None, None]).to(a.dtype)
        for spans, product in zip(ctx.groups, products):
            units, E = _taken(a, spans, 2), _taken(writes, spans, 1)
            sizes = [size for _, size in spans]
            sizes.append(E.shape[1] - sum(sizes))
            dE = (twice * (units.mT @ units)) @ E
            for (start, size), d_units, d_writes in zip(spans, product.split(sizes, 2), dE.split(sizes, 1)):
                da[..., start : start + size] = twice * d_units
                d_maps[:, 1, start : start + size] = d_writes
        ds = activate_backward(da if ours is None else da * ours, s, ctx.nonlinear)
        d_maps[:, 0] = ds.mT @ x
        return None, d_maps, None, None, None


def _stacked(tensors: list[Tensor]) -> Tensor:
    """`torch.stack`, without a copy of a single one."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _taken(tensor: Tensor, spans: Sequence[Span], dim: int) -> Tensor:
    """The hidden units of a group side by side; on a GPU with zeros to a good size.

    And copied there, for where they lie they may begin at any number: a GPU has its slowest products for those.
    """
    parts = [tensor.narrow(dim, *span) for span in spans]
    units = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    if tensor.device.type == "cpu":
        return units
    return F.pad(units, (0, 0) * (tensor.dim() - 1 - dim) + (0, align(units.shape[dim]) - units.shape[dim]))

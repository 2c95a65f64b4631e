"""How much bundles add to kept states of calibration text; `BundleModel.quiet_loss` is the weighted sum.

U is orthonormal, so an update is as long in its coordinates as in the stream. With the states kept as x = ((h - mu) /
sigma) U, no product with U is left, and all layers of one size share the same few kernels.

Shapes: L layers, N kept states, R coordinates (d where a bundle acts on the whole stream), H hidden units.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .basis import align
from .functional import activate, activate_backward


Layer: TypeAlias = Any  # a `BundleLayer`, which imports this file
Span: TypeAlias = tuple[int, int]  # start and number of hidden units
DRAW = 512  # number of kept states that one step looks at


def warn_uncalibrated(layers: Sequence[Layer], adapter: str) -> None:
    """Warn, once for an adapter, if it has `quiet` but its layers keep no states to be quiet on.

    Args:
        layers: layers with bundles of the adapter, all of one model.
        adapter: name of the adapter.
    """
    state = layers[0].state
    quiet = state.configs[adapter].quiet
    if not quiet or adapter in state.warned or any(adapter in layer.bundle_states for layer in layers):
        return
    state.warned.add(adapter)
    warnings.warn(
        f"adapter {adapter!r} trains with quiet={quiet:g}, but the model holds no calibration states, so nothing keeps "
        "its bundles quiet on other text. Call peft_bundles.calibrate(model) before training (with states_only=True "
        "for an adapter that was calibrated or trained before), or set quiet=0 in the BundleConfig.",
        stacklevel=2,
    )


def loudness(layers: Sequence[Layer], adapter: str, names: list[str], tables: Sequence[Any] | None = None) -> Tensor:
    """Mean |what the named bundles add|^2 on kept states, divided by the states' variance, summed over layers.

    Bundles that learn from the same signals count together: many that add the same are as loud as one large one.

    Args:
        layers: layers that keep states of this adapter.
        adapter: name of the adapter.
        names: bundles of the adapter.
        tables: weights to take instead of the layers' own, as in `BundleLayer.tables`, one entry for each layer.

    Returns:
        A scalar, with gradients for the named bundles only.
    """
    alike: dict[Any, list[tuple[Layer, Any]]] = {}
    for layer, table in zip(layers, tables or [layer.tables(adapter) for layer in layers]):
        states = layer.bundle_states[adapter]
        # On a CPU layers stay apart: kernels are not the cost there, and one layer's tensors stay in its caches.
        alone = layer if states.device.type == "cpu" else None
        alike.setdefault((layer.packing(adapter), states.device, states.shape, alone), []).append((layer, table))
    parts = [_loudness([layer for layer, _ in g], adapter, names, [t for _, t in g]) for g in alike.values()]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _loudness(layers: list[Layer], adapter: str, names: list[str], tables: Sequence[Any]) -> Tensor:
    """`loudness` of layers of one size, on one device."""
    first, state = layers[0], layers[0].state
    packing, device = first.packing(adapter), first.bundle_states[adapter].device
    kept = [layer.bundle_states[adapter] for layer in layers]
    if len(kept[0]) > DRAW:
        drawn = torch.randint(len(kept[0]), (len(kept), DRAW), device=device)
        kept = [states.index_select(0, rows) for states, rows in zip(kept, drawn)]
    weight = next(weight for table in tables[0] for weight in table.values())
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else torch.promote_types(weight.dtype, torch.float32)
    states_LNR = _stacked(kept).to(dtype)
    with torch.autocast(device.type, enabled=False):
        if packing.full:  # these bundles see the whole stream, so D and E are needed themselves
            folded = [layer.fold(adapter, dtype, None, names, t) for layer, t in zip(layers, tables)]
            maps_L2HR, factor = _stacked([torch.stack((D.T, E)) for D, E in folded]), 1.0
        else:
            options = device, dtype, names
            maps_L2HR = _stacked([packing.maps(*table, *options) for table in tables])
            factor = state.configs[adapter].scaling ** 2
        chosen_H = None
        if not set(packing.names) <= set(names):
            owner = packing.index(device)["owner"]
            chosen_H = state.call.cached(
                (packing, "learns", tuple(names)),
                maps_L2HR,
                lambda: torch.tensor([float(n in names) for n in packing.names], device=device, dtype=dtype)[owner],
            )
        groups = [spans for members, spans in packing.groups if not set(members).isdisjoint(names)]
        total_L = _Energy.apply(states_LNR, maps_L2HR, chosen_H, packing.nonlinear, groups)
        variance_L = torch.stack([layer.bundle_scale[adapter] for layer in layers]).square().sum(-1)
        return (total_L / variance_L).sum() * (factor / states_LNR.shape[1])


class _Energy(torch.autograd.Function):
    """For each layer the sum of |a E|^2 over groups of hidden units and states, for a = act(x D) * chosen; (L,).

    `maps` holds D and E, (L, 2, H, R). A group's sum is (a E E^T) a^T, for it has fewer units than states, and than R.
    One node for all groups: with one for every group and slice, a CPU would spend its time adding up zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, maps: Tensor, chosen: Tensor | None, nonlinear: int, groups: Sequence[Sequence[Span]]
    ) -> Tensor:
        reads, writes = maps.unbind(1)
        s = x @ reads.mT
        a = activate(s, nonlinear) if chosen is None else activate(s, nonlinear) * chosen
        total, products = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32)), []
        for spans in groups:
            units, E = _units_of(a, spans, 2), _units_of(writes, spans, 1)
            products.append(units @ (E @ E.mT))
            total += (products[-1] * units).sum((1, 2), dtype=total.dtype)
        ctx.save_for_backward(x, maps, chosen, s, a, *products)
        ctx.nonlinear, ctx.groups = nonlinear, groups
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, maps, chosen, s, a, *products = ctx.saved_tensors
        da, d_maps, writes = torch.zeros_like(a), torch.zeros_like(maps), maps[:, 1]
        twice = (2 * grad[:, None, None]).to(a.dtype)
        for spans, product in zip(ctx.groups, products):
            units, E = _units_of(a, spans, 2), _units_of(writes, spans, 1)
            sizes = [size for _, size in spans]
            sizes.append(E.shape[1] - sum(sizes))
            dE = (twice * (units.mT @ units)) @ E
            for (start, size), d_units, d_writes in zip(spans, product.split(sizes, 2), dE.split(sizes, 1)):
                da[..., start : start + size] = twice * d_units
                d_maps[:, 1, start : start + size] = d_writes
        ds = activate_backward(da if chosen is None else da * chosen, s, ctx.nonlinear)
        d_maps[:, 0] = ds.mT @ x
        return None, d_maps, None, None, None


def _stacked(tensors: list[Tensor]) -> Tensor:
    """`torch.stack`, without a copy of a single one."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _units_of(tensor: Tensor, spans: Sequence[Span], dim: int) -> Tensor:
    """The hidden units of a group side by side; on a GPU a copy, padded with zeros to a good size.

    In place they may begin at any offset, which gives a GPU its slowest products.
    """
    parts = [tensor.narrow(dim, *span) for span in spans]
    units = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    if tensor.device.type == "cpu":
        return units
    return F.pad(units, (0, 0) * (tensor.dim() - 1 - dim) + (0, align(units.shape[dim]) - units.shape[dim]))

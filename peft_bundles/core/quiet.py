"""How much bundles add to kept states of calibration text; `BundleModel.quiet_loss` is the weighted sum.

Behind blocks U is orthonormal, so an update is as long in its coordinates as in the stream. With the states kept as
x = ((h - mu) / sigma) U, no product with U is left. At a linear layer the kept states are its inputs v. All layers of
one size share the same few kernels.

Shapes: L layers, N kept states, R coordinates (d where a bundle acts on the whole stream, the input features of a
linear layer), O output features (R behind blocks), H hidden units.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .basis import align
from .functional import activate, activate_backward
from .packing import Layout, Packing


Layer: TypeAlias = Any  # a `BundleLayer`, which imports this file
Span: TypeAlias = tuple[int, int]  # start and number of hidden units
Group: TypeAlias = tuple[Sequence[Span], float]  # hidden units that count together, and the weight of their energy
DRAW, DRAW_INPUTS = 512, 256  # number of kept states that one step looks at, behind blocks and at linear layers


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


def loudness(
    layers: Sequence[Layer],
    adapter: str,
    names: list[str],
    tables: Sequence[Any] | None = None,
    shares: Mapping[str, float] | None = None,
) -> Tensor:
    """Mean |what the named bundles add|^2 on kept states, relative to what is there, summed over layers.

    Behind blocks it is divided by the variance of the states, at linear layers by the mean |W v|^2.

    Bundles that learn from the same signals count together: many that add the same are as loud as one large one.

    Args:
        layers: layers that keep states of this adapter.
        adapter: name of the adapter.
        names: bundles of the adapter.
        tables: weights to take instead of the layers' own, as in `BundleLayer.tables`, one entry for each layer.
        shares: bundle -> a factor, the same for bundles that learn from the same signals; None: 1.

    Returns:
        A scalar, with gradients for the named bundles only.
    """
    alike: dict[Any, list[tuple[Layer, Any]]] = {}
    for layer, table in zip(layers, tables or [layer.tables(adapter) for layer in layers]):
        if set(names).isdisjoint(layer.packing(adapter).names):
            continue
        states = layer.bundle_states[adapter]
        # On a CPU layers stay apart: kernels are not the cost there, and one layer's tensors stay in its caches.
        alone = layer if states.device.type == "cpu" else None
        sizes = states.shape, getattr(layer, "out_features", None)
        alike.setdefault((layer.packing(adapter), states.device, sizes, alone), []).append((layer, table))
    parts = [
        _loudness([layer for layer, _ in g], adapter, names, [t for _, t in g], shares or {}) for g in alike.values()
    ]
    if not parts:
        return torch.zeros((), device=layers[0].device_of(adapter))
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


@torch.no_grad()
def linear_gradients(
    layers: Sequence[Layer], adapter: str, names: Sequence[str], weight: float, shares: Mapping[str, float]
) -> tuple[Tensor, dict[int, Tensor]]:
    """`loudness` at linear layers times `weight`, and its gradient by the id of each weight.

    Without autograd: 15 bundles at 48 linear layers are 1,440 weights, and a node for each is what would cost.

    Args:
        layers: linear layers that keep inputs of this adapter, on one device.
        adapter, names, shares: as in `loudness`.
        weight: a factor.
    """
    device = layers[0].device_of(adapter)
    total, gradients = torch.zeros((), device=device), dict[int, Tensor]()
    alike: dict[Any, list[Layer]] = {}
    for layer in layers:
        sizes = layer.bundle_states[adapter].shape, layer.out_features
        alike.setdefault((layer.packing(adapter), sizes), []).append(layer)
    for (packing, (shape, outputs)), group in alike.items():
        learning = [name for name in packing.names if name in names]
        if not learning:
            continue
        weights = [[layer.tables(adapter)[which][n] for layer in group for n in packing.ordered] for which in (1, 2)]
        dtype = torch.promote_types(weights[0][0].dtype, torch.float32)
        reads_LHI, writes_LHO = (
            F.pad(torch.cat(of).view(len(group), -1, width), (0, 0, 0, packing.padding)).to(dtype)
            for of, width in zip(weights, (shape[1], outputs))
        )
        scale_H1 = packing.index(device)["scale"].to(dtype)
        states_LNI = _drawn([layer.bundle_states[adapter] for layer in group], DRAW_INPUTS).to(dtype)
        chosen_H = None
        if len(learning) < len(packing.names):
            chosen_H = torch.tensor([float(n in learning) for n in packing.names], device=device, dtype=dtype)
            chosen_H = chosen_H[packing.index(device)["owner"]]
        groups = _groups(packing, learning, shares)
        energy_L, saved = _energy(states_LNI, reads_LHI, writes_LHO * scale_H1, chosen_H, packing.nonlinear, groups)
        factor_L = (
            weight / states_LNI.shape[1] / torch.stack([layer.bundle_energy[adapter] for layer in group]).to(dtype)
        )
        total += (energy_L * factor_L).sum()
        d_reads, d_writes = _energy_backward(factor_L, saved, chosen_H, packing.nonlinear, groups)
        for of, gradient in zip(weights, (d_reads, d_writes * scale_H1)):
            used = gradient[:, : gradient.shape[1] - packing.padding].flatten(0, 1)
            pieces = used.split([packing.ranks[n] for n in packing.ordered] * len(group))
            owners = packing.ordered * len(group)
            gradients.update((id(w), piece) for w, piece, n in zip(of, pieces, owners) if n in learning)
    return total, gradients


def _drawn(kept: list[Tensor], draw: int) -> Tensor:
    """At most `draw` random rows of the kept states of each layer, (L, N, R)."""
    if len(kept[0]) > draw:
        rows_LN = torch.randint(len(kept[0]), (len(kept), draw), device=kept[0].device)
        kept = [states.index_select(0, rows) for states, rows in zip(kept, rows_LN)]
    return _stacked(kept)


def _groups(packing: Layout, names: Sequence[str], shares: Mapping[str, float]) -> list[Group]:
    """The hidden units of bundles that learn from the same signals, for those with a bundle among `names`."""
    learning = [(spans, [m for m in members if m in names]) for members, spans in packing.groups]
    return [(spans, shares.get(members[0], 1.0)) for spans, members in learning if members]


def _loudness(
    layers: list[Layer], adapter: str, names: list[str], tables: Sequence[Any], shares: Mapping[str, float]
) -> Tensor:
    """`loudness` of layers of one size, on one device."""
    first, state = layers[0], layers[0].state
    packing, device = first.packing(adapter), first.bundle_states[adapter].device
    names = [name for name in packing.names if name in names]
    kept = [layer.bundle_states[adapter] for layer in layers]
    weight = next(weight for table in tables[0] for weight in table.values())
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else torch.promote_types(weight.dtype, torch.float32)
    states_LNR = _drawn(kept, DRAW_INPUTS if first.site.path else DRAW).to(dtype)
    with torch.autocast(device.type, enabled=False):
        factor = 1.0
        if isinstance(packing, Packing) and not packing.full:
            maps = _stacked([packing.maps(weight, down, up, device, dtype, names) for weight, down, up in tables])
            reads_LHR, writes_LHO = maps.unbind(1)
            factor = state.configs[adapter].scaling ** 2
        else:  # D and E are needed themselves
            folded = [layer.fold(adapter, dtype, None, names, t) for layer, t in zip(layers, tables)]
            reads_LHR, writes_LHO = _stacked([D.T for D, _ in folded]), _stacked([E for _, E in folded])
        chosen_H = None
        if not set(packing.names) <= set(names):
            owner = packing.index(device)["owner"]
            chosen_H = state.call.cached(
                (packing, "learns", tuple(names)),
                reads_LHR,
                lambda: torch.tensor([float(n in names) for n in packing.names], device=device, dtype=dtype)[owner],
            )
        groups = _groups(packing, names, shares)
        total_L = _Energy.apply(states_LNR, reads_LHR, writes_LHO, chosen_H, packing.nonlinear, groups)
        if first.site.path:
            size_L = torch.stack([layer.bundle_energy[adapter] for layer in layers])
        else:
            size_L = torch.stack([layer.bundle_scale[adapter] for layer in layers]).square().sum(-1)
        return (total_L / size_L).sum() * (factor / states_LNR.shape[1])


def _energy(
    x: Tensor, reads: Tensor, writes: Tensor, chosen: Tensor | None, nonlinear: int, groups: Sequence[Group]
) -> tuple[Tensor, list[Tensor]]:
    """For each layer the sum of |a E|^2 over groups of hidden units and states, for a = act(x D) * chosen; (L,).

    D^T is (L, H, R) and E is (L, H, O). A group's sum is (a E E^T) a^T: it has fewer units than states, and than O.
    Also returns what `_energy_backward` needs.
    """
    s = x @ reads.mT
    a = activate(s, nonlinear) if chosen is None else activate(s, nonlinear) * chosen
    total, products = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32)), []
    for spans, share in groups:
        units, E = _units_of(a, spans, 2), _units_of(writes, spans, 1)
        products.append(units @ (E @ E.mT))
        total += (products[-1] * units).sum((1, 2), dtype=total.dtype) * share
    return total, [x, writes, s, a, *products]


def _energy_backward(
    grad: Tensor, saved: Sequence[Tensor], chosen: Tensor | None, nonlinear: int, groups: Sequence[Group]
) -> tuple[Tensor, Tensor]:
    """The gradients for D^T and E, from that of the energies, (L,)."""
    x, writes, s, a, *products = saved
    da, d_writes = torch.zeros_like(a), torch.zeros_like(writes)
    for (spans, share), product in zip(groups, products):
        twice = (2 * share * grad[:, None, None]).to(a.dtype)
        units, E = _units_of(a, spans, 2), _units_of(writes, spans, 1)
        sizes = [size for _, size in spans]
        sizes.append(E.shape[1] - sum(sizes))
        dE = (twice * (units.mT @ units)) @ E
        for (start, size), d_units, d_rows in zip(spans, product.split(sizes, 2), dE.split(sizes, 1)):
            da[..., start : start + size] = twice * d_units
            d_writes[:, start : start + size] = d_rows
    ds = activate_backward(da if chosen is None else da * chosen, s, nonlinear)
    return ds.mT @ x, d_writes


class _Energy(torch.autograd.Function):
    """`_energy`, as one node: with one for every group and slice, a CPU would spend its time adding up zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reads: Tensor, writes: Tensor, chosen: Tensor | None, *rest: Any) -> Tensor:
        total, saved = _energy(x, reads, writes, chosen, *rest)
        ctx.save_for_backward(chosen, *saved)
        ctx.rest = rest
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        chosen, *saved = ctx.saved_tensors
        return None, *_energy_backward(grad, saved, chosen, *ctx.rest), None, None, None


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

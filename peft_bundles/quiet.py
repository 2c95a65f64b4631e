"""How loud bundles are on kept states of calibration text: what `BundleModel.quiet_loss` sums up (docs/learning.md).

U is orthonormal, so bundles are as loud in its coordinates as in the stream: with the states kept as x = ((h - mu) /
sigma) U, no product with U is left, and all layers of one size are looked at in the same few kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .functional import activate
from .layer import BundleLayer


DRAW = 512  # of the states kept by calibration, so many are looked at a step


def loudness(layers: Sequence[BundleLayer], adapter: str, names: list[str]) -> Tensor:
    """Mean |what the named bundles add|^2 on kept states, over the states' variance, summed over layers; a scalar.

    Bundles that learn from the same signals count together: many that add the same are as loud as one large one.
    """
    alike: dict[Any, list[BundleLayer]] = {}
    for layer in layers:
        states = layer.bundle_states[adapter]
        alike.setdefault((layer.packing(adapter), states.device, states.shape), []).append(layer)
    parts = [_loudness(group, adapter, names) for group in alike.values()]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _loudness(layers: list[BundleLayer], adapter: str, names: list[str]) -> Tensor:
    """`loudness` of layers of one size, on one device."""
    first, state = layers[0], layers[0].state
    packing, device = first.packing(adapter), first.bundle_states[adapter].device
    kept = [layer.bundle_states[adapter] for layer in layers]
    if len(kept[0]) > DRAW:
        kept = [
            states[drawn] for states, drawn in zip(kept, torch.randint(len(kept[0]), (len(kept), DRAW), device=device))
        ]
    # Autocast's dtype, as the forward has it: they share what they make of the weights (packing.py).
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else torch.float32
    states = torch.stack(kept).to(dtype)
    with torch.autocast(device.type, enabled=False):
        if packing.full:  # those see the whole stream, so D and E are needed as they are
            folded = [layer._folded(adapter, dtype, None, names) for layer in layers]
            D, E = (torch.stack(each) for each in zip(*folded))
            reads, writes, factor = D.mT, E, 1.0
        else:
            given = device, dtype, names
            maps = torch.stack(
                [packing.maps(*layer.tables(adapter), *given, layer.joined(adapter)) for layer in layers]
            )
            reads, writes, factor = *maps.unbind(1), state.configs[adapter].scaling ** 2
        owner = packing.index(device)["owner"]
        ours = state.call.cached(
            (packing, "learns", tuple(names)),
            reads,
            lambda: torch.tensor([float(n in names) for n in packing.names], device=device, dtype=dtype)[owner],
        )
        a = activate(states @ reads.mT, packing.nonlinear) * ours
        total = states.new_zeros(len(layers), dtype=torch.float32)
        for members, spans in packing.groups:
            if not set(members).isdisjoint(names):
                units = [a.narrow(2, *span) for span in spans], [writes.narrow(1, *span) for span in spans]
                total = total + _Energy.apply(
                    *(u[0] if len(u) == 1 else torch.cat(u, d) for d, u in zip((2, 1), units))
                )
        variance = torch.stack([layer.bundle_scale[adapter] for layer in layers]).square().sum(-1)
        return (total / variance).sum() * (factor / states.shape[1])


class _Energy(torch.autograd.Function):
    """sum |a E|^2 over rows, for a (L, N, h) and E (L, h, d), as a (E E^T) a^T: (L,). For h below N and d."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, E: Tensor) -> Tensor:
        product = a @ (E @ E.mT)
        ctx.save_for_backward(a, E, product)
        return (product * a).sum((1, 2), dtype=torch.promote_types(a.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, E, product = ctx.saved_tensors
        twice = (2 * grad[:, None, None]).to(a.dtype)
        return twice * product, twice * ((a.mT @ a) @ E)

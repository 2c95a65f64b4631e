"""Heads of objectives: small maps that read the final state in the subspace of the bundles that own a signal.

Shapes: d the hidden size, r the columns of the subspace.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.basis import bundle_shapes, sizes_of_bundles
from ..core.layer import BundleLayer
from ..core.walking import bundle_layers
from .seeding import seeded
from .tokens import wide


def owners(model: nn.Module, signal: str) -> list[tuple[str, str]]:
    """(adapter, bundle) of the largest weight for a signal, among active adapters; [] for a model without bundles."""
    layer = _last_layer(model)
    active = [] if layer is None else [a for a in layer.state.configs if a in layer.active_adapters]
    columns = {a: layer.state.configs[a].column(signal) for a in active}  # type: ignore[union-attr]
    weights = {(a, b): w for a, column in columns.items() for b, w in column.items()}
    return [key for key, w in weights.items() if w > 0 and w == max(weights.values())]


def subspace(model: nn.Module, signal: str) -> Tensor:
    """Orthonormal columns Q (d, r): what the owners of a signal may read and write in the last layer.

    These are the columns of U in the owners' supports, not the span of the owners' weights, so that Q stays where it is
    while the owners are trained. For owners in several adapters it is the span of the columns of all their U. For a
    model without bundles, and for an owner of kind "full" or at linear layers, it is the identity (d, d).
    """
    layer = _last_layer(model)
    supports: dict[str, list[Tensor]] = {}
    for adapter, bundle in owners(model, signal):
        assert layer is not None
        shape = bundle_shapes(layer.state.configs[adapter], layer.hidden_size).get(bundle)
        if shape is None or shape.kind == "full":
            return torch.eye(layer.hidden_size)
        supports.setdefault(adapter, []).append(shape.support)
    if not supports:
        return torch.eye(model.get_output_embeddings().weight.shape[1])  # type: ignore[operator]
    columns = []
    for adapter, parts in supports.items():
        assert layer is not None
        basis = layer.bundle_basis[adapter]
        columns.append(basis[:, torch.cat(parts).unique().to(basis.device)].detach().float())
    if len(columns) == 1:
        return columns[0].clone()
    left, values, _ = torch.linalg.svd(torch.cat([c.to(columns[0].device) for c in columns], 1).double(), False)
    return left[:, values > 1e-4 * values[0]].float()  # adapters with the same basis have columns in common


def largest_owner_rank(model: nn.Module, signal: str) -> int:
    """The largest rank among the owners of a signal; for a model without bundles the width of the subspace."""
    layer, keys = _last_layer(model), owners(model, signal)
    if layer is None or not keys:
        return subspace(model, signal).shape[1]
    sizes = {a: sizes_of_bundles(layer.state.configs[a], layer.hidden_size) for a, _ in keys}
    return max(sizes[adapter][bundle]["rank"] for adapter, bundle in keys)


def _last_layer(model: nn.Module) -> BundleLayer | None:
    """The last block with bundles behind it, or inside."""
    return max((m for m in bundle_layers(model) if not m.site.path), key=lambda m: m.index, default=None)


class SubspaceHead(nn.Module):
    """A linear map of Q^T h / rms(Q^T h), with Q the subspace of a signal's owners and h the final state.

    The head sees nothing outside Q, so its gradient on h is in Q. It is linear because the bundles should make its
    input linearly readable, and because there are few labels.

    Args:
        basis: Q, (d, r).
        outputs: number of outputs, o.
        name: seeds the weights, so that they are the same in every process.
        bias: whether the map has a bias.
    """

    basis: Tensor

    def __init__(self, basis: Tensor, outputs: int, name: str, *, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("basis", basis.cpu(), persistent=False)  # the adapter's checkpoint has it
        with seeded(torch.device("cpu"), "head", name):
            self.map = nn.Linear(basis.shape[1], outputs, bias=bias)

    def coordinates(self, hidden: Tensor) -> Tensor:
        """Coordinates in Q of final states (..., d), scaled to root mean square 1: (..., r)."""
        basis = self.basis.to(wide(hidden).dtype)
        return F.rms_norm(wide(hidden) @ basis, (basis.shape[1],), eps=1e-6)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., o)."""
        return self.map(self.coordinates(hidden).to(self.map.weight.dtype))

"""Heads of objectives: small maps that read the final state in the subspace of the bundles that own a signal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from ..core.layer import BundleLayer
from .forward import seeded
from .tokens import wide


def owners(model: nn.Module, signal: str) -> list[tuple[str, str]]:
    """(adapter, bundle) with the largest weight for a signal, of the active adapters; empty where there are none."""
    layer = _last_layer(model)
    active = [] if layer is None else [a for a in layer.bundle_adapters() if a in layer.active_adapters]
    columns = {a: layer.state.configs[a].column(signal) for a in active}  # type: ignore[union-attr]
    weights = {(a, b): w for a, column in columns.items() for b, w in column.items()}
    return [key for key, w in weights.items() if w > 0 and w == max(weights.values())]


def subspace(model: nn.Module, signal: str) -> Tensor:
    """Orthonormal columns (d, r): what the owners of a signal may read and write in the last layer.

    The columns of U in the supports of the owners, not the span of their weights: it stays where it is while they are
    trained. Owners in several adapters: the span of the columns of all their U. The identity (d, d) for a model without
    bundles, and for an owner of kind "full".
    """
    layer = _last_layer(model)
    supports: dict[str, list[Tensor]] = {}
    for adapter, bundle in owners(model, signal):
        assert layer is not None
        shape = layer.packing(adapter).shapes[bundle]
        if shape.kind == "full":
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
    return left[:, values > 1e-4 * values[0]].float()  # adapters of one basis have columns in common


def goal_rank(model: nn.Module, signal: str) -> int:
    """The largest rank of the owners of a signal; the width of the subspace for a model without bundles."""
    layer, found = _last_layer(model), owners(model, signal)
    if layer is None or not found:
        return subspace(model, signal).shape[1]
    return max(layer.packing(adapter).shapes[bundle].rank for adapter, bundle in found)


def _last_layer(model: nn.Module) -> BundleLayer | None:
    return max((m for m in model.modules() if isinstance(m, BundleLayer)), key=lambda m: m.index, default=None)


class SubspaceHead(nn.Module):
    """A linear map of Q^T h / rms(Q^T h), Q the subspace of a signal's owners and h the final state.

    What lies outside of Q is not seen, so the gradient on h lies in Q. Linear, because the bundles are there to make
    what it reads linear, and little is labelled.

    Args:
        basis: Q, (d, r).
        outputs: o.
        name: seeds the weights, alike in every process.
        bias: of the map.
    """

    basis: Tensor

    def __init__(self, basis: Tensor, outputs: int, name: str, *, bias: bool = True) -> None:
        super().__init__()
        self.register_buffer("basis", basis.cpu(), persistent=False)  # the adapter's file has it
        with seeded(torch.device("cpu"), "head", name):
            self.map = nn.Linear(basis.shape[1], outputs, bias=bias)

    def coordinates(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., r), of root mean square 1."""
        basis = self.basis.to(wide(hidden).dtype)
        return F.rms_norm(wide(hidden) @ basis, (basis.shape[1],), eps=1e-6)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., o)."""
        return self.map(self.coordinates(hidden).to(self.map.weight.dtype))


# ---- what several objectives do with their rows ----


def pooled(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of a mask: values (B, T, r), mask (B, T) or (B, S, T) -> (B, r) or (B, S, r)."""
    weights = mask.to(values.dtype)
    total = weights @ values if mask.dim() == 3 else (weights.unsqueeze(1) @ values).squeeze(1)
    return total / weights.sum(-1, keepdim=True).clamp_min(1)


def at(hidden: Tensor, position: Tensor) -> Tensor:
    """hidden (B, T, ...) at one position a row (B,) -> (B, ...)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


def labels(objective: str, values: list[object], column: str, both: bool = True) -> list[float]:
    """0.0 or 1.0 from bools or numbers.

    Raises:
        ValueError: a label that is neither; with `both`, labels that are all the same.
    """
    for row, value in enumerate(values):
        if value not in (0, 1):  # True and 1.0 are 1
            raise ValueError(
                f"objective {objective!r}: row {row} has {column}={value!r}; give true or false, 1 or 0 (a score needs "
                "a threshold first)."
            )
    if both and len(set(values)) == 1:
        raise ValueError(
            f"objective {objective!r}: {column} is {values[0]!r} in all {len(values)} rows, so there is nothing to "
            "tell apart; add rows of the other class (studies.data makes wrong answers)."
        )
    return [float(bool(value)) for value in values]


def texts(objective: str, dataset: Dataset, *columns: str) -> None:
    """Raise ValueError for a row whose text or conversation in one of the columns is empty."""
    for column in columns:
        for row, value in enumerate(dataset[column]):
            parts = [m.get("content") for m in value] if isinstance(value, list) else [value]
            if not all(isinstance(p, str) and p.strip() for p in parts) or not parts:
                raise ValueError(f"objective {objective!r}: row {row} has an empty {column!r} ({value!r}); drop it.")


def joined(objective: str, row: int, pieces: list[str], column: str, tokenizer: object) -> tuple[list[int], list[int]]:
    """Ids of the pieces, a line each, and the number of its piece for every token.

    Raises:
        ValueError: fewer than two pieces, or one without text.
    """
    if len(pieces) < 2:
        raise ValueError(f"objective {objective!r}: row {row} has {len(pieces)} {column}; give at least two.")
    ids: list[int] = []
    of: list[int] = []
    for number, piece in enumerate(pieces):
        if not isinstance(piece, str) or not piece.strip():
            raise ValueError(f"objective {objective!r}: row {row}: {column}[{number}]={piece!r} is empty; drop it.")
        new = tokenizer(text=piece.rstrip("\n") + "\n", add_special_tokens=number == 0)["input_ids"]  # type: ignore
        ids, of = ids + new, of + [number] * len(new)
    return ids, of

"""What an adapter consists of, as a table a person can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .core.basis import BundleShape, principal_angles, support_overlap
from .core.layer import BundleLayer
from .core.walking import adapter_layers, resolve_adapter, state_of


@dataclass
class BundleReport:
    """One row per bundle, the matrix of common supports, and (when asked for) the smallest principal angles.

    Attributes:
        rows: bundle, kind, rank, hidden, support (columns), parameters (all layers), alpha, signals.
        overlap: (M, M), share of common support (`basis.support_overlap`).
        angles: (M, M), smallest principal angle of span(P_j) and span(P_k) in degrees, mean over layers, or None.
        header: lines about the adapter as a whole.
    """

    rows: list[dict[str, Any]]
    overlap: Tensor
    angles: Tensor | None
    header: list[str]

    def __str__(self) -> str:
        columns = ["bundle", "kind", "rank", "hidden", "support", "parameters", "alpha", "signals"]
        cells = [[_text(row[c]) for c in columns] for row in self.rows]
        widths = [max(len(c), *(len(line[i]) for line in cells)) if cells else len(c) for i, c in enumerate(columns)]
        lines = [*self.header, "  ".join(c.ljust(w) for c, w in zip(columns, widths)).rstrip()]
        lines += ["  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells]
        names = [row["bundle"] for row in self.rows]
        for title, matrix, form in (
            ("share of common support", self.overlap, "{:.2f}"),
            ("smallest principal angle, degrees, mean over layers", self.angles, "{:.0f}"),
        ):
            if matrix is not None and len(names) > 1:
                width = max(map(len, names))
                lines += ["", title]
                lines += [
                    f"{n.ljust(width)}  " + " ".join(form.format(v).rjust(4) for v in r)
                    for n, r in zip(names, matrix.tolist())
                ]
        return "\n".join(lines)

    __repr__ = __str__


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(k if v == 1 else f"{k}:{v:g}" for k, v in value.items() if v) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def report(model: nn.Module, adapter: str | None = None, *, angles: bool = False) -> BundleReport:
    """Describe one adapter of a model; `angles` also measures principal angles (a few SVDs per layer).

    Raises:
        ValueError: the model has no such adapter.
    """
    adapter = resolve_adapter(model, adapter)
    config, layers = state_of(model).configs[adapter], adapter_layers(model, adapter)
    packing = layers[0].packing(adapter)
    assert config.bundles is not None
    rows: list[dict[str, Any]] = [
        {
            "bundle": name,
            "kind": shape.kind,
            "rank": shape.rank,
            "hidden": shape.hidden,
            "support": len(shape.support),
            "parameters": sum(p.numel() for layer in layers for p in layer.bundle_parameters(adapter, name)),
            "alpha": config.bundles[name].alpha,
            "signals": dict(config.bundles[name].signals),
        }
        for name, shape in packing.shapes.items()
    ]
    total = sum(row["parameters"] for row in rows)
    calibrated = "no: run peft_bundles.calibrate(model, texts, tokenizer)"
    if config.calibration is not None:
        calibrated = f"{config.calibration['tokens']:,} tokens of {config.calibration['source']}"
    header = [
        f"adapter {adapter!r}: {len(rows)} bundles in {len(layers)} layers, {total:,} parameters",
        f"basis: {packing.basis_rank} of {layers[0].hidden_size} directions, {config.basis_init}",
        f"calibrated: {calibrated}",
    ]
    return BundleReport(rows, support_overlap(packing.shapes), _angles(layers, adapter) if angles else None, header)


def _angles(layers: list[BundleLayer], adapter: str) -> Tensor:
    shapes = layers[0].packing(adapter).shapes
    table = torch.full((len(shapes), len(shapes)), float("nan"), dtype=torch.float64)
    for j, (a, left) in enumerate(shapes.items()):
        for k, (b, right) in enumerate(shapes.items()):
            if "full" in (left.kind, right.kind) or k < j:
                continue  # no projector: spans everything; and the table is symmetric
            reads = [(_reads(layer, adapter, a, left), _reads(layer, adapter, b, right)) for layer in layers]
            angles = [principal_angles(x, left.support, y, right.support).min() for x, y in reads]
            table[j, k] = table[k, j] = torch.rad2deg(torch.stack(angles).mean())
    return table


def _reads(layer: BundleLayer, adapter: str, name: str, shape: BundleShape) -> Tensor:
    """Rows that span what a bundle reads of its support: those of W, of `down`, or all of it."""
    for table in (layer.bundle_weight[adapter], layer.bundle_down[adapter]):
        if name in table:
            return table[name]
    return torch.eye(len(shape.support))

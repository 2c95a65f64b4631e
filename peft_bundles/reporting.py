"""A table of an adapter's bundles."""

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
    """What `report` returns; printing it gives a table.

    Attributes:
        rows: a dict for each bundle: bundle, kind, rank, hidden (units), support (number of columns), parameters (in
            all layers), alpha, signals.
        overlap: (M, M), |S_j and S_k| / min(|S_j|, |S_k|): the share of common support of two bundles.
        angles: (M, M), smallest principal angle between what two bundles read, in degrees, mean over layers; NaN for a
            "full" bundle, which reads everything. None unless requested.
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
    """Describe the bundles of one adapter.

    Args:
        model: a model with bundles.
        adapter: name of the adapter. None: the only one.
        angles: also measure principal angles, with an SVD for every two bundles and layer.

    Returns:
        A `BundleReport`; print it for a table.

    Raises:
        ValueError: the model has no bundles, no adapter of this name, or several adapters and none is named.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, report
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> spec = {"rank": 8, "sub_bases": ["main"], "bottleneck": 4, "signals": {"lm": 1.0, "policy": 0.3}}
        >>> model = get_peft_model(base, BundleConfig(sub_bases={"main": 8}, bundles={"b_all": spec}))
        >>> print(report(model))
        adapter 'default': 1 bundles in 2 layers, 128 parameters
        basis: 8 of 32 directions, null
        calibrated: no: run peft_bundles.calibrate(model, texts, tokenizer)
        bundle  kind  rank  hidden  support  parameters  alpha  signals
        b_all   mlp   8     4       8        128         1.0    lm policy:0.3
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
                continue  # "full" bundles read everything, and the table is symmetric
            reads = [(_reads(layer, adapter, a, left), _reads(layer, adapter, b, right)) for layer in layers]
            angles = [principal_angles(x, left.support, y, right.support).min() for x, y in reads]
            table[j, k] = table[k, j] = torch.rad2deg(torch.stack(angles).mean())
    return table


def _reads(layer: BundleLayer, adapter: str, name: str, shape: BundleShape) -> Tensor:
    """Rows that span what a bundle reads of its support: those of W, those of `down`, or ("diag") all of it."""
    for table in (layer.bundle_weight[adapter], layer.bundle_down[adapter]):
        if name in table:
            return table[name]
    return torch.eye(len(shape.support))

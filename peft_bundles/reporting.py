"""A table of an adapter's bundles."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .core.basis import basis_rank, bundle_shapes, principal_angles, sizes_of_bundles, support_overlap
from .core.layer import BundleLayer
from .core.walking import adapter_layers, resolve_adapter, state_of


@dataclass
class BundleReport:
    """What `report` returns; printing it gives a table.

    Attributes:
        rows: a dict for each bundle: bundle, place, kind, rank, hidden (units of a layer), support (columns of U),
            parameters (in all layers), alpha, signals.
        overlap: (M, M), |S_j and S_k| / min(|S_j|, |S_k|): the share of common support of two bundles.
        angles: (M, M), smallest principal angle between what two bundles read, in degrees, mean over the layers that
            both read; NaN without such a layer, and for a "full" bundle, which reads everything. None unless requested.
        header: lines about the adapter as a whole.
    """

    rows: list[dict[str, Any]]
    overlap: Tensor
    angles: Tensor | None
    header: list[str]

    def __str__(self) -> str:
        columns = ["bundle", "kind", "rank", "hidden", "support", "parameters", "alpha", "signals", "place"]
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
        bundle  kind  rank  hidden  support  parameters  alpha  signals        place
        b_all   mlp   8     4       8        128         1.0    lm policy:0.3  block
    """
    adapter = resolve_adapter(model, adapter)
    config, layers = state_of(model).configs[adapter], adapter_layers(model, adapter)
    assert config.bundles is not None
    d = layers[0].hidden_size
    shapes = bundle_shapes(config, d)
    rows: list[dict[str, Any]] = [
        {
            "bundle": name,
            **sizes,
            "parameters": sum(p.numel() for layer in layers for p in layer.bundle_parameters(adapter, name)),
            "alpha": config.bundles[name].alpha,
            "signals": dict(config.bundles[name].signals),
        }
        for name, sizes in sizes_of_bundles(config, d).items()
    ]
    total = sum(row["parameters"] for row in rows)
    calibrated = "no: run peft_bundles.calibrate(model, texts, tokenizer)"
    if config.calibration is not None:
        calibrated = f"{config.calibration['tokens']:,} tokens of {config.calibration['source']}"
    header = [f"adapter {adapter!r}: {len(rows)} bundles in {len(layers)} layers, {total:,} parameters"]
    if any(row["support"] for row in rows):
        header.append(f"basis: {basis_rank(config, d)} of {d} directions, {config.basis_init}")
    header.append(f"calibrated: {calibrated}")
    return BundleReport(
        rows,
        support_overlap({n: shapes.get(n) for n in config.bundles}),
        _angles(layers, adapter) if angles else None,
        header,
    )


def _angles(layers: list[BundleLayer], adapter: str) -> Tensor:
    names = list(layers[0].state.configs[adapter].bundles or ())
    table = torch.full((len(names), len(names)), float("nan"), dtype=torch.float64)
    for j, k in itertools.combinations_with_replacement(range(len(names)), 2):  # the table is symmetric
        angles = []
        for layer in layers:
            reads = [_reads(layer, adapter, names[n]) for n in (j, k)]
            if reads[0] is not None and reads[1] is not None:
                angles.append(principal_angles(*reads[0], *reads[1]).min())
        if angles:
            table[j, k] = table[k, j] = torch.rad2deg(torch.stack(angles).mean())
    return table


def _reads(layer: BundleLayer, adapter: str, name: str) -> tuple[Tensor, Tensor] | None:
    """Rows that span what a bundle reads in a layer, and which coordinates they are: columns of U, or inputs.

    The rows are those of W, of `down`, or ("diag") all of the support. None if it is not there, or reads everything.
    """
    packing = layer.packing(adapter)
    if name not in packing.names:
        return None
    if layer.site.path:
        down = layer.bundle_down[adapter][name]
        return down, torch.arange(down.shape[1])
    shape = packing.shapes[name]
    if shape.kind == "full":
        return None
    for table in (layer.bundle_weight[adapter], layer.bundle_down[adapter]):
        if name in table:
            return table[name], shape.support
    return torch.eye(len(shape.support)), shape.support

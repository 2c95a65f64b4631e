"""Plans for compiled inference, made for all layers before a compiled forward starts (see inference.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .gates import given_sizes
from .inference import Plan, for_compiler
from .layer import BundleLayer


@contextmanager
def prepared(model: nn.Module, layers: Sequence[BundleLayer]) -> Iterator[None]:
    """Run the block with a plan in every layer's slot, if inference is compiled; otherwise do nothing.

    Args:
        model: the base model with bundles.
        layers: all its bundle layers.
    """
    if torch.is_grad_enabled() or not layers or not is_compiled(model, layers):
        yield
        return
    state = layers[0].state
    active = state.call.active
    if active is None or (layers[0].training and state.draws_dropout()):
        yield
        return
    slots, settings = [layer.slot for layer in layers], state.settings(active)
    before = [(slot.plan, slot.settings) for slot in slots]
    # A call inside a call (in a logits processor, say) may have its own alphas or adapters.
    if slots[0].plan is not None and slots[0].settings == settings:
        yield
        return
    first = next(p for p in model.parameters() if p.is_floating_point())
    device = first.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.dtype
    try:
        for layer, slot in zip(layers, slots):
            slot.plan, slot.settings = plan_ahead(layer, active, dtype), settings
        yield
    finally:
        for slot, (plan, earlier) in zip(slots, before):
            slot.plan, slot.settings = plan, earlier


def is_compiled(model: nn.Module, layers: Sequence[BundleLayer]) -> bool:
    """Whether inference is compiled, as far as can be seen before it runs; a layer being traced notes it later."""
    modules = [model, getattr(model, "base_model", None), *(layer.get_base_layer() for layer in layers)]
    state = layers[0].state
    state.compiled |= any(getattr(module, "_compiled_call_impl", None) is not None for module in modules)
    return state.compiled


@torch.compiler.disable
def plan_ahead(layer: BundleLayer, active: Sequence[str], dtype: torch.dtype) -> Plan:
    """A layer's plan for this call, with products in `dtype`, before the sizes of its batches are known."""
    state, parts = layer.state, []
    names = state.call.adapter_names
    for adapter in layer.acting(active):
        # For the rows and tokens that the alphas were given for; the forward checks them against the batch.
        rows, tokens = given_sizes(state, adapter)
        rows = max(len(names), rows or 1) if names is not None else rows
        like = torch.empty(rows or 1, tokens or 1, 0, dtype=dtype, device=layer.device_of(adapter))
        part = layer.part(adapter, like, dtype)
        if part is not None:
            parts.append(for_compiler(part, (rows is not None, tokens is not None)))
    budget = None if state.budget is None or not parts else torch.tensor(state.budget, device=parts[0].E_Hd.device)
    return Plan(tuple(parts), budget, state.call.prompts is not None, state.call.uncached)

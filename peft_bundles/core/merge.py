"""Merging bundles of kind "lora" into the linear layers that they are on, as PEFT merges LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import BundleConfig
from .state import BundleState


BROKEN = "NaNs detected in the merged weights. The adapter {} seems to be broken"  # as PEFT says it


def check_mergeable(state: BundleState, layers: Iterable[Any], adapters: Sequence[str], safe: bool = False) -> None:
    """Refuse what no linear layer could hold, before anything is changed.

    Raises:
        ValueError: a bundle that is on is behind a block or not linear, its alpha differs between rows or tokens, or a
            norm budget is set; or with `safe` an update is not finite.
    """
    if state.budget is not None:
        raise ValueError(
            "bundles cannot be merged while a norm budget is set; call set_norm_budget(model, None) first."
        )
    for layer in layers:
        for adapter in adapters:
            for bundle in layer.packing(adapter).names if layer.holds(adapter) else ():
                if alpha_of(state, adapter, bundle, layer.index):
                    check_linear(layer, state.configs[adapter], bundle)
            update = update_of(layer, adapter) if safe and layer.site.path and layer.holds(adapter) else None
            if update is not None and not bool(torch.isfinite(update).all()):
                raise ValueError(BROKEN.format(adapter))


def check_linear(layer: Any, config: BundleConfig, bundle: str, what: str = "cannot be merged") -> None:
    """Refuse a bundle that no LoRA computes.

    Raises:
        ValueError: it is behind a block, or of another kind than "lora".
    """
    kind = config.kind_of(bundle, bool(layer.site.path))
    if layer.site.path and kind == "lora":
        return
    where = f"is of kind {kind!r}" if layer.site.path else "acts on the residual stream behind blocks"
    raise ValueError(
        f"bundle {bundle!r} {what}: it {where}, and no weight of the base model or LoRA could hold that. Set its alpha "
        "to 0, keep the adapter, or use distill_to_lora, which trains a LoRA to do nearly the same."
    )


def alpha_of(state: BundleState, adapter: str, bundle: str, layer: int) -> float:
    """The present alpha of a bundle in a layer.

    Raises:
        ValueError: it differs between rows or tokens.
    """
    spec = (state.configs[adapter].bundles or {})[bundle]
    value = state.call.alphas.get(bundle, state.set_alphas.get(bundle, spec.alpha))
    value = value[layer] if isinstance(value, tuple) else value
    if isinstance(value, Tensor) and value.dim():
        raise ValueError(
            f"the alpha of {bundle!r} differs between rows or tokens, and a merged weight is one for all; give a "
            "number, or one for each layer."
        )
    return float(value)


@torch.no_grad()
def update_of(layer: Any, adapter: str) -> Tensor | None:
    """What an adapter adds to the weight of its linear layer, (O, I), at the present alphas; None if it is off."""
    packing, total = layer.packing(adapter), None
    for bundle in packing.names:
        if alpha := alpha_of(layer.state, adapter, bundle, layer.index):
            down, up = layer.bundle_down[adapter][bundle], layer.bundle_up[adapter][bundle]
            update = (packing.scales[bundle] * alpha) * (up.T @ down)
            total = update if total is None else total + update
    return total


@torch.no_grad()
def add_to_weight(module: nn.Module, update: Tensor, safe: bool, adapter: str) -> None:
    """Add an update, (O, I), to the weight of a linear layer; a quantised one is quantised anew.

    Raises:
        ValueError: with `safe`, the sum is not finite.
    """
    linear: Any = module
    while hasattr(linear, "base_layer"):  # LoRA is on it too
        linear = linear.base_layer
    weight, quantised = linear.weight, type(linear.weight).__name__
    if quantised in ("Params4bit", "Int8Params"):
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            linear.state_dict()  # after a forward on some CPUs the weight is in an order of its own; this undoes that
        total = dequantize_bnb_weight(weight, state=getattr(linear, "state", None)).to(update) + update
    else:
        update = update.T if isinstance(linear, Conv1D) else update
        wide = torch.promote_types(weight.dtype, update.dtype)
        total = weight.to(wide) + update.to(weight.device, wide)
    if safe and not bool(torch.isfinite(total).all()):
        raise ValueError(BROKEN.format(adapter))
    if quantised not in ("Params4bit", "Int8Params"):
        weight.copy_(total)
        return
    warnings.warn(
        f"the weight is quantised ({quantised}): merged bundles are rounded with it, and the model differs a little.",
        stacklevel=4,
    )
    if quantised == "Params4bit":
        kept = {k: v for k, v in vars(weight).items() if not k.startswith("_") and k != "data"}
        kept |= {"bnb_quantized": False, "requires_grad": False}
        linear.weight = type(weight)(total.to("cpu"), **kept).to(weight.device)
    else:
        fields = {"requires_grad": False, "has_fp16_weights": weight.has_fp16_weights}
        linear.weight = type(weight)(total.to("cpu"), **fields).to(weight.device)
        linear.state.reset_grads()

"""Closing a step: average gradients over processes (missing ones stay None) and clip them by bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.walking import bundle_parameters, state_of


def finalize_grads(model: nn.Module, *, reduce: bool = True) -> None:
    """Close the backward passes of a step, before clipping and `optimizer.step()`.

    Bundles that no forward of the step let learn have `.grad` None afterwards. With several processes, gradients are
    averaged: first a bitmap of which gradients exist on any rank, then one flat all-reduce, so that a gradient that no
    rank has stays None on all. Run the backward passes without synchronisation (`ddp.no_sync()`, or no DDP at all).

    Args:
        model: a model with bundles.
        reduce: False where something else (plain DDP) has averaged the gradients already. Gradients that it filled with
            zeros, for bundles that learned nothing, become None.

    Raises:
        RuntimeError: forwards ran with gradients on, but no bundle got a gradient; or rows with several signals were
            not given to `routed_backward`.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, finalize_grads
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> signals = {"b_lm": {"lm": 1.0}, "b_rl": {"policy": 1.0}}
        >>> bundles = {name: {"rank": 8, "sub_bases": ["main"], "signals": signals[name]} for name in signals}
        >>> model = get_peft_model(base, BundleConfig(sub_bases={"main": 8}, bundles=bundles))
        >>> ids = torch.arange(8).view(2, 4)
        >>> with model.route("lm"):
        ...     loss = model(input_ids=ids, labels=ids).loss
        >>> loss.backward()
        >>> finalize_grads(model)
        >>> all(p.grad is None for p in model.bundle_parameters("b_rl"))
        True
    """
    state = state_of(model)
    waiting, state.waiting = state.waiting, []
    seen_here, state.seen = state.seen, set()
    if waiting:
        raise RuntimeError(
            "a forward had rows with several signals, and their losses were not given; call "
            "routed_backward({signal: loss}) before finalize_grads."
        )
    table = bundle_parameters(model)
    seen = torch.tensor([key in seen_here for key in table], dtype=torch.int32)
    if _several_ranks():
        seen = seen.to(next(model.parameters()).device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        if reduce:
            reduce_gradients([p for p in model.parameters() if p.requires_grad])
    if not bool(seen.any()):
        return  # no forward with gradients since the last call
    learned = [key for key, flag in zip(table, seen.tolist()) if flag]
    for key in table.keys() - set(learned):
        for parameter in table[key]:
            parameter.grad = None
    if all(p.grad is None for key in learned for p in table[key]):
        raise RuntimeError(
            f"no gradient reached any of the bundles {learned}, which took part in the forwards since the last "
            "finalize_grads. Call .backward() first; set an alpha other than 0; with gradient checkpointing, use "
            "use_reentrant=False."
        )


def share_seen(model: nn.Module) -> None:
    """Share which bundles learn on any process, so that all processes have the same `quiet_loss`."""
    if not _several_ranks():
        return
    state, table = state_of(model), bundle_parameters(model)
    device = next(model.parameters()).device
    seen = torch.tensor([key in state.seen for key in table], dtype=torch.int32, device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    state.seen = {key for key, flag in zip(table, seen.tolist()) if flag}


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average gradients over the processes, if there are several; a gradient that no process has stays None."""
    if not parameters or not _several_ranks():
        return
    device = parameters[0].device
    exists = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(exists, op=dist.ReduceOp.MAX)
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter, flag in zip(parameters, exists.tolist()):
        if flag:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in groups.values():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, gradient in zip(group, flat.split([p.numel() for p in group])):
            parameter.grad = gradient.view_as(parameter).clone()


def clip_parts(parts: Mapping[str, Sequence[nn.Parameter]], max_norms: Mapping[str, float]) -> dict[str, Tensor]:
    """Clip the gradient of every part of a model separately.

    Args:
        parts: name -> parameters.
        max_norms: name -> largest norm; `math.inf` measures without clipping.

    Returns:
        Name -> norm before clipping; parts without gradient are left out.
    """
    return {
        name: nn.utils.clip_grad_norm_(parameters, max_norms[name])
        for name, parameters in parts.items()
        if any(p.grad is not None for p in parameters)
    }


def bundle_labels(model: nn.Module) -> dict[tuple[str, str], str]:
    """(adapter, bundle) -> the name shown to users: the bundle's; "adapter.bundle" where there are several adapters."""
    keys = list(bundle_parameters(model))
    several = len({adapter for adapter, _ in keys}) > 1
    return {(adapter, name): f"{adapter}.{name}" if several else name for adapter, name in keys}


def clip_bundle_grads(model: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """Clip the gradient of every bundle to `max_norm`, each bundle on its own.

    One global norm would let a large gradient of one signal shrink that of another.

    Args:
        model: a model with bundles.
        max_norm: the largest norm of a bundle's gradient over all layers.

    Returns:
        Bundle -> norm before clipping ("adapter.bundle" with several adapters); bundles without gradient are left out.

    Raises:
        ValueError: max_norm is not positive.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, clip_bundle_grads
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> bundles = {"b_lm": {"rank": 8, "sub_bases": ["main"], "signals": {"lm": 1.0}}}
        >>> model = get_peft_model(base, BundleConfig(sub_bases={"main": 8}, bundles=bundles))
        >>> model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
        >>> list(clip_bundle_grads(model, 1.0))
        ['b_lm']
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm!r} must be positive; 1.0 is usual.")
    labels = bundle_labels(model)
    parts = {labels[key]: parameters for key, parameters in bundle_parameters(model).items()}
    return clip_parts(parts, dict.fromkeys(parts, max_norm))

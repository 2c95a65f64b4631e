"""Closing a step: gradients over processes, None where no rank has one, and clipping bundle by bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.walking import bundle_parameters, state_of


def finalize_grads(model: nn.Module, *, reduce: bool = True) -> None:
    """Close the backward passes of a step, before clipping and `optimizer.step()`.

    With several processes, gradients are averaged over ranks: a bitmap of which exist on any rank, then one flat
    all-reduce, so that a gradient that no rank has stays None on all. Run the backwards without synchronisation
    (`ddp.no_sync()`, or no DDP at all).

    Args:
        reduce: False where something else (plain DDP) has reduced already; what it filled with zeros becomes None.

    Raises:
        RuntimeError: forwards ran with gradients on, but no bundle got one; or rows with several signals were never
            given to `routed_backward`.
    """
    state = state_of(model)
    waiting, state.waiting = state.waiting, []
    seen_here, state.seen = state.seen, set()
    if waiting:
        raise RuntimeError("rows with several signals wait for their losses: call routed_backward({signal: loss}).")
    table = bundle_parameters(model)
    seen = torch.tensor([key in seen_here for key in table], dtype=torch.int32)
    if _several_ranks():
        seen = seen.to(next(model.parameters()).device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        if reduce:
            reduce_gradients([p for p in model.parameters() if p.requires_grad])
    if not bool(seen.any()):
        return  # no forward with gradients since the last call
    learnt = [key for key, flag in zip(table, seen.tolist()) if flag]
    for key in table.keys() - set(learnt):
        for parameter in table[key]:
            parameter.grad = None
    if all(p.grad is None for key in learnt for p in table[key]):
        raise RuntimeError(
            f"no gradient reached any of the bundles {learnt} of the forwards since the last call. Was .backward() "
            "called, is their alpha 0, or is gradient checkpointing re-entrant? Use use_reentrant=False."
        )


def share_seen(model: nn.Module) -> None:
    """Tell all processes which bundles the forwards of any have let learn, so that `quiet_loss` is of the same ones."""
    if not _several_ranks():
        return
    state, table = state_of(model), bundle_parameters(model)
    device = next(model.parameters()).device
    seen = torch.tensor([key in state.seen for key in table], dtype=torch.int32, device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    state.seen = {key for key, flag in zip(table, seen.tolist()) if flag}


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduce_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over ranks, where there are several; a gradient that no rank has stays None."""
    if not parameters or not _several_ranks():
        return
    device = parameters[0].device
    exists = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(exists, op=dist.ReduceOp.MAX)
    by_kind: dict[Any, list[nn.Parameter]] = {}
    for parameter, flag in zip(parameters, exists.tolist()):
        if flag:
            by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in by_kind.values():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, gradient in zip(group, flat.split([p.numel() for p in group])):
            parameter.grad = gradient.view_as(parameter).clone()


def clip_bundle_grads(model: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """Clip the gradient of every bundle to `max_norm` by itself; returns each bundle's norm before clipping.

    One global norm would let one signal's large gradient shrink another's. Keys are bundle names, "adapter.bundle" with
    several adapters; bundles without gradient are left out.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm!r} must be positive.")
    names = bundle_labels(model)
    parts = {names[key]: parameters for key, parameters in bundle_parameters(model).items()}
    return clip_parts(parts, dict.fromkeys(parts, max_norm))


def clip_parts(parts: Mapping[str, Sequence[nn.Parameter]], max_norms: Mapping[str, float]) -> dict[str, Tensor]:
    """Clip the gradient of every part of a model to a norm of its own.

    Args:
        parts: name -> parameters.
        max_norms: name -> largest norm; `math.inf` measures without clipping.

    Returns:
        Name -> norm before clipping, of the parts that have a gradient.
    """
    return {
        name: nn.utils.clip_grad_norm_(parameters, max_norms[name])
        for name, parameters in parts.items()
        if any(p.grad is not None for p in parameters)
    }


def bundle_labels(model: nn.Module) -> dict[tuple[str, str], str]:
    """(adapter, bundle) -> its name in logs: the bundle's, "adapter.bundle" with several adapters."""
    keys = list(bundle_parameters(model))
    several = len({adapter for adapter, _ in keys}) > 1
    return {(a, b): f"{a}.{b}" if several else b for a, b in keys}

"""The forward without gradients: one plan for each layer, run by one function.

A plan holds the tensors that a layer needs: D, E, mu and the alphas of every active adapter. `BundleLayer.plan` makes
it, and `run_plan` runs it, with the same operation as training (functional.py). Plans are used in three ways:

- an ordinary forward makes a plan for the states it gets, and drops it;
- inside `folded()` and `generate` a layer keeps its plan until something it depends on changes (`for_reuse`);
- compiled inference gets its plans before the forward starts (`planning.prepared`, `for_compiler`).

A compiler bakes into the program whatever it sees while tracing: names of bundles, numbers, sizes. A plan made
beforehand holds only tensors, and its number of hidden units is marked as dynamic, so other bundles, sizes and alphas
do not recompile. These do, once each: another number of adapters, the first alphas per row, the first norm budget, all
bundles off.

Shapes: B rows, T tokens, d hidden size, H hidden units of all bundles of an adapter. "B|1" is B or 1.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import compute_dtype, stacked, within_budget
from .gates import for_new_tokens
from .kernels import FewTokens, fits


class Part(NamedTuple):
    """What one adapter does in one layer.

    Attributes:
        D_dH, E_Hd: the folded maps; alphas that are numbers are multiplied into E.
        mean_d: mu; None is 0.
        nonlinear: hidden units before this one pass through GELU. For a compiler: a mask (H,) of those that do; None:
            all do.
        alpha_BTH: (B|1, T|1, H); None is 1.
        by: for a plan made before the batch is known: whether alpha was given per row, and per token. Its rows and
            tokens must then match the batch. None: alpha fits the batch.
        few: a GPU kernel for the whole part, if there are few tokens; None: plain PyTorch.
    """

    D_dH: Tensor
    E_Hd: Tensor
    mean_d: Tensor | None
    nonlinear: int | Tensor | None
    alpha_BTH: Tensor | None
    by: tuple[bool, bool] | None = None
    few: FewTokens | None = None


class Plan(NamedTuple):
    """What all active adapters do in one layer.

    Attributes:
        parts: one for every adapter that is on.
        budget: tau of the norm budget; None: no limit.
        generating: inside `generate`: a prompt may have several beams, and tokens may come one at a time.
        uncached: inside a `generate` without a cache.
    """

    parts: tuple[Part, ...]
    budget: float | Tensor | None
    generating: bool
    uncached: bool = False


class Slot(threading.local):
    """One layer's plan for the call that this thread runs; None unless `prepared` made one before the call.

    Attributes:
        plan: the plan.
        settings: what it was made for (`BundleState.settings`).
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.settings: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, ()  # a copy of the model starts with no call in progress


def run_plan(plan: Plan, hidden_BTd: Tensor, residual_BTd: Tensor | None = None) -> Tensor:
    """The bundles of a layer.

    Args:
        hidden_BTd: what they read, (B, T, d), or (B, T, I) at a linear layer.
        residual_BTd: what their update is added to, (B, T, O). None: hidden.

    Returns:
        The sum, of the shape and dtype of the residual.
    """
    residual_BTd = hidden_BTd if residual_BTd is None else residual_BTd
    if not plan.parts:
        return residual_BTd
    out_BTd, dtype = residual_BTd, compute_dtype(hidden_BTd)
    for part in plan.parts:
        if part.few is not None:
            out_BTd = part.few(hidden_BTd.contiguous(), out_BTd.contiguous())
            continue
        alpha = part.alpha_BTH
        if alpha is not None and part.by is not None:
            alpha = _fitted(alpha, hidden_BTd, part.by, plan.generating, plan.uncached)
        factors = () if alpha is None else (alpha,)
        out_BTd, _, _ = stacked(hidden_BTd, out_BTd, part.D_dH, part.E_Hd, part.mean_d, part.nonlinear, factors, dtype)
    return out_BTd if plan.budget is None else within_budget(residual_BTd, out_BTd, plan.budget)


def for_reuse(plan: Plan, hidden_BTd: Tensor) -> Plan:
    """The plan for repeated use on such states: mu in their dtype, and a GPU kernel if there are few tokens."""
    dtype, parts = compute_dtype(hidden_BTd), []
    for part in plan.parts:
        mean, alpha, few = part.mean_d, part.alpha_BTH, None
        mean = None if mean is None else mean.to(hidden_BTd.dtype)
        if fits(hidden_BTd, dtype) and isinstance(part.nonlinear, int) and (alpha is None or alpha.shape[1] == 1):
            few = FewTokens(hidden_BTd.shape, mean, part.D_dH, part.E_Hd, part.nonlinear, alpha)
        parts.append(part._replace(mean_d=mean, few=few))
    return plan._replace(parts=tuple(parts))


@torch.compiler.disable
def for_compiler(part: Part, by: tuple[bool, bool]) -> Part:
    """A part for a compiled program: only tensors, with a dynamic number of hidden units."""
    # Copies: a tensor's offset in its storage is a number too and would be baked into the program.
    D, E, nonlinear, alpha = part.D_dH.clone(), part.E_Hd.clone(), part.nonlinear, part.alpha_BTH
    H = len(E)
    mask = torch.arange(H, device=E.device) < nonlinear if isinstance(nonlinear, int) and nonlinear < H else None
    alpha = None if alpha is None else alpha.expand(-1, -1, H)
    for tensor, axis in ((D, 1), (E, 0), (mask, 0), (alpha, 2)):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
    return part._replace(D_dH=D, E_Hd=E, nonlinear=mask, alpha_BTH=alpha, by=by)


def _fitted(alpha_BTH: Tensor, hidden_BTd: Tensor, by: tuple[bool, bool], generating: bool, uncached: bool) -> Tensor:
    """Alphas of a plan made before the batch was known, for this batch.

    Inside `generate` a prompt's alpha is repeated for its beams, and new tokens keep that of the prompt's last one.

    Raises:
        ValueError: alphas per row (per token) that do not match the number of rows (tokens) of the batch.
    """
    (rows, length), (batch, tokens) = alpha_BTH.shape[:2], hidden_BTd.shape[:2]
    if generating:
        alpha_BTH = alpha_BTH if rows in (1, batch) else alpha_BTH.repeat_interleave(batch // rows, 0)
        return alpha_BTH if length in (1, tokens) else for_new_tokens(alpha_BTH, tokens, uncached)
    by_row, by_token = by
    if (rows != batch and (by_row or rows != 1)) or (length != tokens and (by_token or length != 1)):
        raise ValueError(
            f"alphas or adapter_names are for {rows} rows (of {length} tokens), but the batch has {batch} (of "
            f"{tokens}); give one value for each row (and each token)."
        )
    return alpha_BTH

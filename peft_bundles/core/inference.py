"""The forward without gradients: one plan for each layer, run by one function.

A plan holds the tensors that a layer needs: D, E, mu and the alphas of every active adapter. `BundleLayer.plan` makes
it, and `run_plan` runs it, with the same operation as training (functional.py). Plans are used in three ways:

- an ordinary forward makes a plan for the states it gets, and drops it;
- inside of `folded()` and `generate` a layer keeps its plan until something changes that it depends on (`for_reuse`);
- compiled inference gets its plans before the forward starts (`planning.prepared`, `for_compiler`).

A compiler builds into the program whatever it finds while it traces: names of bundles, numbers, sizes. A plan made
before is tensors only, and its number of hidden units is marked as variable. So other bundles, other sizes and other
alphas need no other program. What does compile again, once each: another number of adapters, the first alphas by row,
the first norm budget, all bundles off.

Shapes: B rows, T tokens, d hidden size, H hidden units of all bundles of an adapter. "B|1" is B or 1.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import compute_dtype, stacked, within_budget
from .kernels import FewTokens, fits


class Part(NamedTuple):
    """What one adapter does in one layer.

    Attributes:
        D_dH, E_Hd: the folded maps; alphas that are numbers are in E.
        mean_d: mu; None is 0.
        nonlinear: hidden units before this one pass through GELU. For a compiler: a mask (H,) of those that do; None:
            all do.
        alpha_BTH: (B|1, T|1, H); None is 1.
        by: for a plan made before the batch is known: whether alpha was given by row, and by token. Then its rows and
            tokens must be those of the batch. None: alpha fits the batch.
        few: a GPU kernel for the whole part, where tokens are few; None: plain PyTorch.
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
        generating: inside of `generate`: a prompt may have several beams, and tokens may come one at a time.
    """

    parts: tuple[Part, ...]
    budget: float | Tensor | None
    generating: bool


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


def run_plan(plan: Plan, hidden_BTd: Tensor) -> Tensor:
    """The bundles of a layer, (B, T, d) -> (B, T, d)."""
    if not plan.parts:
        return hidden_BTd
    out_BTd, dtype = hidden_BTd, compute_dtype(hidden_BTd)
    for part in plan.parts:
        if part.few is not None:
            out_BTd = part.few(hidden_BTd.contiguous(), out_BTd.contiguous())
            continue
        alpha = part.alpha_BTH
        if alpha is not None and part.by is not None:
            alpha = _fitted(alpha, hidden_BTd, part.by, plan.generating)
        factors = () if alpha is None else (alpha,)
        out_BTd, _, _ = stacked(hidden_BTd, out_BTd, part.D_dH, part.E_Hd, part.mean_d, part.nonlinear, factors, dtype)
    return out_BTd if plan.budget is None else within_budget(hidden_BTd, out_BTd, plan.budget)


def for_reuse(plan: Plan, hidden_BTd: Tensor) -> Plan:
    """A plan for many states like these: mu in their dtype, and a GPU kernel where tokens are few."""
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
    """A part as a compiled program takes it: nothing but tensors, with a variable number of hidden units."""
    # Copies: where a tensor lies in its storage is a number too, which would be built into the program.
    D, E, nonlinear, alpha = part.D_dH.clone(), part.E_Hd.clone(), part.nonlinear, part.alpha_BTH
    H = len(E)
    mask = torch.arange(H, device=E.device) < nonlinear if isinstance(nonlinear, int) and nonlinear < H else None
    alpha = None if alpha is None else alpha.expand(-1, -1, H)
    for tensor, axis in ((D, 1), (E, 0), (mask, 0), (alpha, 2)):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
    return part._replace(D_dH=D, E_Hd=E, nonlinear=mask, alpha_BTH=alpha, by=by)


def _fitted(alpha_BTH: Tensor, hidden_BTd: Tensor, by: tuple[bool, bool], generating: bool) -> Tensor:
    """Alphas of a plan made before the batch was known, for this batch.

    Inside of `generate` a prompt's alpha is repeated for its beams, and new tokens keep that of the prompt's last one.

    Raises:
        ValueError: alphas by row (by token) for another number of rows (tokens) than the batch has.
    """
    (rows, length), (batch, tokens) = alpha_BTH.shape[:2], hidden_BTd.shape[:2]
    if generating:
        alpha_BTH = alpha_BTH if rows in (1, batch) else alpha_BTH.repeat_interleave(batch // rows, 0)
        return alpha_BTH if length in (1, tokens) else alpha_BTH[:, -1:]
    by_row, by_token = by
    if (rows != batch and (by_row or rows != 1)) or (length != tokens and (by_token or length != 1)):
        raise ValueError(
            f"alphas or adapter_names are for {rows} rows (of {length} tokens), but the batch has {batch} (of "
            f"{tokens}); give one value for each row (and each token)."
        )
    return alpha_BTH

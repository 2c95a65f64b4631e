"""What a compiled forward reads of the bundles: tensors made before it starts, and nothing that would be compiled in.

A compiler keeps what it finds while it traces: names of bundles, numbers, shapes. Inference that is compiled therefore
gets D, E, mu and the gates of every layer as tensors, made eagerly when the call starts (once a `generate`), with the
number of hidden units marked as variable. Another set of bundles, another size of one or another number for an alpha
is then other tensors and no other program. What compiles again, once: another number of bases, the first alphas by row,
the first norm budget, all bundles off. (Training compiles what it finds.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import _add_product, compute_dtype, within_budget
from .gates import layer_alphas


if TYPE_CHECKING:
    from .layer import BundleLayer


class Group(NamedTuple):
    """One adapter in one layer; H its hidden units."""

    D: Tensor  # (d, H)
    E: Tensor  # (H, d), with the alphas that are numbers
    mean: Tensor | None  # (d,)
    linear: Tensor | None  # (H,), True where a unit has no activation; None: none of them
    alpha: Tensor | None  # (B|1, T|1, H); None is 1
    given: tuple[bool, bool]  # whether alpha is by row, and by token: then its size must be the batch's


class Prepared(NamedTuple):
    groups: tuple[Group, ...]
    budget: Tensor | None  # ()
    generating: bool  # then a batch may be the prompts' beams, and its tokens one at a time


class Slot(threading.local):
    """One layer's `Prepared` for the call that this thread runs."""

    def __init__(self) -> None:
        self.ready: Prepared | None = None
        self.made_of: tuple[Any, ...] = ()  # what `ready` was made for

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, ()  # a copy of the model starts with no call in progress


@contextmanager
def prepared(model: nn.Module, layers: Sequence[BundleLayer]) -> Iterator[None]:
    """Run the block with what compiled inference reads in this thread's slots, where there is a call that needs it."""
    if torch.is_grad_enabled() or not layers or not _compiled(model, layers):
        yield
        return
    state, before = layers[0].state, [(layer.slot.ready, layer.slot.made_of) for layer in layers]
    call = state.call
    if call.active is None or (layers[0].training and any(state.configs[a].dropout for a in state.configs)):
        yield  # (dropout is drawn anew in every forward)
        return
    # A call inside of a call (in a logits processor, say) may have alphas or adapters of its own.
    made_of = id(call.alphas), call.adapter_names, call.prompts is not None, state.version, state.budget
    if before[0][0] is not None and before[0][1][:-1] == made_of:
        yield
        return
    first = next(p for p in model.parameters() if p.is_floating_point())
    device = first.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.dtype
    try:
        for layer in layers:
            layer.slot.ready = prepare(layer, call.active, call.adapter_names, dtype)
            layer.slot.made_of = (*made_of, call.alphas)  # kept, so that its id stays its own
        yield
    finally:
        for layer, earlier in zip(layers, before):
            layer.slot.ready, layer.slot.made_of = earlier


def _compiled(model: nn.Module, layers: Sequence[BundleLayer]) -> bool:
    """Whether inference is compiled, as far as one can see before it runs; a forward that was traced says so later."""
    parts = [model, getattr(model, "base_model", None), *(layer.get_base_layer() for layer in layers)]
    state = layers[0].state
    state.compiled |= any(getattr(part, "_compiled_call_impl", None) is not None for part in parts)
    return state.compiled


@torch.compiler.disable
def prepare(layer: BundleLayer, adapters: tuple[str, ...], rows: list[str] | None, dtype: torch.dtype) -> Prepared:
    """One layer's tensors for a call with these adapters, or with `rows` naming one for each row of the batch."""
    state, groups = layer.state, []
    for adapter in adapters if rows is None else dict.fromkeys(rows):
        if adapter not in layer.bundle_basis or not layer.packing(adapter).names:
            continue
        packing, basis = layer.packing(adapter), layer.bundle_basis[adapter]
        values = [state.call.alphas.get(name, state.set_alphas.get(name)) for name in packing.names]
        shapes = [value.shape for value in values if isinstance(value, Tensor)]
        # As large as the gates say: whether that fits the batch shows in the forward.
        batch = max([len(rows or ()), 1, *(shape[0] for shape in shapes if len(shape))])
        tokens = max([1, *(shape[1] for shape in shapes if len(shape) > 1)])
        like = basis.new_empty(batch, tokens, 0, dtype=dtype)
        owner = packing.index(basis.device)["owner"]
        numbers, alpha = layer_alphas(state, adapter, layer.index, like, (owner, dtype))
        if numbers is not None and not any(numbers):
            continue
        # Tensors of their own: where one lies in a storage is a number too, which would be compiled in.
        D, E = (tensor.clone() for tensor in layer._folded(adapter, dtype, numbers, packing.names))
        if rows is not None:
            mine = layer._row_mask([name == adapter for name in rows], like)
            alpha = mine.expand(-1, -1, len(owner)) if alpha is None else alpha * mine
        linear = None
        if packing.nonlinear < len(owner):
            linear = torch.arange(len(owner), device=basis.device) >= packing.nonlinear
        mean = layer.bundle_mean[adapter] if layer._standardised(adapter) else None
        for tensor, axis in ((D, 1), (E, 0), (linear, 0), (alpha, -1)):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, axis % tensor.dim())
        given = rows is not None or any(map(len, shapes)), any(len(shape) > 1 for shape in shapes)
        groups.append(Group(D, E, mean, linear, alpha, given))
    budget = torch.tensor(state.budget, device=groups[0].D.device) if state.budget is not None and groups else None
    return Prepared(tuple(groups), budget, state.call.prompts is not None)


def apply(ready: Prepared, hidden: Tensor) -> Tensor:
    """The bundles of a layer on hidden, (B, T, d); the same arithmetic as `bundle_forward`, without a backward."""
    out, dtype = hidden, compute_dtype(hidden)
    for D, E, mean, linear, alpha, given in ready.groups:
        x = hidden if mean is None else hidden - mean.to(hidden.dtype)
        s = x.to(dtype) @ D.to(dtype)
        a = F.gelu(s) if linear is None else torch.where(linear, s, F.gelu(s))
        if alpha is not None:
            a = a * _fitted(alpha, hidden, given, ready.generating).to(dtype)
        out = _add_product(out, a, E.to(dtype))
    return out if ready.budget is None else within_budget(hidden, out, ready.budget)


def _fitted(alpha: Tensor, hidden: Tensor, given: tuple[bool, bool], generating: bool) -> Tensor:
    """Gates by prompt for its beams; new tokens keep the gate of the prompt's last one.

    Raises:
        ValueError: gates by row (by token) for another number of rows (tokens) than `hidden` has.
    """
    (rows, length), (batch, tokens) = alpha.shape[:2], hidden.shape[:2]
    if generating:
        alpha = alpha if rows in (1, batch) else alpha.repeat_interleave(batch // rows, 0)
        return alpha if length in (1, tokens) else alpha[:, -1:]
    if (rows != batch and (given[0] or rows != 1)) or (length != tokens and (given[1] or length != 1)):
        raise ValueError(
            f"alphas or adapter_names are for {rows} rows (of {length} tokens), but the batch has {batch} (of "
            f"{tokens}); give one value a row (a token)."
        )
    return alpha

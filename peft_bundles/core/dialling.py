"""Setting alphas: for a block of code, for all later forwards, and a limit on what all bundles add together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .gates import parse_alphas
from .state import CallAlphas
from .walking import checked_layers, state_of


@contextmanager
def alphas(
    model: nn.Module,
    values: Mapping[str, Any] | Tensor | Sequence[Any] | None = None,
    *,
    per: str = "row",
    **by_name: Any,
) -> Iterator[None]:
    """Run the block's forwards with these alphas, in this thread only; bundles not named keep what they had.

    Args: see `parse_alphas`; bundles may also be given as keywords, `alphas(model, b_rl_policy=0.0)`.
    """
    state = checked_layers(model)[0].state
    given = parse_alphas(values, state, per) if values is not None else {}
    given.update(parse_alphas(by_name, state, per))
    call = state.call
    before, call.own = call.own, CallAlphas({**call.alphas, **given})
    try:
        yield
    finally:
        call.own = before


def set_alphas(model: nn.Module, values: Mapping[str, Any] | Tensor | Sequence[Any], *, per: str = "row") -> None:
    """Set alphas for all later forwards of this model, in every thread. Not saved: `BundleSpec.alpha` is what is."""
    state = state_of(model)
    state.set_alphas = {**state.set_alphas, **parse_alphas(values, state, per)}
    state.version += 1  # what any thread has cached of them is out of date


def set_norm_budget(model: nn.Module, tau: float | None) -> None:
    """Limit what all bundles together add to a token in a layer to `tau` times the length of its residual state.

    For all later forwards of this model, in every thread; None (as a model starts) takes the limit off. Not saved.
    Updates within the limit are unchanged to the bit, longer ones keep their direction.

    Raises:
        ValueError: tau is no positive number.
    """
    if tau is not None and not (isinstance(tau, (int, float)) and math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau={tau!r} must be a positive number (a share of the residual norm, such as 0.2) or None.")
    state_of(model).budget = tau

"""Setting alphas: for a block of code, for all later forwards, and a limit on what all bundles add together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .gates import parse_alphas
from .state import CallAlphas
from .walking import checked_layers, resolve_adapter, state_of


@contextmanager
def alphas(
    model: nn.Module,
    values: Mapping[str, Any] | Tensor | Sequence[Any] | None = None,
    *,
    per: str = "row",
    **by_name: Any,
) -> Iterator[None]:
    """Run the block's forward passes with these alphas, in this thread only. Bundles not named keep their alphas.

    Args:
        model: a model with bundles.
        values: bundle -> a number, one value for each row (B,), for each token (B, T), or with per="layer" for each
            layer (L,). Or a tensor for all M bundles, whose last axis is M. 0 turns a bundle off.
        per: what the first axis of a tensor means: "row" of the batch or decoder "layer".
        by_name: more bundles, as keywords: `alphas(model, b_rl_policy=0.0)`.

    Raises:
        ValueError: a model without bundles, an unknown bundle, a wrong shape, or a number that is not finite.
        RuntimeError: decoder blocks are wrapped by torch's `checkpoint_wrapper`.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> import peft_bundles
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> bundles = {"b_style": {"rank": 8, "sub_bases": ["main"], "signals": {"lm": 1.0}}}
        >>> config = peft_bundles.BundleConfig(sub_bases={"main": 8}, bundles=bundles, init_weights=False)
        >>> model = get_peft_model(base, config).eval()
        >>> ids = torch.arange(8).view(2, 4)
        >>> with torch.no_grad(), peft_bundles.alphas(model, b_style=torch.tensor([0.0, 1.0])):
        ...     dialled = model(input_ids=ids).logits
        >>> with torch.no_grad(), model.disable_adapter():
        ...     plain = model(input_ids=ids).logits
        >>> [torch.equal(dialled[row], plain[row]) for row in (0, 1)]
        [True, False]
    """
    state = checked_layers(model)[0].state
    parsed = parse_alphas(values, state, per) if values is not None else {}
    parsed.update(parse_alphas(by_name, state, per))
    call = state.call
    before, call.own = call.own, CallAlphas({**call.alphas, **parsed})
    try:
        yield
    finally:
        call.own = before


def set_alphas(
    model: nn.Module,
    values: Mapping[str, Any] | Tensor | Sequence[Any] | None = None,
    *,
    per: str = "row",
    **by_name: Any,
) -> None:
    """Set alphas for all later forwards of this model, in every thread.

    They are not saved: `bake_alphas` makes them those of the config, which are. `set_alphas(model)` without values goes
    back to the config's alphas.

    Args:
        model: a model with bundles.
        values: as in `alphas`; bundles not named keep their alphas. None, and no keyword: all as in the config.
        per: as in `alphas`.
        by_name: more bundles, as keywords: `set_alphas(model, b_rl_policy=0.0)`.

    Raises:
        ValueError: a model without bundles, an unknown bundle, a wrong shape, or a number that is not finite.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> import peft_bundles
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> bundles = {"b_style": {"rank": 8, "sub_bases": ["main"], "signals": {"lm": 1.0}}}
        >>> config = peft_bundles.BundleConfig(sub_bases={"main": 8}, bundles=bundles, init_weights=False)
        >>> model = get_peft_model(base, config).eval()
        >>> ids = torch.arange(8).view(2, 4)
        >>> peft_bundles.set_alphas(model, {"b_style": 0.0})
        >>> with torch.no_grad():
        ...     off = model(input_ids=ids).logits
        ...     with model.disable_adapter():
        ...         plain = model(input_ids=ids).logits
        >>> torch.equal(off, plain)
        True
    """
    state = state_of(model)
    state.check_unmerged()
    if values is None and not by_name:
        state.set_alphas = {}
    else:
        parsed = parse_alphas(values, state, per) if values is not None else {}
        state.set_alphas = {**state.set_alphas, **parsed, **parse_alphas(by_name, state, per)}
    state.version += 1  # plans and tensors that threads have cached are now stale


def bake_alphas(model: nn.Module, adapter: str | None = None) -> None:
    """Make the alphas of `set_alphas` those of the adapter's config, so that `save_pretrained` keeps them.

    Args:
        model: a model with bundles.
        adapter: name of the adapter. None: the only one.

    Raises:
        ValueError: no such adapter, or an alpha that differs between rows, tokens or layers.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> import peft_bundles
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> bundles = {"b_style": {"rank": 8, "sub_bases": ["main"], "signals": {"lm": 1.0}}}
        >>> model = get_peft_model(base, peft_bundles.BundleConfig(sub_bases={"main": 8}, bundles=bundles))
        >>> peft_bundles.set_alphas(model, b_style=0.5)
        >>> peft_bundles.bake_alphas(model)
        >>> model.peft_config["default"].bundles["b_style"].alpha
        0.5
    """
    state = state_of(model)
    adapter = resolve_adapter(model, adapter)
    specs = state.configs[adapter].bundles or {}
    current = {name: value for name, value in state.set_alphas.items() if name in specs}
    if wrong := [name for name, value in current.items() if not isinstance(value, float) and not _is_scalar(value)]:
        raise ValueError(
            f"the alphas of {wrong} differ between rows, tokens or layers, and a config keeps one number a bundle; set "
            "a number first."
        )
    for name, value in current.items():
        specs[name].alpha = float(value)  # type: ignore[arg-type]
    state.set_alphas = {name: value for name, value in state.set_alphas.items() if name not in specs}
    state.version += 1


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def set_norm_budget(model: nn.Module, tau: float | None) -> None:
    """Limit what all bundles together add to a token in a layer to `tau` times the length of its residual state.

    For all later forwards of this model, in every thread; not saved. Updates within the limit are unchanged, bit for
    bit; longer ones are shortened and keep their direction.

    Args:
        model: a model with bundles.
        tau: a share of the residual norm, such as 0.2; None, the initial state of a model, removes the limit.

    Raises:
        ValueError: tau is not a positive number, the model has no bundles, or they are merged.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> import peft_bundles
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> bundles = {"b_style": {"rank": 8, "sub_bases": ["main"], "signals": {"lm": 1.0}}}
        >>> config = peft_bundles.BundleConfig(sub_bases={"main": 8}, bundles=bundles, init_weights=False)
        >>> model = get_peft_model(base, config).eval()
        >>> ids = torch.arange(8).view(2, 4)
        >>> layer, hidden = model.base_model.model.model.layers[0].bundles, torch.randn(1, 3, 32)
        >>> peft_bundles.set_norm_budget(model, 0.01)
        >>> with torch.no_grad():
        ...     added = layer(hidden) - hidden
        >>> bool((added.norm(dim=-1) <= 0.0101 * hidden.norm(dim=-1)).all())
        True
    """
    if tau is not None and not (isinstance(tau, (int, float)) and math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau={tau!r} must be a positive number (a share of the residual norm, such as 0.2) or None.")
    state = state_of(model)
    if tau is not None:
        state.check_unmerged()
    state.budget = tau

"""From the alphas that a user gives to tensors for the hidden units of one layer.

In order of precedence: a call's own `alphas=`, a `with model.alphas(...)` block, what `set_alphas` set, the config's
defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .state import AlphaValue, BundleState


def parse_alphas(
    values: Mapping[str, Any] | Tensor | Sequence[Any], state: BundleState, per: str = "row"
) -> dict[str, AlphaValue]:
    """Check the user's alphas, and return one for each bundle named.

    Args:
        values: bundle name -> number, (B,), (B, T), or with per="layer" (L,); or all M bundles at once, (M,), (B, M),
            (B, T, M), or with per="layer" (L, M), in the order of the config of the only adapter.
        state: what the layers of the model share.
        per: what the first axis means, if there is one: "row" of the batch or decoder "layer".

    Returns:
        Bundle name -> number, tensor, or one number for each layer.

    Raises:
        ValueError: an unknown bundle, a wrong shape, or a number that is not finite.
    """
    if per not in ("row", "layer"):
        raise ValueError(f"per={per!r} is not an axis of alphas; write per='row' or per='layer'.")
    names = state.bundle_names()
    if not isinstance(values, Mapping):
        if len(state.configs) != 1:
            raise ValueError(
                f"alphas were given as a tensor, but the model has {len(state.configs)} adapters; give a dict of "
                "bundle name -> alpha."
            )
        table = _as_tensor("alphas", values)
        if table.dim() == 0 or table.shape[-1] != len(names):
            raise ValueError(
                f"alphas have shape {tuple(table.shape)}; the last axis must have one value for each of the "
                f"{len(names)} bundles, in the order {names}."
            )
        return _parse_columns(names, table, per, state.num_layers)
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"alphas name unknown bundle(s) {unknown}; the model has {names}.")
    return {name: _parse_one(name, value, per, state.num_layers) for name, value in values.items()}


def _as_tensor(what: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what}={value!r} must be a number, or numbers in a tensor or list ({error}).") from error
    if tensor.is_complex():
        raise ValueError(f"{what}={value!r} must be real; give floats.")
    return tensor


def _parse_one(name: str, value: Any, per: str, num_layers: int) -> AlphaValue:
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise ValueError(f"alphas[{name!r}]={value!r} must be a finite number.")
        return float(value)
    return _parse_table(name, value, per, num_layers)


@torch.compiler.disable  # reads values, which a compiled graph cannot: every new list would recompile
def _parse_table(name: str, value: Any, per: str, num_layers: int) -> AlphaValue:
    tensor = _as_tensor(f"alphas[{name!r}]", value)
    return _parse_columns([name], tensor[..., None], per, num_layers)[name]


@torch.compiler.disable
def _parse_columns(names: Sequence[str], table: Tensor, per: str, num_layers: int) -> dict[str, AlphaValue]:
    """Split a table whose last axis is the bundles. Values are checked all at once: each check waits for the GPU."""
    if not names:
        return {}
    table = table if table.is_floating_point() else table.float()
    table = table if table.requires_grad else table.clone()  # the user may change the tensor later
    flat = table.detach().reshape(-1, len(names))
    largest = flat.abs().amax(0).tolist() if len(flat) else [0.0] * len(names)
    alphas: dict[str, AlphaValue] = {}
    for name, column, size in zip(names, table.unbind(-1), largest):
        if not math.isfinite(size):  # true for NaN too, which amax keeps
            raise ValueError(f"alphas[{name!r}] holds NaN or infinity; all values must be finite.")
        if per == "layer" and column.dim() == 1:
            if len(column) != num_layers:
                raise ValueError(
                    f"alphas[{name!r}] has {len(column)} values, but the model has {num_layers} layers; give one for "
                    "each."
                )
            alphas[name] = tuple(column.tolist())
        elif column.dim() > 2 or (per == "layer" and column.dim() > 0):
            allowed = "one value per layer, (L,)" if per == "layer" else "a number, (B,) or (B, T)"
            raise ValueError(f"alphas[{name!r}] has shape {tuple(column.shape)}; give {allowed}.")
        elif column.requires_grad or (column.dim() > 0 and size > 0):
            alphas[name] = column
        else:
            # A bundle that is off in every row gets the number 0, hence no gradient; AdamW would move it on zeros.
            alphas[name] = float(column) if size > 0 else 0.0
    return alphas


def layer_alphas(
    state: BundleState,
    adapter: str,
    layer: int,
    hidden: Tensor,
    units: tuple[Tensor, torch.dtype] | None = None,
    names: Sequence[str] | None = None,
) -> tuple[tuple[float, ...], None] | tuple[None, Tensor]:
    """The alphas of one adapter's bundles in one layer.

    Args:
        state: what the layers of the model share.
        adapter: name of the adapter.
        layer: number of the layer.
        hidden: the states that they are for, (B, T, d); only the shape and device are used.
        units: the bundle number of every hidden unit, (H,), and a dtype: return the alphas of the units, in that dtype.
        names: the M bundles; None: all of the config.

    Returns:
        (M numbers, None) where all alphas are numbers; else (None, a tensor), of shape (B|1, T|1, M), or with `units`
        (B|1, T|1, H).

    Raises:
        ValueError: alphas per row (per token) that do not match the number of rows (tokens) of `hidden`.
    """
    call, specs = state.call, state.configs[adapter].bundles
    assert specs is not None
    names = list(specs) if names is None else names
    current = current_alphas(state, adapter, names)
    types = {type(value) for value in current}  # faster than checking each value; every layer does this
    by_layer = tuple in types
    values = [value[layer] if isinstance(value, tuple) else value for value in current] if by_layer else current
    has_tensors = any(issubclass(each, Tensor) for each in types)
    tensors = [value for value in values if isinstance(value, Tensor)] if has_tensors else []
    if not tensors:
        return tuple(cast(list[float], values)), None

    def table() -> Tensor:
        columns = [_broadcast(value, name, hidden, call.prompts, call.uncached) for name, value in zip(names, values)]
        stacked = torch.stack(torch.broadcast_tensors(*columns), -1)
        return stacked if units is None else stacked[..., units[0]]

    if any(value.requires_grad for value in tensors):
        return None, table()  # a cached graph would be freed by the first backward
    # The numbers are part of the key, because the alpha of a spec may be changed.
    numbers = () if len(tensors) == len(values) else tuple(value for value in values if not isinstance(value, Tensor))
    which = len(names) if len(names) == len(specs) else tuple(names)
    key = (state.version, adapter, which, layer if by_layer else None, *hidden.shape[:2], numbers, units and units[1])
    return None, call.cached(key, hidden, lambda: table() if units is None else table().to(units[1]))


def current_alphas(state: BundleState, adapter: str, names: Sequence[str]) -> list[AlphaValue]:
    """The alphas of bundles as they were given, or else as the config says."""
    specs, own = state.configs[adapter].bundles or {}, state.call.alphas
    later = state.set_alphas if state.call.set_alphas is None else state.call.set_alphas
    return [own[n] if n in own else later[n] if n in later else specs[n].alpha for n in names]


def switched_on(state: BundleState, adapter: str, layer: int, names: Sequence[str]) -> list[str]:
    """The bundles whose alpha in a layer is not the number 0."""
    values = current_alphas(state, adapter, names)
    return [n for n, v in zip(names, values) if isinstance(v, Tensor) or (v[layer] if isinstance(v, tuple) else v)]


def current_alpha(state: BundleState, bundle: str) -> AlphaValue:
    """A bundle's alpha in this thread's call, as it was given."""
    adapter = next(adapter for adapter, config in state.configs.items() if bundle in (config.bundles or ()))
    return current_alphas(state, adapter, [bundle])[0]


def given_sizes(state: BundleState, adapter: str) -> tuple[int | None, int | None]:
    """The rows and tokens that an adapter's alphas were given for; None if no alpha is per row, per token."""
    names = state.configs[adapter].bundles or ()
    values = [state.call.alphas.get(name, state.set_alphas.get(name)) for name in names]
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    rows = max((shape[0] for shape in shapes if len(shape) > 0), default=None)
    tokens = max((shape[1] for shape in shapes if len(shape) > 1), default=None)
    return rows, tokens


def expand_rows(values: Tensor, prompts: int | None, batch: int, what: str) -> Tensor:
    """Values by row, (B, ...), for a batch.

    Args:
        values: one value for each row of the batch, or inside `generate` for each prompt.
        prompts: the number of prompts inside `generate`, where each may have several beams; None outside.
        batch: the number of rows of the batch.
        what: how the error calls the values.

    Raises:
        ValueError: the number of values is not the number of rows (prompts).
    """
    rows = batch if prompts is None else prompts
    if values.shape[0] != rows:
        raise ValueError(f"{what} has {values.shape[0]} rows, but the batch has {rows}; give one value for each row.")
    # `generate` repeats a prompt for its beams in the same way.
    return values if batch == rows else values.repeat_interleave(batch // rows, 0)


def for_new_tokens(values: Tensor, tokens: int, uncached: bool) -> Tensor:
    """Values for the tokens of the prompt, (B, P, ...), for a forward of `generate` with another number of tokens.

    New tokens keep the value of the prompt's last one.

    Args:
        values: one for each token of the prompt.
        tokens: of the forward.
        uncached: without a cache a forward has the prompt and all new tokens.

    Raises:
        ValueError: which of the prompt's tokens the forward has is not known here.
    """
    prompt = values.shape[1]
    if uncached and tokens > prompt:
        last = values[:, -1:]
        return torch.cat([values, last.expand(-1, tokens - prompt, *last.shape[2:])], 1)
    if tokens > 1:
        raise ValueError(
            f"alphas were given for the {prompt} tokens of the prompt, but a forward of generate has {tokens} tokens. "
            "Chunks, candidates of an assistant and the rest of a cached prompt cannot have alphas per token; give one "
            "value for each row, or leave out prefill_chunk_size, assistant_model, prompt_lookup_num_tokens and "
            "past_key_values."
        )
    return values[:, -1:]


def _broadcast(value: Any, name: str, hidden: Tensor, prompts: int | None, uncached: bool) -> Tensor:
    """One bundle's alpha as (B|1, T|1)."""
    if not isinstance(value, Tensor):
        return torch.full((1, 1), value, device=hidden.device)
    value = value.to(hidden.device)
    if value.dim() == 0:
        return value.view(1, 1)
    batch, tokens = hidden.shape[0], hidden.shape[1]
    value = expand_rows(value, prompts, batch, f"alphas[{name!r}]")
    if value.dim() == 1:
        return value.view(-1, 1)
    if prompts is not None and tokens != value.shape[1]:
        return for_new_tokens(value, tokens, uncached)
    if value.shape[1] != tokens:
        raise ValueError(
            f"alphas[{name!r}] has {value.shape[1]} tokens a row, but the batch has {tokens}; give one value for each "
            "token."
        )
    return value

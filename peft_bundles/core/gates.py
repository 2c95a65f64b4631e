"""Alphas as the user gives them, and as gate tensors of one layer's bundles.

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
    """Normalise what the user gave into one gate per bundle.

    Args:
        values: bundle name -> number, (B,), (B, T), or with per="layer" (L,); or all M bundles at once, (M,), (B, M),
            (B, T, M), or with per="layer" (L, M), in the order of the config of the only adapter.
        per: what the first axis means where there is one: "row" of the batch or decoder "layer".

    Raises:
        ValueError: an unknown bundle, a wrong shape, or a number that is not finite.
    """
    if per not in ("row", "layer"):
        raise ValueError(f"per={per!r} is unknown; choose 'row' or 'layer'.")
    known = state.bundle_names()
    if not isinstance(values, Mapping):
        if len(state.configs) != 1:
            raise ValueError(
                f"alphas as a tensor are ambiguous with {len(state.configs)} adapters; give a dict by bundle name."
            )
        table = _tensor("alphas", values)
        if table.dim() == 0 or table.shape[-1] != len(known):
            raise ValueError(
                f"alphas of shape {tuple(table.shape)} must end in one value per bundle, {len(known)}: {known}."
            )
        return _parse_columns(known, table, per, state.num_layers)
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"alphas for unknown bundle(s) {unknown}; known are {known}.")
    return {name: _parse_one(name, value, per, state.num_layers) for name, value in values.items()}


def _tensor(what: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what}={value!r} must be a number, or numbers in a tensor or list ({error}).") from error
    if tensor.is_complex():
        raise ValueError(f"{what}={value!r} must be real.")
    return tensor


def _parse_one(name: str, value: Any, per: str, num_layers: int) -> AlphaValue:
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            raise ValueError(f"alphas[{name!r}]={value!r} must be a finite number.")
        return float(value)
    return _parse_table(name, value, per, num_layers)


@torch.compiler.disable  # it looks at values, which no graph holds; traced, each new list would compile again
def _parse_table(name: str, value: Any, per: str, num_layers: int) -> AlphaValue:
    tensor = _tensor(f"alphas[{name!r}]", value)
    return _parse_columns([name], tensor[..., None], per, num_layers)[name]


@torch.compiler.disable
def _parse_columns(names: Sequence[str], table: Tensor, per: str, num_layers: int) -> dict[str, AlphaValue]:
    """A table whose last axis is that of the bundles; all are looked at together, for each look waits for a GPU."""
    if not names:
        return {}
    table = table if table.is_floating_point() else table.float()
    table = table if table.requires_grad else table.clone()  # what the user does to it later is no new alpha
    values = table.detach().reshape(-1, len(names))
    largest = values.abs().amax(0).tolist() if len(values) else [0.0] * len(names)
    found: dict[str, AlphaValue] = {}
    for name, tensor, size in zip(names, table.unbind(-1), largest):
        if not math.isfinite(size):  # (of NaN too, which amax keeps)
            raise ValueError(f"alphas[{name!r}] holds NaN or infinity; all values must be finite.")
        if per == "layer" and tensor.dim() == 1:
            if len(tensor) != num_layers:
                raise ValueError(f"alphas[{name!r}] has {len(tensor)} values, but the model has {num_layers} layers.")
            found[name] = tuple(tensor.tolist())
        elif tensor.dim() > 2 or (per == "layer" and tensor.dim() > 0):
            wanted = "(L,)" if per == "layer" else "a number, (B,) or (B, T)"
            raise ValueError(f"alphas[{name!r}] of shape {tuple(tensor.shape)} must be {wanted}.")
        elif tensor.requires_grad or (tensor.dim() > 0 and size > 0):
            found[name] = tensor
        else:
            # Off in every row is the number 0: such a bundle gets no gradient, where zeros would let AdamW move it.
            found[name] = float(tensor) if size > 0 else 0.0
    return found


def layer_alphas(
    state: BundleState, adapter: str, layer: int, hidden: Tensor, units: tuple[Tensor, torch.dtype] | None = None
) -> tuple[tuple[float, ...], None] | tuple[None, Tensor]:
    """The alphas of one adapter's bundles in one layer: M numbers where all are numbers, else a tensor (B|1, T|1, M).

    With `units`, the bundle number of every hidden unit (H,) and a dtype, the tensor is theirs, (B|1, T|1, H).

    Raises:
        ValueError: alphas given per row (token) for another number of rows (tokens) than `hidden` has.
    """
    call, config = state.call, state.configs[adapter]
    assert config.bundles is not None
    given = [call.alphas.get(name, state.set_alphas.get(name, spec.alpha)) for name, spec in config.bundles.items()]
    kinds = {type(v) for v in given}  # a look at each value takes longer, and this is asked in every layer
    per_layer = tuple in kinds
    values = [v[layer] if isinstance(v, tuple) else v for v in given] if per_layer else given
    tensors = [v for v in values if isinstance(v, Tensor)] if any(issubclass(k, Tensor) for k in kinds) else []
    if not tensors:
        return tuple(cast(list[float], values)), None

    def table() -> Tensor:
        columns = [_broadcast(v, n, hidden, call.prompts) for n, v in zip(config.bundles or (), values)]
        found = torch.stack(torch.broadcast_tensors(*columns), -1)
        return found if units is None else found[..., units[0]]

    if any(v.requires_grad for v in tensors):
        return None, table()  # a cached graph would be freed by the first backward
    # In the key, for a spec's alpha may be changed.
    numbers = () if len(tensors) == len(values) else tuple(v for v in values if not isinstance(v, Tensor))
    key = (state.version, adapter, layer if per_layer else None, *hidden.shape[:2], numbers, units and units[1])
    return None, call.cached(key, hidden, lambda: table() if units is None else table().to(units[1]))


def expand_rows(values: Tensor, prompts: int | None, batch: int, what: str) -> Tensor:
    """One value a row (B, ...) for a batch: the same rows, or inside generate each prompt's value for all its beams.

    Raises:
        ValueError: another number of rows than the batch (inside generate: the prompts) has.
    """
    wanted = batch if prompts is None else prompts
    if values.shape[0] != wanted:
        raise ValueError(f"{what} has {values.shape[0]} rows, but the batch has {wanted}; give one value a row.")
    # As generate repeats a prompt for its beams.
    return values if batch == wanted else values.repeat_interleave(batch // wanted, 0)


def _broadcast(value: Any, name: str, hidden: Tensor, prompts: int | None) -> Tensor:
    """A gate as (B|1, T|1) for this batch."""
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
        return value[:, -1:]  # new tokens keep the gate of the prompt's last one
    if value.shape[1] != tokens:
        raise ValueError(
            f"alphas[{name!r}] has {value.shape[1]} tokens a row, but the batch has {tokens}; give one value a token."
        )
    return value

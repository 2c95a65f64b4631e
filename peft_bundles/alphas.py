"""Where the alphas of a forward come from, and the state that one model's bundle layers share.

In order of precedence: a call's own `alphas=`, a `with model.alphas(...)` block, what `set_alphas` set, the config's
defaults. The first two belong to the thread that runs the call, so that two threads can serve one model with different
alphas; nothing is a module global.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from .base import CHILD


if TYPE_CHECKING:
    from .config import BundleConfig
    from .layer import BundleLayer
    from .packing import Packing
    from .signals import Route


# A gate for one bundle: a number, a tensor (B,) or (B, T) or (), or one number a layer.
AlphaValue: TypeAlias = float | Tensor | tuple[float, ...]


class _Call(threading.local):
    """What holds for the forwards that this thread runs now."""

    def __init__(self) -> None:
        self.alphas: dict[str, AlphaValue] = {}
        self.route: Route | None = None
        self.adapter_names: list[str] | None = None
        self.active: tuple[str, ...] | None = None  # the adapters it runs with, from its start to its end
        self.prompts: int | None = None  # inside generate: its prompts, each of which may have several beams
        self.folds: dict[Any, Any] | None = None  # (layer, adapter) -> folded weights, while they cannot change
        self.joined: dict[Any, dict[Any, Any]] | None = None  # of a training forward, for its quiet penalty
        self.cache: dict[Any, Tensor] = {}

    def cached(self, key: tuple[Any, ...], like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns for this key, device and dtype, made once a call and not once a layer."""
        if torch.compiler.is_compiling():
            return make()  # the compiler keeps it
        key = (*key, like.device, like.dtype)
        if key not in self.cache:
            if len(self.cache) > 256:  # alphas that stay while the shapes of the batches change
                self.cache = {}
            # A tensor made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False):
                self.cache[key] = make()
        return self.cache[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Call, ()  # a copy of the model starts with no call in progress


class _InUse:
    """Which adapters the calls in flight run with, in all threads, and those to be deleted when the last one ends."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # short: held while a call starts or ends, and while the active set changes
        self.swapping = threading.Lock()  # long: one thread at a time builds the next set
        self.calls: Counter[str] = Counter()
        self.retired: set[str] = set()
        self.built = 0  # adapters made by `compose` so far; their names are never used again

    def __reduce__(self) -> tuple[Any, ...]:
        return _InUse, ()  # a copy of the model has no call in flight


@dataclass
class BundleState:
    """Shared by all `BundleLayer`s of one model."""

    configs: dict[str, BundleConfig] = field(default_factory=dict)
    packings: dict[tuple[str, int], Packing] = field(default_factory=dict)
    num_layers: int = 0
    set_alphas: dict[str, AlphaValue] = field(default_factory=dict)
    call: _Call = field(default_factory=_Call)
    version: int = 0  # of set_alphas
    nested: bool = False  # some block with bundles lies inside another
    budget: float | None = None  # `set_norm_budget`
    compiled: bool = False  # some inference was (prepared.py)
    use: _InUse = field(default_factory=_InUse)
    seen: set[tuple[str, str]] = field(default_factory=set)  # (adapter, bundle) that a grad-mode forward let learn
    waiting: list[Route] = field(default_factory=list)  # routes whose forwards wait for `routed_backward`

    def __deepcopy__(self, memo: dict[int, Any]) -> BundleState:
        # The configs go through the memo: they stay the very objects of the copied model's `peft_config`.
        configs = copy.deepcopy(self.configs, memo)
        memo[id(self)] = new = BundleState(configs, dict(self.packings), self.num_layers, dict(self.set_alphas))
        new.budget, new.use.built, new.nested = self.budget, self.use.built, self.nested
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "waiting": []}

    def bundle_names(self) -> list[str]:
        """Names of the bundles of all adapters, each once."""
        # A list first: another thread may add an adapter meanwhile.
        return list(dict.fromkeys(name for config in list(self.configs.values()) for name in config.bundles or ()))


def down_to_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What `model.modules()` gives, but of a block with bundles the bundle layer only.

    Every step asks before its first kernel, when the GPU waits: for 16 blocks 8 us against 350.
    """
    from .layer import BundleLayer

    seen: set[nn.Module] = set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        layer = module._modules.get(CHILD)
        if isinstance(layer, BundleLayer) and not layer.state.nested:
            yield layer
        else:
            yield module
            stack.extend(reversed(module._modules.values()))


def bundle_layers(model: nn.Module) -> list[BundleLayer]:
    """The bundle layers of a model, in order."""
    from .layer import BundleLayer

    return [module for module in down_to_blocks(model) if isinstance(module, BundleLayer)]


def state_of(model: nn.Module) -> BundleState:
    """The `BundleState` of a model that has bundles, whichever way they were attached.

    Raises:
        ValueError: the model has no bundle layer.
    """
    from .layer import BundleLayer

    for module in down_to_blocks(model):
        if isinstance(module, BundleLayer):
            return module.state
    raise ValueError(
        f"{type(model).__name__} has no bundles; attach some with get_peft_model(model, BundleConfig(...))."
    )


def check_checkpointing(modules: Iterable[nn.Module]) -> None:
    """Refuse, among `down_to_blocks` of a model, what would run a block's hook once more in backward.

    This call's alphas and route are gone by then.

    Raises:
        RuntimeError: gradients are on, and blocks are wrapped for activation checkpointing from outside.
    """
    # By class: `isinstance` asks the wrapper's abstract base, which takes as long as the walk.
    if torch.is_grad_enabled() and any(CheckpointWrapper in type(module).__mro__ for module in modules):
        raise RuntimeError(
            "blocks are wrapped by torch's checkpoint_wrapper (as accelerate does for FSDP); it would "
            "run their bundles again in backward without this call's alphas and route. Leave it out and call "
            "model.gradient_checkpointing_enable(), which checkpoints inside of a block's hooks."
        )


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
    state = state_of(model)
    check_checkpointing(down_to_blocks(model))
    given = parse_alphas(values, state, per) if values is not None else {}
    given.update(parse_alphas(by_name, state, per))
    call = state.call
    before = call.alphas, call.cache
    call.alphas, call.cache = {**call.alphas, **given}, {}
    try:
        yield
    finally:
        call.alphas, call.cache = before


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

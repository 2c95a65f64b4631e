"""The state that one model's bundle layers share, and what holds for the forwards that a thread runs now.

A call's own alphas, its route and its folded weights belong to the thread that runs the call, so that two threads can
serve one model with different alphas. Nothing is a module global.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..config import BundleConfig
from .packing import Packing


# A gate for one bundle: a number, a tensor (B,) or (B, T) or (), or one number a layer.
AlphaValue: TypeAlias = float | Tensor | tuple[float, ...]


class OpenRoute(Protocol):
    """What a bundle layer asks of the route that is open around a forward (`routing.routes.Route`)."""

    deferred: bool

    def live(self, adapter: str) -> set[str]: ...

    def gate(self, adapter: str, hidden: Tensor) -> Tensor | None: ...


class _Call(threading.local):
    """What holds for the forwards that this thread runs now."""

    def __init__(self) -> None:
        self.alphas: dict[str, AlphaValue] = {}
        self.route: OpenRoute | None = None
        self.adapter_names: list[str] | None = None
        self.active: tuple[str, ...] | None = None  # the adapters it runs with, from its start to its end
        self.prompts: int | None = None  # inside generate: its prompts, each of which may have several beams
        self.folds: dict[Any, Any] | None = None  # (layer, adapter) -> folded weights, while they cannot change
        self.joined: dict[Any, dict[Any, Any]] | None = None  # of a training forward, for its quiet penalty
        self.cache: dict[Any, Tensor] = {}
        self.offered: Any = None  # alphas that PeftModel has set for this call and may hand on to the tuner, too

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
    waiting: list[OpenRoute] = field(default_factory=list)  # routes whose forwards wait for `routed_backward`

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

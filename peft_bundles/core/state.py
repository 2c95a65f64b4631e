"""What the bundle layers of one model share, and what holds for the forwards that one thread runs now.

A call's alphas, route and kept plans belong to the thread that runs the call, so that two threads can serve one model
with different alphas. Nothing is a module global.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from ..config import BundleConfig
from .functional import Gate
from .packing import Layout
from .penalty import Penalty


# The alpha of one bundle: a number, a tensor of shape (B,), (B, T) or (), or one number for each layer.
AlphaValue: TypeAlias = float | Tensor | tuple[float, ...]
OF_MODEL = "of the model"  # the router of a call that has none of its own


class OpenRoute(Protocol):
    """What a bundle layer asks of the route around a forward (`routing.routes.Route`)."""

    deferred: bool
    rows: list[Any]

    def live(self, adapter: str) -> set[str]: ...

    def rows_of(self, adapter: str, bundle: str) -> int: ...

    def gate(self, adapter: str, hidden: Tensor, packing: Layout) -> Gate: ...


REMEMBERED_WIDTH = 128  # numbers of a state that a key remembers


@dataclass(frozen=True, eq=False)
class Key:
    """What a router knows of a bundle: hidden states of its own rows, with bundles off.

    Attributes:
        mean: mean state at every depth, (P, d).
        remembered: states at one early depth, projected to q = min(REMEMBERED_WIDTH, d) numbers, (n, q).
    """

    mean: Tensor
    remembered: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "remembered": self.remembered}


class OpenPass(Protocol):
    """What a bundle layer asks of the router in a forward (`routers.passes.Pass`)."""

    def read(self, depth: int, hidden_BTd: Tensor) -> None: ...

    def gates(self, adapter: str, layer: Any, hidden_BTd: Tensor, dtype: torch.dtype) -> Tensor: ...


@dataclass(eq=False)
class CallAlphas:
    """The alphas of one `with alphas(...)` block. Equal only to itself, so it can tell what a plan was made for.

    Attributes:
        values: bundle -> alpha; bundles not named keep what `set_alphas` or the config says.
        tensors: tensors made from them once a call instead of once a layer (`Call.cached`).
    """

    values: dict[str, AlphaValue] = field(default_factory=dict)
    tensors: dict[Any, Tensor] = field(default_factory=dict)


class Call(threading.local):
    """What holds for the forwards that this thread runs now.

    Attributes:
        own: the alphas of this call.
        route: the route around the forward; None outside `route(...)`.
        adapter_names: one adapter name for each row of a mixed batch; None otherwise.
        active: the adapters of this call, fixed from its start to its end; None outside a call.
        prompts: inside `generate`, the number of its prompts; each may have several beams.
        uncached: inside a `generate` without a cache, whose forwards have the prompt and all new tokens.
        folds: inside `folded()` and `generate`, the folded weights and plans that the layers keep: weights cannot
            change there.
        shape: (rows, tokens) of the block that runs now, if its linear layers have bundles.
        set_alphas: the model's, as they were in the forward that runs again; None: those of now.
        again: gradient checkpointing runs a block's forward again, in backward: what it noted the first time stands.
        offered: alphas that `PeftModel` has set for this call and may pass on to the tuner too.
        router: the router of this call, or None for none; `OF_MODEL`: that of `set_router`.
        reading: what the router has read in the forward that runs now; None without a router.
        heard: the evidence of the last forward with a router.
    """

    def __init__(self) -> None:
        self.own = CallAlphas()
        self.route: OpenRoute | None = None
        self.adapter_names: list[str] | None = None
        self.active: tuple[str, ...] | None = None
        self.prompts: int | None = None
        self.uncached = False
        self.folds: dict[Any, Any] | None = None
        self.shape: torch.Size | None = None
        self.set_alphas: dict[str, AlphaValue] | None = None
        self.again = False
        self.offered: Any = None
        self.router: Any = OF_MODEL
        self.reading: OpenPass | None = None
        self.heard: Any = None

    @property
    def alphas(self) -> dict[str, AlphaValue]:
        return self.own.values

    def cached(self, key: tuple[Any, ...], like: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, made once a call for this key and the device and dtype of `like`."""
        if torch.compiler.is_compiling():
            return make()  # the compiled program keeps it
        tensors, key = self.own.tensors, (*key, like.device, like.dtype)
        if key not in tensors:
            if len(tensors) > 256:  # alphas that stay while the shapes of the batches change
                tensors.clear()
            # A tensor made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False):
                tensors[key] = make()
        return tensors[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Call, ()  # a copy of the model starts with no call in progress


class InUse:
    """Which adapters the running calls of all threads use, and which to delete when the last such call ends.

    Attributes:
        lock: held for a moment, while a call starts or ends and while the set of active adapters changes.
        swapping: held for longer: one thread at a time builds the next set of adapters.
        calls: adapter -> number of running calls that use it.
        retired: adapters to delete once no running call uses them.
        built: number of adapters that `compose` has made; their names are never used again.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.swapping = threading.Lock()
        self.calls: Counter[str] = Counter()
        self.retired: set[str] = set()
        self.built = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return InUse, ()  # a copy of the model has no running call


@dataclass
class BundleState:
    """Shared by all `BundleLayer`s of one model.

    Attributes:
        configs: by adapter.
        packings: how an adapter's bundles are laid out: by (adapter, None) behind blocks, and at linear layers by
            (adapter, the bundles that sit there).
        num_layers: number of decoder blocks, with bundles or without.
        set_alphas: alphas from `set_alphas`, bundle -> alpha.
        version: raised by everything that changes `set_alphas` or the adapters behind a name.
        budget: tau of `set_norm_budget`; None: no limit.
        unchecked: (adapter, layer) whose config names a basis that it has yet to get, from a file or another adapter.
        call: what holds for the calling thread.
        use: which adapters running calls use.
        compiled: some forward without gradients was compiled. Set by `planning.is_compiled` and by a layer that is
            being compiled; never taken back. From then on plans are made before the forward.
        seen: (adapter, bundle) that a forward with gradients has let learn since the last `finalize_grads`. Layers add
            to it; `BundleModel.quiet_loss` reads it; `finalize_grads` empties it.
        waiting: deferred routes whose forwards still wait for their losses. Layers add to it; `routed_backward` takes
            its routes out; `finalize_grads` raises an error while some are left.
        penalty: the quiet penalty of the step in progress.
        merged: some adapters are merged into the base model, at alphas that are fixed.
        before_merge: what `set_alphas` had set before.
        keys: (adapter, bundle) -> its key, on the CPU.
        null: what `learn_null` measured; None before.
        router: of `set_router`; None: alphas alone decide.
        warned: adapters that train without the calibration that their `quiet` needs, after the warning.
    """

    configs: dict[str, BundleConfig] = field(default_factory=dict)
    packings: dict[tuple[str, tuple[str, ...] | None], Layout] = field(default_factory=dict)
    num_layers: int = 0
    set_alphas: dict[str, AlphaValue] = field(default_factory=dict)
    call: Call = field(default_factory=Call)
    version: int = 0
    unchecked: set[tuple[str, int]] = field(default_factory=set)
    budget: float | None = None
    compiled: bool = False
    use: InUse = field(default_factory=InUse)
    seen: set[tuple[str, str]] = field(default_factory=set)
    waiting: list[OpenRoute] = field(default_factory=list)
    penalty: Penalty = field(default_factory=Penalty)
    warned: set[str] = field(default_factory=set)
    merged: bool = False
    before_merge: dict[str, AlphaValue] = field(default_factory=dict)
    keys: dict[tuple[str, str], Key] = field(default_factory=dict)
    null: Any = None
    router: Any = None

    def check_unmerged(self) -> None:
        """Refuse what a merged model cannot do: dial, route, train, mix adapters, exchange or save bundles.

        Raises:
            ValueError: adapters are merged.
        """
        if self.merged:
            raise ValueError(
                "the bundles are merged into the base model at fixed alphas; call unmerge_adapter() before setting "
                "alphas, a route, adapter_names or a norm budget, and before training, exchanging or saving bundles."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> BundleState:
        # The configs go through the memo: they stay the very objects of the copied model's `peft_config`.
        configs = copy.deepcopy(self.configs, memo)
        memo[id(self)] = new = BundleState(configs, dict(self.packings), self.num_layers, dict(self.set_alphas))
        new.budget, new.use.built, new.unchecked = self.budget, self.use.built, set(self.unchecked)
        new.merged, new.before_merge = self.merged, dict(self.before_merge)
        new.keys, new.null, new.router = dict(self.keys), self.null, copy.copy(self.router)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "waiting": []}

    def take_keys(self, adapter: str, keys: Mapping[str, Key]) -> None:
        """Take the keys of an adapter's bundles, in place of those it had."""
        kept = {name: key for name, key in self.keys.items() if name[0] != adapter}
        self.keys = {**kept, **{(adapter, bundle): key for bundle, key in keys.items()}}
        self.version += 1

    def router_in_use(self) -> Any:
        """The router of this thread's call, or else the model's; None: alphas alone decide."""
        return self.router if self.call.router is OF_MODEL else self.call.router

    def bundle_names(self) -> list[str]:
        """Names of the bundles of all adapters, each once."""
        # A list first: another thread may add an adapter during the loop.
        return list(dict.fromkeys(name for config in list(self.configs.values()) for name in config.bundles or ()))

    def settings(self, active: tuple[str, ...]) -> tuple[Any, ...]:
        """What determines, besides the weights, how bundles act in this thread's call: equal settings, equal plans."""
        call = self.call
        return active, call.adapter_names, call.own, call.prompts, call.uncached, self.version, self.budget

    def draws_dropout(self) -> bool:
        """Whether some adapter has dropout, which training mode draws again in every forward."""
        return any(config.dropout for config in list(self.configs.values()))

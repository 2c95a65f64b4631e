"""Which router a model uses, and what it did: set for all later forwards, or for a block of code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.base import base_fingerprint
from ..core.dialling import alphas
from ..core.evidence import EvidenceLayer
from ..core.gates import current_alpha
from ..core.state import BundleState
from .keys import KeyRouter, Null, call_adapters
from .passes import RouterHooks


ROUTERS = {"keys": KeyRouter}


@dataclass
class Gates:
    """What a router turned on, token by token.

    Attributes:
        bundles: names of the M bundles.
        values: (B, T, M): 1 where the bundle was on, at the last depth, while the token was read.
    """

    bundles: list[str]
    values: Tensor


class Routed:
    """The part of `BundleModel` that has to do with routers."""

    model: Any
    _state: BundleState
    _hooks: RouterHooks | None = None

    def set_router(self, router: Any) -> None:
        """Let a router gate the bundles in all later forwards in eval mode, in every thread.

        A router's gate multiplies the bundle's alpha: 0 stays off. In training mode it does nothing: there alphas and
        the trainer's tables say what is on. It reads hidden states, so compiled models run with graph breaks.

        Args:
            router: "keys" (a `KeyRouter`), a router, or None for none.

        Raises:
            ValueError: an unknown router; a bundle without a key, or no null (`learn_null`).
        """
        state = self._state
        made = self._ready(router)
        state.router = made
        state.version += 1
        if made is None and self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    @contextmanager
    def router(self, router: Any) -> Iterator[None]:
        """Run the block with another router, in this thread only; arguments and errors as in `set_router`."""
        call = self._state.call
        before, call.router = call.router, self._ready(router)
        try:
            yield
        finally:
            call.router = before

    def set_null(self, null: Null) -> None:
        """Use a null that was measured before, by `learn_null` of the same base model.

        Raises:
            ValueError: it was measured on another base model.
        """
        if null.base and null.base != base_fingerprint(self.model):
            raise ValueError("the null was measured on another base model; measure it on this one with learn_null.")
        self._state.null = null
        self._state.version += 1

    @torch.no_grad()
    def gates(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Gates:
        """What the router turns on while it reads some rows.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T); None: all ones.

        Raises:
            ValueError: the model has no router, or is in training mode.
        """
        state = self._state
        if state.router_in_use() is None:
            raise ValueError("the model has no router; call model.set_router('keys') first.")
        if self.model.training:
            raise ValueError("routers act in eval mode only; call model.eval() first.")
        self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return self._heard()

    @contextmanager
    def _gated_by_prompt(self, inputs: Sequence[Any], attention_mask: Tensor | None) -> Iterator[None]:
        """For a router with scope="prompt": read the prompts, and run the block with the gate at the end of each.

        Raises:
            ValueError: the prompts are not token ids, or an alpha differs between tokens or layers.
        """
        state, call = self._state, self._state.call
        if getattr(state.router_in_use(), "scope", None) != "prompt":
            yield
            return
        ids = next((each for each in inputs if isinstance(each, Tensor)), None)
        if ids is None or ids.is_floating_point():
            raise ValueError("a router with scope='prompt' needs token ids; pass input_ids, or use scope='token'.")
        gates = self.gates(ids, attention_mask)
        values: dict[str, Any] = {}
        for name, gate in zip(gates.bundles, gates.values[:, -1].unbind(-1)):
            alpha = current_alpha(state, name)
            if isinstance(alpha, tuple) or (isinstance(alpha, Tensor) and alpha.dim() > 1):
                raise ValueError(
                    f"alphas[{name!r}] differs between tokens or layers, and scope='prompt' gives every row one gate; "
                    "use scope='token'."
                )
            values[name] = alpha * gate
        before, call.router = call.router, None
        try:
            with alphas(self.model, values):
                yield
        finally:
            call.router = before

    def _with_gates(self, *args: Any, **kwargs: Any) -> Any:
        """(result, gates) of `generate`."""
        call = self._state.call
        if self._state.router_in_use() is None:
            raise ValueError("return_gates=True needs a router; call model.set_router('keys'), or pass router='keys'.")
        beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None) or 1
        if beams > 1:
            raise ValueError("return_gates=True cannot follow beams; call model.gates(sequences) on the result.")
        call.heard = None
        result = self.generate(*args, **kwargs)  # type: ignore[attr-defined]
        gates = self._heard()
        if self._state.router_in_use().scope == "prompt":
            tokens = (result if isinstance(result, Tensor) else result.sequences).shape[1] - 1
            gates.values = gates.values[:, -1:].expand(-1, tokens, -1)
        return result, gates

    def _heard(self) -> Gates:
        """The gates of this thread's last forward and of what its cache held."""
        state, call = self._state, self._state.call
        kept = call.heard
        assert isinstance(kept, EvidenceLayer) and kept.spoke is not None
        folded = kept.router.folded(state)
        names: list[str] = []
        numbers: list[Tensor] = []
        for adapter in call_adapters(state):
            of_adapter = tuple(state.configs[adapter].bundles or ())
            names += of_adapter
            numbers.append(folded.columns(adapter, of_adapter, kept.spoke.device))
        columns_M = torch.cat(numbers)
        return Gates(names, ((kept.spoke[..., None] == columns_M) | (columns_M < 0)).float())

    def _ready(self, router: Any) -> Any:
        """The router itself, with the hooks that it needs, after a check that it can be used."""
        state = self._state
        if router is None:
            return None
        if isinstance(router, str):
            if router not in ROUTERS:
                raise ValueError(f"router={router!r} is unknown; write one of {sorted(ROUTERS)}, or None.")
            router = ROUTERS[router]()
        if not hasattr(router, "folded"):
            raise ValueError(f"router={router!r} is not a router; write 'keys', KeyRouter(...) or None.")
        state.check_unmerged()
        router.folded(state)
        if self._hooks is None:
            self._hooks = RouterHooks(self.model, state)
        return router

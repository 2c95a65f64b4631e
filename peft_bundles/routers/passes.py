"""One forward with a router: the evidence is read depth by depth, in the pass that uses it.

Depth l is the input of decoder block l; the last depth is the output of the last block. Linear layers of block l are
gated by what is known at depth l, and bundles behind it by what is known at depth l + 1, before they act.

Shapes: B rows, T tokens, d hidden size, P depths, C classes, M bundles of a layer, H their hidden units.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..core.base import find_blocks
from ..core.evidence import KEPT, EvidenceLayer, attended_tokens, running_sum
from ..core.state import BundleState


class Folded(Protocol):
    """A router made ready for the adapters of a call.

    Attributes:
        decay: of the evidence from token to token.
        router: the router it was made of.
    """

    decay: float
    router: Any

    def scores(self, depth: int, hidden_BTd: Tensor) -> Tensor:
        """(B, T, C), float32."""

    def decide(self, depth: int, evidence_BTC: Tensor) -> Tensor:
        """The class that is on, (B, T)."""

    def columns(self, adapter: str, names: tuple[str, ...], device: torch.device) -> Tensor:
        """The class of each of these bundles, (M,); -1 for one that is always on."""


class Pass:
    """What a router has read in one forward.

    Args:
        folded: the router.
        attended_BT: tokens that count; None: all.
        cache: the cache of the forward; None: it has none, or makes one itself.

    Raises:
        ValueError: the cache holds tokens that were read without this router.
    """

    def __init__(self, folded: Folded, attended_BT: Tensor | None, cache: Cache | None) -> None:
        self.folded, self.attended, self.cache = folded, attended_BT, cache
        self.kept = _evidence_of(cache, folded.router)
        self.depth = -1  # the last one that was read
        self.counts: Tensor | None = None  # (B, T, 1): 1 where a token gives evidence
        self.started: Tensor | None = None
        self.total: Tensor | None = None  # scores of all depths so far, (B, T, C)
        self.spoke: Tensor | None = None  # the class with most evidence, (B, T)
        self.tails: list[Tensor] = []
        self._gates: dict[Any, Tensor] = {}

    @torch.no_grad()
    def read(self, depth: int, hidden_BTd: Tensor) -> None:
        """Add the evidence of a depth, unless it was read already."""
        if depth <= self.depth:
            return
        counts = self.counts = self._counts(hidden_BTd)
        scores_BTC = self.folded.scores(depth, hidden_BTd) * counts
        self.total = scores_BTC if self.total is None else self.total.to(scores_BTC.device) + scores_BTC
        past = self.kept.kept[:, -1, depth] if self.kept is not None and self.kept.kept is not None else None
        past = None if past is None else past.to(scores_BTC.device)
        evidence_BTC = running_sum(self.total, self.folded.decay, past)
        self.tails.append(evidence_BTC[:, -KEPT:])
        self.spoke, self.depth = self.folded.decide(depth, evidence_BTC), depth
        self._gates.clear()

    def _counts(self, hidden_BTd: Tensor) -> Tensor:
        """1 for tokens that give evidence, (B, T, 1): those attended to, but not a row's first, an attention sink."""
        if self.counts is not None:
            return self.counts.to(hidden_BTd.device)
        B, T = hidden_BTd.shape[:2]
        attended = torch.ones(B, T, dtype=torch.bool) if self.attended is None else self.attended
        attended = attended.to(hidden_BTd.device)
        seen_BT = attended.cumsum(1)
        earlier = None if self.kept is None or self.kept.started is None else self.kept.started.to(attended.device)
        first = attended & (seen_BT == 1) & (True if earlier is None else ~earlier[:, None])
        self.started = seen_BT[:, -1] > 0 if earlier is None else earlier | (seen_BT[:, -1] > 0)
        return (attended & ~first)[..., None].float()

    def gates(self, adapter: str, layer: Any, hidden_BTd: Tensor, dtype: torch.dtype) -> Tensor:
        """Gates of the hidden units of a layer's bundles, (B, T, H) in `dtype`: 1 for units of the bundle that is on.

        Raises:
            ValueError: the layer does not get whole rows of tokens, as an expert does not.
        """
        if self.spoke is None or self.spoke.shape != hidden_BTd.shape[:2]:
            raise ValueError(
                f"the bundles at {layer.site} get states of shape {tuple(hidden_BTd.shape)}, which are not rows of "
                "tokens, so a router cannot gate them; turn it off with model.router(None)."
            )
        packing, device = layer.packing(adapter), hidden_BTd.device
        key = packing, device, dtype
        if key not in self._gates:  # the linear layers of a block have the same
            columns_M = self.folded.columns(adapter, tuple(packing.names), device)
            on_BTM = (self.spoke.to(device)[..., None] == columns_M) | (columns_M < 0)
            self._gates[key] = on_BTM.to(dtype)[..., packing.index(device)["owner"]]
        return self._gates[key]

    def end(self, output: Any) -> EvidenceLayer:
        """Put the evidence into the cache of the forward's output, if it has one."""
        cache = self.cache if self.cache is not None else _first_cache(output)
        kept = self.kept or EvidenceLayer(self.folded.router)
        if cache is not None and kept is not self.kept:
            cache.layers.append(kept)  # type: ignore[arg-type]
        assert self.spoke is not None and self.started is not None
        device = self.spoke.device
        kept.add(torch.stack([tail.to(device) for tail in self.tails], 2), self.started.to(device), self.spoke)
        return kept


def _first_cache(values: Any) -> Cache | None:
    values = values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def _evidence_of(cache: Cache | None, router: Any) -> EvidenceLayer | None:
    if cache is None:
        return None
    layers: list[Any] = list(getattr(cache, "layers", ()))
    kept = next((layer for layer in layers if isinstance(layer, EvidenceLayer)), None)
    if kept is None and any(not _is_empty(layer) for layer in layers):
        raise ValueError("the cache holds tokens that were read without a router; run the prompt again with a new one.")
    if kept is not None and kept.router is not router:
        raise ValueError("the cache holds evidence of another router; run the prompt again with a new cache.")
    return kept


def _is_empty(layer: Any) -> bool:
    length = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
    states = getattr(layer, "has_previous_state", False)
    return not int(length) and not (any(states.values()) if isinstance(states, dict) else states)


class RouterHooks:
    """Hooks on a model through which the router of a call reads its states. Without a router they do nothing.

    Args:
        model: the base model.
        state: what the bundle layers of the model share.
    """

    def __init__(self, model: nn.Module, state: BundleState) -> None:
        names = find_blocks(model)
        self.state, self.handles = state, list[Any]()
        decoder = model.get_submodule(names[0].rpartition(".")[0].rpartition(".")[0])
        self.arguments = list(inspect.signature(decoder.forward).parameters)
        blocks = [model.get_submodule(name) for name in names]
        self.handles += [
            decoder.register_forward_pre_hook(self._start, with_kwargs=True),
            decoder.register_forward_hook(self._end, always_call=True),
            blocks[0].register_forward_pre_hook(self._read_first, with_kwargs=True),
            *(block.register_forward_hook(partial(self._read, depth)) for depth, block in enumerate(blocks, 1)),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.compiler.disable
    def _start(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, call = self.state, self.state.call
        router = state.router_in_use()
        call.reading = None
        if router is None or decoder.training:
            return
        named = {**dict(zip(self.arguments, args)), **kwargs}
        ids = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
        cache = _first_cache(named)
        past = 0 if (kept := _evidence_of(cache, router)) is None else kept.tokens
        attended = None if ids is None else attended_tokens(named.get("attention_mask"), ids.shape[1], past)
        call.reading = Pass(router.folded(state), attended, cache)

    @torch.compiler.disable
    def _end(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self.state.call
        reading, call.reading = call.reading, None
        if isinstance(reading, Pass) and output is not None:
            call.heard = reading.end(output)

    @torch.compiler.disable
    def _read_first(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.state.call.reading is not None:
            self.state.call.reading.read(0, args[0] if args else kwargs["hidden_states"])

    @torch.compiler.disable
    def _read(self, depth: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.state.call.reading is not None:
            self.state.call.reading.read(depth, output[0] if isinstance(output, tuple) else output)

"""The evidence of a router between forwards: how it adds up over tokens, and how a model's cache keeps it.

Shapes: B rows, T tokens of a forward, P depths, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


KEPT = 64  # tokens whose evidence the cache keeps: as many can be taken back (rejected drafts of an assistant)
CHUNK = 256  # tokens that one matrix product adds up


def running_sum(scores_BTC: Tensor, decay: float, past_BC: Tensor | None = None) -> Tensor:
    """e(t) = score(t) + decay * e(t - 1), for all tokens; (B, T, C).

    Args:
        scores_BTC: of the tokens of this forward.
        decay: in [0, 1].
        past_BC: e of the token before the first; None: 0.
    """
    T = scores_BTC.shape[1]
    if T == 1:
        return scores_BTC if past_BC is None else scores_BTC + decay * past_BC[:, None]
    parts = []
    age = torch.arange(min(T, CHUNK), device=scores_BTC.device, dtype=scores_BTC.dtype)
    weights_TT = (decay ** (age[:, None] - age).clamp_min(0)).tril()
    for chunk_BtC in scores_BTC.split(CHUNK, 1):
        t = chunk_BtC.shape[1]
        total_BtC = weights_TT[:t, :t] @ chunk_BtC
        if past_BC is not None:
            total_BtC = total_BtC + decay ** (age[:t, None] + 1) * past_BC[:, None]
        past_BC = total_BtC[:, -1]
        parts.append(total_BtC)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def attended_tokens(mask: Any, tokens: int, past: int) -> Tensor | None:
    """Which tokens of a forward are attended to, (B, T) bool; None: all.

    Args:
        mask: the `attention_mask` that the decoder got: (B, T) or (B, past + T); (B, 1, T, S) as attention takes it, or
            a dict of such by kind of attention; None.
        tokens: T.
        past: number of tokens in the cache.

    Raises:
        ValueError: a mask of another kind.
    """
    if isinstance(mask, Mapping):
        kinds = [value for key, value in sorted(mask.items(), key=lambda item: "full" not in item[0])]
        mask = kinds[0] if kinds else None
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        start = past if mask.shape[1] >= past + tokens else mask.shape[1] - tokens
        return mask[:, start : start + tokens].bool()
    if isinstance(mask, Tensor) and mask.dim() == 4:
        last_BS = mask[:, 0, -1]  # what the last token attends to
        last_BS = last_BS if last_BS.dtype == torch.bool else last_BS == 0
        return last_BS[:, past : past + tokens]
    raise ValueError(
        f"a router cannot read an attention_mask of type {type(mask).__name__}; give one of shape (rows, tokens), or "
        "load the model with attn_implementation='sdpa'."
    )


class EvidenceLayer:
    """The evidence of the tokens that a cache holds: one more layer of it, without keys and values.

    So it is reordered with the beams, cut with rejected tokens, repeated and copied as the rest of the cache is.

    Attributes:
        tokens: number of tokens that the cache holds.
        kept: evidence of the last tokens at every depth, (B, n <= KEPT, P, C); None before the first.
        started: rows with an attended token, (B,).
        spoke: the class with most evidence at the last depth for every token, (B, tokens).
        router: which router it belongs to.
    """

    # What transformers asks of a cache's layers. (A cache with one that cannot be compiled gets no masks for its empty
    # places.)
    is_compileable = True
    is_croppable = True
    is_sliding = False
    is_initialized = True
    supports_early_init = False
    keys = None
    values = None

    def __init__(self, router: Any) -> None:
        self.router, self.tokens = router, 0
        self.kept: Tensor | None = None
        self.started: Tensor | None = None
        self.spoke: Tensor | None = None

    def add(self, kept_BnPC: Tensor, started_B: Tensor, spoke_BT: Tensor) -> None:
        """Take in the tokens of a forward; of `kept`, those of the last `KEPT` tokens."""
        self.tokens += spoke_BT.shape[1]
        earlier = [] if self.kept is None or kept_BnPC.shape[1] >= KEPT else [self.kept]
        self.kept = torch.cat([*earlier, kept_BnPC], 1)[:, -KEPT:]
        self.started = started_B
        self.spoke = spoke_BT if self.spoke is None else torch.cat([self.spoke, spoke_BT], 1)

    def _map(self, change: Any) -> None:
        if self.kept is not None:
            self.kept, self.started, self.spoke = change(self.kept), change(self.started), change(self.spoke)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the sign does not matter.

        Raises:
            ValueError: more than are kept.
        """
        count = abs(int(tokens_to_remove))
        if not count or self.kept is None or self.spoke is None:
            return
        if count >= self.tokens:
            self.reset()
            return
        if count >= self.kept.shape[1]:
            raise ValueError(
                f"{count} tokens are to be taken off a cache, and evidence of the last {self.kept.shape[1]} is kept; "
                "run the prompt again with a new cache."
            )
        self.tokens -= count
        self.kept, self.spoke = self.kept[:, :-count], self.spoke[:, :-count]

    def reset(self) -> None:
        self.tokens, self.kept, self.started, self.spoke = 0, None, None, None

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

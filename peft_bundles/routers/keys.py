"""`KeyRouter`: every bundle has a key, and the one whose key fits what is being read is on.

The key of a bundle is the mean state m_k of its own training rows at every depth. The null class is text that is
nobody's, with a mean m_0 for each kind of it and one covariance C. A token with state x is evidence for class k by

    s_k = (m_k - c)^T C^-1 (x - (m_k + c) / 2)        c: the mean of the null's kinds

which compares the likelihoods of x under two normal distributions (linear discriminant analysis). Evidence is summed
over depths, and over tokens with weights decay^age. A bundle is on if it leads every kind of null text by MARGIN of
what it would lead by if all states were m_k.

Which one: bundles may differ in what their rows are about and not in their form. So a key also remembers states of its
rows at one early depth, and x is evidence against a bundle by how much farther its nearest remembered state is:

    r_k = -RECALL / 2 (min_n |x - r_kn|^2 - the smallest of these among all bundles)

(distances of states projected to q random directions, where the null's covariance is made 1). The bundle with the
largest sum of both is on, of those that lead the null by nearly as much as the first.

Shapes: B rows, T tokens, P depths, d hidden size, K kinds of null text, r rank of the covariance, M keys, n remembered
states of q numbers, C columns of evidence: the K kinds, the keys, a count of the tokens, and what the keys remember.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.state import REMEMBERED_WIDTH, BundleState


# What the formulas above leave open; the measurements behind the numbers are in docs/decisions.md.
DECAY = 0.9
MARGIN = 0.3
RECALL = 100.0
TIE = 0.8  # what is remembered decides among keys whose lead is at least this share of the largest
SCOPES = ("token", "prompt")
TOGETHER = 2048  # tokens that are compared with remembered states at once
CLAIMS = 0.05  # a key that wins more of the null's tokens than this is refused


def remembered_at(depths: int) -> int:
    """The depth whose states are remembered: early, since bundles after it are gated by them."""
    return min(2, depths - 1)


def projection(like: Tensor) -> Tensor:
    """The (d, q) projection of remembered states, the same in every key: drawn from a fixed seed, float64."""
    d = like.shape[-1]
    drawn = torch.randn(d, min(REMEMBERED_WIDTH, d), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (drawn / d**0.5).to(like.device)


@dataclass(eq=False)
class Null:
    """What `learn_null` measured on text that belongs to no bundle.

    Attributes:
        kinds: names of the kinds of text.
        mean_PKd: mean state of each kind at every depth.
        diagonal_Pd, factor_Pdr: the covariance of a state, diag(diagonal) + factor factor^T.
        limit_P: a longer state is an attention sink, and gives no evidence.
        sample_PNd: states averaged over tokens with weights decay^age, at N tokens of the text.
        tokens: number of tokens that were measured.
        base: fingerprint of the base model.
    """

    kinds: tuple[str, ...]
    mean_PKd: Tensor
    diagonal_Pd: Tensor
    factor_Pdr: Tensor
    limit_P: Tensor
    sample_PNd: Tensor
    tokens: int
    base: dict[str, str]

    def solve(self, depth: int, right_dn: Tensor) -> Tensor:
        """C^-1 right, (d, n), in float64."""
        diagonal, factor = self.diagonal_Pd[depth].double()[:, None], self.factor_Pdr[depth].double()
        scaled_dn, scaled_dr = right_dn.double() / diagonal, factor / diagonal
        inner_rr = torch.eye(factor.shape[1], dtype=torch.float64) + factor.T @ scaled_dr
        return scaled_dn - scaled_dr @ torch.linalg.solve(inner_rr, factor.T @ scaled_dn)

    def whitening(self, depth: int) -> tuple[Tensor, Tensor]:
        """(W (q, q), projection (d, q)), float64: states x @ projection @ W have covariance 1 on null text."""
        project_dq = projection(self.mean_PKd)
        factor_qr = project_dq.T @ self.factor_Pdr[depth].double()
        covariance_qq = (
            project_dq.T @ (self.diagonal_Pd[depth].double()[:, None] * project_dq) + factor_qr @ factor_qr.T
        )
        values, vectors = torch.linalg.eigh(covariance_qq)
        return (vectors * values.clamp_min(1e-12).rsqrt()) @ vectors.T, project_dq

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file, for `Null.load`."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        words = {
            "kinds": "\n".join(self.kinds),
            "tokens": str(self.tokens),
            **{f"base.{k}": v for k, v in self.base.items()},
        }
        save_file(tensors, path, words)

    @classmethod
    def load(cls, path: str | Path) -> Null:
        """Read what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        with safe_open(path, "pt") as file:
            words = file.metadata() or {}
            if not set(_TENSORS) <= set(file.keys()) or "kinds" not in words:
                raise ValueError(f"{path} was not written by Null.save; measure the null again with learn_null.")
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        base = {key.removeprefix("base."): value for key, value in words.items() if key.startswith("base.")}
        return cls(tuple(words["kinds"].split("\n")), **tensors, tokens=int(words["tokens"]), base=base)


_TENSORS = ("mean_PKd", "diagonal_Pd", "factor_Pdr", "limit_P", "sample_PNd")


def call_adapters(state: BundleState) -> tuple[str, ...]:
    """The bundle adapters of this thread's call."""
    call = state.call
    names = dict.fromkeys(call.adapter_names) if call.adapter_names else call.active or state.configs
    return tuple(name for name in names if name in state.configs)


@dataclass
class KeyRouter:
    """Turns on, token by token, the bundle whose key fits what is being read; none where null text fits better.

    Args:
        always_on: bundles that are on everywhere and need no key, such as a style.
        follows: bundle -> the bundle whose key it uses, for bundles that learnt together, such as a policy's value.
        remembered: use the states that keys remember; False: only their means, which costs less.
        scope: "token": every token has a gate of its own, in the pass that reads it. "prompt": `generate` reads the
            prompt twice, first to find the gate at its end, then with this gate for the whole prompt and the answer. It
            costs a second prefill, and the answer is what it would be if somebody had said which bundle to turn on.
            Forwards outside `generate` have gates by token.

    Raises:
        ValueError: an unknown scope. When it is used: a bundle without a key, no null, or a key that wins more than 5%
            of the null's tokens.

    Example: see `peft_bundles.learn_keys`.
    """

    always_on: Sequence[str] = ()
    follows: Mapping[str, str] | None = None
    remembered: bool = True
    scope: str = "token"
    _made: tuple[Any, FoldedKeys] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r} is unknown; write one of {', '.join(map(repr, SCOPES))}.")

    def folded(self, state: BundleState) -> FoldedKeys:
        """Ready for the adapters that are active in this thread's call."""
        active = call_adapters(state)
        key = active, state.version, state.null
        made = self._made
        if made is None or made[0][:2] != key[:2] or made[0][2] is not key[2]:
            made = self._made = key, FoldedKeys(self, state, active)
        return made[1]

    def check(self, state: BundleState, adapters: Sequence[str]) -> None:
        """Raises ValueError if these adapters could not be routed."""
        FoldedKeys(self, state, adapters)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyRouter:
        return KeyRouter(self.always_on, self.follows, self.remembered, self.scope)


class FoldedKeys:
    """Keys and null of a call's adapters as one linear map a depth.

    Attributes:
        classes: the K kinds of null text, then (adapter, bundle) of every key.
        claims: (adapter, bundle) -> share of the null's tokens that its key wins.
        maps: (d, K + M + 1) for each depth. offsets: (K + M + 1,) for each depth.
        leads: what a token leads the null by up to each depth if its state is the key's mean, (P, M).
        recall: projection (d, q), all remembered states (q, n), -|state|^2 / 2 (n,) and the key of each (n,), where the
            null has covariance 1; None without them.
    """

    decay = DECAY

    def __init__(self, router: KeyRouter, state: BundleState, active: Sequence[str]) -> None:
        self.router, null = router, state.null
        if null is None:
            raise ValueError(
                "keys are compared with text that is nobody's, which was not measured yet; call "
                "peft_bundles.learn_null(model, texts, tokenizer) before the router is used."
            )
        self.key_of = _keys_in_use(router, state, active)
        self.always_on = set(router.always_on)
        self._columns: dict[Any, Tensor] = {}
        self.classes: list[Any] = [*null.kinds, *dict.fromkeys(self.key_of.values())]
        self.kinds = len(null.kinds)
        keys = [state.keys[name] for name in self.classes[self.kinds :]]
        means_PCd = torch.cat([null.mean_PKd, *(key.mean[:, None].float() for key in keys)], 1)
        self.limits, self.maps, self.offsets = null.limit_P, list[Tensor](), list[Tensor]()
        leads: list[Tensor] = []
        for depth, mean_Cd in enumerate(means_PCd.double()):
            centre_d = null.mean_PKd[depth].double().mean(0)
            apart_dC = (mean_Cd - centre_d).T
            map_dC = null.solve(depth, apart_dC).float()
            # Of the rounded map: states and means then cancel exactly.
            offset_C = -(map_dC.double() * (apart_dC / 2 + centre_d[:, None])).sum(0)
            fits_MC = mean_Cd[self.kinds :] @ map_dC.double() + offset_C
            leads.append((fits_MC[:, self.kinds :].diagonal() - fits_MC[:, : self.kinds].amax(-1)).clamp_min(0))
            # The last column counts the tokens that gave evidence.
            self.maps.append(torch.cat([map_dC, map_dC.new_zeros(len(map_dC), 1)], 1))
            self.offsets.append(torch.cat([offset_C, offset_C.new_tensor([float(depth == 0)])]).float())
        self.leads = torch.stack(leads).cumsum(0).float()
        self.recall: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.recalled_at = remembered_at(len(means_PCd))
        if router.remembered and len(keys) > 1:
            white_qq, project_dq = null.whitening(self.recalled_at)
            states_qn = (torch.cat([key.remembered.double() for key in keys]) @ white_qq).T
            owners_n = torch.cat([torch.full((len(key.remembered),), n) for n, key in enumerate(keys)])
            offset_n = -states_qn.square().sum(0) / 2
            self.recall = (project_dq @ white_qq).float(), states_qn.float(), offset_n.float(), owners_n
        self.claims = self._claims(null)
        loud = {name: round(share, 3) for (_, name), share in self.claims.items() if share > CLAIMS}
        if loud:
            raise ValueError(
                f"keys win these shares of the tokens of text that is nobody's: {loud}; at most {CLAIMS} is allowed. "
                "Leave these bundles out, make them always_on, or measure the null on other text."
            )

    def _claims(self, null: Null) -> dict[tuple[str, str], float]:
        total_NC = torch.zeros(())
        for depth, sample_Nd in enumerate(null.sample_PNd):
            total_NC = total_NC + sample_Nd.float() @ self.maps[depth] + self.offsets[depth]
        names = self.classes[self.kinds :]
        winners_N = self.decide(len(self.maps) - 1, total_NC) if names else torch.zeros(0)
        return {name: float((winners_N == self.kinds + n).float().mean()) for n, name in enumerate(names)}

    def scores(self, depth: int, hidden_BTd: Tensor) -> Tensor:
        """The evidence of every token for every class, (B, T, C) in float32; 0 for attention sinks."""
        if self.maps[depth].device != hidden_BTd.device:
            self.maps[depth], self.offsets[depth] = (
                each.to(hidden_BTd.device) for each in (self.maps[depth], self.offsets[depth])
            )
        x_BTd = hidden_BTd.float()
        with torch.autocast(hidden_BTd.device.type, enabled=False):
            scores_BTC = torch.addmm(self.offsets[depth], x_BTd.flatten(0, 1), self.maps[depth])
        inside = torch.linalg.vector_norm(x_BTd, dim=-1, keepdim=True) <= float(self.limits[depth])
        scores_BTC = scores_BTC.view(*hidden_BTd.shape[:2], -1)
        if self.recall is not None:  # at other depths zeros, so that all depths add up
            scores_BTC = torch.cat([scores_BTC, self._recalled(depth, x_BTd)], -1)
        return scores_BTC * inside

    def _recalled(self, depth: int, x_BTd: Tensor) -> Tensor:
        """How much farther each key's nearest remembered state is than the nearest of all, (B, T, M), at most 0."""
        assert self.recall is not None
        M = len(self.classes) - self.kinds
        if depth != self.recalled_at:
            return x_BTd.new_zeros(*x_BTd.shape[:2], M)
        if self.recall[0].device != x_BTd.device:
            project_dq, states_qn, offset_n, owners_n = (each.to(x_BTd.device) for each in self.recall)
            self.recall = project_dq, states_qn, offset_n, owners_n
        project_dq, states_qn, offset_n, owners_n = self.recall
        nearest = []
        for x_nd in x_BTd.flatten(0, 1).split(TOGETHER):  # (tokens, n) does not fit for all tokens of a long prompt
            fits_Nn = torch.addmm(offset_n, x_nd @ project_dq, states_qn)
            best_NM = fits_Nn.new_full((len(x_nd), M), -torch.inf)
            nearest.append(best_NM.scatter_reduce_(1, owners_n.expand_as(fits_Nn), fits_Nn, "amax"))
        best_BTM = torch.cat(nearest).view(*x_BTd.shape[:2], M)
        return RECALL * (best_BTM - best_BTM.amax(-1, keepdim=True))

    def decide(self, depth: int, evidence_BTC: Tensor) -> Tensor:
        """The class that is on at every token, (B, T); 0, the first kind of null text: none."""
        K, M = self.kinds, len(self.classes) - self.kinds
        if not M:
            return evidence_BTC.new_zeros(evidence_BTC.shape[:-1], dtype=torch.long)
        if self.leads.device != evidence_BTC.device:
            self.leads = self.leads.to(evidence_BTC.device)
        lead_BTM = evidence_BTC[..., K : K + M] - evidence_BTC[..., :K].amax(-1, keepdim=True)
        rank_BTM, best_BT1 = lead_BTM, lead_BTM.amax(-1, keepdim=True)
        if evidence_BTC.shape[-1] > K + M + 1:
            rank_BTM = (lead_BTM + evidence_BTC[..., K + M + 1 :]).masked_fill(lead_BTM < TIE * best_BT1, -torch.inf)
        first_BT = rank_BTM.argmax(-1)
        least_BT = MARGIN * self.leads[depth][first_BT] * evidence_BTC[..., K + M]
        return torch.where(best_BT1[..., 0] > least_BT, first_BT + K, 0)

    def columns(self, adapter: str, names: tuple[str, ...], device: torch.device) -> Tensor:
        """The class of each bundle, (M,); -1 for one that is always on."""
        if (adapter, names, device) not in self._columns:
            numbers = [-1 if n in self.always_on else self.classes.index(self.key_of[adapter, n]) for n in names]
            self._columns[adapter, names, device] = torch.tensor(numbers, device=device)
        return self._columns[adapter, names, device]


def _keys_in_use(
    router: KeyRouter, state: BundleState, active: Sequence[str]
) -> dict[tuple[str, str], tuple[str, str]]:
    """(adapter, bundle) -> that of the key it uses, for all bundles that have to be gated."""
    follows = router.follows or {}
    owners = {
        name: adapter for adapter in active if adapter in state.configs for name in state.configs[adapter].bundles or ()
    }
    if unknown := sorted({*router.always_on, *follows, *follows.values()} - owners.keys()):
        raise ValueError(
            f"the router names {unknown}, and the model has the bundles {sorted(owners)}; name some of these."
        )
    used = {}
    for name, adapter in owners.items():
        if name not in router.always_on:
            leader = follows.get(name, name)
            used[adapter, name] = owners[leader], leader
    if missing := sorted({leader for adapter, leader in used.values() if (adapter, leader) not in state.keys}):
        raise ValueError(
            f"bundles {missing} have no key; make one with peft_bundles.learn_keys(model, {{{missing[0]!r}: rows}}, "
            "tokenizer), or name them in KeyRouter(always_on=[...])."
        )
    return used

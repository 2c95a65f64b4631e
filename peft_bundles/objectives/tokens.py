"""Sums, means and log-probabilities over the tokens of a batch. Shapes: B rows, T tokens, V vocabulary."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


class Sampling(NamedTuple):
    """The distribution that tokens are drawn from and scored in: softmax(logits / temperature), cut off three ways.

    Args:
        temperature: divides the logits.
        top_k: keep the k most likely tokens. 0 keeps all.
        top_p: keep the most likely tokens that together have this probability. 1 keeps all.
        min_p: keep tokens at least this many times as likely as the most likely one. 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def checked(self, prefix: str) -> Sampling:
        """Itself; a ValueError that starts with `prefix` if a field is out of range."""
        whole = isinstance(self.top_k, int) and self.top_k >= 0
        for field, fits, wanted in (
            ("temperature", 0 < self.temperature < math.inf, "a number > 0"),
            ("top_k", whole, "a whole number >= 0 (0 keeps all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 keeps all tokens)"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 and below 1 (0 keeps all tokens)"),
        ):
            if not fits:
                raise ValueError(f"{prefix}: {field}={getattr(self, field)!r} must be {wanted}.")
        return self

    def options(self) -> dict[str, Any]:
        """Arguments of `model.generate` that sample from this distribution."""
        return {"do_sample": True, **self._asdict(), "min_p": self.min_p or None}

    def scores(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits of the distribution, -inf where a token is cut off.

        Args:
            logits: (B, T, V).
            ids: (B, T), tokens that are never cut off: one that was drawn may have left the set in a later step.
        """
        scores = wide(logits) / self.temperature
        warpers: list[Any] = [TopKLogitsWarper(self.top_k)] if self.top_k else []
        warpers += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        warpers += [MinPLogitsWarper(self.min_p)] if self.min_p else []
        if not warpers:
            return scores
        kept = scores.detach().flatten(0, 1)
        for warper in warpers:
            kept = warper(None, kept)
        cut = (kept == -torch.inf).view_as(scores)
        if ids is not None:
            cut = cut.scatter(-1, ids.unsqueeze(-1), False)
        return scores.masked_fill(cut, -torch.inf)


PLAIN = Sampling()


def token_logprobs(logits: Tensor, ids: Tensor, sampling: Sampling = PLAIN) -> Tensor:
    """log p(ids[:, t] | ids[:, :t]) for t >= 1.

    Args:
        logits: (B, T, V); position t predicts token t + 1. Computed in float32 at least.
        ids: (B, T).
        sampling: the distribution; by default the model's own.

    Returns:
        (B, T - 1), in nats.
    """
    scores = sampling.scores(logits[:, :-1], ids[:, 1:])
    return scores.gather(-1, ids[:, 1:, None]).squeeze(-1) - scores.logsumexp(-1)


def token_entropy(logits: Tensor, sampling: Sampling = PLAIN) -> Tensor:
    """Entropy of the distribution of each token t >= 1, (B, T - 1), in nats; logits (B, T, V)."""
    scores = sampling.scores(logits[:, :-1])
    logprobs = scores.log_softmax(-1)
    return -(logprobs.exp() * logprobs.masked_fill(scores == -torch.inf, 0.0)).sum(-1)


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) in nats, (...), of log-probabilities (..., V)."""
    return (logp.exp() * (logp - logq)).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` weighted with `mask` (same shape, >= 0), a scalar; 0 where the mask is empty."""
    mask = mask.to(values.dtype)
    # torch.where and not a product alone: a value outside the mask may be NaN
    return torch.where(mask > 0, values * mask, 0.0).sum() / mask.sum().clamp_min(1e-12)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of each row of `values` (B, T) where `mask` (B, T) is not 0, (B,)."""
    return torch.where(mask > 0, values, 0.0).sum(-1)


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row of `values` (B, T) where `mask` (B, T) is 1, (B,); 0 for a row whose mask is empty."""
    return masked_sum(values, mask) / mask.sum(1).clamp_min(1)


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean state over the tokens of a mask: states (B, T, r), mask (B, T) or (B, S, T) -> (B, r) or (B, S, r)."""
    weights = mask.to(states.dtype)
    total = weights @ states if mask.dim() == 3 else (weights.unsqueeze(1) @ states).squeeze(1)
    return total / weights.sum(-1, keepdim=True).clamp_min(1)


def at(states: Tensor, position: Tensor) -> Tensor:
    """States (B, T, ...) at one position of each row, (B,) -> (B, ...)."""
    return states[torch.arange(len(states), device=states.device), position]


def accuracy(scores: Tensor, correct: Tensor) -> Tensor:
    """Share of scores whose sign is right: above 0 where `correct` is 1, else not; both (B,)."""
    return ((scores > 0) == (correct > 0.5)).float().mean()


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: a logsumexp over a vocabulary in bf16 keeps two digits."""
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor

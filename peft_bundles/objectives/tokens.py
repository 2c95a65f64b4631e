"""Sums, means and log-probabilities over the tokens of a batch. Shapes: B rows, T tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(ids[:, t] | ids[:, :t]) for t >= 1.

    Args:
        logits: (B, T, V); position t predicts token t + 1. Computed in float32 at least.
        ids: (B, T).
        temperature: divides the logits, as in sampling.

    Returns:
        (B, T - 1), in nats.
    """
    logits = wide(logits[:, :-1]) / temperature
    return logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the distribution of each token t >= 1, (B, T - 1), in nats; logits (B, T, V)."""
    logprobs = (wide(logits[:, :-1]) / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


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

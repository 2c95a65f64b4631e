"""Functions of token tensors that every objective needs."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(ids[:, t] | ids[:, :t]) for t >= 1.

    Args:
        logits: (B, T, V); row t predicts token t + 1. Taken to float32 if they are narrower.
        ids: (B, T).
        temperature: what logits are divided by, as when the tokens were sampled.

    Returns:
        (B, T - 1), in nats.
    """
    logits = wide(logits[:, :-1]) / temperature
    return logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of the distribution of token t >= 1, (B, T - 1), in nats; logits (B, T, V)."""
    logs = (wide(logits[:, :-1]) / temperature).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` (same shape) is not 0, a scalar; 0 where the mask is empty."""
    mask = mask.to(values.dtype)
    # where, and not a product: what is masked out may be NaN
    return torch.where(mask > 0, values * mask, 0.0).sum() / mask.sum().clamp_min(1e-12)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of each row of `values` (B, T) where `mask` (B, T) is not 0, (B,)."""
    return torch.where(mask > 0, values, 0.0).sum(-1)


def wide(tensor: Tensor) -> Tensor:
    """At least float32: a bf16 logsumexp over a vocabulary has two digits."""
    return tensor.float() if torch.finfo(tensor.dtype).bits < 32 else tensor

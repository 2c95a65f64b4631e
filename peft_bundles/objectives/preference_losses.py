"""Losses on preferences, as functions of the log-probabilities of completions.

Each returns one value per pair (KTO: per completion), (B,). `chosen` and `rejected` are log p of the completions, (B,),
in nats; arguments that start with `ref_` are those of the reference model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    dpop: float = 0.0,
) -> Tensor:
    """-log sigmoid(beta [(chosen - ref_chosen) - (rejected - ref_rejected) - dpop max(0, ref_chosen - chosen)]).

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. The last term is DPO-Positive's (Pal et al. 2024, arXiv 2402.13228,
    eq. 3): it keeps the chosen completion likely, where DPO alone may make it less likely as long as the margin grows.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(beta * (margin - dpop * (ref_chosen - chosen).clamp_min(0)))


def ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 beta))^2.

    Azar et al. 2023 (arXiv 2310.12036), eq. 17, with tau = beta. As in TRL, pass means over tokens, not sums: with
    sums the target 1 / (2 beta) would mean something else for every length.
    """
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (margin - 1 / (2 * beta)).square()


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """-chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p). No reference.

    Hong et al. 2024 (arXiv 2403.07691), eqs. 6 and 7. `chosen`, `rejected`: means of log p over tokens (< 0), so that
    -chosen is the usual next-token loss.
    """
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """logp - log(1 - exp(logp)), in the form that is precise on each side of -log 2."""
    logp = logp.clamp_max(-1e-7)
    near = torch.log(-torch.expm1(logp))
    far = torch.log1p(-torch.exp(logp))
    return logp - torch.where(logp > -math.log(2), near, far)


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w (1 - sigmoid(s beta (logprobs - ref_logprobs - z0))): s = 1 for desirable completions, -1 for the others.

    Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 8, with beta outside the reference point as in TRL.

    Args:
        desirable: (B,), True for completions that are wanted.
        kl: z0, a scalar without gradient, from `kto_reference_point`.
        beta: strength of the reference.
        desirable_weight, undesirable_weight: w of the wanted and of the other completions.
    """
    reward = beta * (logprobs - ref_logprobs - kl)
    sign = torch.where(desirable, 1.0, -1.0).to(reward.dtype)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(reward.dtype)
    return weight * (1 - torch.sigmoid(sign * reward))


def kto_reference_point(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """z0 = max(0, mean(logprobs - ref_logprobs)) of prompts (B,) with the completion of another prompt."""
    return (logprobs - ref_logprobs).mean().clamp_min(0).detach()

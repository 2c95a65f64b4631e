"""The formulas of PPO: advantages, losses, estimates of KL, and the coefficient of KL.

Shapes are (B, T): B completions of up to T tokens, padded on the right; `mask` is 1 at their tokens. `logprobs` are the
log p of the sampled tokens under the current policy, `old_logprobs` those under the policy that sampled them, and
`ref_logprobs` those under the reference, all in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .tokens import masked_mean


KL_ESTIMATORS = ("k1", "k2", "k3")


# ---- advantages ----


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t.

    Schulman et al. 2015 (arXiv 1506.02438), eq. 16. A completion ends with its last token: V is 0 after it.

    Args:
        rewards: (B, T), the reward of a completion at its last token, plus rewards of single tokens.
        values: (B, T), V of the state before each token.
        mask: (B, T).
        gamma: discount of a token.
        lam: lambda; 0 uses one step, 1 the whole completion.

    Returns:
        Advantages A and returns A + V, both (B, T), 0 outside the mask.
    """
    values, rewards = values * mask, rewards * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    delta = rewards + gamma * following - values
    advantages, later = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        later = (delta[:, t] + gamma * lam * later) * mask[:, t]
        advantages[:, t] = later
    return advantages, advantages + values


def group_advantages(rewards: Tensor, group: int, kind: str) -> Tensor:
    """Advantages of completions, compared with the other completions of their prompt; no critic.

    "grpo": (r - mean) / (std + 1e-4) (Shao et al. 2024, arXiv 2402.03300, section 4.1.2; the 1e-4 is TRL's).
    "rloo": r - mean of the other completions (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).

    Args:
        rewards: (B,), the completions of one prompt next to each other.
        group: completions per prompt, a divisor of B.
        kind: "grpo" or "rloo".

    Returns:
        (B,)

    Raises:
        ValueError: the group has one completion, B is not a multiple of it, or the kind is unknown.
    """
    if kind not in ("grpo", "rloo"):
        raise ValueError(f"kind={kind!r} is unknown; choose 'grpo' or 'rloo'.")
    if group < 2 or len(rewards) % group:
        raise ValueError(f"group={group} must be at least 2 and divide the {len(rewards)} completions.")
    table = rewards.view(-1, group)
    if kind == "grpo":
        table = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-4)
    else:
        table = (table - table.mean(1, keepdim=True)) * group / (group - 1)
    return table.flatten()


def whiten(values: Tensor, mask: Tensor, *, reduce: bool = True) -> Tensor:
    """(values - mean) / std over the mask, with `reduce` over the masks of all processes; 0 outside the mask."""
    kept = torch.where(mask > 0, values, 0.0)
    sums = torch.stack([mask.sum().to(values.dtype), kept.sum()])
    if several := reduce and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    count, mean = sums[0].clamp_min(1), sums[1] / sums[0].clamp_min(1)
    squares = torch.where(mask > 0, (values - mean).square(), 0.0).sum()
    if several:
        dist.all_reduce(squares)
    # 1e-8 is added to the variance, as in TRL and baselines
    return torch.where(mask > 0, (values - mean) * (squares / (count - 1).clamp_min(1) + 1e-8).rsqrt(), 0.0)


# ---- losses, means over the tokens of the mask ----


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """-mean min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A), ratio = exp(logprobs - old_logprobs).

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7.
    """
    ratio = torch.exp(torch.where(mask > 0, logprobs - old_logprobs, 0.0))
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -masked_mean(surrogate, mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2) -> Tensor:
    """0.5 mean max((V - R)^2, (V_clipped - R)^2), with V_clipped within `clip` of the value at rollout time.

    As in OpenAI baselines' ppo2 and in TRL. `clip=None` does not clip.
    """
    error = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns).square())
    return 0.5 * masked_mean(error, mask)


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """Share of tokens whose ratio is outside 1 +- clip."""
    return masked_mean((torch.exp(logprobs - old_logprobs) - 1).abs().gt(clip).to(logprobs.dtype), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 for a perfect critic, 0 for a constant one."""
    inside, error = returns[mask > 0], (returns - values)[mask > 0]
    return 1 - error.var(unbiased=False) / inside.var(unbiased=False).clamp_min(1e-12)


# ---- KL to the reference ----


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k3") -> Tensor:
    """Estimates of KL(policy || reference) from each sampled token, (B, T); http://joschu.net/blog/kl-approx.html.

    With r = ref_logprobs - logprobs: "k1" is -r (unbiased, high variance, may be negative), "k2" is r^2 / 2 (biased,
    low variance), "k3" is exp(r) - 1 - r (unbiased, low variance, never negative).

    "k1" does not work as a loss: the expectation of its gradient, E[grad log p], is 0 whatever the KL.

    Raises:
        ValueError: the kind is unknown.
    """
    r = ref_logprobs - logprobs
    if kind == "k1":
        return -r
    if kind == "k2":
        return r.square() / 2
    if kind == "k3":
        return torch.expm1(r) - r
    raise ValueError(f"kl estimator {kind!r} is unknown; choose one of {', '.join(KL_ESTIMATORS)}.")


@dataclass
class KLController:
    """The coefficient of KL: constant, or adapted towards a target.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.

    Args:
        coefficient: its first value.
        target: target KL of a completion, in nats. None keeps the coefficient constant.
        horizon: number of completions over which the coefficient adapts.
    """

    coefficient: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, completions: int) -> None:
        """coefficient *= 1 + clip(kl / target - 1, -0.2, 0.2) completions / horizon."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * completions / self.horizon

"""Heads that `PPO` trains on its rollouts in addition to the policy: advantage regression and curiosity.

Both read the final state in the subspace of the owners of their signal (`heads.py`; b_rl_advantage in the taxonomy).
Shapes: B completions, T tokens, d the hidden size, r columns of the subspace, V the vocabulary.

Failure modes. Advantages are whitened within a rollout and change their meaning with the policy, so the head follows
a moving target; a large `advantage_explained` on the rollout it trains on only shows memory of the rollout. Curiosity
rewards what cannot be predicted, including noise ("noisy TV", Burda et al. 2018): at high temperature sampled nonsense
is the best source of reward, and a large `curiosity_reward` drowns out the task's reward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .heads import SubspaceHead
from .seeding import seeded
from .tokens import wide


class Curiosity(nn.Module):
    """A forward model: it predicts the base model's state after a token from the state before it and the token.

    error_t = mean over coordinates of (f(x_{t-1}, e(a_t)) - x'_t)^2. Here x are the coordinates of the current model's
    final state, x' those of the base model (bundles off), e(a) those of the token's row of the LM head. As in Pathak et
    al. 2017 (arXiv 1705.05363, eq. 5-6), but with frozen features as targets, as in Burda et al. 2018 (arXiv
    1808.04355): learned features would become easy to predict.

    Args:
        basis: columns of the subspace, (d, r).
        embedding: weight of the LM head, (V, d); it is not trained here.
        name: seeds the weights.
        hidden: units of f.
    """

    actions: Tensor

    def __init__(self, basis: Tensor, embedding: Tensor, name: str, hidden: int = 128) -> None:
        super().__init__()
        r = basis.shape[1]
        self.reader = SubspaceHead(basis, hidden, f"{name} state")
        with torch.no_grad():
            rows = embedding.detach().float() @ basis.to(embedding.device)
            rows = nn.functional.rms_norm(rows, (r,), eps=1e-6).cpu()
        self.register_buffer("actions", rows, persistent=False)
        with seeded(torch.device("cpu"), "curiosity", name):
            self.action, self.out = nn.Linear(r, hidden, bias=False), nn.Linear(hidden, r)

    @torch.no_grad()
    def target(self, reference: Tensor) -> Tensor:
        """x'_t for tokens t >= 1, (B, T - 1, r), from the base model's final states (B, T, d)."""
        return self.reader.coordinates(reference[:, 1:]).float()

    def forward(self, hidden: Tensor, ids: Tensor, target: Tensor) -> Tensor:
        """error_t for tokens t >= 1, (B, T - 1), from final states (B, T, d), ids (B, T), targets (B, T - 1, r)."""
        state = self.reader(hidden[:, :-1]) + self.action(self.actions[ids[:, 1:]])
        return (self.out(nn.functional.gelu(state)) - target.to(state.dtype)).square().mean(-1)


def advantage_error(head: SubspaceHead, hidden: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """0.5 (A_hat_t - A_t)^2 and A_hat_t for tokens t >= 1, both (B, T - 1).

    Args:
        head: reads A_hat_t from the state after token t.
        hidden: final states, (B, T, d).
        advantages: A_t, (B, T - 1).
    """
    predicted = head(hidden[:, 1:])[..., 0]
    return 0.5 * (predicted - wide(advantages).to(predicted.dtype)).square(), predicted.detach()

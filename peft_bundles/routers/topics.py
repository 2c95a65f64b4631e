"""From a topic vector tau to the gates of semantic bundles: alpha_sem_k and the gradient weight of b_sem_k = f(tau_k).

tau is (B, K), one number in [0, 1] a row and topic, several topics may hold at once. Bundles that are about no topic
(mem, abstraction and all others) are not named, so they stay on and learn from every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..config import BundleConfig


MASKS = ("soft", "hard", "stochastic", "rate")


@dataclass
class TopicRouting:
    """How topics gate the semantic bundles.

    Args:
        topics: names of the columns of tau.
        mask: what the gradient of b_sem_k from a row is weighed with: "soft", tau_k; "hard", 1 where tau_k >=
            `threshold`; "stochastic", 1 with probability tau_k, drawn anew for every row and step; "rate", 1 where
            tau_k > 0, and the bundle's learning rate is scaled by the mean of tau_k over those rows (`rates`).
            Under Adam a constant weight on all gradients of a bundle is no weight at all; a rate is.
        gate_forward: alpha_sem_k of a row is that same mask, tau_k for "stochastic" and "rate"; False: 1 in every row.
        threshold: of "hard".
        seed: of the draws.

    Raises:
        ValueError: a value outside what is said above.
    """

    topics: Sequence[str] = field(default_factory=list)
    mask: str = "soft"
    gate_forward: bool = True
    threshold: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ValueError(f"mask={self.mask!r} is unknown; choose one of {', '.join(MASKS)}.")
        if not self.topics or len(set(self.topics)) != len(self.topics):
            raise ValueError(f"topics={list(self.topics)} must name the columns of tau, each once.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r} must be in (0, 1].")

    def check(self, tau: Tensor) -> Tensor:
        """tau as float64 (B, K); raises ValueError for another shape or numbers outside [0, 1]."""
        tau = torch.as_tensor(tau, dtype=torch.float64)
        if tau.dim() != 2 or tau.shape[1] != len(self.topics) or not len(tau):
            raise ValueError(f"tau has shape {tuple(tau.shape)}; give (B, {len(self.topics)}), a column a topic.")
        if not bool(((tau >= 0) & (tau <= 1)).all()):
            raise ValueError(
                f"tau holds values from {tau.min():g} to {tau.max():g}; a topic's weight must be in [0, 1]."
            )
        return tau

    def owners(self, config: BundleConfig, tau: Tensor) -> dict[str, int]:
        """Semantic bundle -> its column of tau.

        Raises:
            ValueError: a topic that some row has and no bundle is about; a semantic bundle of a topic not in `topics`.
        """
        found = {}
        for name, spec in (config.bundles or {}).items():
            if spec.role == "semantic" and spec.topic is not None:
                if spec.topic not in self.topics:
                    raise ValueError(f"bundle {name!r} is about {spec.topic!r}, but the topics are {self.topics}.")
                found[name] = list(self.topics).index(spec.topic)
        present = [t for t, any_row in zip(self.topics, (tau > 0).any(0).tolist()) if any_row]
        owned = {self.topics[column] for column in found.values()}
        if unowned := [t for t in present if t not in owned]:
            raise ValueError(
                f"rows have the topic(s) {unowned}, which no bundle owns; the bundles are about {sorted(owned)}. Add a "
                "bundle (role='semantic', topic=...), or leave the topic out of tau."
            )
        return found

    def masked(self, tau: Tensor, step: int, draws: Tensor | None = None) -> Tensor:
        """The mask itself, (B, K); the draws of "stochastic" are a function of (seed, step), or those given, (B, K)."""
        if self.mask == "soft":
            return tau
        if self.mask == "hard":
            return (tau >= self.threshold).double()
        if self.mask == "rate":
            return (tau > 0).double()
        if draws is None:
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
            draws = torch.rand(tau.shape, generator=generator, dtype=torch.float64)
        return (draws < tau).double()

    def weights(
        self, config: BundleConfig, tau: Tensor, step: int = 0, draws: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Semantic bundle -> gradient weight of every row (B,), for `route(..., weights=)`; draws as of `masked`.

        A row without topic (all zeros) trains no semantic bundle, only those that are always on.
        """
        tau = self.check(tau)
        mask = self.masked(tau, step, draws)
        return {name: mask[:, column] for name, column in self.owners(config, tau).items()}

    def gates(self, config: BundleConfig, tau: Tensor) -> dict[str, Tensor]:
        """Semantic bundle -> factor on its alpha in every row (B,), float64; {} without `gate_forward`."""
        tau = self.check(tau)
        owners = self.owners(config, tau)
        if not self.gate_forward:
            return {}
        mask = (tau >= self.threshold).double() if self.mask == "hard" else tau
        return {name: mask[:, column] for name, column in owners.items()}

    def alphas(self, config: BundleConfig, tau: Tensor) -> dict[str, Tensor]:
        """Semantic bundle -> alpha of every row (B,), times the bundle's own; {} without `gate_forward`.

        A bundle that is off in a row learns nothing from it, whatever its weight.
        """
        bundles = config.bundles or {}
        return {name: (gate * bundles[name].alpha).float() for name, gate in self.gates(config, tau).items()}

    def rates(self, config: BundleConfig, tau: Tensor) -> dict[str, float]:
        """Semantic bundle -> factor on its learning rate in this step: with "rate" the mean of tau_k where it is > 0.

        {} for the other masks.
        """
        tau = self.check(tau)
        if self.mask != "rate":
            return {}
        found = {}
        for name, column in self.owners(config, tau).items():
            held = tau[:, column][tau[:, column] > 0]
            found[name] = float(held.mean()) if len(held) else 0.0
        return found

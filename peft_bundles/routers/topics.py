"""Topic routing: from topic vectors of rows to alphas and gradient weights of topic bundles.

A topic vector tau (B, K) holds one number in [0, 1] for each of B rows and K topics; a row may have several topics. A
topic bundle is one with role "semantic" and a topic. All other bundles stay on and learn from every row.
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
    """How the topics of a row gate the topic bundles.

    Args:
        topics: names of the columns of tau.
        mask: the weight of a row in the gradient of the bundle of topic k: "soft", tau_k; "hard", 1 where tau_k >=
            `threshold`, else 0; "stochastic", 1 with probability tau_k, drawn again for every row and step; "rate", 1
            where tau_k > 0, and the bundle's learning rate is scaled by the mean of tau_k over these rows (`rates`).
            Adam hides a constant factor on all gradients of a bundle; it does not hide a learning rate.
        gate_forward: whether the alphas of topic bundles are gated too: with the mask for "soft" and "hard", with tau_k
            for "stochastic" and "rate". False leaves the alphas as they are.
        threshold: threshold of "hard", in (0, 1].
        seed: seed of the draws of "stochastic".

    Raises:
        ValueError: the mask is unknown, topics are missing or named twice, or the threshold is out of range.

    Example:
        >>> import torch
        >>> from peft_bundles import BundleConfig
        >>> from peft_bundles.routers.topics import TopicRouting
        >>> law = {"rank": 4, "sub_bases": ["a"], "role": "semantic", "topic": "law", "signals": {"lm": 1.0}}
        >>> config = BundleConfig(sub_bases={"a": 16}, bundles={"b_sem_law": law})
        >>> routing = TopicRouting(["law"], mask="hard")
        >>> tau = torch.tensor([[0.9], [0.2]])  # two rows
        >>> routing.alphas(config, tau)
        {'b_sem_law': tensor([1., 0.])}
        >>> routing.weights(config, tau)["b_sem_law"].tolist()
        [1.0, 0.0]
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
            raise ValueError(
                f"topics={list(self.topics)} must name the columns of tau, each once; give a list of names."
            )
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r} must be in (0, 1].")

    def check(self, tau: Tensor) -> Tensor:
        """tau as float64 (B, K).

        Raises:
            ValueError: tau has another shape, or a number outside [0, 1].
        """
        tau = torch.as_tensor(tau, dtype=torch.float64)
        if tau.dim() != 2 or tau.shape[1] != len(self.topics) or not len(tau):
            raise ValueError(f"tau has shape {tuple(tau.shape)}; give (B, {len(self.topics)}), one column per topic.")
        if not bool(((tau >= 0) & (tau <= 1)).all()):
            raise ValueError(
                f"tau holds values from {tau.min():g} to {tau.max():g}; the weight of a topic must be in [0, 1]."
            )
        return tau

    def owners(self, config: BundleConfig, tau: Tensor) -> dict[str, int]:
        """Topic bundle -> its column of tau.

        Raises:
            ValueError: a row has a topic that no bundle owns, or a bundle has a topic that is not in `topics`.
        """
        column_of = {}
        for name, spec in (config.bundles or {}).items():
            if spec.role == "semantic" and spec.topic is not None:
                if spec.topic not in self.topics:
                    raise ValueError(
                        f"bundle {name!r} is about {spec.topic!r}, but the topics are {self.topics}; add this topic."
                    )
                column_of[name] = list(self.topics).index(spec.topic)
        present = [t for t, any_row in zip(self.topics, (tau > 0).any(0).tolist()) if any_row]
        owned = {self.topics[column] for column in column_of.values()}
        if unowned := [t for t in present if t not in owned]:
            raise ValueError(
                f"rows have the topic(s) {unowned}, which no bundle owns; the bundles are about {sorted(owned)}. Add a "
                "bundle (role='semantic', topic=...), or leave the topic out of tau."
            )
        return column_of

    def masked(self, tau: Tensor, step: int, draws: Tensor | None = None) -> Tensor:
        """The mask, (B, K), of tau (B, K).

        Args:
            tau: checked topic vectors.
            step: with the seed it determines the draws of "stochastic".
            draws: numbers in [0, 1) to use instead, (B, K).
        """
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
        """Topic bundle -> gradient weight of every row, (B,), float64, for `model.route(..., weights=)`.

        A row without topic (all zeros) trains no topic bundle, only the others.

        Args:
            config: config of the adapter.
            tau: topic vectors, (B, K).
            step: number of the step; with the seed it determines the draws of "stochastic".
            draws: numbers in [0, 1) to use instead, (B, K).

        Raises:
            ValueError: as `check` and `owners`.
        """
        tau = self.check(tau)
        mask = self.masked(tau, step, draws)
        return {name: mask[:, column] for name, column in self.owners(config, tau).items()}

    def gates(self, config: BundleConfig, tau: Tensor) -> dict[str, Tensor]:
        """Topic bundle -> factor on its alpha in every row, (B,), float64; {} without `gate_forward`."""
        tau = self.check(tau)
        owners = self.owners(config, tau)
        if not self.gate_forward:
            return {}
        mask = (tau >= self.threshold).double() if self.mask == "hard" else tau
        return {name: mask[:, column] for name, column in owners.items()}

    def alphas(self, config: BundleConfig, tau: Tensor) -> dict[str, Tensor]:
        """Topic bundle -> alpha in every row, (B,): its gate times its alpha in the config.

        {} without `gate_forward`. A bundle that is off in a row learns nothing from that row, whatever its weight.

        Args:
            config: config of the adapter.
            tau: topic vectors, (B, K).

        Raises:
            ValueError: as `check` and `owners`.
        """
        bundles = config.bundles or {}
        return {name: (gate * bundles[name].alpha).float() for name, gate in self.gates(config, tau).items()}

    def rates(self, config: BundleConfig, tau: Tensor) -> dict[str, float]:
        """Topic bundle -> factor on its learning rate in this step, the mean of tau_k over the rows where it is > 0.

        {} for other masks than "rate". `BundleTrainer` applies the factors; a loop that steps an optimizer multiplies
        the rate of the bundle's parameter group.
        """
        tau = self.check(tau)
        if self.mask != "rate":
            return {}
        factors = {}
        for name, column in self.owners(config, tau).items():
            present = tau[:, column][tau[:, column] > 0]
            factors[name] = float(present.mean()) if len(present) else 0.0
        return factors

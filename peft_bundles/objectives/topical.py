"""Topics of training rows: from a dataset's column `topics` to gates on topic bundles (`routers/topics.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import BundleConfig
from ..routers.topics import TopicRouting
from .seeding import seed_of


COLUMN = "topics"  # the dataset's column with the topics of each row


class RowTopics:
    """The topic routing of a training run, applied to the bundles of one adapter.

    Shapes: B rows, K topics.

    Args:
        routing: the topics and the mask.
        config: config of the adapter; its bundles with role "semantic" have the topics.
    """

    def __init__(self, routing: TopicRouting, config: BundleConfig) -> None:
        self.routing, self.config = routing, config

    def vectors(self, objective: str, values: Sequence[Any]) -> list[list[float]]:
        """The topic vectors tau (K numbers per row) of a dataset's column.

        Args:
            objective: name of the objective, for errors.
            values: one value per row: K numbers, a dict topic -> weight, or a list of topics (weight 1 each).

        Raises:
            ValueError: a value is none of these, names an unknown topic, holds a number outside [0, 1], or names a
                topic that no bundle owns.
        """
        vectors = []
        for row, value in enumerate(values):
            try:
                vectors.append(self._vector(value))
            except ValueError as error:
                raise ValueError(f"objective {objective!r}: row {row}: {error}") from None
        try:
            self.routing.owners(self.config, torch.tensor(vectors, dtype=torch.float64))
        except ValueError as error:
            raise ValueError(f"objective {objective!r}: {error}") from None
        return vectors

    def _vector(self, value: Any) -> list[float]:
        names = list(self.routing.topics)
        if isinstance(value, Mapping):
            # In a table every row has the keys of all rows, with None for those it lacks.
            weights = {name: weight for name, weight in value.items() if weight is not None}
        elif isinstance(value, Sequence) and all(isinstance(v, str) for v in value) and not isinstance(value, str):
            weights = dict.fromkeys(value, 1.0)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != len(names):
                raise ValueError(
                    f"topics={value!r} has {len(value)} numbers, but the topics are {names}; give one number per topic."
                )
            weights = dict(zip(names, value))
        else:
            raise ValueError(
                f"topics={value!r}: give {len(names)} numbers, a dict topic -> weight, or a list of names ([]: none)."
            )
        if unknown := sorted(set(weights) - set(names)):
            raise ValueError(f"topics={value!r} names {unknown}; the topics are {names}.")
        for name, weight in weights.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight) or not 0 <= weight <= 1:
                raise ValueError(f"topics: {name!r} has weight {weight!r}; give a number in [0, 1].")
        return [float(weights.get(name, 0.0)) for name in names]

    def draws(self, rows: int, *key: int | str) -> Tensor | None:
        """Numbers in [0, 1), (rows, K), that depend on seed and key alone; None unless the mask is "stochastic"."""
        if self.routing.mask != "stochastic":
            return None
        generator = torch.Generator().manual_seed(seed_of("topics", self.routing.seed, *key))
        return torch.rand(rows, len(self.routing.topics), generator=generator, dtype=torch.float64)

    def gates(self, tau: Tensor) -> dict[str, Tensor]:
        """Topic bundle -> factor on its alpha in every row, (B,), from tau (B, K); {} without `gate_forward`."""
        return self.routing.gates(self.config, tau)

    def weights(self, tau: Tensor, draws: Tensor | None) -> dict[str, Tensor]:
        """Topic bundle -> gradient weight of every row, (B,), from tau and `draws`, both (B, K)."""
        return self.routing.weights(self.config, tau, draws=draws)

    def scaled(self) -> list[str]:
        """The topic bundles, whose learning rates the mask "rate" scales."""
        return list(self.routing.owners(self.config, torch.zeros(1, len(self.routing.topics))))

    def held(self, tau: Tensor) -> dict[str, Tensor]:
        """Topic bundle -> (2,): the sum of tau over the rows that have its topic, and the number of these rows."""
        owners = self.routing.owners(self.config, tau)
        return {b: torch.stack([tau[:, k].sum(), (tau[:, k] > 0).sum()]) for b, k in owners.items()}

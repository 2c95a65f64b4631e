"""Topics of rows in training: from a dataset's column to gates on semantic bundles (routers/topics.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ..config import BundleConfig
from ..routers.topics import TopicRouting


COLUMN = "topics"  # of a dataset


class RowTopics:
    """A run's topic routing on one config's bundles.

    Args:
        routing: the topics and the mask.
        config: of the adapter.
    """

    def __init__(self, routing: TopicRouting, config: BundleConfig) -> None:
        self.routing, self.config = routing, config

    def vectors(self, objective: str, values: Sequence[Any]) -> list[list[float]]:
        """tau of every row (K numbers each) of a dataset's column.

        Args:
            objective: for errors.
            values: a row each: K numbers, topic -> weight, or names of topics (weight 1); empty for none.

        Raises:
            ValueError: a row that is none of these, an unknown topic, a number outside [0, 1], a topic nobody owns.
        """
        found = []
        for row, value in enumerate(values):
            try:
                found.append(self._vector(value))
            except ValueError as error:
                raise ValueError(f"objective {objective!r}: row {row}: {error}") from None
        try:
            self.routing.owners(self.config, torch.tensor(found, dtype=torch.float64))
        except ValueError as error:
            raise ValueError(f"objective {objective!r}: {error}") from None
        return found

    def _vector(self, value: Any) -> list[float]:
        names = list(self.routing.topics)
        if isinstance(value, Mapping):
            # A table's struct has all keys of all rows, None where a row lacks one.
            weights = {name: weight for name, weight in value.items() if weight is not None}
        elif isinstance(value, Sequence) and all(isinstance(v, str) for v in value) and not isinstance(value, str):
            weights = dict.fromkeys(value, 1.0)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) != len(names):
                raise ValueError(f"topics={value!r} has {len(value)} numbers, but the topics are {names}.")
            weights = dict(zip(names, value))
        else:
            raise ValueError(
                f"topics={value!r}; give {len(names)} numbers, topic -> weight, or a list of names ([] for none)."
            )
        if unknown := sorted(set(weights) - set(names)):
            raise ValueError(f"topics={value!r} names {unknown}; the topics are {names}.")
        for name, weight in weights.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight) or not 0 <= weight <= 1:
                raise ValueError(f"topics: {name!r} has weight {weight!r}; it must be in [0, 1].")
        return [float(weights.get(name, 0.0)) for name in names]

    def draws(self, rows: int, *key: int | str) -> Tensor | None:
        """Numbers in [0, 1), (rows, K), for the mask "stochastic", a function of seed and key; None for the others."""
        if self.routing.mask != "stochastic":
            return None
        generator = torch.Generator().manual_seed(crc32(repr(("topics", self.routing.seed, *key)).encode()))
        return torch.rand(rows, len(self.routing.topics), generator=generator, dtype=torch.float64)

    def gates(self, tau: Tensor) -> dict[str, Tensor]:
        """Semantic bundle -> factor on its alpha, (B,); {} without `gate_forward`."""
        return self.routing.gates(self.config, tau)

    def weights(self, tau: Tensor, draws: Tensor | None) -> dict[str, Tensor]:
        """Semantic bundle -> gradient weight, (B,)."""
        return self.routing.weights(self.config, tau, draws=draws)

    def scaled(self) -> list[str]:
        """The semantic bundles."""
        return list(self.routing.owners(self.config, torch.zeros(1, len(self.routing.topics))))

    def held(self, tau: Tensor) -> dict[str, Tensor]:
        """Semantic bundle -> [sum of tau, number] over the rows that have its topic, (2,); for the mask "rate"."""
        owners = self.routing.owners(self.config, tau)
        return {b: torch.stack([tau[:, k].sum(), (tau[:, k] > 0).sum()]) for b, k in owners.items()}

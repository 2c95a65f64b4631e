"""Which objectives take part in which step: a pure function of the step, so a resumed run needs no saved state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


MIXINGS = ("together", "ratio", "alternate")


class MixingPlan:
    """The objectives of every optimizer step.

    Args:
        names: the objectives.
        kind: "together", all in every step, each with its own rows; "alternate", one per step, in turn; "ratio", one
            per step, drawn by weight.
        weights: objective -> weight, for "ratio"; an objective not named weighs 1.
        seed: seed of the draws.

    Raises:
        ValueError: an unknown kind or name, a weight that is not positive, or weights for another kind than "ratio".
    """

    def __init__(
        self, names: Sequence[str], kind: str = "together", weights: Mapping[str, float] | None = None, seed: int = 0
    ) -> None:
        weights = weights or {}
        if kind not in MIXINGS:
            raise ValueError(f"mixing={kind!r} is unknown; choose one of {', '.join(MIXINGS)}.")
        if unknown := sorted(set(weights) - set(names)):
            raise ValueError(f"mixing_weights names {unknown}; it takes some of {list(names)}.")
        if wrong := {n: w for n, w in weights.items() if not w > 0}:
            raise ValueError(
                f"mixing_weights={wrong} must be positive; to give an objective no steps, leave it out of objectives."
            )
        if weights and kind != "ratio":
            raise ValueError(f"mixing_weights belong to mixing='ratio'; mixing is {kind!r}.")
        self.names, self.kind = list(names), kind
        self._weights = torch.tensor([float(weights.get(n, 1.0)) for n in names], dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: list[int] = []

    def _draws(self, steps: int) -> list[int]:
        while len(self._drawn) < steps:
            self._drawn += torch.multinomial(self._weights, 1024, True, generator=self._generator).tolist()
        return self._drawn[:steps]

    def objectives(self, step: int) -> list[str]:
        """The objectives that take part in a step."""
        if self.kind == "together":
            return self.names
        if self.kind == "alternate":
            return [self.names[step % len(self.names)]]
        return [self.names[self._draws(step + 1)[step]]]

    def used(self, name: str, step: int) -> int:
        """The number of steps before `step` that an objective took part in: its own step number."""
        if self.kind == "together":
            return step
        index = self.names.index(name)
        if self.kind == "alternate":
            return (step - index + len(self.names) - 1) // len(self.names)
        return self._draws(step).count(index)

    def share(self, name: str) -> float:
        """The share of all steps that an objective takes part in, on average."""
        if self.kind == "together":
            return 1.0
        if self.kind == "alternate":
            return 1 / len(self.names)
        return float(self._weights[self.names.index(name)] / self._weights.sum())

"""Which objectives take part in which step: a pure function of the step, so that a resumed run needs no state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


MIXINGS = ("together", "ratio", "alternate")


class MixingPlan:
    """The objectives of every optimizer step.

    "together": all of them, each with rows of its own. "alternate": one after the other. "ratio": one, drawn by weight.

    Args:
        names: the objectives.
        kind: one of the above.
        weights: objective -> weight, for "ratio"; those not named weigh 1.
        seed: of the draws.
    """

    def __init__(
        self, names: Sequence[str], kind: str = "together", weights: Mapping[str, float] | None = None, seed: int = 0
    ) -> None:
        weights = weights or {}
        if kind not in MIXINGS:
            raise ValueError(f"mixing={kind!r} is unknown; choose one of {', '.join(MIXINGS)}.")
        if unknown := sorted(set(weights) - set(names)):
            raise ValueError(f"mixing_weights names {unknown}; the objectives are {list(names)}.")
        if wrong := {n: w for n, w in weights.items() if not w > 0}:
            raise ValueError(
                f"mixing_weights={wrong} must be positive; leave an objective out instead of weighing it 0."
            )
        if weights and kind != "ratio":
            raise ValueError(f"mixing_weights belong to mixing='ratio', not {kind!r}.")
        self.names, self.kind = list(names), kind
        self._weights = torch.tensor([float(weights.get(n, 1.0)) for n in names], dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: list[int] = []

    def _draws(self, steps: int) -> list[int]:
        while len(self._drawn) < steps:
            self._drawn += torch.multinomial(self._weights, 1024, True, generator=self._generator).tolist()
        return self._drawn[:steps]

    def objectives(self, step: int) -> list[str]:
        """Names of those that take part in a step."""
        if self.kind == "together":
            return self.names
        if self.kind == "alternate":
            return [self.names[step % len(self.names)]]
        return [self.names[self._draws(step + 1)[step]]]

    def used(self, name: str, step: int) -> int:
        """In how many steps before `step` an objective took part: its own step number."""
        if self.kind == "together":
            return step
        index = self.names.index(name)
        if self.kind == "alternate":
            return (step - index + len(self.names) - 1) // len(self.names)
        return self._draws(step).count(index)

    def share(self, name: str) -> float:
        """Part of the steps that an objective takes part in, on average."""
        if self.kind == "together":
            return 1.0
        if self.kind == "alternate":
            return 1 / len(self.names)
        return float(self._weights[self.names.index(name)] / self._weights.sum())

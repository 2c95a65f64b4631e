"""`RunLog`: what a run measures between two log lines, kept on the device until it is read."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives.batches import Batch


class RunLog:
    """Numbers of the steps since the last log line.

    Reading a number from a GPU makes the CPU wait, so everything stays a tensor until `read`.
    """

    def __init__(self) -> None:
        self._step: dict[str, Tensor] = {}
        self._values: dict[str, list[Tensor]] = {}
        self._tokens, self._since = torch.zeros(()), 0.0

    def start_clock(self) -> None:
        """Start to measure tokens per second; later calls change nothing."""
        self._since = self._since or time.perf_counter()

    def add_share(self, name: str, value: Tensor, weight: Tensor) -> None:
        """Add a micro-batch's share of a number of the current step: its mean times the micro-batch's weight."""
        self._step[name] = self._step.get(name, 0) + value.detach().float() * weight

    def close_step(self) -> None:
        """End the current step: its shares are complete."""
        for name, value in self._step.items():
            self.add(name, value)
        self._step = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add one value of a number; the log line has the mean of its values."""
        self._values.setdefault(name, []).append(value)

    def count_tokens(self, batches: Iterable[Batch], device: torch.device) -> None:
        """Count the tokens of a micro-batch, padding left out."""
        self._tokens = sum((b["attention_mask"].sum() for b in batches), self._tokens.to(device))

    def read(self, device: torch.device, processes: int) -> dict[str, float]:
        """The means since the last call, over all processes, and "tokens_per_second"; then the log is empty.

        All processes must call it. They have the same names, because a step's number determines its objectives.
        """
        means = {name: torch.stack(values).mean() for name, values in self._values.items()}
        means["tokens_per_second"] = self._tokens * processes  # a sum over processes, as their mean times their number
        flat = torch.stack([value.float().to(device) for value in means.values()])
        if processes > 1:
            dist.all_reduce(flat)
            flat /= processes
        now = time.perf_counter()
        numbers = dict(zip(means, flat.tolist()))
        numbers["tokens_per_second"] /= max(now - self._since, 1e-9)
        self._values, self._tokens, self._since = {}, torch.zeros(()), now
        return numbers

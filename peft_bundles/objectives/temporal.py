"""Temporal: a goal vector that follows a text segment by segment and predicts the next segment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.utils import pad

from .base import Objective
from .batches import ROW, Batch, Outputs
from .checks import require_columns
from .data import joined_ids
from .heads import SubspaceHead, largest_owner_rank, subspace
from .seeding import seeded
from .tokens import pooled


class GoalTracker(nn.Module):
    """Goals G_s = GRU(z_s, G_{s-1}) from a learned G_{-1}, and the predicted next segment P G_s.

    Args:
        basis: columns of the subspace (d, r), in which the segments z_s (r) are coordinates.
        rank: r_temp, the length of G_s.
        name: seeds the weights.
    """

    def __init__(self, basis: Tensor, rank: int, name: str) -> None:
        super().__init__()
        self.reader = SubspaceHead(basis, rank, name)  # its map takes z to the input of the cell
        with seeded(torch.device("cpu"), "goal", name):
            self.cell, self.expect = nn.GRUCell(rank, rank), nn.Linear(rank, basis.shape[1], bias=False)
        self.start = nn.Parameter(torch.zeros(rank))

    def forward(self, segments: Tensor) -> Tensor:
        """Segments (B, S, r) -> goals (B, S, r_temp); a goal depends on the segments up to its own."""
        goal, goals = self.start.expand(len(segments), -1), []
        for z in self.reader.map(segments).unbind(1):
            goal = self.cell(z, goal)
            goals.append(goal)
        return torch.stack(goals, 1)


class Temporal(Objective):
    """InfoNCE(P G_s, z_{s+1}) + consistency * mean_s (1 - cos(G_s, G_{s+1})), means over the transitions s -> s + 1.

    z_s is the mean, over the tokens of segment s, of the coordinates in the owners' subspace (`heads.py`). G_s, of
    length r_temp, is updated once per segment (`GoalTracker`). The first term compares with all segments of the
    micro-batch, also those of the same row, so that order counts (van den Oord et al. 2018, arXiv 1807.03748). The
    second keeps the plan from one segment to the next.

    Failure mode: with a large `consistency` G stops moving and is the same for every segment; then `drift` goes to 0
    and `accuracy` falls. Texts that share few words can be told apart by their words alone, without any plan: compare
    `accuracy` with what the mean of a row's own segments would predict.

    Args:
        dataset: rows `segments` (two or more texts: the steps of a plan, the paragraphs of a text), or rows `text` with
            `window`.
        window: tokens in a segment of `text`; tokens left at the end are dropped. Rows with `segments` do not use it.
        signal: name of the signal and of the objective.
        rank: r_temp. None takes the largest rank of the signal's owners.
        temperature: temperature of the first term, > 0.
        consistency: weight of the second term, >= 0.
        eval_dataset: held-out rows of the same format.
        max_length: tokens kept of a row, in whole segments. None keeps all.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> from peft_bundles.objectives import Temporal
        >>> rows = [{"segments": ["Boil water.", "Add tea.", "Drink."]}, {"segments": ["Sow.", "Reap."]}]
        >>> Temporal(rows).signals
        ('temporal',)
    """

    def __init__(
        self,
        dataset: Any,
        *,
        window: int | None = None,
        signal: str = "temporal",
        rank: int | None = None,
        temperature: float = 0.1,
        consistency: float = 0.1,
        eval_dataset: Any = None,
        max_length: int | None = 1024,
    ) -> None:
        super().__init__(signal, (signal,), dataset, eval_dataset)
        for field, value in (("window", window), ("rank", rank)):
            if value is not None and value < 1:
                raise ValueError(f"objective {signal!r}: {field}={value!r} must be at least 1.")
        if not temperature > 0 or not 0 <= consistency < math.inf:
            raise ValueError(
                f"objective {signal!r}: temperature={temperature!r} must be > 0, and consistency={consistency!r} a "
                "number >= 0."
            )
        self.window, self.rank, self.temperature, self.consistency = window, rank, temperature, consistency
        self.max_length = max_length
        self.tracker: GoalTracker | None = None

    def setup(self, tokenizer: Any, model: nn.Module) -> None:
        super().setup(tokenizer, model)
        signal = self.signals[0]
        self.tracker = GoalTracker(subspace(model, signal), self.rank or largest_owner_rank(model, signal), self.name)

    def head(self) -> nn.Module | None:
        return self.tracker

    def prepare(self, dataset: Dataset, split: str) -> list[dict[str, Any]]:
        columns = require_columns(self.name, dataset, ("segments",), ("text",))
        if columns == ("text",) and self.window is None:
            raise ValueError(f"objective {self.name!r}: rows of text need window=, the tokens in a segment; set it.")
        rows = []
        for number, row in enumerate(dataset):
            if "segments" in row:
                ids, segment_of = joined_ids(self.name, number, row["segments"], "segments", self.tokenizer)
            else:
                if not isinstance(row["text"], str):
                    raise ValueError(f"objective {self.name!r}: row {number} has text={row['text']!r}; give a string.")
                ids, segment_of = self._windows(number, row["text"])
            if self.max_length is not None and len(ids) > self.max_length:
                whole = sum(segment != segment_of[self.max_length] for segment in segment_of[: self.max_length])
                ids, segment_of = ids[:whole], segment_of[:whole]
            if segment_of and segment_of[-1] > 0:
                rows.append({"ids": ids, "segment": segment_of, ROW: number})
        return rows

    def _windows(self, number: int, text: str) -> tuple[list[int], list[int]]:
        assert self.window is not None
        ids = self.tokenizer(text=text)["input_ids"]
        count = len(ids) // self.window
        if count < 2:
            raise ValueError(
                f"objective {self.name!r}: row {number} has {len(ids)} tokens, fewer than two windows of "
                f"{self.window}; lower window, or drop the row."
            )
        return ids[: count * self.window], [i // self.window for i in range(count * self.window)]

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        """`segments` (B, S, T) is 1 where token t is in segment s."""
        ids = [torch.tensor(row["ids"]) for row in rows]
        number = pad([torch.tensor(row["segment"]) for row in rows], padding_value=-1)
        count = int(number.max()) + 1
        return {
            "input_ids": pad(ids, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids]),
            "segments": (number[:, None, :] == torch.arange(count)[None, :, None]).float(),
        }

    def items(self, batch: Batch) -> Tensor:
        """The number of transitions from one segment to the next."""
        return batch["segments"].any(-1)[:, 1:].sum().float()

    def read(self, hidden: Tensor, batch: Batch) -> Tensor:
        """z of every segment, (B, S, r), from final states (B, T, d)."""
        assert self.tracker is not None, "setup() makes the head"
        return pooled(self.tracker.reader.coordinates(hidden), batch["segments"])

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.compare(self.read(outputs.hidden, batch), batch["segments"].any(-1))

    def compare(self, segments: Tensor, exists: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and metrics from segments (B, S, r) and a mask (B, S) of those that exist."""
        assert self.tracker is not None, "setup() makes the head"
        segments = segments.to(self.tracker.start.dtype)
        goals, moves = self.tracker(segments), exists[:, 1:]
        expected = F.normalize(self.tracker.expect(goals[:, :-1][moves]), dim=-1)  # (N, r)
        scores = expected @ F.normalize(segments[exists], dim=-1).T / self.temperature
        index = exists.flatten().cumsum(0).view_as(exists) - 1  # of a segment among those that exist
        target = index[:, 1:][moves]
        drift = 1 - F.cosine_similarity(goals[:, :-1][moves], goals[:, 1:][moves], dim=-1).mean()
        metrics = {
            "accuracy": (scores.argmax(1) == target).float().mean(),
            "chance": torch.tensor(1 / scores.shape[1], device=scores.device),
            "drift": drift.detach(),
        }
        return {self.signals[0]: F.cross_entropy(scores, target) + self.consistency * drift}, metrics

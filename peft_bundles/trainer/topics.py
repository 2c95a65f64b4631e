"""Topics in `BundleTrainer`: checks, and learning rates by topic (the mask "rate").

The rows' gates, on alphas and on gradients, are `objectives/topical.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from ..config import BundleConfig
from ..objectives.base import Objective
from ..objectives.batches import Batch, has_topics
from ..objectives.topical import COLUMN, RowTopics
from ..routers.topics import TopicRouting
from .tables import updated


MARK = "bundle"  # key of an optimizer's group: the bundle whose rate topics scale


class TopicRates:
    """Factors on the learning rates of topic bundles, step by step.

    Args:
        topics: the run's topics; None if it has none.
        signals: objective -> the signals it emits.
    """

    def __init__(self, topics: RowTopics | None, signals: Mapping[str, tuple[str, ...]]) -> None:
        self.topics, self.signals = topics, signals
        self.bundles = topics.scaled() if topics is not None and topics.routing.mask == "rate" else []
        self._factors: dict[str, float] = {}
        self._unscaled: list[float] = []

    def note(self, micro_batches: Iterable[Mapping[str, Batch]], device: torch.device, processes: int) -> None:
        """Note the factors of a step: bundle -> the mean of its topic's weight over the rows that have the topic.

        Rows of all processes count. Rows of an objective that does not update the bundle do not.
        """
        self._factors = {}
        if self.topics is None or not self.bundles:
            return
        total = torch.zeros(len(self.bundles), 2, dtype=torch.float64)  # sum of weights, number of rows
        for batches in micro_batches:
            for name, batch in batches.items():
                if "topics" in batch:
                    held = self.topics.held(batch["topics"])
                    owners = updated(self.topics.config, self.signals[name])
                    total += torch.stack([held[bundle] * (bundle in owners) for bundle in self.bundles])
        if processes > 1:
            total = total.to(device)
            dist.all_reduce(total)
        self._factors = {bundle: s / rows for bundle, (s, rows) in zip(self.bundles, total.tolist()) if rows}

    def scale(self, optimizer: Optimizer) -> None:
        """Multiply the rates of the step's bundles, before the optimizer steps."""
        self._unscaled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self._factors.get(group.get(MARK, ""), 1.0)

    def restore(self, optimizer: Optimizer) -> None:
        """Put the rates back, after the optimizer has stepped."""
        for group, rate in zip(optimizer.param_groups, self._unscaled):
            group["lr"] = rate


def topics_of(settings: Mapping[str, Any] | None, config: BundleConfig) -> RowTopics | None:
    """The topics that `BundleTrainingConfig.topics` describes, for the bundles of a config."""
    return None if settings is None else RowTopics(TopicRouting(**settings), config)


def check_topics(topics: RowTopics | None, objectives: Sequence[Objective], sharded: bool) -> None:
    """Compare topics with the datasets, after the objectives' `setup`.

    Raises:
        ValueError: topics are set and no dataset has any; the trunk is sharded and a row may train nothing.
    """
    if topics is None:
        return
    with_topics = [o for o in objectives if has_topics(o.rows)]
    if not with_topics:
        raise ValueError(
            f"topics are set, but no objective's dataset has a column {COLUMN!r}. Add it, with a vector, a dict topic "
            "-> weight or a list of names in every row, or leave topics out."
        )
    for objective in with_topics if sharded else ():
        # Signal by signal: each may take a separate backward, which would run on some processes only.
        if alone := [s for s in objective.signals if updated(topics.config, (s,)) <= set(topics.scaled())]:
            raise ValueError(
                f"objective {objective.name!r}: signal(s) {alone} update topic bundles only. A process whose rows "
                "have no topic would run no backward, and FSDP's other processes would wait for it. Let the signal "
                "update a bundle without topic too, or leave FSDP out."
            )

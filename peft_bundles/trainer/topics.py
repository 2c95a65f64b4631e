"""Topics in `BundleTrainer`: rows gate the semantic bundles, and with the mask "rate" their learning rates too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..objectives.base import Batch, Objective, has_topics
from ..objectives.topical import COLUMN, RowTopics
from ..routers.topics import TopicRouting
from .tables import updated


if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer as _Base

    from ..config import BundleConfig
else:
    _Base = object

MARK = "bundle"  # of an optimizer's group whose rate topics scale


class TopicsMixin(_Base):
    """Learning rates by topic for `BundleTrainer`."""

    topics: RowTopics | None
    _rates: dict[str, float]

    def _note_rates(self: Any, micro: Sequence[Mapping[str, Batch]]) -> None:
        """Rates of the step of these micro-batches: the mean of tau_k over the rows, on all processes, that have it.

        Rows of objectives that do not update a bundle have no say in its rate.
        """
        self._rates = {}
        if self.topics is None or self.topics.routing.mask != "rate":
            return
        names = self.topics.scaled()
        total = torch.zeros(len(names), 2, dtype=torch.float64)
        for batches in micro:
            for name, batch in batches.items():
                if "topics" in batch:
                    held, owners = (
                        self.topics.held(batch["topics"]),
                        updated(self.bundle_config, self.forward.signals[name]),
                    )
                    total += torch.stack([held[b] * (b in owners) for b in names])
        if self.accelerator.num_processes > 1:
            total = total.to(self.args.device)
            dist.all_reduce(total)
        self._rates = {b: s / n for b, (s, n) in zip(names, total.tolist()) if n}

    def _scale_rates(self: Any) -> None:
        """Before the optimizer steps; `_restore_rates` after."""
        self._unscaled = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * self._rates.get(group.get(MARK), 1.0)

    def _restore_rates(self: Any) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._unscaled):
            group["lr"] = rate


def topics_of(given: Mapping[str, Any] | None, config: BundleConfig) -> RowTopics | None:
    """What `BundleTrainingConfig.topics` says, for one adapter's bundles."""
    return None if given is None else RowTopics(TopicRouting(**given), config)


def check_topics(topics: RowTopics | None, objectives: Sequence[Objective], sharded: bool) -> None:
    """After `setup`.

    Raises:
        ValueError: topics are given and no dataset has any; the trunk is sharded and a row may train nothing.
    """
    if topics is None:
        return
    having = [o for o in objectives if has_topics(o.rows)]
    if not having:
        raise ValueError(
            f"topics are set, but no objective's dataset has a column {COLUMN!r}; add it (a vector, topic -> weight, "
            "or names, for every row), or leave topics out."
        )
    for o in having if sharded else ():
        # Signal by signal: each may take a backward of its own, and it would be missing on some processes only.
        if alone := [s for s in o.signals if updated(topics.config, (s,)) <= set(topics.scaled())]:
            raise ValueError(
                f"objective {o.name!r}: {alone} update(s) topic bundles only; a process whose rows have no topic then "
                "has no backward, for which FSDP's others wait. Add a bundle without topic, or use no FSDP."
            )

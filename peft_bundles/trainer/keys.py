"""Keys at the end of training: every bundle's, from the rows of its signals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from ..keys import keys_from_batches, token_batches
from ..objectives.base import Objective
from ..objectives.batches import TAU
from ..objectives.topical import RowTopics


ROWS = 512  # of each objective, evenly spread
TOKENS = 8192  # of a bundle: about 20 s a bundle for a model of 135M on two CPU cores
LENGTH = 512  # tokens of a row
BATCH = 8


class KeysAtEnd(TrainerCallback):
    """Makes the keys when training ends."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        keys_of_run(trainer.model, trainer.objectives, trainer.topics, not trainer.args.disable_tqdm)


def keys_of_run(
    model: PeftModel, objectives: Mapping[str, Objective], topics: RowTopics | None = None, progress: bool = False
) -> None:
    """Make the keys of all bundles that the objectives' signals own.

    A bundle's rows are those of the objectives whose signals update it most. Of a topic's bundle they are the rows in
    which the topic has at least half of its weight.
    """
    adapter = model.active_adapter
    config: Any = model.peft_config[adapter]
    rows: dict[str, list[Any]] = {}
    for name, spec in (config.bundles or {}).items():
        weights = {o: max(spec.signals.get(s, 0.0) for s in objective.signals) for o, objective in objectives.items()}
        own = [objectives[o] for o, weight in weights.items() if weight > 0 and weight == max(weights.values())]
        topic_names = list(topics.routing.topics) if topics is not None and spec.role == "semantic" else []
        column = topic_names.index(spec.topic) if spec.topic in topic_names else None
        every = [ids[:LENGTH] for o in own for ids in map(token_ids, _spread(o, column)) if len(ids) > 1]
        rows[name] = every[:: math.ceil(sum(map(len, every)) / TOKENS) or 1]
    if rows := {name: of_bundle for name, of_bundle in rows.items() if of_bundle}:
        batches = {
            name: token_batches([{"input_ids": ids} for ids in of_bundle], None, LENGTH, BATCH, f"bundle {name!r}")
            for name, of_bundle in rows.items()
        }
        keys_from_batches(model, batches, adapter, progress=progress)


def token_ids(row: Mapping[str, Any]) -> list[int]:
    """The tokens of a prepared row of any objective: of several sequences the first; empty if it has none."""
    if "prompt_ids" in row:
        return [*row["prompt_ids"], *(row.get("chosen_ids") or row.get("completion_ids") or [])]
    row = row["sides"][0] if "sides" in row else row
    return next((list(row[column]) for column in ("input_ids", "ids", "anchor") if column in row), [])


def _spread(objective: Objective, column: int | None) -> list[Any]:
    """At most `ROWS` rows of an objective, evenly spread; with a topic's column, rows of that topic."""
    numbers = list(range(len(objective.rows)))
    if column is not None:
        numbers = [n for n in numbers if TAU in objective.rows[n] and objective.rows[n][TAU][column] >= 0.5]
    step = max(len(numbers) / ROWS, 1.0)
    return [objective.rows[numbers[int(n * step)]] for n in range(min(len(numbers), ROWS))]

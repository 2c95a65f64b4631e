"""The base class of objectives: rows in, one loss for each of the objective's signals out."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from .batches import ROW, TAU, Batch, Outputs, Share, has_topics
from .checks import short, whole_number
from .forward import Forward
from .seeding import draw
from .topical import COLUMN, RowTopics


class Objective(ABC):
    """One family of losses and the dataset that it learns from.

    A subclass writes `prepare`, `collate`, `items` and `losses`; one that needs forwards without gradient (a reference,
    say) writes `complete` too. `BundleTrainer` calls `setup` once, then for every step `batches`, a forward, `losses`.

    Args:
        name: name in logs, errors and the trainer's tables; the objectives of a run need different names.
        signals: names under which `losses` returns its losses; each needs a bundle that owns it.
        dataset: training rows, a `datasets.Dataset` or a list of dicts.
        eval_dataset: held-out rows of the same format, or None.

    Attributes:
        penalties: signals whose losses are penalties, kept small by a coefficient.
        topics: topic routing of the trainer; set before `setup`, None without topics.
        rows, eval_rows: the prepared rows, set by `setup`.

    Example:
        >>> from peft_bundles.objectives import LM
        >>> class Doubled(LM):
        ...     def losses(self, outputs, batch):
        ...         losses, metrics = super().losses(outputs, batch)
        ...         return {signal: 2 * loss for signal, loss in losses.items()}, metrics
        >>> Doubled([{"text": "one"}, {"text": "two"}]).signals
        ('lm',)
    """

    penalties: tuple[str, ...] = ()
    topics: RowTopics | None = None

    def __init__(self, name: str, signals: Sequence[str], dataset: Any, eval_dataset: Any = None) -> None:
        self.name, self.signals = name, tuple(signals)
        self._dataset, self._eval_dataset = dataset, eval_dataset
        self.tokenizer: Any = None
        self.rows: Any = None
        self.eval_rows: Any = None

    # ---- rows, once ----

    def setup(self, tokenizer: Any, model: nn.Module) -> None:
        """Tokenize the datasets.

        Args:
            tokenizer: of the model, with a padding token.
            model: the model with its bundles; objectives with a head read its shapes.

        Raises:
            ValueError: a dataset is empty, lacks a column, or has a row with nothing to learn from.
        """
        prefix = f"objective {self.name!r}"
        if not hasattr(tokenizer, "eos_token"):
            raise ValueError(f"{prefix}: the tokenizer is {short(tokenizer)}; give the model's tokenizer.")
        if (max_length := getattr(self, "max_length", None)) is not None:
            whole_number(prefix, "max_length", max_length)
        self.tokenizer = tokenizer
        self.rows = self._prepare_split(self._dataset, "train")
        self.eval_rows = None if self._eval_dataset is None else self._prepare_split(self._eval_dataset, "eval")
        if self.eval_rows is not None and has_topics(self.rows) != has_topics(self.eval_rows):
            having, lacking = ("train", "eval") if has_topics(self.rows) else ("eval", "train")
            raise ValueError(
                f"objective {self.name!r}: the {having} rows have a column {COLUMN!r} and the {lacking} rows have "
                "none; add it to both or to neither."
            )

    def _prepare_split(self, dataset: Any, split: str) -> Any:
        if isinstance(dataset, list):
            dataset = self._table(dataset, split)
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"objective {self.name!r}: the {split} dataset is a {type(dataset).__name__}; give a datasets.Dataset "
                "or a list of dicts (from a DatasetDict take one split, e.g. dataset['train']; from a stream, which "
                "has no length, take a part: Dataset.from_list(list(...)))."
            )
        if not len(dataset):
            raise ValueError(f"objective {self.name!r}: the {split} dataset is empty; give at least one row.")
        topics = None
        if COLUMN in dataset.column_names and self.topics is None:
            warnings.warn(
                f"objective {self.name!r}: the {split} rows have a column {COLUMN!r}, which is not used: the trainer "
                "has no topics. Set topics= in BundleTrainingConfig, or remove the column.",
                stacklevel=4,
            )
        elif COLUMN in dataset.column_names and self.topics is not None:
            topics = self.topics.vectors(self.name, dataset[COLUMN])
        rows = self.prepare(dataset, split)
        if not len(rows):
            raise ValueError(
                f"objective {self.name!r}: none of the {len(dataset)} {split} rows has a token to learn from after "
                "tokenizing and truncating; raise max_length or check the dataset."
            )
        if len(rows) < len(dataset):
            warnings.warn(
                f"objective {self.name!r}: {len(dataset) - len(rows)} of {len(dataset)} {split} rows are left out: "
                "tokenized and truncated, they have no token to learn from. Raise max_length to keep them.",
                stacklevel=4,
            )
        if topics is not None and isinstance(rows, Dataset):
            return rows.add_column(TAU, [topics[number] for number in rows[ROW]])
        return rows if topics is None else [{**row, TAU: topics[row[ROW]]} for row in rows]

    def _table(self, rows: list[Any], split: str) -> Dataset:
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"objective {self.name!r}: row {number} of the {split} dataset is a {type(row).__name__}; give a "
                    "dict of columns, such as {'text': ...} or {'prompt': ...}."
                )
        try:
            # Without "use_json" the arguments of one tool call would be added, as null, to those of all others.
            return Dataset.from_list(rows, on_mixed_types="use_json")
        except (TypeError, ValueError, OverflowError) as error:  # pyarrow's errors are subclasses of these
            raise ValueError(
                f"objective {self.name!r}: the {split} rows do not fit into one table ({error}); give a column "
                "the same kind of value in all rows, such as {} instead of [] next to dicts."
            ) from error

    # ---- batches, every step ----

    def steps(self, share: Share) -> int:
        """Optimizer steps in one pass over the training rows."""
        return -(-len(self.rows) // share.step_rows)

    def batches(self, forward: Forward, step: int, share: Share) -> list[Batch]:
        """The micro-batches of one step of this objective, ready for `losses`.

        Args:
            forward: the model, for what `complete` computes.
            step: counts the steps of this objective, from 0.
            share: the rows of this process.

        Returns:
            `share.accumulation` batches of `share.rows` rows.
        """
        start = step * share.step_rows
        return [
            self._batch(forward, start + (number * share.world + share.rank) * share.rows, share)
            for number in range(share.accumulation)
        ]

    def _batch(self, forward: Forward, start: int, share: Share) -> Batch:
        numbers = draw(len(self.rows), start, share.rows, share.seed, self.name)
        step, place = divmod(start, share.step_rows)
        draws = self.topics.draws(share.step_rows, self.name, step) if self.topics is not None else None
        return self._ready(forward, [self.rows[i] for i in numbers], None if draws is None else draws[place:])

    def _ready(self, forward: Forward, rows: list[Any], draws: Tensor | None) -> Batch:
        """The batch of some rows, ready for `losses`; `draws` has at least as many rows."""
        batch = self.on(forward, self.collate(rows))
        if has_topics(rows):
            batch = self.add_topics(batch, torch.tensor([row[TAU] for row in rows], dtype=torch.float64), draws)
        return self.complete(forward, batch)

    def add_topics(self, batch: Batch, tau: Tensor, draws: Tensor | None) -> Batch:
        """The batch with topics for each of its sequences.

        Args:
            batch: the first sequences of all rows, then the second ones of all rows, and so on.
            tau: (rows, K).
            draws: (rows or more, K), or None.
        """
        sides = len(batch["input_ids"]) // len(tau)
        batch = {**batch, "topics": tau.repeat(sides, 1)}
        return batch if draws is None else {**batch, "draws": draws[: len(tau)].repeat(sides, 1)}

    def eval_batches(self, forward: Forward, share: Share) -> Iterator[Batch]:
        """The held-out rows of this process, each once. A batch whose "weight" is 0 does not count."""
        for _, rows, weight in self.held_out(share, share.rows):
            yield {**self._ready(forward, rows, None), "weight": weight}

    def held_out(self, share: Share, size: int) -> Iterator[tuple[int, list[Any], float]]:
        """(start, rows, weight) of the held-out rows of this process, `size` rows at a time.

        All processes get the same number of parts, because a forward of a sharded model waits for all of them. A
        process without rows left gets one row of weight 0.
        """
        numbers = range(share.rank, len(self.eval_rows), share.world)
        for start in range(0, -(-len(self.eval_rows) // share.world), size):
            rows = [self.eval_rows[i] for i in numbers[start : start + size]]
            yield start, rows or [self.eval_rows[0]], float(bool(rows))

    def on(self, forward: Forward, batch: Batch) -> Batch:
        """The batch on the model's device."""
        return {k: v.to(forward.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    # ---- what a subclass writes ----

    @abstractmethod
    def prepare(self, dataset: Dataset, split: str) -> Any:
        """Tokenized rows of a dataset; each holds in `ROW` the number of the dataset's row that it comes from."""

    @abstractmethod
    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        """One batch of tokenized rows."""

    @abstractmethod
    def items(self, batch: Batch) -> Tensor:
        """The number of items (tokens, rows, pairs) that `losses` takes means over, a scalar."""

    @abstractmethod
    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One scalar loss for every signal, and scalars to log; all are means over `items`."""

    def complete(self, forward: Forward, batch: Batch) -> Batch:
        """Add what needs forward passes without gradients, such as the log-probabilities of the reference."""
        return batch

    def head(self) -> nn.Module | None:
        """Parameters of the objective itself, such as a value head."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs in addition to the weights: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what `state_dict` returned."""

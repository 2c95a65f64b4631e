"""What an objective is: rows in, one loss for each of its signals out."""

from __future__ import annotations

import functools
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from datasets import Dataset
from torch import Tensor, nn

from .topical import COLUMN, RowTopics


if TYPE_CHECKING:
    from .forward import Forward

# Tensors: "input_ids" and "attention_mask" (B, T), padded on the right; with topics, on the CPU, "topics" (B, K) and
# "draws" (`topical.py`).
Batch: TypeAlias = dict[str, Any]
ROW = "_row"  # of a prepared row: the number of the dataset's row that it comes from
TAU = "_tau"  # of a prepared row: its topic vector


@dataclass
class Outputs:
    """Of a forward, for one objective's rows: logits (B, T, V) and the final state (B, T, d) they are read from."""

    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Share:
    """The rows of a step that this process takes.

    Args:
        rows: rows of the objective in one micro-batch of one process.
        accumulation: micro-batches a step.
        rank, world: this process, of how many.
        seed: of the order of the rows.
    """

    rows: int
    accumulation: int = 1
    rank: int = 0
    world: int = 1
    seed: int = 0

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.rows * self.accumulation * self.world


@functools.lru_cache(maxsize=16)
def _order(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def seed_of(*key: int | str) -> int:
    """A seed from numbers and names, the same in every process and on every machine."""
    return zlib.crc32(repr(key).encode())


def draw(size: int, start: int, count: int, *key: int | str) -> list[int]:
    """Positions start .. start + count of an endless walk over `size` rows, each pass shuffled anew.

    A pure function: what step n sees needs no state, so a resumed run sees it again.
    """
    found: list[int] = []
    while len(found) < count:
        epoch, offset = divmod(start + len(found), size)
        found += _order(size, seed_of(*key, epoch))[offset : offset + count - len(found)].tolist()
    return found


class Objective(ABC):
    """One family of losses and the dataset it learns from.

    Attributes:
        name: in logs, errors and the forward table.
        signals: the names under which `losses` returns its losses.
        penalties: those of them that a small coefficient keeps small beside the others.
        topics: the trainer's, where it has topics: what it makes of a dataset's column `topics`.
    """

    penalties: tuple[str, ...] = ()
    topics: RowTopics | None = None

    def __init__(self, name: str, signals: Sequence[str], dataset: Any, eval_dataset: Any = None) -> None:
        self.name, self.signals = name, tuple(signals)
        self._given, self._eval_given = dataset, eval_dataset
        self.tokenizer: Any = None
        self.rows: Any = None
        self.eval_rows: Any = None

    def setup(self, tokenizer: Any, model: nn.Module) -> None:
        """Prepare the datasets. Raises ValueError for one that is empty or lacks columns."""
        self.tokenizer = tokenizer
        self.rows = self._prepared(self._given, "train")
        self.eval_rows = None if self._eval_given is None else self._prepared(self._eval_given, "eval")
        if self.eval_rows is not None and has_topics(self.rows) != has_topics(self.eval_rows):
            with_, without = ("train", "eval") if has_topics(self.rows) else ("eval", "train")
            raise ValueError(
                f"objective {self.name!r}: the {with_} rows have a column {COLUMN!r} and the {without} rows have none; "
                "give it to both."
            )

    def _prepared(self, dataset: Any, split: str) -> Any:
        if isinstance(dataset, list):
            dataset = self._table(dataset, split)
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"objective {self.name!r}: the {split} dataset is a {type(dataset).__name__}; give a datasets.Dataset "
                "or a list of rows (a stream has no length: take a part of it)."
            )
        if not len(dataset):
            raise ValueError(f"objective {self.name!r}: the {split} dataset is empty; give at least one row.")
        topics = None
        if self.topics is not None and COLUMN in dataset.column_names:
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
                "tokenized and truncated, they have no token to learn from.",
                stacklevel=4,
            )
        if topics is not None and isinstance(rows, Dataset):
            return rows.add_column(TAU, [topics[number] for number in rows[ROW]])
        return rows if topics is None else [{**row, TAU: topics[row[ROW]]} for row in rows]

    def _table(self, rows: list[Any], split: str) -> Dataset:
        me = f"objective {self.name!r}"
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"{me}: row {number} of the {split} dataset is a {type(row).__name__}; give a dict of columns, "
                    "such as {'text': ...} or {'prompt': ...}."
                )
        try:
            return Dataset.from_list(rows)
        except (TypeError, ValueError) as error:  # pyarrow's are of these
            raise ValueError(
                f"{me}: the {split} rows do not make one table ({error}); give a column one kind of value in all rows, "
                "such as {} and not [] beside dicts."
            ) from error

    def steps(self, share: Share) -> int:
        """Optimizer steps in one pass over the training rows."""
        return -(-len(self.rows) // share.step_rows)

    def batches(self, forward: Forward, step: int, share: Share) -> list[Batch]:
        """The micro-batches of the objective's own step `step`, complete for `losses`."""
        start = step * share.step_rows
        return [
            self._batch(forward, self.rows, start + (m * share.world + share.rank) * share.rows, share)
            for m in range(share.accumulation)
        ]

    def _batch(self, forward: Forward, rows: Any, start: int, share: Share) -> Batch:
        indices = draw(len(rows), start, share.rows, share.seed, self.name)
        step, place = divmod(start, share.step_rows)
        draws = self.topics.draws(share.step_rows, self.name, step) if self.topics is not None else None
        return self._made(forward, [rows[i] for i in indices], None if draws is None else draws[place:])

    def _made(self, forward: Forward, rows: list[Any], draws: Tensor | None) -> Batch:
        """The batch of some rows, complete; draws (>= rows, K) belong to them."""
        batch = self.on(forward, self.collate(rows))
        if has_topics(rows):
            batch |= self.topical(batch, torch.tensor([row[TAU] for row in rows], dtype=torch.float64), draws)
        return self.complete(forward, batch)

    def topical(self, batch: Batch, tau: Tensor, draws: Tensor | None) -> Batch:
        """Topics of a batch's sequences, of tau (rows, K): first sequences of all rows, then all second ones, ..."""
        sides = len(batch["input_ids"]) // len(tau)
        found = {"topics": tau.repeat(sides, 1)}
        return found if draws is None else found | {"draws": draws[: len(tau)].repeat(sides, 1)}

    def eval_batches(self, forward: Forward, share: Share) -> Iterator[Batch]:
        """The held-out rows, each once, those of this process; "weight" is 0 for a batch that does not count."""
        for _, rows, weight in self.held_out(share, share.rows):
            yield {**self._made(forward, rows, None), "weight": weight}

    def held_out(self, share: Share, size: int) -> Iterator[tuple[int, list[Any], float]]:
        """(start, rows, weight) of this process's held-out rows, `size` at a time, as many times on every process.

        A forward of a sharded model waits for all processes. One that has no rows left gets a row of weight 0.
        """
        mine = range(share.rank, len(self.eval_rows), share.world)
        for start in range(0, -(-len(self.eval_rows) // share.world), size):
            rows = [self.eval_rows[i] for i in mine[start : start + size]]
            yield start, rows or [self.eval_rows[0]], float(bool(rows))

    def on(self, forward: Forward, batch: Batch) -> Batch:
        """The batch on the model's device."""
        return {k: v.to(forward.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    @abstractmethod
    def prepare(self, dataset: Dataset, split: str) -> Any:
        """Tokenized rows from a dataset in one of TRL's formats, each with the number of its row there, `ROW`."""

    @abstractmethod
    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        """One batch of tokenized rows."""

    @abstractmethod
    def items(self, batch: Batch) -> Tensor:
        """How many items (tokens, pairs) the means of `losses` are over, a scalar."""

    def complete(self, forward: Forward, batch: Batch) -> Batch:
        """Add what needs forwards without gradient, such as the reference's log-probabilities."""
        return batch

    @abstractmethod
    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A scalar loss for every signal, and scalars to log; all means over `items`."""

    def head(self) -> nn.Module | None:
        """Parameters of the objective's own, such as a value head."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the weights: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up what `state_dict` gave."""


def has_topics(rows: Any) -> bool:
    """Whether prepared rows have topic vectors: all of a dataset have, or none."""
    return TAU in rows[0]


def numbered(dataset: Dataset) -> Dataset:
    """With the number of each row, `ROW`."""
    return dataset.add_column(ROW, list(range(len(dataset))))

"""What goes into a forward and comes out of it: a batch, its outputs, and the rows that a process takes.

Shapes everywhere in this package: B rows, T tokens, V the vocabulary, d the hidden size, K topics, r columns of a
subspace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import Dataset
from torch import Tensor


# Tensors: "input_ids" and "attention_mask" (B, T), padded on the right. Rows with topics add, on the CPU, "topics"
# (B, K) and, for the mask "stochastic", "draws" (B, K); see `topical.py`.
Batch: TypeAlias = dict[str, Any]
ROW = "_row"  # column of prepared rows: the number of the dataset's row that a prepared row comes from
TAU = "_tau"  # column of prepared rows: the row's topic vector, K numbers


@dataclass
class Outputs:
    """What a forward gives for the rows of one objective.

    Args:
        logits: (B, T, V).
        hidden: (B, T, d), the final states from which the LM head makes the logits.

    Example:
        >>> import torch
        >>> from peft_bundles.objectives import Outputs
        >>> Outputs(logits=torch.zeros(2, 5, 50), hidden=torch.zeros(2, 5, 32)).logits.shape
        torch.Size([2, 5, 50])
    """

    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Share:
    """The rows of one objective that this process takes in an optimizer step.

    Args:
        rows: rows in one micro-batch of one process.
        accumulation: micro-batches in a step.
        rank: number of this process, from 0.
        world: number of processes.
        seed: seed of the order of the rows.

    Example:
        >>> from peft_bundles.objectives import Share
        >>> Share(rows=4, accumulation=2, rank=1, world=3).step_rows
        24
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


def has_topics(rows: Any) -> bool:
    """Whether prepared rows have topic vectors. Either all rows of a dataset have one, or none has."""
    return TAU in rows[0]


def numbered(dataset: Dataset) -> Dataset:
    """The dataset with the number of each row in the column `ROW`."""
    return dataset.add_column(ROW, list(range(len(dataset))))

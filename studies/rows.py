"""Token rows with the positions that count, as the training loop and the measures read them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


Encoded = tuple[list[int], int]  # tokens, and the index of the first one that counts


@dataclass
class Rows:
    """Padded rows of tokens. N rows of T tokens, of which P positions count; stacked batches have a first axis more.

    Attributes:
        ids: (N, T), padded with 0.
        where: (P,) flat positions in (N, T) whose next token counts.
        target: (P,) that next token.
        row: (P,) the row of each position.
        weight: (P,) the weights of a row add up to 1; padding has weight 0.
    """

    ids: Tensor
    where: Tensor
    target: Tensor
    row: Tensor
    weight: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.ids, self.where, self.target, self.row, self.weight]

    def to(self, device: Any) -> Rows:
        return Rows(*(t.to(device) for t in self.tensors()))

    def at(self, step: int) -> Rows:
        """One batch of stacked ones (a view)."""
        return Rows(*(t[step] for t in self.tensors()))


def tokens_of(tokenizer: Any, example: Any) -> Encoded:
    """Encode a text (every token but the first counts), or a pair (prompt, answer) (the answer counts)."""
    prompt, answer = ("", example) if isinstance(example, str) else example
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return before + tokenizer(answer, add_special_tokens=False)["input_ids"], max(len(before), 1)


def rows_of(examples: Sequence[Encoded], length: int) -> Rows:
    """Pad examples to the longest, cut at `length` tokens. The tokens of a row share its weight of 1."""
    length = min(length, max(len(tokens) for tokens, _ in examples))
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    where, target, row, weight = [], [], [], []
    for n, (tokens, first) in enumerate(examples):
        tokens = tokens[:length]
        ids[n, : len(tokens)] = torch.tensor(tokens)
        counted = range(first, len(tokens))
        for t in counted:
            where.append(n * length + t - 1)
            target.append(tokens[t])
            row.append(n)
            weight.append(1 / len(counted))
    return Rows(ids, *map(torch.tensor, (where, target, row, weight)))


def stack(batches: Sequence[Rows]) -> Rows:
    """Batches of equal row count as one, padded to one shape: ids (S, N, T), the rest (S, P)."""
    length, places = max(b.ids.shape[1] for b in batches), max(len(b.where) for b in batches)
    padded = [widen(b, length, places).tensors() for b in batches]
    return Rows(*(torch.stack(parts) for parts in zip(*padded)))


def widen(rows: Rows, length: int, places: int) -> Rows:
    """The same rows (or stacked batches) padded to `length` tokens and `places` counted positions."""
    old = rows.ids.shape[-1]
    where = rows.where // old * length + rows.where % old  # flat positions move when rows get longer
    parts = [F.pad(t, (0, places - t.shape[-1])) for t in (where, rows.target, rows.row, rows.weight)]
    return Rows(F.pad(rows.ids, (0, length - old)), *parts)


def batches_of(*stacked: Rows) -> Iterator[tuple[Rows, ...]]:
    """The batches of stacked rows, side by side, one step after another."""
    for step in range(len(stacked[0].ids)):
        yield tuple(rows.at(step) for rows in stacked)


class Draws:
    """Draws examples of several kinds; each kind is shuffled anew whenever all of it was drawn.

    Args:
        pools: kind -> its examples.
        shuffles: kind -> the generator that shuffles it (several kinds may share one).
    """

    def __init__(self, pools: Mapping[str, list[Encoded]], shuffles: Mapping[str, random.Random]) -> None:
        self.pools, self.shuffles = pools, shuffles
        self.queues: dict[str, list[Encoded]] = {kind: [] for kind in pools}

    def draw(self, kind: str) -> Encoded:
        if not self.queues[kind]:
            self.queues[kind] = self.shuffles[kind].sample(self.pools[kind], len(self.pools[kind]))
        return self.queues[kind].pop()

    def batches(self, kinds: Sequence[str], steps: int, length: int) -> Rows:
        """`steps` stacked batches with a row of each of `kinds`, cut at `length` tokens."""
        return stack([rows_of([self.draw(kind) for kind in kinds], length) for _ in range(steps)])

"""Random numbers that depend on a key alone: the same in every process, and again after a resume."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A seed computed from numbers and names, the same in every process and on every machine."""
    return zlib.crc32(repr(key).encode())


def draw(size: int, start: int, count: int, *key: int | str) -> list[int]:
    """Row numbers at the positions start .. start + count - 1 of an endless walk over `size` rows.

    Every pass over the rows is shuffled again. The result depends on the arguments alone, so a resumed run gets the
    rows that the interrupted run would have got.
    """
    numbers: list[int] = []
    while len(numbers) < count:
        epoch, offset = divmod(start + len(numbers), size)
        numbers += _order(size, seed_of(*key, epoch))[offset : offset + count - len(numbers)].tolist()
    return numbers


@functools.lru_cache(maxsize=16)
def _order(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def seeded(device: torch.device, *key: int | str) -> Iterator[None]:
    """Random numbers inside depend on `key` alone; those after the block are as if none had been drawn inside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(*key))
        yield

"""Splitting text by document, and the check that no test item stands in training text."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias


Row: TypeAlias = dict[str, Any]
Split: TypeAlias = tuple[list[str], list[str]]  # pieces to train on, pieces held out
LONG = 30  # characters of a line that says something: "King." or ">>> import torch" may stand anywhere


def split_by_document(documents: Mapping[str, str], seed: int, characters: int = 400) -> Split:
    """Shuffled pieces of about so many characters: every fifth document is held out as a whole.

    A held-out piece that shares a line with a training piece is dropped: docstrings are copied from file to file.
    """
    train: list[str] = []
    held_out: list[str] = []
    for number, name in enumerate(sorted(documents)):
        (held_out if number % 5 == 4 else train).extend(pieces(documents[name], characters))
    seen = {line for piece in train for line in long_lines(piece)}
    held_out = [piece for piece in held_out if seen.isdisjoint(long_lines(piece))]
    for part in (train, held_out):
        random.Random(seed).shuffle(part)
    return train, held_out


def pieces(text: str, characters: int) -> Iterator[str]:
    """Consecutive whole lines of at least so many characters; a shorter rest is dropped."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece.strip()) >= characters:
            yield piece.strip()
            piece = ""


def long_lines(piece: str) -> list[str]:
    """The lines of at least `LONG` characters, stripped."""
    return [line.strip() for line in piece.splitlines() if len(line.strip()) >= LONG]


def texts_of(row: Row) -> str:
    """What of a row a model reads while training: its text, or its question, else its prompt."""
    return str(row.get("text") or row.get("question") or row.get("prompt") or "")


def leaked(train: Iterable[Row], test: Iterable[Row]) -> list[bool]:
    """For each test row, whether it stands in the training rows: the same text, or for running text a shared line.

    The comparison ignores case and runs of blanks, so a copy with other line breaks is still found.
    """
    whole: set[str] = set()
    lines: set[str] = set()
    for row in train:
        whole.add(_plain(texts_of(row)))
        lines.update(_plain(line) for line in long_lines(texts_of(row)))
    return [
        _plain(texts_of(row)) in whole or ("text" in row and any(_plain(x) in lines for x in long_lines(row["text"])))
        for row in test
    ]


def check_leaks(train: Iterable[Row], test: Sequence[Row]) -> None:
    """Raise ValueError if a test row stands in the training rows, as `leaked` says."""
    for row, found in zip(test, leaked(train, test)):
        if found:
            raise ValueError(f"a test row stands in the training rows: {texts_of(row)!r:.120}; split anew, or drop it.")


def _plain(text: str) -> str:
    return " ".join(text.lower().split())

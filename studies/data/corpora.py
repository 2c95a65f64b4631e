"""Plays, docstrings and a manual, in pieces and split by document; texts as rows of tokens."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch

from studies.data.split import Split, split_by_document
from studies.data.text import docstrings, plays


def load_texts(seed: int) -> dict[str, Split]:
    """Pieces of the three kinds, each as (train, held out).

    "plays" and "docs" lie far apart and have nothing to do with each other. Nobody trains on "manual": it is what must
    not be disturbed, so its train half calibrates the bundles and its held-out half measures the damage.
    """
    documents = {"plays": plays(), "docs": docstrings(), "manual": dict(topics)}
    return {kind: split_by_document(texts, seed) for kind, texts in documents.items()}


def encode(tokenizer: Any, texts: list[str], rows: int, length: int) -> torch.Tensor:
    """The first so many texts that fill a row, cut to its length: (rows, length) without padding."""
    encoded = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:length]
        encoded += [ids] if len(ids) == length else []
        if len(encoded) == rows:
            return torch.tensor(encoded)
    raise ValueError(f"only {len(encoded)} of {rows} texts have {length} tokens.")

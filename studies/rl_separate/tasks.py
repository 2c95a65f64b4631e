"""The three kinds of data of rl_separate.py: text, preference pairs, and prompts whose answers can be checked.

Everything is made or read here from fixed seeds, so that runs differ by their own seed alone. Held-out rows: other
documents, other sets of words, other sums.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

from datasets import load_dataset
from torch import Tensor

from studies.data.corpora import encode
from studies.data.split import split_by_document
from studies.data.text import docstrings, plays


SYSTEM = {"role": "system", "content": "Answer briefly."}
EXAMPLE = [{"role": "user", "content": "What is 40 - 3?"}, {"role": "assistant", "content": "37"}]
WORDS = (
    "ant apple bear boat cake chair cow dog door egg fish fox girl goat hat horse ice iron jam key kite lamp leaf moon "
    "nest oak oven pear pig queen rain ring sand ship sun tent tree urn van wolf yard zoo"
)

Rows = list[dict[str, Any]]


def text(tokenizer: Any, length: int, train: int, held_out: int) -> tuple[Rows, dict[str, Tensor], list[str]]:
    """Rows of plays to learn, held-out ids (N, length) of plays and of a manual that nobody learns (its held-out topics
    fill fewer rows), and calibration texts of a third kind."""
    kinds = {"plays": plays(), "manual": dict(topics), "docs": docstrings()}
    # A token has three to four characters: at five nearly every piece fills a row.
    texts = {kind: split_by_document(found, seed=0, characters=5 * length) for kind, found in kinds.items()}
    rows = [{"input_ids": ids} for ids in encode(tokenizer, texts["plays"][0], train, length).tolist()]
    held = {}
    for kind in ("plays", "manual"):
        long = [t for t in texts[kind][1] if len(tokenizer(t, add_special_tokens=False)["input_ids"]) >= length]
        held[kind] = encode(tokenizer, long, min(held_out, len(long)), length)
    return rows, held, texts["docs"][0]


def pairs(source: str | None, train: int, held_out: int) -> tuple[Rows, Rows]:
    """Preference pairs: TRL's columns from a folder or a Hub dataset, or made here: words in order, and out of order.

    A made pair differs in order alone, so neither length nor vocabulary tells the better answer.
    """
    if source is not None:
        rows = load_dataset(source, split=f"train[:{train + held_out}]").to_list()
        return rows[held_out:], rows[:held_out]
    rng, known = random.Random(0), WORDS.split()
    seen: set[frozenset[str]] = set()
    made: Rows = []
    while len(made) < train + held_out:
        words = rng.sample(known, 3)
        wrong = rng.sample(words, 3)
        if wrong == sorted(words) or frozenset(words) in seen:
            continue
        seen.add(frozenset(words))
        made.append(
            {
                "prompt": [SYSTEM, {"role": "user", "content": f"Sort by alphabet: {', '.join(words)}"}],
                "chosen": [{"role": "assistant", "content": ", ".join(sorted(words))}],
                "rejected": [{"role": "assistant", "content": ", ".join(wrong)}],
            }
        )
    return made[held_out:], made[:held_out]


def sums(train: int, held_out: int) -> tuple[Rows, Rows]:
    """Prompts with an `answer`: sums and differences of two numbers below 25, after one example.

    Without the example the base model answers in sentences: 16 samples of 16 had no bare number, so RL had nothing to
    reinforce.
    """
    found = [(f"{a} + {b}", a + b) for a, b in itertools.product(range(2, 25), repeat=2)]
    found += [(f"{a} - {b}", a - b) for a, b in itertools.product(range(2, 25), repeat=2) if a > b]
    random.Random(0).shuffle(found)
    rows = [
        {"prompt": [SYSTEM, *EXAMPLE, {"role": "user", "content": f"What is {question}?"}], "answer": answer}
        for question, answer in found
    ]
    return rows[held_out:][:train], rows[:held_out]


# ---- rewards, as TRL calls them ----


def bare(completions: Sequence[Any], **_: Any) -> list[float]:
    """1 if the completion is a number and nothing else."""
    return [float(bool(re.fullmatch(r"\s*-?\d+\s*", _text(c)))) for c in completions]


def near(completions: Sequence[Any], answer: Sequence[int], **_: Any) -> list[float]:
    """1 if the last number is the answer; up to a half if it is near; 0 if there is none."""
    rewards = []
    for completion, right in zip(completions, answer):
        numbers = re.findall(r"-?\d+", _text(completion))
        error = abs(int(numbers[-1]) - right) if numbers else right
        rewards.append(1.0 if error == 0 and numbers else 0.5 * max(0.0, 1 - error / max(right, 1)))
    return rewards


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


REWARDS, WEIGHTS = [bare, near], [0.3, 0.7]

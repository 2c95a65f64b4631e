"""T_logic: questions with one answer that can be checked: made by reasoning-gym, and GSM8K."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .fetch import hub_rows
from .split import Row


# Family of reasoning-gym 0.1.25 -> its options, easy enough that a small model can learn some of it from 1500 examples.
FAMILIES: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2},
    "family_relationships": {"max_family_size": 6},
    "number_sequence": {"min_terms": 5, "max_terms": 8, "max_complexity": 2},
    "products": {"min_digits": 1, "max_digits": 2},
    "simple_equations": {"min_terms": 2, "max_terms": 2, "max_value": 20},
}
BACKWARDS = r".*-in-law|niece|nephew"  # answers of family_relationships 0.1.25 that name the other person's part
REPHRASED = {  # question of reasoning-gym -> the same, shorter or (a bare sequence) in words
    "number_sequence": (r"^(.*)$", r"Which number continues the sequence? \1"),
    "gsm_symbolic": (r"\s*Give (?:the result|your answer)[^.]*\.(?: Do not include units\.)?$", ""),
}
TEST_OFFSET = 10**6  # item i of seed s is item 0 of seed s + i: test seeds lie further away than any list is long


def questions(
    family: str, options: dict[str, Any], rows: int, seed: int, keep: Callable[[str, str], bool], seen: set[str]
) -> list[tuple[str, str]]:
    """The first so many (question, answer) of a family of reasoning-gym that pass `keep`; none twice, none of `seen`.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: the family has not so many different questions with these options.
    """
    try:
        from reasoning_gym import create_dataset  # slow to import
    except ImportError as error:
        raise ImportError("T_logic is made by a package: pip install reasoning-gym==0.1.25") from error
    found = []
    for item in create_dataset(family, size=20 * rows, seed=seed, **options):
        if re.fullmatch(BACKWARDS, item["answer"]):
            continue
        question = re.sub(*REPHRASED.get(family, ("$^", "")), item["question"].strip())
        if question not in seen and keep(question, item["answer"]):
            seen.add(question)
            found.append((question, item["answer"]))
            if len(found) == rows:
                return found
    raise ValueError(f"only {len(found)} of {rows} questions of {family}; ask for fewer, or widen its options.")


def logic(family: str, train: int, test: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Training and test rows {"question", "answer"} of one family of `FAMILIES`; they share no question."""
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}.")
    seen: set[str] = set()
    return tuple(  # type: ignore[return-value]
        [
            {"question": q, "answer": a}
            for q, a in (questions(family, FAMILIES[family], rows, s, lambda *_: True, seen) if rows else ())
        ]
        for rows, s in ((train, seed), (test, seed + TEST_OFFSET))
    )


def gsm8k(folder: str | Path | None, split: str) -> list[Row]:
    """GSM8K rows {"question", "answer", "solution"}; the answer is the number after "####".

    Args:
        folder: with train.jsonl or test.jsonl (.gz or not) as OpenAI published them; None reads `openai/gsm8k`.
        split: "train" (7,473 rows) or "test" (1,319).

    Raises:
        RuntimeError: the Hub's could not be read. ValueError: the folder has not got the file.
    """
    if folder is None:
        given: Any = hub_rows("openai/gsm8k", "main", split, ("question", "answer"))
    else:
        given = [json.loads(line) for line in _lines(Path(folder), split)]
    return [
        {"question": r["question"], "answer": r["answer"].rpartition("####")[2].strip(), "solution": r["answer"]}
        for r in given
    ]


def gsm8k_solutions(folder: str | Path) -> list[Row]:
    """The published solutions of four models to the test questions, each marked right or wrong.

    Rows {"question", "answer": the solution, "correct", "model"}. They are judgements of real models, and of test
    questions: a model that learns from them has seen GSM8K's test set.
    """
    rows = []
    for line in _lines(Path(folder), "example_model_solutions"):
        item = json.loads(line)
        for name, value in item.items():
            if isinstance(value, dict) and {"solution", "is_correct"} <= value.keys():
                correct = bool(value["is_correct"])
                rows.append(
                    {"question": item["question"], "answer": value["solution"], "correct": correct, "model": name}
                )
    if not rows:
        raise ValueError(f"{folder}: example_model_solutions has no marked solutions; is it OpenAI's file?")
    return rows


def _lines(folder: Path, name: str) -> list[str]:
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.is_file():
            content = path.read_bytes()
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
            return [line for line in text.split("\n") if line.strip()]
    raise ValueError(f"{folder} has no {name}.jsonl or {name}.jsonl.gz; give the folder of GSM8K's files.")

"""Comparing an answer with its reference: F1 of words, and numbers as numbers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction


NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def last_number(text: str) -> Fraction | None:
    """The first number after the last "####", else the last number of the text, exactly; None if it has none.

    Thousands may have commas ("1,200"), and a fraction is a number ("3/4"): GSM8K's answers are written so.
    """
    marked = "####" in text
    found = NUMBER.findall(text.rpartition("####")[2] if marked else text)
    if not found:
        return None
    try:
        return Fraction(found[0 if marked else -1].replace("$", "").replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def same_answer(answer: str, reference: str) -> bool:
    """Equal as numbers where the reference is a number or ends in "#### number", else equal after `normalised`.

    A wordy answer ("12 + 7 = 19.") to a numeric reference counts by its last number.
    """
    if "####" in reference or NUMBER.fullmatch(reference.strip()):
        wanted = last_number(reference)
        return wanted is not None and last_number(answer) == wanted
    return normalised(answer) == normalised(reference)


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and runs of blanks (SQuAD's evaluation, Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """Mean F1 of the words of prediction and reference, as SQuAD counts it (of several references, the best)."""
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references; give one each, at least 1.")
    total = 0.0
    for prediction, reference in zip(predictions, references):
        choices = [reference] if isinstance(reference, str) else reference
        total += max(_word_f1(prediction, choice) for choice in choices)
    return total / len(predictions)


def _word_f1(prediction: str, reference: str) -> float:
    ours, theirs = Counter(normalised(prediction).split()), Counter(normalised(reference).split())
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((ours & theirs).values())
    return 2 * common / (sum(ours.values()) + sum(theirs.values()))

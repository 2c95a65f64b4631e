"""Claims: pieces of a page's text with a format field for each number, and the numbers computed from records.

("LoRA costs {:.2f} of", 2.637) says that the page has "LoRA costs 2.64 of", once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from string import Formatter
from typing import Any


Claim = tuple[Any, ...]  # (text with format fields, number, ...)
NUMBER = re.compile(r"(?<![\w.,])\d+\.\d+(?:e-\d+)?(?!\w|\.\d)")
IN_TABLE = re.compile(r"(?<![\w.])\d(?:[\d.,]*\d)?(?:e-\d+)?")


def one_line(text: str) -> str:
    """The text with every run of spaces and line ends as one space, so that claims may span lines."""
    return re.sub(r"\s+", " ", text)


def filled(claim: Claim) -> tuple[str, list[tuple[int, int]]]:
    """The text of a claim, and where in it the numbers are."""
    text, spans, numbers = "", [], list(claim[1:])
    for literal, field, spec, _ in Formatter().parse(claim[0]):
        text += literal
        if field is not None:
            number = format(numbers.pop(0), spec or "")
            spans.append((len(text), len(text) + len(number)))
            text += number
    assert spans and not numbers, f"as many numbers as fields, please: {claim}"
    return text, spans


def missing(text: str, claims: Iterable[Claim]) -> list[str]:
    """Claims that do not stand in the text exactly once."""
    return [found for found, _ in map(filled, claims) if text.count(found) != 1]


def uncovered(text: str, claims: Iterable[Claim], settings: Iterable[str] = ()) -> list[str]:
    """Decimal numbers, and all numbers in tables, that no claim covers, with the text around them.

    Code, pictures, targets of links and `settings` are left out, and whole numbers in a table's head and first column.
    """
    covered: set[int] = set()
    for claim in claims:
        found, spans = filled(claim)
        start = text.find(found)
        covered |= {n for low, high in spans for n in range(start + low, start + high) if start >= 0}
    for pattern in (r"```.*?```", r"`[^`]*`", r"!\[[^\]]*\]", r"\]\([^)]*\)", *map(re.escape, settings)):
        text = re.sub(pattern, lambda match: re.sub(r"[^|]", "#", match[0]), text)
    places = {match.start(): match.end() for match in NUMBER.finditer(text)}
    for row in re.finditer(r"\|(?: [^|]* \|){2,}", text):
        if text.startswith(" | ---", row.end()):
            continue  # the head
        second = text.index("|", row.start() + 1)
        places |= {match.start(): match.end() for match in IN_TABLE.finditer(text, second, row.end())}
    return [text[max(0, low - 30) : high + 15] for low, high in sorted(places.items()) if low not in covered]

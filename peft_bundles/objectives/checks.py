"""Checks of the rows that a user gives. Every error names the objective, the row, the column and what to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset


MESSAGES = "[{'role': 'user', 'content': '...'}, ...]"


def short(value: object) -> str:
    """A value in an error: its first 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def whole_number(prefix: str, field: str, value: object, *, least: int = 1) -> None:
    """Check an argument that is a whole number.

    Raises:
        ValueError: it is something else, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{prefix}: {field}={value!r} must be a whole number of at least {least}.")


def require_words(
    objective: str, dataset: Dataset, tokenizer: Any, columns: Sequence[str], *, ended: bool = False
) -> None:
    """Check that some columns hold text, or conversations, and the same of the two in all rows.

    Args:
        objective: name of the objective.
        dataset: the rows.
        tokenizer: has a chat template if there are conversations.
        columns: the columns to look at.
        ended: the tokenizer needs an end token if there is text, because TRL puts it after every text.

    Raises:
        ValueError: a value is neither text nor a list of messages, the two are mixed, or the tokenizer cannot take it.
    """
    first: tuple[str, str] | None = None
    options = [c for c in ("tools", "chat_template_kwargs") if c in dataset.column_names]
    for number, row in enumerate(dataset.select_columns([*columns, *options])):
        where = f"objective {objective!r}: row {number}"
        for column in columns:
            kind = _kind(where, column, row[column])
            first = first or (kind, column)
            if kind != first[0]:
                raise ValueError(
                    f"{where}: {column!r} holds {kind} where {first[1]!r} of row 0 holds {first[0]}; write all as text "
                    f"or all as messages, {MESSAGES}."
                )
        if not isinstance(row.get("tools"), (list, str, type(None))):
            raise ValueError(f"{where}: tools={short(row['tools'])}; give a list of JSON schemas (or it as JSON).")
        if not isinstance(row.get("chat_template_kwargs", {}), Mapping):
            raise ValueError(f"{where}: chat_template_kwargs={short(row['chat_template_kwargs'])}; give a dict.")
    if first is None:
        return
    if first[0] == "messages" and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"objective {objective!r}: {first[1]!r} holds conversations, but the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give text."
        )
    if first[0] == "text" and ended and tokenizer.eos_token is None:
        raise ValueError(
            f"objective {objective!r}: the tokenizer has no end token, which is put after every text; set "
            "tokenizer.eos_token, e.g. tokenizer.eos_token = '</s>'."
        )


def _kind(where: str, column: str, value: object) -> str:
    if column == "messages" and not isinstance(value, list):
        raise ValueError(f"{where}: {column!r} is {short(value)}; give a list of messages, {MESSAGES}.")
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {column!r} is {short(value)}; give text, or a list of messages {MESSAGES}.")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"{where}: {column!r} has the message {short(message)}; each message needs a role and a content, "
                f"{MESSAGES}."
            )
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise ValueError(
                f"{where}: {column!r} has a message with content={short(message.get('content'))}; give text."
            )
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(f"{where}: {column!r} has a message without content ({short(message)}); give text.")
    return "messages"


def require_columns(objective: str, dataset: Dataset, *formats: Sequence[str]) -> Sequence[str]:
    """The first of several formats (tuples of column names) that a dataset has.

    Raises:
        ValueError: the dataset has none of them, or a row of these columns holds None.
    """
    columns = next((f for f in formats if set(f) <= set(dataset.column_names)), None)
    if columns is None:
        expected = " or ".join("+".join(f) for f in formats)
        raise ValueError(
            f"objective {objective!r} needs the columns {expected}, but the dataset has {dataset.column_names}; rename "
            "them with dataset.rename_column."
        )
    for column in columns:
        for row, value in enumerate(dataset[column]):
            if value is None:
                raise ValueError(f"objective {objective!r}: row {row} has no {column!r} (None); drop or fill that row.")
    return columns


def require_text(objective: str, dataset: Dataset, *columns: str) -> None:
    """Check that every text or conversation of some columns has words.

    Raises:
        ValueError: a text is empty, or a message of a conversation is.
    """
    for column in columns:
        for row, value in enumerate(dataset[column]):
            messages = value if isinstance(value, list) else [{"content": value}]
            parts = [m.get("content") if isinstance(m, Mapping) else None for m in messages]
            if not all(isinstance(p, str) and p.strip() for p in parts) or not parts:
                raise ValueError(f"objective {objective!r}: row {row} has an empty {column!r} ({value!r}); drop it.")


def binary_labels(objective: str, values: list[object], column: str, both: bool = True) -> list[float]:
    """Labels as 0.0 or 1.0, from bools or numbers.

    Raises:
        ValueError: a label is neither 0 nor 1; or, with `both`, all labels are the same.
    """
    for row, value in enumerate(values):
        if value not in (0, 1):  # True and 1.0 are equal to 1
            raise ValueError(
                f"objective {objective!r}: row {row} has {column}={value!r}; give true or false, 1 or 0 (compare a "
                "score with a threshold first)."
            )
    if both and len(set(values)) == 1:
        raise ValueError(
            f"objective {objective!r}: {column} is {values[0]!r} in all {len(values)} rows, so there is nothing to "
            "tell apart; add rows of the other class."
        )
    return [float(bool(value)) for value in values]

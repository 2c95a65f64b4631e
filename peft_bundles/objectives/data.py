"""Rows of datasets: checked, and tokenized by TRL's own preparation.

`SFTTrainer._prepare_dataset` and `DPOTrainer._prepare_dataset` read only the tokenizer and a few settings of their
trainer, so they run here on a stand-in that has just these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any, cast

from datasets import Dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.data_utils import is_conversational


# ---- tokenizing ----


def text_rows(dataset: Dataset, tokenizer: Any, max_length: int | None, text_field: str = "text") -> Dataset:
    """Language-modelling or prompt-completion rows -> `input_ids`, and `completion_mask` where there is a prompt."""
    stand_in = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    args = _config(SFTConfig, max_length=max_length, dataset_text_field=text_field)
    return _quietly(SFTTrainer._prepare_dataset, stand_in, dataset, tokenizer, args, False, None, "train")


def preference_rows(dataset: Dataset, tokenizer: Any, max_length: int | None) -> Dataset:
    """Preference rows, prompt given or implied -> `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    args = _config(DPOConfig, max_length=max_length)
    return _quietly(
        DPOTrainer._prepare_dataset, SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, args, "train"
    )


def prompt_ids(prompt: Any, tokenizer: Any) -> list[int]:
    """Token ids of a prompt: a string, or a conversation followed by the template's generation prompt."""
    if is_conversational({"prompt": prompt}):
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer(text=prompt)["input_ids"]


def joined_ids(objective: str, row: int, pieces: list[str], column: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of several pieces of text, each on its own line, and for every token the number of its piece.

    Raises:
        ValueError: there are fewer than two pieces, or a piece has no text.
    """
    if len(pieces) < 2:
        raise ValueError(f"objective {objective!r}: row {row} has {len(pieces)} {column}; give at least two.")
    ids: list[int] = []
    piece_of: list[int] = []
    for number, piece in enumerate(pieces):
        if not isinstance(piece, str) or not piece.strip():
            raise ValueError(f"objective {objective!r}: row {row}: {column}[{number}]={piece!r} is empty; drop it.")
        new = tokenizer(text=piece.rstrip("\n") + "\n", add_special_tokens=number == 0)["input_ids"]
        ids, piece_of = ids + new, piece_of + [number] * len(new)
    return ids, piece_of


def _config(cls: Any, **values: Any) -> SimpleNamespace:
    """A TRL config as plain data: a real config would reset accelerate's state in a distributed run."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
    return SimpleNamespace(**{**defaults, **values})


def _quietly(prepare: Any, *args: Any) -> Dataset:
    enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return cast(Dataset, prepare(*args))
    finally:
        if enabled:
            enable_progress_bar()


# ---- checks ----


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
            parts = [m.get("content") for m in value] if isinstance(value, list) else [value]
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

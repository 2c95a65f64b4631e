"""Rows of datasets, tokenized by TRL's own preparation.

`SFTTrainer._prepare_dataset` and `DPOTrainer._prepare_dataset` read only the tokenizer and a few settings of their
trainer, so they run here on a stand-in that has just these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any, cast

from datasets import Dataset
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.data_utils import is_conversational

from .checks import require_words


def text_rows(
    objective: str, dataset: Dataset, tokenizer: Any, max_length: int | None, text_field: str = "text"
) -> Dataset:
    """Language-modelling or prompt-completion rows -> `input_ids`, and `completion_mask` where there is a prompt.

    Raises:
        ValueError: as `require_words`; or the rows are text and the tokenizer has no end token.
    """
    columns = [c for c in (text_field, "messages", "prompt", "completion") if c in dataset.column_names]
    require_words(objective, dataset, tokenizer, columns, ended=True)
    stand_in = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    args = _config(SFTConfig, max_length=max_length, dataset_text_field=text_field)
    return _quietly(SFTTrainer._prepare_dataset, stand_in, dataset, tokenizer, args, False, None, "train")


def preference_rows(objective: str, dataset: Dataset, tokenizer: Any, max_length: int | None) -> Dataset:
    """Preference rows, prompt given or implied -> `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Raises:
        ValueError: as `text_rows`.
    """
    columns = [c for c in ("prompt", "chosen", "rejected") if c in dataset.column_names]
    require_words(objective, dataset, tokenizer, columns, ended=True)
    args = _config(DPOConfig, max_length=max_length)
    return _quietly(
        DPOTrainer._prepare_dataset, SimpleNamespace(_tokenizer=tokenizer), dataset, tokenizer, args, "train"
    )


def prompt_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Token ids of a row's `prompt`: text, or a conversation followed by the template's generation prompt.

    A row's `tools` and `chat_template_kwargs` go to the chat template, as in TRL.
    """
    if not is_conversational({"prompt": row["prompt"]}):
        return tokenizer(text=row["prompt"])["input_ids"]
    tools = row.get("tools")
    options = {"tools": json.loads(tools) if isinstance(tools, str) else tools, **row.get("chat_template_kwargs", {})}
    return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True, **options)[
        "input_ids"
    ]


def joined_ids(objective: str, row: int, pieces: list[str], column: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of several pieces of text, each on its own line, and for every token the number of its piece.

    Raises:
        ValueError: there are fewer than two pieces, or a piece is no text or empty.
    """
    if not isinstance(pieces, list):
        raise ValueError(f"objective {objective!r}: row {row} has {column}={pieces!r}; give a list of strings.")
    if len(pieces) < 2:
        raise ValueError(f"objective {objective!r}: row {row} has {len(pieces)} {column}; give at least two.")
    ids: list[int] = []
    piece_of: list[int] = []
    for number, piece in enumerate(pieces):
        if not isinstance(piece, str):
            raise ValueError(f"objective {objective!r}: row {row}: {column}[{number}]={piece!r}; give a string.")
        if not piece.strip():
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

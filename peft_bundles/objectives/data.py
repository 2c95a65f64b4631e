"""Rows from TRL's dataset formats, tokenized by TRL's own preparation where that has been stable across releases.

`SFTTrainer._prepare_dataset` and `DPOTrainer._prepare_dataset` read nothing of their trainer but the tokenizer and a
few settings, so they run on a stand-in with just these.
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


def require(objective: str, dataset: Dataset, *formats: Sequence[str]) -> Sequence[str]:
    """The first of the formats (column names) that a dataset has.

    Raises:
        ValueError: it has none; a row of the format's columns holds None.
    """
    found = next((f for f in formats if set(f) <= set(dataset.column_names)), None)
    if found is None:
        wanted = " or ".join("+".join(f) for f in formats)
        raise ValueError(
            f"objective {objective!r} needs the columns {wanted}, but the dataset has {dataset.column_names}; rename "
            "them with dataset.rename_column."
        )
    for column in found:
        for row, value in enumerate(dataset[column]):
            if value is None:
                raise ValueError(f"objective {objective!r}: row {row} has no {column!r} (None); drop or fill that row.")
    return found


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
    """Token ids of a prompt: a string, or a conversation with the template's generation prompt after it."""
    if is_conversational({"prompt": prompt}):
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer(text=prompt)["input_ids"]


def _config(cls: Any, **given: Any) -> SimpleNamespace:
    """A TRL config's defaults as plain data: a real one would reset accelerate's state in a distributed run."""
    values = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
    return SimpleNamespace(**{**values, **given})


def _quietly(prepare: Any, *args: Any) -> Dataset:
    enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return cast(Dataset, prepare(*args))
    finally:
        if enabled:
            enable_progress_bar()

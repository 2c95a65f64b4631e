"""Contrast: texts that mean the same, or come from one document, get similar embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.utils import pad

from .base import Objective
from .batches import ROW, Batch, Outputs, Share
from .checks import require_columns, require_text, short
from .forward import Forward
from .heads import SubspaceHead, subspace
from .tokens import pooled


class Contrastive(Objective):
    """Symmetric InfoNCE: mean_i -log softmax_j(cos(a_i, p_j) / temperature)_i, and the same with a and p exchanged.

    The embeddings a and p are means over tokens of the coordinates in the owners' subspace (`heads.py`), through a
    linear map (van den Oord et al. 2018, arXiv 1807.03748, eq. 4; in-batch negatives both ways as Radford et al. 2021,
    arXiv 2103.00020). Rows of the same document are not each other's negatives.

    Failure mode: the negatives are those of a micro-batch, so few rows make the task easy (`chance` is logged next to
    `accuracy`), and gradient accumulation adds no negatives. The embedding learns whatever tells the rows of a batch
    apart: among documents of several topics that is the topic, not the meaning. Two rows that mean the same but do not
    share a `document` are pushed apart.

    Args:
        dataset: rows `anchor` and `positive` (texts), and `document` (any value) where several rows come from one
            document. `document_pairs` makes such rows.
        signal: name of the signal and of the objective.
        temperature: temperature of the softmax, > 0.
        size: length of an embedding.
        eval_dataset: held-out rows of the same format. A last batch of one row does not count.
        max_length: tokens kept of a text. None keeps all.

    Raises:
        ValueError: `temperature` or `size` is out of range.

    Example:
        >>> from peft_bundles.objectives import Contrastive
        >>> rows = [{"anchor": "It rains.", "positive": "Rain is falling."},
        ...         {"anchor": "The cat sleeps.", "positive": "A cat is asleep."}]
        >>> Contrastive(rows).signals
        ('contrastive',)
    """

    def __init__(
        self,
        dataset: Any,
        *,
        signal: str = "contrastive",
        temperature: float = 0.05,
        size: int = 128,
        eval_dataset: Any = None,
        max_length: int | None = 256,
    ) -> None:
        super().__init__(signal, (signal,), dataset, eval_dataset)
        if not temperature > 0 or size < 1:
            raise ValueError(
                f"objective {signal!r}: temperature={temperature!r} must be > 0, and size={size!r} at least 1."
            )
        self.temperature, self.size, self.max_length = temperature, size, max_length
        self.projector: SubspaceHead | None = None

    def setup(self, tokenizer: Any, model: nn.Module) -> None:
        super().setup(tokenizer, model)
        self.projector = SubspaceHead(subspace(model, self.signals[0]), self.size, self.name, bias=False)

    def head(self) -> nn.Module | None:
        return self.projector

    def prepare(self, dataset: Dataset, split: str) -> list[dict[str, Any]]:
        require_columns(self.name, dataset, ("anchor", "positive"))
        require_text(self.name, dataset, "anchor", "positive")
        documents = dataset["document"] if "document" in dataset.column_names else range(len(dataset))
        documents = [value if isinstance(value, (str, int)) else repr(value) for value in documents]
        number_of = {value: i for i, value in enumerate(dict.fromkeys(documents))}
        if len(number_of) < 2:
            raise ValueError(
                f"objective {self.name!r}: all {len(dataset)} {split} rows are of one document, so there is nothing to "
                "tell apart; add rows of another document."
            )
        rows = []
        for i, (a, p, document) in enumerate(zip(dataset["anchor"], dataset["positive"], documents)):
            for column, text in (("anchor", a), ("positive", p)):
                if not isinstance(text, str):
                    raise ValueError(f"objective {self.name!r}: row {i} has {column}={short(text)}; give a string.")
            if a == p:
                raise ValueError(f"objective {self.name!r}: row {i}: anchor and positive are the same text; drop it.")
            ids = [self.tokenizer(text=text)["input_ids"][: self.max_length] for text in (a, p)]
            rows.append({"anchor": ids[0], "positive": ids[1], "document": number_of[document], ROW: i})
        return rows

    def batches(self, forward: Forward, step: int, share: Share) -> list[Batch]:
        batches = super().batches(forward, step, share)
        for batch in batches:
            if len(set(batch["document"].tolist())) < 2:
                raise ValueError(
                    f"objective {self.name!r}: the {share.rows} row(s) of a micro-batch of step {step} are all of one "
                    f"document, so none has a negative; set rows={{{self.name!r}: 8}} or more in the arguments."
                )
        return batches

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        """The anchors of all rows, then the positives of all rows."""
        ids = [torch.tensor(row[side]) for side in ("anchor", "positive") for row in rows]
        return {
            "input_ids": pad(ids, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids]),
            "document": torch.tensor([row["document"] for row in rows]),
        }

    def items(self, batch: Batch) -> Tensor:
        """The number of rows that have a negative."""
        return self._negatives(batch).any(1).sum().float()

    def _negatives(self, batch: Batch) -> Tensor:
        return batch["document"][:, None] != batch["document"][None, :]

    def embed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (B, size) of length 1 of final states (B, T, d) with their mask (B, T)."""
        assert self.projector is not None, "setup() makes the head"
        mean = pooled(self.projector.coordinates(hidden), mask)
        return nn.functional.normalize(self.projector.map(mean.to(self.projector.map.weight.dtype)), dim=-1)

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.compare(self.embed(outputs.hidden, batch["attention_mask"]), batch)

    def compare(self, embeddings: Tensor, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and metrics from embeddings (2 B, size), anchors first."""
        anchors, positives = embeddings.chunk(2)
        negatives = self._negatives(batch)
        own = torch.eye(len(anchors), dtype=torch.bool, device=negatives.device)
        scores = (anchors @ positives.T / self.temperature).masked_fill(~(negatives | own), -torch.inf)
        counted = negatives.any(1).to(scores.dtype)
        count = counted.sum().clamp_min(1)
        of_anchors, of_positives = (-s.log_softmax(-1).diagonal() for s in (scores, scores.T))
        hits = (scores.argmax(1) == torch.arange(len(scores), device=scores.device)).to(scores.dtype)
        metrics = {
            "accuracy": (hits * counted).sum() / count,
            "chance": (counted / (1 + negatives.sum(1))).sum() / count,
        }
        return {self.signals[0]: ((of_anchors + of_positives) / 2 * counted).sum() / count}, metrics


def document_pairs(documents: Mapping[str, list[str]]) -> list[dict[str, str]]:
    """Rows for `Contrastive` from documents: pieces 0 and 1 of a document are anchor and positive, then 2 and 3, ...

    Args:
        documents: name -> the pieces of the document, at least two. The last of an odd number is not used.

    Returns:
        Rows of `anchor`, `positive` and `document`.

    Raises:
        ValueError: a document has fewer than two pieces.

    Example:
        >>> from peft_bundles.objectives import document_pairs
        >>> document_pairs({"poem": ["Roses are red,", "violets are blue."]})
        [{'anchor': 'Roses are red,', 'positive': 'violets are blue.', 'document': 'poem'}]
    """
    rows = []
    for name, pieces in documents.items():
        if len(pieces) < 2:
            raise ValueError(f"document {name!r} has {len(pieces)} piece(s); give at least two, or leave it out.")
        rows += [{"anchor": a, "positive": b, "document": name} for a, b in zip(pieces[::2], pieces[1::2])]
    return rows

"""Preferences: DPO, IPO, ORPO and KTO. The reference is the model with its bundles off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import pad

from .base import Objective
from .batches import ROW, Batch, Outputs, Share, numbered
from .checks import binary_labels, require_columns
from .data import preference_rows, text_rows
from .forward import Forward
from .preference_losses import dpo_loss, ipo_loss, kto_loss, kto_reference_point, orpo_loss
from .tokens import masked_sum, token_logprobs


OTHER = "_other"  # completion of another row
LOSSES = ("sigmoid", "ipo", "orpo", "kto")
PAIRED, UNPAIRED = ("chosen", "rejected"), ("prompt", "completion", "label")


class Preference(Objective):
    """Losses on pairs (chosen, rejected), or with "kto" on single completions with a label.

    A row is a pair (with "kto" possibly a single completion). A batch holds the chosen sequences of all rows, then the
    rejected ones.

    Failure mode: only the margin is trained, so both sides may become less likely (`dpop` counteracts it); pairs that
    differ in length or style teach length or style. At the learning rate of the other signals it moves the model far
    and costs text loss: give its bundles a lower rate (`lr_multipliers` of the trainer).

    Args:
        dataset: rows in TRL's preference format, with the prompt given or implied, standard or conversational; for
            "kto" also its unpaired format (`prompt`, `completion`, `label`).
        loss: "sigmoid" (DPO), "ipo", "orpo" (no reference) or "kto"; formulas in `preference_losses.py`.
        beta: strength of the reference, > 0; for "orpo" the strength of the odds ratio.
        dpop: weight of DPO-Positive's term, for "sigmoid" only.
        desirable_weight: weight of wanted completions, for "kto" only.
        undesirable_weight: weight of unwanted completions, for "kto" only.
        signal: name of the signal and of the objective.
        eval_dataset: held-out rows of the same format.
        max_length: tokens kept of a sequence. None keeps all.

    Raises:
        ValueError: the loss is unknown, `beta` is not positive, or `dpop` is given with another loss than "sigmoid".

    Example:
        >>> from peft_bundles.objectives import Preference
        >>> rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "5"},
        ...         {"prompt": "3+3=", "chosen": "6", "rejected": "7"}]
        >>> Preference(rows, loss="ipo").signals
        ('preference',)
        >>> Preference(rows, loss="dpo")
        Traceback (most recent call last):
        ValueError: objective 'preference': loss='dpo' is unknown; choose one of sigmoid, ipo, orpo, kto.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        loss: str = "sigmoid",
        beta: float = 0.1,
        dpop: float = 0.0,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        signal: str = "preference",
        eval_dataset: Any = None,
        max_length: int | None = 1024,
    ) -> None:
        super().__init__(signal, (signal,), dataset, eval_dataset)
        if loss not in LOSSES:
            raise ValueError(f"objective {signal!r}: loss={loss!r} is unknown; choose one of {', '.join(LOSSES)}.")
        if not beta > 0:
            raise ValueError(f"objective {signal!r}: beta={beta!r} must be positive.")
        if dpop and loss != "sigmoid":
            raise ValueError(
                f"objective {signal!r}: dpop={dpop!r} belongs to loss='sigmoid', not to {loss!r}; leave it at 0."
            )
        self.loss, self.beta, self.dpop, self.max_length = loss, beta, dpop, max_length
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def prepare(self, dataset: Dataset, split: str) -> Dataset:
        formats = (PAIRED, UNPAIRED) if self.loss == "kto" else (PAIRED,)
        if require_columns(self.name, dataset, *formats) == PAIRED:
            rows = preference_rows(self.name, numbered(dataset), self.tokenizer, self.max_length)
            return rows.filter(lambda row: bool(row["chosen_ids"]) and bool(row["rejected_ids"]))
        labels = [bool(label) for label in binary_labels(self.name, dataset["label"], "label", both=False)]
        template = [c for c in ("tools", "chat_template_kwargs") if c in dataset.column_names]
        rows = numbered(dataset.select_columns(["prompt", "completion", *template]))
        rows = text_rows(self.name, rows, self.tokenizer, self.max_length)

        def separated(row: Mapping[str, Any]) -> dict[str, Any]:
            return {
                "prompt_ids": [i for i, bit in zip(row["input_ids"], row["completion_mask"]) if not bit],
                "completion_ids": [i for i, bit in zip(row["input_ids"], row["completion_mask"]) if bit],
                "label": labels[row[ROW]],
            }

        rows = rows.map(separated, remove_columns=[c for c in rows.column_names if c != ROW])
        return rows.filter(lambda row: bool(row["completion_ids"]))

    def steps(self, share: Share) -> int:
        if self.loss == "kto" and share.rows < 2:
            raise ValueError(
                f"objective {self.name!r}: loss='kto' with {share.rows} row per micro-batch; its reference point "
                f"compares the rows of a micro-batch, so give at least two: rows={{{self.name!r}: 2}} in "
                "BundleTrainingConfig (and fewer gradient_accumulation_steps)."
            )
        return super().steps(share)

    def held_out(self, share: Share, size: int) -> Iterator[tuple[int, list[Any], float]]:
        """With "kto" a row that is alone in its batch takes the completion of another held-out row as the mismatch."""
        for start, rows, weight in super().held_out(share, size):
            if self.loss == "kto" and len(rows) == 1:
                other = next((row for row in self.eval_rows if row[ROW] != rows[0][ROW]), rows[0])
                rows = [{**rows[0], OTHER: other.get("chosen_ids") or other.get("completion_ids")}]
            yield start, rows, weight

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        if "chosen_ids" in rows[0]:
            batch = DataCollatorForPreference(self.tokenizer.pad_token_id, max_length=self.max_length)(list(rows))
            desirable = torch.tensor([True] * len(rows) + [False] * len(rows))
        else:
            batch = self._sequences([(row["prompt_ids"], row["completion_ids"]) for row in rows])
            desirable = torch.tensor([row["label"] for row in rows])
        if self.loss != "kto":
            return dict(batch)
        # z0 is measured on prompts with the completion of another prompt: that of the next row.
        pairs = [(row["prompt_ids"], row.get("chosen_ids") or row.get("completion_ids")) for row in rows]
        others = [row.get(OTHER) or pairs[(i + 1) % len(pairs)][1] for i, row in enumerate(rows)]
        mismatched = [(prompt, other) for (prompt, _), other in zip(pairs, others)]
        return {**batch, "desirable": desirable, "mismatched": self._sequences(mismatched)}

    def _sequences(self, pairs: list[tuple[Any, Any]]) -> Batch:
        ids = [torch.tensor([*prompt, *completion])[: self.max_length] for prompt, completion in pairs]
        masks = [torch.tensor([0] * len(p) + [1] * len(c))[: self.max_length] for p, c in pairs]
        return {
            "input_ids": pad(ids, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids]),
            "completion_mask": pad(masks),
        }

    def on(self, forward: Forward, batch: Batch) -> Batch:
        moved = super().on(forward, batch)
        return {**moved, "mismatched": super().on(forward, batch["mismatched"])} if "mismatched" in batch else moved

    def add_topics(self, batch: Batch, tau: Tensor, draws: Tensor | None) -> Batch:
        batch = super().add_topics(batch, tau, draws)
        if "mismatched" in batch:  # its prompts are those of the same rows
            batch["mismatched"] = {**batch["mismatched"], "topics": tau}
        return batch

    def complete(self, forward: Forward, batch: Batch) -> Batch:
        if self.loss == "orpo":
            return batch
        batch = {**batch, "ref_logprobs": sequence_logprobs(forward.reference(batch), batch)}
        if self.loss == "kto":
            other = batch.pop("mismatched")
            logprobs = sequence_logprobs(forward.current(self.name, other), other)
            batch["kl"] = kto_reference_point(logprobs, sequence_logprobs(forward.reference(other), other))
        return batch

    def items(self, batch: Batch) -> Tensor:
        """The number of pairs; with "kto" of completions."""
        rows = len(batch["input_ids"]) // (1 if self.loss == "kto" else 2)
        return torch.tensor(float(rows), device=batch["input_ids"].device)

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logprobs = sequence_logprobs(outputs, batch)
        tokens = batch["completion_mask"][:, 1:].sum(1)
        reference = batch.get("ref_logprobs", torch.zeros_like(logprobs))
        if self.loss == "kto":
            weights = {"desirable_weight": self.desirable_weight, "undesirable_weight": self.undesirable_weight}
            loss = kto_loss(logprobs, reference, batch["desirable"], batch["kl"], beta=self.beta, **weights).mean()
            return {self.signals[0]: loss}, {"kl_reference_point": batch["kl"]}
        reward = self.beta * (logprobs - reference).detach()
        if self.loss in ("ipo", "orpo"):
            logprobs, reference = logprobs / tokens, reference / tokens
        chosen, rejected = logprobs.chunk(2)
        if self.loss == "orpo":
            loss = orpo_loss(chosen, rejected, beta=self.beta)
        elif self.loss == "ipo":
            loss = ipo_loss(chosen, rejected, *reference.chunk(2), beta=self.beta)
        else:
            loss = dpo_loss(chosen, rejected, *reference.chunk(2), beta=self.beta, dpop=self.dpop)
        chosen_reward, rejected_reward = reward.chunk(2)
        metrics = {
            "rewards/chosen": chosen_reward.mean(),
            "rewards/rejected": rejected_reward.mean(),
            "rewards/margin": (chosen_reward - rejected_reward).mean(),
            "rewards/accuracy": (chosen_reward > rejected_reward).to(reward.dtype).mean(),
            "logprobs/chosen": chosen.detach().mean(),
            "logprobs/rejected": rejected.detach().mean(),
        }
        return {self.signals[0]: loss.mean()}, metrics


def sequence_logprobs(outputs: Outputs, batch: Batch) -> Tensor:
    """log p of each completion, (B,), in nats: the sum over its tokens."""
    logprobs = token_logprobs(outputs.logits, batch["input_ids"])
    return masked_sum(logprobs, batch["completion_mask"][:, 1:])

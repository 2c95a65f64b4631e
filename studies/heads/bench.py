"""What the parts of the heads' study share: states of the model, training of heads and bundles, intervals."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from peft_bundles.objectives import Forward, Objective
from peft_bundles.routing.reduction import clip_bundle_grads, finalize_grads
from studies.heads.make_data import Rows
from studies.training import Training


ROWS = 16  # of a batch: what contrast and goals are told apart from
STEPS = 3000  # of a head at most
DRAWS = 500  # of an interval
Parts = list[tuple[Tensor, Any, dict[str, Any]]]  # final states, what the loss needs of the logits, batch


@dataclass
class Part:
    """One head's test.

    Args:
        make: rows -> objective. rows: bench -> training and held-out rows.
        loss: objective, one batch of `Parts` -> the objective's own loss.
        measure: objective, `Parts` of the held-out rows, these rows, the group of each -> measures.
        extra: outputs, batch -> what of the logits is kept.
        group: the column that intervals are resampled by.
        bare: measure the head before it is trained too.
    """

    make: Callable[[Rows], Objective]
    rows: Callable[[Bench], tuple[Rows, Rows]]
    loss: Callable[[Any, Any], Tensor]
    measure: Callable[[Any, Parts, Rows, np.ndarray], dict[str, Any]]
    extra: Callable[[Any, Any], Any] = lambda outputs, batch: None
    group: str = "item"
    bare: bool = False


class Bench:
    """A model with calibrated bundles, data, and how much of everything."""

    def __init__(self, model: Any, tokenizer: Any, data: dict[str, Any], seed: int, scale: float, steps: int) -> None:
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.seed, self.scale, self.steps = seed, scale, steps
        self.forward = Forward(model, {"all": ()}, {"all": {}})
        self.line_end: int = tokenizer(text="\n", add_special_tokens=False)["input_ids"][0]
        with torch.device("meta"):  # a model without bundles: its signals' subspace is everything
            self.bare = AutoModelForCausalLM.from_config(model.config)

    def size(self, count: int) -> int:
        return max(int(count * self.scale), 2 * ROWS)

    def sample(self, prompts: list[str], answers: int, greedy: bool) -> list[list[str]]:
        """So many answers of the model as it is to each prompt, one line of at most 6 tokens."""
        found: list[list[str]] = []
        many = 1024 // answers
        options: dict[str, Any] = {"do_sample": False}
        if not greedy:
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": answers}
        torch.manual_seed(self.seed)
        for start in range(0, len(prompts), many):
            given = self.tokenizer(
                prompts[start : start + many], return_tensors="pt", padding=True, padding_side="left"
            ).to(self.forward.device)
            ids = self.forward.generate(
                "all", given["input_ids"], given["attention_mask"], max_new_tokens=6, eos_token_id=self.line_end,
                pad_token_id=self.tokenizer.pad_token_id, **options,
            )  # fmt: skip
            new = self.tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
            found += [new[i : i + answers] for i in range(0, len(new), answers)]
        return found

    def parts(self, part: Part, rows: Rows, model: Any = None) -> Parts:
        """The states of the model, by batches; a rest is dropped."""
        objective = part.make(rows)
        objective.setup(self.tokenizer, model or self.model)
        assert len(objective.rows) == len(rows), "a row was left out"
        found = []
        for start in range(0, len(rows) // ROWS * ROWS, ROWS):
            batch = objective.on(self.forward, objective.collate(objective.rows[start : start + ROWS]))
            outputs = self.forward.current("all", batch)
            with torch.no_grad():
                found.append((outputs.hidden, part.extra(outputs, batch), batch))
        return found

    def run(self, part: Part, trained: bool) -> dict[str, Any]:
        """The head alone on states of the fresh model, in the owners' subspace and on all of the state; or `trained`:
        the head and the owners' bundles, together."""
        train, test = part.rows(self)
        groups = np.unique([str(row[part.group]) for row in test[: len(test) // ROWS * ROWS]], return_inverse=True)[1]
        cells: dict[str, Any] = {"rows": len(train), "held_out": len(groups), "groups": int(groups.max()) + 1}
        if trained:
            objective = part.make(train)
            objective.setup(self.tokenizer, self.model)
            self.train(objective, part)
            with torch.no_grad():
                cells["trained"] = part.measure(objective, self.parts(part, test), test, groups)
            return cells
        known, held = self.parts(part, train), self.parts(part, test)
        for where, model in (("subspace", self.model), ("whole state", self.bare)):
            objective = part.make(train)
            objective.setup(self.tokenizer, model)
            head: Any = objective.head()
            head.to(self.forward.device)
            with torch.no_grad():
                before = part.measure(objective, held, test, groups) if part.bare else {}
            fit(head, lambda p, o=objective: part.loss(o, p), known)
            with torch.no_grad():
                cells[where] = part.measure(objective, held, test, groups)
            if part.bare:
                cells[where]["untrained"] = before
        return cells

    def train(self, objective: Objective, part: Part) -> None:
        """So many steps of the owners' bundles and the head on the objective's loss, in a plain loop."""
        signal = objective.signals[0]
        head: Any = objective.head()
        head.to(self.forward.device)
        forward = Forward(self.model, {objective.name: (signal,)}, {objective.name: {}})
        rows: Any = objective.rows
        long = objective.collate(rows[:ROWS])["input_ids"].numel() > 32 * 128
        many = ROWS if long else 2 * ROWS  # so that several processes fit on a GPU, with their logits

        def batches() -> Any:
            rng = random.Random(self.seed)
            while True:
                order = rng.sample(range(len(rows)), len(rows))
                for start in range(0, len(rows) - many + 1, many):
                    yield objective.collate([rows[i] for i in order[start : start + many]])

        def loss(batch: Any) -> Tensor:
            batch = objective.on(forward, batch)
            outputs = forward({objective.name: batch})[objective.name]
            return part.loss(objective, (outputs.hidden, part.extra(outputs, batch), batch))

        self.descend(head, loss, batches())

    def descend(self, head: Any, loss: Callable[[Any], Tensor], batches: Any) -> None:
        """AdamW on head and bundles: warm-up, cosine, clipping by bundle, the quiet penalty of calibrated bundles."""
        self.model.train()
        bundles = [p for p in self.model.parameters() if p.requires_grad]
        warm = max(self.steps // 20, 1)

        def gradients(batch: Any) -> Tensor:
            value = loss(batch)
            (value + self.model.quiet_loss()).backward()
            finalize_grads(self.model)
            return value.detach()

        def clip() -> None:
            clip_bundle_grads(self.model, 1.0)
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)

        def rates(n: int) -> list[float]:
            share = min((n + 1) / warm, 0.5 + 0.5 * np.cos(np.pi * n / self.steps))
            return [2e-3 * share, 3e-3 * share]

        training = Training([bundles, head.parameters()], gradients, clip=clip, decay=0.01)
        training.run(((batch,) for batch in itertools.islice(batches, self.steps)), rates)
        self.model.eval()


def fit(head: torch.nn.Module, loss: Callable[[Any], Tensor], parts: list[Any], epochs: int = 60) -> None:
    """AdamW on the head alone; the parts in a new order each epoch."""
    rng = random.Random(0)
    epochs = max(min(epochs, STEPS // len(parts)), 1)

    def gradients(part: Any) -> Tensor:
        value = loss(part)
        value.backward()
        return value.detach()

    batches = ((part,) for _ in range(epochs) for part in rng.sample(parts, len(parts)))
    Training([head.parameters()], gradients, decay=0.1).run(batches, lambda n: [3e-3])


# ---- measures with intervals ----


def interval(measure: Callable[[np.ndarray], float], groups: np.ndarray) -> dict[str, float]:
    """A measure of row numbers, with its 95% interval over resampled groups."""
    rng = np.random.default_rng(0)
    order = np.argsort(groups, kind="stable")
    by = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    values = [measure(np.concatenate([by[i] for i in rng.integers(len(by), size=len(by))])) for _ in range(DRAWS)]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return {
        k: round(float(v), 4) for k, v in (("value", measure(np.arange(len(groups)))), ("low", low), ("high", high))
    }


def auc(scores: np.ndarray, marks: np.ndarray) -> Callable[[np.ndarray], float]:
    """How often a marked row has the higher score than another, ties as halves; NaN where all are of one kind."""

    def measure(rows: np.ndarray) -> float:
        marked = marks[rows] > 0.5
        count = marked.sum()
        if not 0 < count < len(rows):
            return np.nan
        _, place, many = np.unique(scores[rows], return_inverse=True, return_counts=True)
        ranks = (many.cumsum() - (many - 1) / 2)[place]
        return float((ranks[marked].sum() - count * (count + 1) / 2) / (count * (len(rows) - count)))

    return measure


def auc_within(scores: np.ndarray, marks: np.ndarray, kinds: np.ndarray) -> Callable[[np.ndarray], float]:
    """The mean over kinds of the AUC within a kind: telling the kinds apart is worth nothing."""

    def measure(rows: np.ndarray) -> float:
        return float(np.mean([auc(scores, marks)(rows[kinds[rows] == kind]) for kind in np.unique(kinds)]))

    return measure


def mean(values: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda rows: float(values[rows].mean())


def correlation(a: np.ndarray, b: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda rows: float(np.corrcoef(a[rows], b[rows])[0, 1])


def array(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).detach().float().cpu().numpy()

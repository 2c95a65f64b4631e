"""Turn one bundle's alpha through many values and see which tasks follow: monotonicity, selectivity, a plot.

Rows of one forward may have different alphas, so several values of a sweep share a pass: the rows are repeated, and
every copy has its own alpha.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.dialling import alphas
from ..core.gates import parse_alphas
from ..core.walking import state_of


Batch = Mapping[str, Any]  # what the model takes: tensors (B, ...), and lists of B things that only `eval_fn` reads
EvalFn = Callable[[Any, dict[str, Any]], Tensor]


@dataclass
class AlphaSweep:
    """Scores of one bundle's sweep.

    Attributes:
        bundle: whose alpha was turned.
        values: V alphas, in the order given.
        scores: task -> (V, N) float64, the score of each of its N rows at each alpha.
        passes: calls of `eval_fn` that it took.
    """

    bundle: str
    values: list[float]
    scores: dict[str, Tensor]
    passes: int

    def mean(self, task: str) -> Tensor:
        """Mean score over a task's rows at each alpha, (V,)."""
        return self.scores[task].mean(1)

    def monotonicity(self, task: str) -> float:
        """Spearman's rank correlation of alpha and the mean score.

        1: the score rises with every step of alpha; -1: it falls with every step; NaN: it does not move. No p-value:
        the mean curve is not a sample, and what rows add to doubt is the standard error of `to_dict`.
        """
        from scipy.stats import spearmanr

        mean = self.mean(task).tolist()
        if len(set(mean)) == 1 or len(set(self.values)) == 1:
            return math.nan
        return float(spearmanr(self.values, mean).statistic)

    def effect(self, task: str) -> float:
        """How much the task's mean score moves: the mean of |score(alpha) - score(0)| over the sweep, >= 0.

        Raises:
            ValueError: 0 is not among the values.
        """
        if 0.0 not in self.values or len(self.values) < 2:
            raise ValueError(f"values={self.values} need 0.0 and another one: an effect is measured from alpha 0.")
        mean = self.mean(task)
        moved = (mean - mean[self.values.index(0.0)]).abs()
        return float(moved.sum() / (len(self.values) - 1))

    def selectivity(self, own: str) -> float:
        """Share of the movement that is the own task's: own / (own + mean of the others), in [0, 1].

        1: only the own task moves; 0.5: the others move as much; NaN: nothing moves. Only tasks of one unit compare
        (all losses, or all accuracies).

        Raises:
            ValueError: the task is unknown or the only one, or 0 is not among the values.
        """
        others = [task for task in self.scores if task != own]
        if own not in self.scores or not others:
            raise ValueError(
                f"own={own!r}: selectivity needs that task and another one; the tasks are {[*self.scores]}."
            )
        mine, theirs = self.effect(own), sum(self.effect(task) for task in others) / len(others)
        return mine / (mine + theirs) if mine + theirs else math.nan

    def to_dict(self, own: str | None = None) -> dict[str, Any]:
        """What JSON can hold: means, standard errors over rows, Spearman's rho, and with `own` the selectivity."""

        def number(value: float) -> float | None:
            return round(value, 6) if math.isfinite(value) else None

        tasks = {}
        for task, scores in self.scores.items():
            tasks[task] = {
                "mean": [number(v) for v in scores.mean(1).tolist()],
                "standard_error": [number(v) for v in _standard_error(scores).tolist()],
                "spearman": number(self.monotonicity(task)),
                "rows": scores.shape[1],
            }
        found: dict[str, Any] = {"bundle": self.bundle, "alphas": self.values, "tasks": tasks, "passes": self.passes}
        if own is not None:
            found |= {"own": own, "selectivity": number(self.selectivity(own))}
        return found

    def draw(self, axes: Any, *, now: float | None = None) -> None:
        """Draw onto matplotlib axes: a line a task, the change of its mean score from alpha 0 (from the first value,
        if 0 is not among them), with a band of the standard error of that change over rows.

        Args:
            now: an alpha to mark.
        """
        start = self.values.index(0.0) if 0.0 in self.values else 0
        order = sorted(range(len(self.values)), key=self.values.__getitem__)
        x = [self.values[i] for i in order]
        for task, scores in self.scores.items():
            change = scores - scores[start]  # row by row: rows differ far more than alphas do
            mean, error = change.mean(1)[order], _standard_error(change)[order]
            (line,) = axes.plot(x, mean.tolist(), marker="o", markersize=4, label=task)
            low, high = (mean - error).tolist(), (mean + error).tolist()
            axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
        if now is not None:
            axes.axvline(now, color="0.3", linewidth=1.0, linestyle=":")
        axes.set_xlabel(f"alpha of {self.bundle}")
        axes.set_ylabel(f"score, change from alpha {self.values[start]:g}")
        axes.legend(frameon=False)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Write `draw` to a picture file of the suffix's kind; returns the path."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        self.draw(figure.subplots())
        figure.savefig(path, dpi=150)
        return Path(path)


def alpha_sweep(
    model: nn.Module,
    bundle: str,
    values: Sequence[float],
    eval_fn: EvalFn,
    tasks: Mapping[str, Batch],
    *,
    max_rows: int = 32,
) -> AlphaSweep:
    """Score every row of every task at every alpha of one bundle, as many in one pass as `max_rows` allows.

    The other bundles keep what they have; run the sweep inside `with model.alphas(...)` to set them.

    Args:
        model: a model with bundles; it is put into eval mode meanwhile.
        bundle: whose alpha.
        values: V alphas.
        eval_fn: (model, batch) -> one score a row, (B,). It calls `model(**...)` or `model.generate(**...)` once with
            the batch's rows in their order; the alphas are set around it. `negative_loss` is one.
        tasks: name -> batch: tensors and lists with one entry a row, moved to the model's device.
        max_rows: rows of a pass. A task with more rows than that runs in parts.

    Raises:
        ValueError: an unknown bundle, no values or one that is not finite, no rows, or another number of scores than
            rows.
    """
    state = state_of(model)
    if isinstance(values, (int, float)):
        raise ValueError(f"values={values!r} must be a list of alphas.")
    values = [float(v) for v in values]
    if not isinstance(tasks, Mapping):
        raise ValueError(f"tasks is a {type(tasks).__name__}; give a dict, name -> batch.")
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values={values} must be finite numbers, at least one.")
    if max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1.")
    parse_alphas({bundle: values[0]}, state)  # knows the bundle, or raises
    sizes = {task: _rows(task, batch) for task, batch in tasks.items()}
    if not tasks:
        raise ValueError("tasks is empty; give at least one, name -> batch.")
    scores, passes, training = {}, 0, model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        for task, batch in tasks.items():
            table = torch.full((len(values), sizes[task]), math.nan, dtype=torch.float64)
            step = min(sizes[task], max_rows)
            together = max(1, max_rows // step)  # values that share a pass
            for row in range(0, sizes[task], step):
                part = {name: value[row : row + step] for name, value in batch.items()}
                rows = min(step, sizes[task] - row)
                for i in range(0, len(values), together):
                    some = torch.tensor(values[i : i + together], dtype=torch.float64)
                    repeated = {name: _repeat(value, len(some), device) for name, value in part.items()}
                    with torch.no_grad(), alphas(model, {bundle: some.repeat_interleave(rows)}):
                        found = torch.as_tensor(eval_fn(model, repeated))
                    if found.shape != (len(some) * rows,):
                        raise ValueError(
                            f"task {task!r}: eval_fn gave scores of shape {tuple(found.shape)} for {len(some) * rows} "
                            "rows; return one a row."
                        )
                    table[i : i + together, row : row + step] = found.double().cpu().view(len(some), rows)
                    passes += 1
            scores[task] = table
    finally:
        model.train(training)
    return AlphaSweep(bundle, values, scores, passes)


def negative_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Minus the mean next-token loss of every row, (B,), in nats a token: higher is better, as scores are.

    `labels` (B, T), where given, say which tokens count (-100: not); else `attention_mask` does; else all do.
    """
    ids = batch["input_ids"]
    labels = batch.get("labels")
    weights = (labels != -100) if labels is not None else batch.get("attention_mask", torch.ones_like(ids))
    given = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    logits = model(**given, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    counted = weights[:, 1:].bool()
    return -torch.where(counted, losses, 0.0).sum(1) / counted.sum(1).clamp_min(1)


def text_batch(texts: Sequence[str], tokenizer: Any, *, max_length: int = 64) -> dict[str, Tensor]:
    """Texts as a batch, (B, T) padded on the right, on the CPU; what is over `max_length` tokens is cut.

    Raises:
        ValueError: a text with fewer than two tokens, which has nothing to predict.
    """
    rows = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    if short := [i for i, ids in enumerate(rows) if len(ids) < 2]:
        raise ValueError(f"text(s) {short} have fewer than two tokens; drop them.")
    length = max(map(len, rows), default=0)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows]),
    }


def _rows(task: str, batch: Batch) -> int:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"task {task!r} is a {type(batch).__name__}; give a dict of tensors, of texts "
            "`evaluation.text_batch(texts, tokenizer)`."
        )
    sizes = {name: len(value) for name, value in batch.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(f"task {task!r} has {sizes} rows; every entry needs the same number, at least one.")
    return next(iter(sizes.values()))


def _repeat(value: Any, times: int, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device).repeat(times, *[1] * (value.dim() - 1))
    return list(value) * times


def _standard_error(scores: Tensor) -> Tensor:
    """Of the mean over rows, (V,); 0 for one row."""
    rows = scores.shape[1]
    return scores.std(1) / rows**0.5 if rows > 1 else torch.zeros(len(scores), dtype=scores.dtype)

"""Alpha sweeps: score tasks at many values of one bundle's alpha.

Rows of one forward may have different alphas. So several values of a sweep share one forward: the rows are repeated,
and each copy of a row gets its own alpha.
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
from ..extras import require


Batch = Mapping[str, Any]  # the model's inputs: tensors (B, ...); and lists of length B that only `eval_fn` reads
EvalFn = Callable[[Any, dict[str, Any]], Tensor]


@dataclass
class AlphaSweep:
    """The result of `alpha_sweep`.

    Attributes:
        bundle: the bundle whose alpha was changed.
        values: the V alphas, in the order given.
        scores: task -> (V, N) float64, the score of each of the task's N rows at each alpha.
        passes: how often `eval_fn` was called.
    """

    bundle: str
    values: list[float]
    scores: dict[str, Tensor]
    passes: int

    def mean(self, task: str) -> Tensor:
        """Mean score over a task's rows at each alpha, (V,)."""
        return self.scores[task].mean(1)

    def monotonicity(self, task: str) -> float:
        """Spearman's rank correlation of alpha and the mean score, in [-1, 1].

        1: the score rises with every step of alpha. -1: it falls with every step. NaN: it is constant.
        There is no p-value, because the mean curve is not a sample. `to_dict` has the standard error over rows.
        """
        return spearman(self.values, self.mean(task).tolist())

    def effect(self, task: str) -> float:
        """How far alpha moves the mean score: the mean of |score(alpha) - score(0)| over the other alphas, >= 0.

        Raises:
            ValueError: 0 is not among the values, or is the only one.
        """
        if 0.0 not in self.values or len(self.values) < 2:
            raise ValueError(
                f"values={self.values}: an effect is measured from alpha 0; sweep 0.0 and at least one other value."
            )
        mean = self.mean(task)
        moved = (mean - mean[self.values.index(0.0)]).abs()
        return float(moved.sum() / (len(self.values) - 1))

    def selectivity(self, own: str) -> float:
        """How much of the effect falls on the bundle's own task: own / (own + mean of the others), in [0, 1].

        1: only the own task moves. 0.5: the other tasks move as much. NaN: nothing moves. All scores must have the same
        unit (all losses, or all accuracies).

        Args:
            own: the bundle's own task.

        Raises:
            ValueError: `own` is unknown or the only task, or 0 is not among the values.
        """
        others = [task for task in self.scores if task != own]
        if own not in self.scores or not others:
            raise ValueError(
                f"own={own!r}: the sweep has the tasks {[*self.scores]}; name one of them, and sweep at least two."
            )
        own_effect, other_effect = self.effect(own), sum(self.effect(task) for task in others) / len(others)
        return own_effect / (own_effect + other_effect) if own_effect + other_effect else math.nan

    def to_dict(self, own: str | None = None) -> dict[str, Any]:
        """The sweep as values for JSON: mean, standard error over rows and Spearman's rho of every task.

        Numbers are rounded to 6 digits; NaN is None. With `own`, a task, the selectivity is added.
        """

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
        result: dict[str, Any] = {"bundle": self.bundle, "alphas": self.values, "tasks": tasks, "passes": self.passes}
        if own is not None:
            result |= {"own": own, "selectivity": number(self.selectivity(own))}
        return result

    def draw(self, axes: Any, *, now: float | None = None) -> None:
        """Draw one line per task onto matplotlib axes, with a band of one standard error over rows.

        A line shows the change of the mean score from alpha 0, or from the first value where 0 is not among them.

        Args:
            axes: `matplotlib.axes.Axes`.
            now: an alpha to mark with a vertical line.
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
        """Write the plot of `draw` to a picture file; the suffix gives the format. Returns the path.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = require("matplotlib.figure", "analysis").Figure(figsize=(6, 4), layout="constrained")
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
    """Score every row of every task at every value of one bundle's alpha.

    The other bundles keep their alphas. To set them, run the sweep inside `with model.alphas(...)`.

    Args:
        model: a model with bundles. It is in eval mode during the sweep.
        bundle: name of the bundle whose alpha changes.
        values: V alphas, finite numbers.
        eval_fn: (model, batch) -> scores (B,), one per row. It must call `model(**...)` or `model.generate(**...)`
            once, with the batch's rows in their order. The alphas are set around the call. `negative_loss` is one.
        tasks: name -> batch. A batch holds tensors (B, ...), which are moved to the model's device, and lists of
            length B.
        max_rows: largest number of rows in one call of `eval_fn`, default 32. A longer task runs in parts.

    Returns:
        An `AlphaSweep` with a score for every task, alpha and row.

    Raises:
        ValueError: an unknown bundle; no values, or one that is not finite; an empty task; a number of scores that is
            not the number of rows.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, alpha_sweep
        >>> from peft_bundles.evaluation import negative_loss
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> model = get_peft_model(base, BundleConfig(preset="ssl_rl_separate"))
        >>> texts = {"input_ids": torch.arange(24).view(3, 8)}
        >>> sweep = alpha_sweep(model, "b_ssl_main", [0.0, 0.5, 1.0], negative_loss, {"texts": texts})
        >>> sweep.scores["texts"].shape, sweep.passes
        (torch.Size([3, 3]), 1)
        >>> sweep.effect("texts")  # a fresh bundle adds nothing
        0.0
    """
    state = state_of(model)
    if isinstance(values, (int, float)):
        raise ValueError(f"values={values!r} is one number; give a list of alphas, e.g. [0.0, 0.5, 1.0].")
    values = [float(v) for v in values]
    if not isinstance(tasks, Mapping):
        raise ValueError(f"tasks is a {type(tasks).__name__}; give a dict, name -> batch.")
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"values={values} must be finite numbers, at least one.")
    if max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1.")
    parse_alphas({bundle: values[0]}, state)  # raises for an unknown bundle
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
            together = max(1, max_rows // step)  # values in one call
            for row in range(0, sizes[task], step):
                part = {name: value[row : row + step] for name, value in batch.items()}
                rows = min(step, sizes[task] - row)
                for i in range(0, len(values), together):
                    some = torch.tensor(values[i : i + together], dtype=torch.float64)
                    repeated = {name: _repeat(value, len(some), device) for name, value in part.items()}
                    with torch.no_grad(), alphas(model, {bundle: some.repeat_interleave(rows)}):
                        row_scores = torch.as_tensor(eval_fn(model, repeated))
                    if row_scores.shape != (len(some) * rows,):
                        raise ValueError(
                            f"task {task!r}: eval_fn returned scores of shape {tuple(row_scores.shape)} for "
                            f"{len(some) * rows} rows; return one score per row."
                        )
                    table[i : i + together, row : row + step] = row_scores.double().cpu().view(len(some), rows)
                    passes += 1
            scores[task] = table
    finally:
        model.train(training)
    return AlphaSweep(bundle, values, scores, passes)


def negative_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Minus the mean next-token loss of every row: a score, so higher is better.

    Args:
        model: a causal LM.
        batch: `input_ids` (B, T). Which tokens count: those whose `labels` (B, T) are not -100; without labels those
            in `attention_mask` (B, T); without a mask all.

    Returns:
        (B,), in nats per token.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles.evaluation import negative_loss
        >>> model = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> ids = torch.arange(8)[None]
        >>> score, loss = negative_loss(model, {"input_ids": ids}), model(input_ids=ids, labels=ids).loss
        >>> torch.allclose(score, -loss)
        True
    """
    ids = batch["input_ids"]
    labels = batch.get("labels")
    weights = (labels != -100) if labels is not None else batch.get("attention_mask", torch.ones_like(ids))
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    counted = weights[:, 1:].bool()
    return -torch.where(counted, losses, 0.0).sum(1) / counted.sum(1).clamp_min(1)


def text_batch(texts: Sequence[str], tokenizer: Any, *, max_length: int = 64) -> dict[str, Tensor]:
    """Tokenize texts into one batch on the CPU.

    Args:
        texts: B texts.
        tokenizer: of the model.
        max_length: tokens to keep of each text, default 64.

    Returns:
        `input_ids` and `attention_mask`, (B, T), padded on the right.

    Raises:
        ValueError: a text has fewer than two tokens, so there is nothing to predict.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from peft_bundles.evaluation import text_batch
        >>> words = Tokenizer(models.WordLevel({"<pad>": 0, "one": 1, "two": 2, "three": 3}))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
        >>> text_batch(["one two three", "three two"], tokenizer)["input_ids"]
        tensor([[1, 2, 3],
                [3, 2, 0]])
    """
    rows = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    if short := [i for i, ids in enumerate(rows) if len(ids) < 2]:
        raise ValueError(f"the text(s) at {short} have fewer than two tokens; leave them out.")
    length = max(map(len, rows), default=0)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows]),
    }


def _rows(task: str, batch: Batch) -> int:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"task {task!r} is a {type(batch).__name__}; give a dict of tensors, such as evaluation.text_batch(texts, "
            "tokenizer)."
        )
    sizes = {name: len(value) for name, value in batch.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise ValueError(
            f"task {task!r} has entries with {sizes} rows; give each the same number of rows, at least one."
        )
    return next(iter(sizes.values()))


def _repeat(value: Any, times: int, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device).repeat(times, *[1] * (value.dim() - 1))
    return list(value) * times


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation of two sequences of n numbers; NaN if one of them is constant.

    The Pearson correlation of the ranks, where equal values share the mean of their ranks (as
    `scipy.stats.spearmanr`).

    Example:
        >>> from peft_bundles.evaluation import spearman
        >>> round(spearman([0, 1, 2, 3], [0, 2, 3, 1]), 6)
        0.4
    """
    if len(set(x)) == 1 or len(set(y)) == 1:
        return math.nan
    values = torch.tensor([list(x), list(y)], dtype=torch.float64)
    below = (values[:, :, None] > values[:, None, :]).sum(-1)
    equal = (values[:, :, None] == values[:, None, :]).sum(-1)
    return float(torch.corrcoef(below + equal.double() / 2)[0, 1])


def _standard_error(scores: Tensor) -> Tensor:
    """Standard error of the mean over rows, (V,); 0 for one row."""
    rows = scores.shape[1]
    return scores.std(1) / rows**0.5 if rows > 1 else torch.zeros(len(scores), dtype=scores.dtype)

"""Do bundles disturb each other? Compare the directions they read and write, and their effects on text."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.dialling import alphas
from ..core.layer import BundleLayer
from ..core.walking import active_adapters, bundle_layers, state_of


@dataclass
class Orthogonality:
    """How much the subspaces of the bundles have in common; all values are means over layers.

    Attributes:
        names: the M bundles, as "bundle", or as "adapter.bundle" where two adapters have a bundle of that name.
        reads: (M, M), mean squared cosine of the principal angles between the subspaces that two bundles read.
            0: orthogonal. 1: one contains the other.
        writes: (M, M), the same for the subspaces that they write to.
        chance: (M, M), the expected value for two random subspaces of these sizes.
    """

    names: list[str]
    reads: Tensor
    writes: Tensor
    chance: Tensor

    def __str__(self) -> str:
        width = max(map(len, self.names), default=0)
        lines = []
        for title, matrix in (("reads", self.reads), ("writes", self.writes), ("by chance", self.chance)):
            lines.append(f"directions in common, {title}")
            for name, row in zip(self.names, matrix.tolist()):
                lines.append(f"{name.ljust(width)}  " + " ".join(f"{v:.2f}" for v in row))
        return "\n".join(lines)

    __repr__ = __str__


def orthogonality(model: nn.Module) -> Orthogonality:
    """Compare the directions of the residual stream that bundles read and write.

    It needs no text. Bundles of several bases can be compared too.

    Args:
        model: a model with bundles. Those of all active adapters are compared.

    Returns:
        An `Orthogonality`, which prints as three tables.

    Raises:
        ValueError: the model has no bundles.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, orthogonality
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> bundles = {name: {"rank": 4, "sub_bases": [part]} for name, part in (("b_one", "a"), ("b_two", "b"))}
        >>> model = get_peft_model(base, BundleConfig(sub_bases={"a": 8, "b": 8}, bundles=bundles))
        >>> result = orthogonality(model)
        >>> result.names, round(result.reads[0, 1].item(), 6)  # the sub-bases are orthogonal
        (['b_one', 'b_two'], 0.0)
    """
    bundles = _active_bundles(model)
    layers = [layer for layer in bundle_layers(model) if layer.bundle_adapters()]
    counts = [b for _, b in bundles]
    names = [b if counts.count(b) == 1 else f"{a}.{b}" for a, b in bundles]
    size = len(bundles)
    total = torch.zeros(3, size, size, dtype=torch.float64)
    count = torch.zeros(size, size, dtype=torch.float64)
    for layer in layers:
        spans = {n: s for n, (a, b) in enumerate(bundles) if (s := _spans(layer, a, b)) is not None}
        for j, k in itertools.product(spans, repeat=2):
            count[j, k] += 1
            for what in (0, 1):
                a, b = spans[j][what], spans[k][what]
                smaller = max(1, min(a.shape[1], b.shape[1]))
                total[what, j, k] += (a.T @ b).square().sum().cpu() / smaller
            # E |Q_a^T Q_b|_F^2 = m n / d for random subspaces of m and n dimensions
            total[2, j, k] += max(spans[j][1].shape[1], spans[k][1].shape[1]) / len(spans[j][1])
    return Orthogonality(names, *(total / count.clamp_min(1)))


def _active_bundles(model: nn.Module) -> list[tuple[str, str]]:
    """(adapter, bundle) of every bundle in an active adapter."""
    configs = state_of(model).configs
    return [(adapter, bundle) for adapter in active_adapters(model) for bundle in configs[adapter].bundles or ()]


def _spans(layer: BundleLayer, adapter: str, bundle: str) -> tuple[Tensor, Tensor] | None:
    """Orthonormal bases (d, m), float64, of what a bundle reads (columns of D) and writes (rows of E) in a layer.

    None if the bundle is not in this layer.
    """
    if not layer.holds(adapter) or bundle not in (packing := layer.packing(adapter)).names:
        return None
    with torch.no_grad():
        D, E = layer.fold(adapter, torch.float32, None, [])
        used = (packing.owner == packing.names.index(bundle)).to(D.device)
        return _orthonormal(D[:, used].double()), _orthonormal(E[used].T.double())


def _orthonormal(columns: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-6 * s.max().clamp_min(1e-30)]


@dataclass
class Conflicts:
    """How bundles change the loss on sample text, alone and in pairs. All losses are in nats per token.

    Attributes:
        names: the M bundles.
        base: mean loss of the base model.
        alone: (M,), change of the loss with only that bundle on.
        interaction: (M, M), change of the loss with both on, minus the two changes alone. 0: the effects add up.
            Positive: together they are worse than the sum.
        warnings: one sentence for each pair whose interaction is above the tolerance.
    """

    names: list[str]
    base: float
    alone: Tensor
    interaction: Tensor
    warnings: list[str]

    def __str__(self) -> str:
        width = max(map(len, self.names), default=0)
        lines = [
            f"loss of the base model: {self.base:.3f} nats per token; change with one bundle on | interaction of pairs"
        ]
        for name, alone, row in zip(self.names, self.alone.tolist(), self.interaction.tolist()):
            lines.append(f"{name.ljust(width)}  {alone:+.3f}  | " + " ".join(f"{v:+.3f}" for v in row))
        return "\n".join([*lines, *self.warnings])

    __repr__ = __str__


@torch.no_grad()
def conflicts(
    model: nn.Module, texts: Sequence[str], tokenizer: Any, *, tolerance: float = 0.02, max_length: int = 256
) -> Conflicts:
    """Measure on text whether the effects of bundles add up.

    The loss of each text is measured with no bundle on, with each bundle alone and with each pair, all at alpha 1. All
    settings of one text are rows of one batch of 1 + M + M (M - 1) / 2 rows. A pair with an interaction above the
    tolerance is also reported by `warnings.warn`.

    Args:
        model: a model with bundles. Those of all active adapters are measured.
        texts: texts of the kind the model will be used on.
        tokenizer: of the model.
        tolerance: largest interaction that does not count as a conflict, in nats per token, default 0.02.
        max_length: tokens to read of each text, default 256.

    Returns:
        A `Conflicts`, which prints as a table.

    Raises:
        ValueError: fewer than two bundles, or no text with at least two tokens.

    Example:
        >>> from peft import get_peft_model
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
        >>> from peft_bundles import BundleConfig, conflicts
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> bundles = {name: {"rank": 4, "sub_bases": ["all"]} for name in ("b_one", "b_two")}
        >>> model = get_peft_model(base, BundleConfig(sub_bases={"all": 8}, bundles=bundles))
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> conflicts(model, ["a b a a"], PreTrainedTokenizerFast(tokenizer_object=words)).alone.tolist()
        [0.0, 0.0]
    """
    device = next(model.parameters()).device
    names = list(dict.fromkeys(bundle for _, bundle in _active_bundles(model)))
    if len(names) < 2:
        raise ValueError(f"the model has the bundle(s) {names}; give a model with at least two to compare.")
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of texts, e.g. [text].")
    pairs = list(itertools.combinations(range(len(names)), 2))
    settings = [(), *((i,) for i in range(len(names))), *pairs]
    gates = {n: torch.tensor([float(i in on) for on in settings], device=device) for i, n in enumerate(names)}
    total, tokens = torch.zeros(len(settings), dtype=torch.float64), 0
    training = model.training
    model.eval()
    try:
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")["input_ids"].to(device)
            if ids.shape[1] < 2:
                continue
            with alphas(model, gates):
                logits = model(input_ids=ids.expand(len(settings), -1)).logits[:, :-1].float()
            labels = ids[:, 1:].expand(len(settings), -1)
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            total, tokens = total + loss.sum(1).double().cpu(), tokens + labels.shape[1]
    finally:
        model.train(training)
    if not tokens:
        raise ValueError("texts has no text with at least two tokens; give some of the kind the model will be used on.")
    mean = total / tokens
    alone = mean[1 : 1 + len(names)] - mean[0]
    interaction = torch.zeros(len(names), len(names), dtype=torch.float64)
    conflicting = []
    for (j, k), loss in zip(pairs, mean[1 + len(names) :]):
        excess = float(loss - mean[0] - alone[j] - alone[k])
        interaction[j, k] = interaction[k, j] = excess
        if excess > tolerance:
            one, other, both = float(alone[j]), float(alone[k]), float(loss - mean[0])
            conflicting.append(
                f"{names[j]} and {names[k]} are in conflict on this text: alone they change the loss by {one:+.3f} and "
                f"{other:+.3f}, together by {both:+.3f} nats per token."
            )
    for line in conflicting:
        warnings.warn(line, stacklevel=3)  # 2 is torch.no_grad
    return Conflicts(names, float(mean[0]), alone, interaction, conflicting)

"""Do bundles get in each other's way? The directions they read and write, and what they do together on text."""

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
from ..core.walking import state_of


@dataclass
class Orthogonality:
    """How much of the directions of two bundles is common, mean over layers.

    Attributes:
        names: "bundle", or "adapter.bundle" where two adapters have one of that name.
        reads, writes: (M, M), mean squared cosine of the principal angles between what they read (write): 0 for
            orthogonal, 1 where one contains the other.
        chance: (M, M), what two random subspaces of those sizes would have.
    """

    names: list[str]
    reads: Tensor
    writes: Tensor
    chance: Tensor

    def __str__(self) -> str:
        width = max(map(len, self.names), default=0)
        lines = []
        for title, matrix in (("reads", self.reads), ("writes", self.writes), ("by chance", self.chance)):
            lines.append(f"common directions, {title}")
            for name, row in zip(self.names, matrix.tolist()):
                lines.append(f"{name.ljust(width)}  " + " ".join(f"{v:.2f}" for v in row))
        return "\n".join(lines)

    __repr__ = __str__


def orthogonality(model: nn.Module) -> Orthogonality:
    """Compare the directions of the residual stream that the active bundles read and write, of one basis or several."""
    state = state_of(model)
    layers = [m for m in model.modules() if isinstance(m, BundleLayer)]
    adapters = [a for a in layers[0].active_adapters if a in state.configs]
    bundles = [(a, b) for a in adapters for b in state.configs[a].bundles or ()]
    counts = [b for _, b in bundles]
    names = [b if counts.count(b) == 1 else f"{a}.{b}" for a, b in bundles]
    size = len(bundles)
    total = torch.zeros(3, size, size, dtype=torch.float64)
    for layer in layers:
        spans = [_spans(layer, adapter, bundle) for adapter, bundle in bundles]
        for j, k in itertools.product(range(size), repeat=2):
            for what in (0, 1):
                a, b = spans[j][what], spans[k][what]
                smaller = max(1, min(a.shape[1], b.shape[1]))
                total[what, j, k] += (a.T @ b).square().sum().cpu() / smaller / len(layers)
            # E |Q_a^T Q_b|_F^2 = m n / d for random subspaces of m and n dimensions
            total[2, j, k] += max(spans[j][1].shape[1], spans[k][1].shape[1]) / layer.hidden_size / len(layers)
    return Orthogonality(names, *total)


def _spans(layer: BundleLayer, adapter: str, bundle: str) -> tuple[Tensor, Tensor]:
    """Orthonormal bases (d, m) of what a bundle reads (columns of D) and writes (rows of E) in a layer, float64."""
    with torch.no_grad():
        D, E = layer.fold(adapter, torch.float32, None, [])
        packing = layer.packing(adapter)
        used = (packing.owner == packing.names.index(bundle)).to(D.device)
        return _orthonormal(D[:, used].double()), _orthonormal(E[used].T.double())


def _orthonormal(columns: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-6 * s.max().clamp_min(1e-30)]


@dataclass
class Conflicts:
    """What bundles do alone and in pairs to the loss of sample text.

    Attributes:
        names: the bundles.
        base: mean loss of the base model, nats a token.
        alone: (M,), change of the loss with only that bundle on.
        interaction: (M, M), change with both on minus the two changes alone: 0 where they add up, positive where they
            get in each other's way.
        warnings: a line for each pair above the tolerance.
    """

    names: list[str]
    base: float
    alone: Tensor
    interaction: Tensor
    warnings: list[str]

    def __str__(self) -> str:
        width = max(map(len, self.names), default=0)
        lines = [
            f"loss of the base model: {self.base:.3f} nats a token; change with one bundle on | interaction of pairs"
        ]
        for name, alone, row in zip(self.names, self.alone.tolist(), self.interaction.tolist()):
            lines.append(f"{name.ljust(width)}  {alone:+.3f}  | " + " ".join(f"{v:+.3f}" for v in row))
        return "\n".join([*lines, *self.warnings])

    __repr__ = __str__


@torch.no_grad()
def conflicts(
    model: nn.Module, texts: Sequence[str], tokenizer: Any, *, tolerance: float = 0.02, max_length: int = 256
) -> Conflicts:
    """Measure on text whether bundles add up: each alone, and every pair, against the base model.

    All settings of a text are rows of one batch: 1 + M + M (M - 1) / 2 rows, at alpha 1.

    Args:
        model: with bundles; those of all active adapters are measured.
        texts: of the kind the model is to be used on.
        tokenizer: of the model.
        tolerance: interaction in nats a token above which a pair is warned of.
        max_length: tokens of a text that are looked at.

    Raises:
        ValueError: fewer than two bundles, or no text of at least two tokens.
    """
    state, device = state_of(model), next(model.parameters()).device
    layer = next(m for m in model.modules() if isinstance(m, BundleLayer))
    active = [a for a in layer.active_adapters if a in state.configs]
    names = list(dict.fromkeys(b for a in active for b in state.configs[a].bundles or ()))
    if len(names) < 2:
        raise ValueError(f"the model has {len(names)} bundle; two are needed to be in conflict.")
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of texts.")
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
        raise ValueError("no text of at least two tokens; give some of the kind the model is to be used on.")
    mean = total / tokens
    alone = mean[1 : 1 + len(names)] - mean[0]
    interaction = torch.zeros(len(names), len(names), dtype=torch.float64)
    found = []
    for (j, k), loss in zip(pairs, mean[1 + len(names) :]):
        excess = float(loss - mean[0] - alone[j] - alone[k])
        interaction[j, k] = interaction[k, j] = excess
        if excess > tolerance:
            one, other, both = float(alone[j]), float(alone[k]), float(loss - mean[0])
            found.append(
                f"{names[j]} and {names[k]} are in conflict on this text: alone they change the loss by {one:+.3f} and "
                f"{other:+.3f}, together by {both:+.3f} nats a token."
            )
    for line in found:
        warnings.warn(line, stacklevel=2)
    return Conflicts(names, float(mean[0]), alone, interaction, found)

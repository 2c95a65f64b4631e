"""A hinge loss on how far training moves the readout in a bundle's subspace away from the base model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.walking import bundle_layers
from .batches import Batch, Outputs
from .forward import Forward
from .tokens import kl_divergence, wide


@dataclass
class KLClamp:
    """strength_S max(0, sum_k beta_k KL_k - tau), added to the loss of every signal S that has a strength.

    KL_k = KL(softmax(W P_k h) || softmax(W P_k h_off)) in nats, the mean over tokens. Here h and h_off are the final
    states with the bundles on and off, W is the LM head, and P_k projects on the subspace that bundle k writes to in
    the last layer.

    Args:
        model: a causal LM with bundles.
        strength: signal -> factor, > 0.
        tau: the sum of KL up to which there is no penalty, in nats.
        beta: bundle -> weight, > 0. None gives the protected bundles 1.
        tokens: tokens of a batch that are measured, spread evenly. Each costs one readout of the vocabulary per bundle.
        signals: objective -> the signals of its losses.

    Raises:
        ValueError: a number is out of range, or a signal or bundle does not exist.
    """

    model: nn.Module
    strength: Mapping[str, float]
    tau: float = 0.0
    beta: Mapping[str, float] | None = None
    tokens: int = 64
    signals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = [m for m in bundle_layers(self.model) if not m.site.path]
        self._layer = max(layers, key=lambda m: m.index)
        adapters = self._layer.state.configs
        specs = {n: s for c in adapters.values() for n, s in (c.bundles or {}).items()}
        emitted = [s for names in self.signals.values() for s in names]
        if self.beta is None:
            self.beta = {n: 1.0 for n, s in specs.items() if s.protected}
        for name, factors, names in (("strength", self.strength, emitted), ("beta", self.beta, list(specs))):
            if not factors:
                raise ValueError(f"kl_clamp: {name} is empty; name at least one of {names} (or protect a bundle).")
            if unknown := sorted(set(factors) - set(names)):
                raise ValueError(f"kl_clamp: {name} names {unknown}; choose from {names}.")
            if wrong := {k: v for k, v in factors.items() if not v > 0}:
                raise ValueError(f"kl_clamp: {name}={wrong} must be positive.")
        if not self.tau >= 0 or self.tokens < 1:
            raise ValueError(f"kl_clamp: tau={self.tau!r} must be >= 0 and tokens={self.tokens!r} at least 1.")

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], model: nn.Module, signals: Mapping[str, tuple[str, ...]]
    ) -> KLClamp:
        """From the fields strength, tau, beta and tokens in `BundleTrainingConfig.kl_clamp`."""
        if unknown := sorted(set(config) - {"strength", "tau", "beta", "tokens"}):
            raise ValueError(f"kl_clamp has unknown field(s) {unknown}; it takes strength, tau, beta, tokens.")
        if "strength" not in config:
            raise ValueError(
                "kl_clamp: strength is missing; give signal -> factor, such as strength={'preference': 1.0}."
            )
        return cls(model=model, signals=signals, **config)

    def subspace(self, bundle: str) -> Tensor:
        """Orthonormal basis (d, r) of the subspace a bundle writes to behind the last block: its support, or its W's
        span; for a bundle that writes elsewhere, at linear layers, all of it."""
        layer = self._layer
        adapter = next((a for a in layer.bundle_adapters() if bundle in layer.packing(a).names), None)
        if adapter is None:
            head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
            return torch.eye(layer.hidden_size, device=head.weight.device)
        weights = layer.bundle_weights(adapter)[layer.packing(adapter).names.index(bundle)]
        if weights.kind == "full":
            return torch.eye(layer.hidden_size, device=weights.up.device)
        basis = layer.bundle_basis[adapter][:, weights.support]
        if weights.weight is None:
            return basis
        with torch.no_grad():  # KL is measured in the subspace; training must not shrink it by turning the subspace
            return torch.linalg.qr(basis @ weights.weight.detach().to(basis.dtype).T)[0]

    def __call__(
        self, forward: Forward, name: str, outputs: Outputs, batch: Batch, metrics: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Signal -> penalty, a scalar, for the rows of one objective; adds each KL_k and the sum to `metrics`."""
        strengths = {s: self.strength[s] for s in self.signals[name] if s in self.strength}
        if not strengths:
            return {}
        mask = batch["attention_mask"].bool()
        on, off = outputs.hidden[mask], forward.reference(batch).hidden[mask]
        if len(on) > self.tokens:
            chosen = torch.linspace(0, len(on) - 1, self.tokens, device=on.device).long()
            on, off = on[chosen], off[chosen]
        total = on.new_zeros((), dtype=wide(on).dtype)
        for bundle, beta in (self.beta or {}).items():
            kl = self.kl(on, off, bundle, forward)
            metrics[f"clamp_kl/{bundle}"] = kl.detach()
            total = total + beta * kl
        penalty = (total - self.tau).clamp_min(0)
        metrics["clamp"] = penalty.detach()
        return {signal: strength * penalty for signal, strength in strengths.items()}

    def kl(self, on: Tensor, off: Tensor, bundle: str, forward: Forward) -> Tensor:
        """KL_k, a scalar, from final states with bundles on and off, both (N, d)."""
        q, on, off = self.subspace(bundle), wide(on), wide(off)
        read = forward.output_embeddings.weight.to(on.dtype) @ q.to(on.dtype)  # (V, r)
        now, base = ((h @ q.to(h.dtype) @ read.T).log_softmax(-1) for h in (on, off))
        return kl_divergence(now, base).mean()

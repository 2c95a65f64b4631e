"""The forms of a bundle that were tried for issue "learn like LoRA, disturb less": one flat module, winners and losers.

The package has the form that won; this file keeps the others runnable, so that every row of tables.md can be
repeated. One adapter a decoder layer, no routing, no saving:

    x = T(h - mu),    s = x D^T,    delta = act(s) U B

T is the input map that calibration sets (scale, basis, whitening), B the map back to the stream. `Form` names every
choice; `attach` measures what the choices need on calibration text and puts the adapters in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


OUTLIER = 3.0  # as peft_bundles.calibration
BANK = 4096  # states of calibration text kept a layer
DRAW = 512  # of which so many are drawn a step


@dataclass
class Form:
    """One form of the adapter. `budget` is the number of trainable parameters of the whole model to come close to."""

    place: str = "block"  # block | mlp (parallel to it, reads its normed input) | attention (the same)
    input: str = "standard"  # none | centred | standard | rms | next_norm
    whiten: bool = False
    basis: str = "null"  # random | pca | null | shared (null, one for all layers) | identity
    rank: float = 0.5  # R as a fraction of d
    cut: float | None = None  # instead of a rank: the directions that carry this share of the variance, from the bottom
    out: str = "tied"  # tied (U^T) | identity | quiet (directions the output distribution is least sensitive to)
    act: str = "gelu"  # gelu | relu | linear | gated | square | shrink | shrink_both | shrink_square | diag (c x)
    threshold: float = 2.0  # of shrink, in deviations on calibration text
    learn_threshold: bool = False
    freeze_down: bool = False  # random keys, trained values: twice the hidden units
    projector: float = 0.0  # rank of a tied projector W_k (P = W U^T, Q = U W^T) as a fraction of R; 0: none
    bottleneck: float = 0.25  # of the projector's rank
    train_basis: bool = False
    first: float = 0.0  # layers from this share of the depth on ...
    last: float = 1.0  # ... up to this one
    scale: float = 1.0
    ramp: float = 1.0  # times the scale at the first step; from there to the whole scale in a straight line
    quiet: float = 0.0  # weight of the penalty on what the adapter adds on calibration states
    kl: float = 0.0  # weight of the KL to the base on the base's own samples, through the whole model
    metric: str = "kl"  # kl: half delta^T G delta, nats a token; norm: |delta|^2 over the stream's variance
    novelty: float | None = None  # gate that opens above this quantile of the Mahalanobis norm on calibration text
    centre: bool = False  # subtract the mean of what is added on calibration text
    decay: float = 0.0  # AdamW's
    norm_budget: float | None = None  # |delta| at most this share of |h|
    budget: int = 4_884_480
    source: str = "own"  # own | mixture | docstrings | ...
    tokens: int = 20_000


@dataclass
class Statistics:
    """Of one place of one layer, on calibration text: mean (d,), covariance (d, d), states (BANK, d), G (d, d)."""

    mean: Tensor
    covariance: Tensor
    bank: Tensor
    sensitivity: Tensor


class FormLayer(nn.Module):
    """The adapter of one decoder layer."""

    def __init__(
        self,
        form: Form,
        stats: Statistics,
        hidden: int,
        norm_weight: Tensor | None,
        seed: int,
        progress: Tensor,
        shared: Tensor | None,
    ) -> None:
        super().__init__()
        self.form, self.progress = form, progress
        d = stats.mean.shape[0]
        variance = stats.covariance.diagonal().clamp_min(0)
        deviation = variance.sqrt().clamp_min(1e-3 * variance.sqrt().median())
        self.register_buffer("norm_weight", norm_weight)
        scale = deviation if form.input == "standard" else torch.ones_like(deviation)
        mean = torch.zeros_like(stats.mean) if form.input in ("none", "rms") else stats.mean
        correlation = stats.covariance / torch.outer(scale, scale)
        values, vectors = torch.linalg.eigh(correlation.double() if shared is None else shared)
        values, vectors = values.clamp_min(1e-6 * values.max()), vectors
        generator = torch.Generator().manual_seed(seed)
        rank = int(form.rank * d)
        if form.cut is not None:
            rank = int((values.cumsum(0) / values.sum() <= form.cut).sum().clamp_min(8))
        if form.basis in ("null", "shared"):
            values, vectors = values[:rank], vectors[:, :rank]
        elif form.basis == "pca":
            values, vectors = values[-rank:], vectors[:, -rank:]
        elif form.basis == "random":
            vectors = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64)).Q.to(vectors)
            values = (vectors.T @ correlation.double() @ vectors).diagonal()
        else:
            rank, vectors = d, torch.eye(d, dtype=torch.float64, device=vectors.device)
            values = correlation.double().diagonal()
        if form.whiten and form.basis == "identity":
            values, vectors = torch.linalg.eigh(correlation.double())
            values = values.clamp_min(1e-4 * values.max())
        x_map = vectors / scale.double()[:, None]
        if form.whiten:
            x_map = x_map / values.sqrt()
        back = vectors.T
        if form.out == "identity":
            back = torch.eye(d, dtype=torch.float64, device=vectors.device)
        elif form.out == "quiet":
            back = torch.linalg.eigh(stats.sensitivity.double())[1][:, :rank].T
        self.rank, self.hidden = rank, hidden
        self.register_buffer("mean", mean.float())
        self.register_buffer("bank", stats.bank.float())
        self.register_buffer("sensitivity", stats.sensitivity.float())
        self.register_buffer("power", variance.sum().float())
        self.register_buffer("x_covariance", (x_map.T @ stats.covariance.double() @ x_map).float())
        if form.train_basis:
            self.x_map, self.back = nn.Parameter(x_map.float()), nn.Parameter(back.float())
        else:
            self.register_buffer("x_map", x_map.float())
            self.register_buffer("back", back.float())

        def uniform(rows: int, columns: int) -> nn.Parameter:
            bound = columns**-0.5
            return nn.Parameter(((torch.rand(rows, columns, generator=generator) * 2 - 1) * bound).to(mean.device))

        inner = rank
        if form.projector:
            inner = int(form.projector * rank)
            self.W = uniform(inner, rank)
        self.down = uniform(hidden, inner)
        self.down.requires_grad_(not form.freeze_down)
        if form.act.startswith("shrink"):
            self.threshold = nn.Parameter(torch.full((hidden,), form.threshold, device=mean.device))
            self.threshold.requires_grad_(form.learn_threshold)
        self.down2 = uniform(hidden, inner) if form.act == "gated" else None
        out_rows = inner if form.projector else self.back.shape[0]
        self.up = nn.Parameter(torch.zeros(out_rows, hidden, device=mean.device))
        if form.act == "diag":
            self.down, self.up = None, nn.Parameter(torch.zeros(inner, device=mean.device))
        if form.novelty is not None:
            whitened = (stats.bank.float() - stats.mean.float()) @ (
                vectors / scale.double()[:, None] / values.sqrt()
            ).float()
            norms = whitened.square().mean(-1)
            self.register_buffer("white", (vectors / scale.double()[:, None] / values.sqrt()).float())
            self.register_buffer("raw_mean", stats.mean.float())
            self.register_buffer("limit", norms.quantile(form.novelty))
            self.register_buffer("width", (norms.quantile(0.9) - norms.quantile(0.5)).clamp_min(1e-3))

    def forward(self, h: Tensor) -> Tensor:
        """delta for states h (..., d)."""
        form = self.form
        x = h.float()
        if form.input in ("rms", "next_norm"):
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            x = x * self.norm_weight if form.input == "next_norm" else x
        x = (x - self.mean) @ self.x_map
        if form.projector:
            x = x @ self.W.T
        if form.act == "diag":
            return self.limited(x * self.up @ self.back * form.scale, h)
        s = x @ self.down.T
        if form.act.startswith("shrink"):
            deviation = torch.einsum("hr,rq,hq->h", self.down, self.x_covariance, self.down).sqrt()
            s = s / (deviation + 1e-6)
            a = F.relu(s - self.threshold)
            a = a.square() if form.act == "shrink_square" else a
            a = a - F.relu(-s - self.threshold) if form.act == "shrink_both" else a
        elif form.act == "square":
            a = F.relu(s).square()
        elif form.act == "gated":
            a = F.gelu(s) * (x @ self.down2.T)
        else:
            a = {"gelu": F.gelu, "relu": F.relu, "linear": lambda t: t}[form.act](s)
        y = a @ self.up.T
        y = (y @ self.W if form.projector else y) @ self.back * form.scale
        y = y if form.ramp == 1 else y * (form.ramp + (1 - form.ramp) * self.progress)
        if form.novelty is not None:
            norms = ((h.float() - self.raw_mean) @ self.white).square().mean(-1, keepdim=True)
            y = y * torch.sigmoid((norms - self.limit) / (0.25 * self.width))
        return self.limited(y, h)

    def limited(self, y: Tensor, h: Tensor) -> Tensor:
        if self.form.norm_budget is None:
            return y
        limit = self.form.norm_budget * h.float().norm(dim=-1, keepdim=True)
        return y * (limit / (y.float().norm(dim=-1, keepdim=True) + 1e-6)).clamp_max(1.0)

    def delta(self, h: Tensor) -> Tensor:
        y = self(h)
        if self.form.centre:
            y = y - self(self.sample()).mean(0)
        return y.to(h.dtype)

    def sample(self) -> Tensor:
        return self.bank[torch.randint(len(self.bank), (DRAW,), device=self.bank.device)]

    def penalty(self) -> Tensor:
        y = self(self.sample()).float()
        if self.form.centre:
            y = y - y.mean(0)
        if self.form.metric == "kl":
            return 0.5 * ((y @ self.sensitivity) * y).sum(-1).mean()
        return y.square().sum(-1).mean() / self.power


def _states(module_args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, place: str) -> tuple[Tensor, Tensor]:
    """What an adapter at this place reads, and what it adds to."""
    out = output[0] if isinstance(output, tuple) else output
    if place == "block":
        return out, out
    return (module_args[0] if module_args else kwargs["hidden_states"]), out


def _spot(block: nn.Module, place: str) -> nn.Module:
    return {"block": block, "mlp": block.mlp, "attention": block.self_attn}[place]  # type: ignore[dict-item,union-attr,return-value]


def measure(model: Any, rows: Tensor, form: Form) -> list[Statistics]:
    """Statistics of every layer on token rows (N, T): one forward and one backward a batch.

    The sensitivity G is the mean outer product of the gradient of the log-likelihood of labels that the model itself
    samples (the Fisher matrix of the output distribution with respect to this state). Half delta^T G delta is, to
    second order, the KL that adding delta at one token costs.
    """
    blocks = model.model.layers
    d = model.config.hidden_size
    device = rows.device
    n = len(blocks)
    zero = lambda *shape: [torch.zeros(*shape, dtype=torch.float64, device=device) for _ in range(n)]  # noqa: E731
    total, outer, fisher = zero(d), zero(d, d), zero(d, d)
    kept = [0] * n
    banks: list[list[Tensor]] = [[] for _ in range(n)]
    caught: dict[int, tuple[Tensor, Tensor]] = {}
    batches = rows.split(16)
    want = -(-BANK // len(batches))

    def hook(index: int) -> Any:
        def inner(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            reads, adds = _states(args, kwargs, output, form.place)
            adds.retain_grad()
            caught[index] = reads.detach(), adds

        return inner

    handles = [_spot(b, form.place).register_forward_hook(hook(i), with_kwargs=True) for i, b in enumerate(blocks)]
    generator = torch.Generator(device=device).manual_seed(0)
    embeddings = model.get_input_embeddings()
    for batch in batches:
        inputs = embeddings(batch).detach().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(inputs_embeds=inputs, use_cache=False).logits
        logprobs = logits.float().log_softmax(-1)
        noise = torch.rand(logprobs.shape[:-1], generator=generator, device=device)[..., None]
        labels = (logprobs.detach().exp().cumsum(-1) < noise).sum(-1).clamp_max(logprobs.shape[-1] - 1)
        logprobs.gather(-1, labels[..., None]).sum().backward()
        for index, (reads, adds) in caught.items():
            states, grads = reads[:, 1:].reshape(-1, d).double(), adds.grad[:, 1:].reshape(-1, d).double()
            norms = states.norm(dim=-1)
            keep = norms <= OUTLIER * norms.median()
            states, grads = states[keep], grads[keep]
            if form.input in ("rms", "next_norm"):
                weight = _norm_weight(model, index, form)
                banks[index].append(states[:want].clone())
                states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)
                states = states * weight if weight is not None else states
            else:
                banks[index].append(states[torch.randperm(len(states), generator=generator, device=device)[:want]])
            total[index] += states.sum(0)
            outer[index] += states.T @ states
            fisher[index] += grads.T @ grads
            kept[index] += len(states)
        caught.clear()
    model.zero_grad(set_to_none=True)
    for handle in handles:
        handle.remove()
    found = []
    for index in range(n):
        mean = total[index] / kept[index]
        covariance = outer[index] / kept[index] - torch.outer(mean, mean)
        bank = torch.cat(banks[index])[:BANK]
        found.append(Statistics(mean, covariance, bank, fisher[index] / kept[index]))
    return found


def _norm_weight(model: Any, index: int, form: Form) -> Tensor | None:
    if form.input != "next_norm":
        return None
    layers = model.model.layers
    norm = layers[index + 1].input_layernorm if index + 1 < len(layers) else model.model.norm
    return norm.weight.detach().clone()


def attach(
    model: Any,
    rows: Tensor,
    form: Form,
    seed: int,
    statistics: list[Statistics] | None = None,
    progress: Tensor | None = None,
) -> nn.ModuleList:
    """Freeze the model, put a `FormLayer` at every chosen layer, and return them. `progress`: (), for `ramp`."""
    done = torch.ones((), device=rows.device) if progress is None else progress
    statistics = statistics if statistics is not None else measure(model, rows, form)
    model.requires_grad_(False)
    d, n = model.config.hidden_size, len(model.model.layers)
    chosen = [i for i in range(n) if form.first <= i / n < form.last]

    shared = None
    if form.basis == "shared":
        deviations = [stats.covariance.diagonal().clamp_min(1e-12).sqrt() for stats in statistics]
        parts = [stats.covariance / torch.outer(d, d) for stats, d in zip(statistics, deviations)]
        shared = torch.stack(parts).mean(0).double()

    def make(hidden: int, index: int) -> FormLayer:
        norm_weight = _norm_weight(model, index, form)
        return FormLayer(form, statistics[index], hidden, norm_weight, 1_000 * seed + index, done, shared)

    def size(hidden: int) -> int:
        # One layer is enough, but for a spectrum cut, where ranks differ.
        layers = chosen if form.cut is not None else chosen[:1]
        return (
            sum(p.numel() for i in layers for p in make(hidden, i).parameters() if p.requires_grad)
            * len(chosen)
            // len(layers)
        )

    one, two = size(8), size(16)  # linear in the hidden units, but for a projector
    if form.act == "diag":
        hidden = 0
    elif form.projector:
        hidden = max(8, int(form.bottleneck * form.projector * form.rank * d))
    else:
        hidden = max(8, round((form.budget - (2 * one - two)) / ((two - one) / 8)))
    layers = nn.ModuleList()
    for index in chosen:
        layer = make(hidden, index).to(next(model.parameters()).device)
        layers.append(layer)

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, layer: FormLayer = layer) -> Any:
            reads, adds = _states(args, kwargs, output, form.place)
            out = adds + layer.delta(reads)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        _spot(model.model.layers[index], form.place).register_forward_hook(hook, with_kwargs=True)
    return layers


def penalty(layers: nn.ModuleList) -> Tensor:
    """Sum of the layers' penalties; under the "kl" metric an estimate of the KL to the base, in nats a token."""
    return torch.stack([layer.penalty() for layer in layers]).sum()  # type: ignore[operator]

"""Calibration: measure the states of the base model once, before training.

Behind blocks it sets mu and sigma, and U where the config asks for directions of high or low variance. At linear layers
it keeps a sample of their inputs. Like EVA for LoRA (PEFT's `initialize_lora_eva_weights`), it needs only forward
passes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer

from .config import BundleConfig
from .core.attaching import own_config
from .core.basis import choose_basis, fingerprint
from .core.generation import own_distribution
from .core.layer import BundleLayer
from .core.linears import LinearBundles
from .core.walking import adapter_layers, basis_layers, measured, resolve_adapter, state_of


SAMPLED = 64  # rows of own samples made together: on a CPU a token costs a look at all weights, for 8 rows as for 64
STATES = 4096  # states kept behind a block for `BundleModel.quiet_loss`
INPUTS = 2048  # inputs kept at a linear layer for the same
OUTLIER = 3.0  # a token whose state is this many times longer than the median is an attention sink, and is left out


class _Moments:
    """Sums over the states of one layer, in float64, and a sample of the states.

    Attributes:
        seen: number of states. kept: number of states that are not outliers.
        sum: sum of the states, (d,). square: sum of their squares (d,), or with `outer` of their outer products (d, d).
    """

    def __init__(self, size: int, outer: bool, device: torch.device, tokens: int) -> None:
        self.tokens, self.sample = tokens, list[Tensor]()
        self.kept = self.seen = 0
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.square = torch.zeros(*((size, size) if outer else (size,)), dtype=torch.float64, device=device)
        self.outer = outer

    def add(self, states: Tensor) -> None:
        """states: (N, d)."""
        states = states.double()
        norms = states.norm(dim=-1)
        kept = states[norms <= OUTLIER * norms.median()]
        self.seen += len(states)
        self.kept += len(kept)
        self.sum += kept.sum(0)
        self.square += kept.T @ kept if self.outer else kept.square().sum(0)
        # Take the same share of every batch, so that the sample covers all kinds of text.
        self.sample.append(_spread(kept, math.ceil(STATES * len(states) / self.tokens)).float())

    def states(self) -> Tensor:
        """A sample of about STATES states, (N, d)."""
        return _spread(torch.cat(self.sample), STATES)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """mu (d,), sigma (d,), and with `outer` the correlation matrix (d, d)."""
        mean = self.sum / self.kept
        centred = self.square / self.kept - (torch.outer(mean, mean) if self.outer else mean.square())
        variance = centred.diagonal() if self.outer else centred
        scale = variance.clamp_min(0).sqrt()
        scale = scale.clamp_min(1e-3 * scale.median().clamp_min(1e-12))  # a dead channel must not divide by zero
        return mean, scale, centred / torch.outer(scale, scale) if self.outer else None


class _Inputs:
    """A sample of the inputs of one linear layer, and how long its outputs are.

    Attributes:
        seen, kept: as in `_Moments`. energy: sum of |W v|^2 over the inputs kept, in float64.
    """

    def __init__(self, device: torch.device, tokens: int) -> None:
        self.tokens, self.sample = tokens, list[Tensor]()
        self.kept = self.seen = 0
        self.energy = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """inputs: v, (N, I). outputs: W v, (N, O)."""
        norms = inputs.double().norm(dim=-1)
        inside = norms <= OUTLIER * norms.median()
        kept = inputs[inside]
        self.seen += len(inputs)
        self.kept += len(kept)
        self.energy += outputs[inside].double().square().sum()
        self.sample.append(_spread(kept, math.ceil(INPUTS * len(inputs) / self.tokens)).to(torch.bfloat16))

    def inputs(self) -> Tensor:
        """A sample of about INPUTS inputs, (N, I), bfloat16."""
        return _spread(torch.cat(self.sample), INPUTS)


def _spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spread."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), count)).long().to(rows.device)]


def calibrate(
    model: nn.Module,
    texts: Iterable[str] | None = None,
    tokenizer: Any = None,
    *,
    adapter: str | None = None,
    tokens: int = 20_000,
    max_length: int = 256,
    batch_size: int = 8,
    own_samples: float | None = None,
    states_only: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the states of the base model, and set mu, sigma and (for "pca" and "null") U behind every block.

    It also keeps a sample of the states, and of the inputs of linear layers with bundles, for `BundleModel.quiet_loss`,
    which penalises what bundles add there. Run it once, after `get_peft_model` and before training. Bundles are off
    while it runs.

    Args:
        model: a model with a fresh bundle adapter.
        texts: strings that the bundles must not disturb, as varied as possible. None: text that the base model
            generates.
        tokenizer: tokenizes `texts`. Without texts only its start token is used, and only if the model's config has
            none.
        adapter: name of the adapter. None: the only one.
        tokens: total number of tokens to measure.
        max_length: tokens per sequence; longer texts are truncated.
        batch_size: sequences per forward pass.
        own_samples: share of the tokens that the base model generates, in [0, 1]. None: 0 with texts, 1 without.
        states_only: keep mu, sigma and U, and only sample new states. Use it to train a loaded adapter further.
        seed: seed of the text that the base model generates.
        progress: show a progress bar.

    Returns:
        `{"tokens": ..., "source": ..., "outliers": ...}`: the number of tokens, their source, and the share left out as
        outliers. It is also saved as `config.calibration`.

    Raises:
        ValueError: no such adapter, or several adapters and none named; an adapter without bundles; texts without a
            tokenizer; texts that are not strings; too few tokens.
        RuntimeError: the adapter has been trained, so its weights would be wrong in another basis.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, calibrate
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> model = get_peft_model(base, BundleConfig(preset="ssl_rl_separate", task_type="CAUSAL_LM"))
        >>> result = calibrate(model, tokens=256, max_length=32, progress=False)
        >>> result["tokens"], result["source"]
        (256, "the base model's own samples")
    """
    adapter = resolve_adapter(model, adapter)
    config, every = state_of(model).configs[adapter], adapter_layers(model, adapter)
    layers = basis_layers(model, adapter)
    linears = [layer for layer in every if isinstance(layer, LinearBundles)]
    if not config.bundles:
        raise ValueError(f"adapter {adapter!r} has no bundles, so there is nothing to calibrate; leave calibrate out.")
    if not states_only and any(is_trained(layer, adapter) for layer in layers):
        raise RuntimeError(
            f"adapter {adapter!r} has been trained, and its weights fit only its current basis. Calibrate a fresh "
            "adapter, or pass states_only=True to train this one further."
        )
    own = own_samples if own_samples is not None else float(texts is None)
    if not 0.0 <= own <= 1.0 or (texts is None and own < 1.0):
        raise ValueError(f"own_samples={own_samples!r} must be in [0, 1]; without texts, leave it out or set it to 1.")
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of texts.")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    if texts is not None and not callable(tokenizer):
        raise ValueError(f"texts need a tokenizer, and tokenizer is {tokenizer!r}; pass the model's as tokenizer=.")
    for field, number in (("tokens", tokens), ("max_length", max_length), ("batch_size", batch_size)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{field}={number!r} must be a whole number of at least 1.")
    outer = config.basis_init != "random" and not states_only and bool(layers)
    if outer and tokens < layers[0].hidden_size:
        raise ValueError(
            f"tokens={tokens} is too few for a {layers[0].hidden_size}-dimensional covariance; give at least "
            f"{layers[0].hidden_size}, preferably ten times as many."
        )

    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or max_length  # type: ignore[union-attr,operator]
    max_length = min(max_length, positions)
    device = next(model.parameters()).device
    device = every[0].device_of(adapter) if device.type == "meta" else device  # accelerate offloads the base
    moments = {
        layer.site: _Moments(layer.hidden_size, outer, layer.bundle_mean[adapter].device, tokens) for layer in layers
    }
    inputs = {layer.site: _Inputs(layer.device_of(adapter), tokens) for layer in linears}
    measures: list[_Moments | _Inputs] = [*moments.values(), *inputs.values()]
    share = round(own * tokens)
    sources = [
        (share, _own_samples(model, tokenizer, share, max_length, batch_size, seed, device, progress)),
        (tokens - share, _tokenised(texts or (), tokenizer, max_length, batch_size, device)),
    ]
    options: dict[str, Any] = {"use_cache": False}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        options["logits_to_keep"] = 1  # logits are not needed, and the head is a third of a small model
    seen = 0
    with (
        _measuring(model, {layer.get_base_layer(): m for layer, m in zip([*layers, *linears], measures)}) as mask,
        tqdm(total=tokens, unit="token", desc="calibrate", disable=not progress) as bar,
    ):
        for wanted, batches in sources:
            before = seen
            for batch in batches if wanted else ():
                mask.append(batch["attention_mask"].bool())
                model(**batch, **options)
                mask.clear()
                step = int(batch["attention_mask"].sum())
                seen += step
                bar.update(min(step, tokens - bar.n))
                if seen - before >= wanted:
                    break
    if silent := [str(site) for site, kept in inputs.items() if not kept.seen]:
        raise ValueError(
            f"the linear layers {silent} were never called: this model uses their weights without calling them, so "
            "bundles cannot act there. Give their bundles another place."
        )
    if min(m.kept for m in measures) < 2:
        raise ValueError("calibration saw no usable token: the texts are empty; give texts with words in them.")
    if outer and (few := min(m.kept for m in moments.values())) < layers[0].hidden_size:
        raise ValueError(
            f"{few} tokens are too few for a {layers[0].hidden_size}-dimensional covariance; give texts of at least "
            f"{layers[0].hidden_size} tokens in all, preferably ten times as many."
        )

    for layer in layers:
        if not states_only:
            _set_statistics(layer, adapter, config, moments[layer.site])
        layer.keep_states(adapter, moments[layer.site].states())
    for earlier, linear in zip([None, *linears], linears):
        kept = inputs[linear.site]
        sample = kept.inputs()
        if earlier is not None and torch.equal(sample, earlier.bundle_states[adapter]):
            sample = earlier.bundle_states[adapter]  # query, key and value, or gate and up, read the same
        linear.keep_inputs(adapter, sample, kept.energy / kept.kept)
    if states_only:
        return dict(config.calibration or {})
    config = own_config(model, adapter)
    config.calibration = {
        "tokens": seen,
        "source": " and ".join(
            source for source, used in (("given texts", own < 1.0), ("the base model's own samples", own > 0.0)) if used
        ),
        "outliers": 1 - sum(m.kept for m in measures) / sum(m.seen for m in measures),
    }
    prints = {str(layer.index): fingerprint(layer.bundle_basis[adapter]) for layer in layers}
    config.basis_fingerprint = prints or None
    config.provenance = None  # it described an earlier basis
    return dict(config.calibration)


def _set_statistics(layer: BundleLayer, adapter: str, config: BundleConfig, moments: _Moments) -> None:
    """Set mu, sigma and, where the config asks for it, U."""
    mean, scale, correlation = moments.statistics()
    layer.bundle_mean[adapter], layer.bundle_scale[adapter] = mean.float(), scale.float()
    if correlation is not None:
        basis = layer.bundle_basis[adapter]
        chosen = choose_basis(correlation, basis.shape[1], config.basis_init, config.basis_seed, layer.index)
        layer.bundle_basis[adapter] = chosen.to(basis.device)


def is_trained(layer: BundleLayer, adapter: str) -> bool:
    """Whether the last map of some bundle is no longer zero."""
    return any(bool(weight.detach().any()) for weight in layer.bundle_up[adapter].values())


@contextmanager
def _measuring(model: nn.Module, measures: Mapping[nn.Module, _Moments | _Inputs]) -> Iterator[list[Tensor]]:
    """Run the `with` block in eval mode, without bundles or gradients, and measure blocks and linear layers.

    Yields a list. While it holds the mask (B, T) of a batch, what the modules compute is added to their `measures`.
    """
    mask: list[Tensor] = []

    def measure(kept: _Moments | _Inputs) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not mask:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            chosen = mask[0].to(hidden.device)
            chosen = chosen if hidden.shape[:2] == chosen.shape else chosen.flatten()
            if isinstance(kept, _Moments):
                kept.add(hidden[chosen])
            elif len(hidden) == len(chosen):  # not of an expert, which sees some of the tokens only
                inputs = args[0] if args else kwargs["input"]
                kept.add(inputs[chosen].flatten(0, -2), hidden[chosen].flatten(0, -2))

        return hook

    handles = [module.register_forward_hook(measure(kept), with_kwargs=True) for module, kept in measures.items()]
    try:
        with measured(model):
            yield mask
    finally:
        for handle in handles:
            handle.remove()


def _tokenised(
    texts: Iterable[str], tokenizer: Any, max_length: int, batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    rows: list[list[int]] = []
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"texts holds a {type(text).__name__}; give strings, e.g. [row['text'] for row in dataset]."
            )
        ids = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        rows += [ids] if len(ids) else []
        if len(rows) == batch_size:
            yield padded(rows, pad, device)
            rows = []
    if rows:
        yield padded(rows, pad, device)


def padded(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def own_samples(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    tokens: int = 20_000,
    max_length: int = 256,
    batch_size: int = 8,
    seed: int = 0,
    start: list[int] | None = None,
) -> list[dict[str, list[int]]]:
    """Sample text from the base model, with bundles off and at temperature 1.

    `calibrate` measures such text when it gets no other. On such text `objectives.Anchor` keeps the model close to the
    base model.

    Args:
        model: a model with bundles.
        tokenizer: used only for the start token, if the model's config has none.
        tokens: total number of tokens, rounded up to whole batches.
        max_length: tokens per row.
        batch_size: the number of rows is a multiple of it.
        seed: seed of the sampling.
        start: token ids that every sample starts with. None: the start token.

    Returns:
        A list of rows `{"input_ids": [...]}`.

    Raises:
        ValueError: the model has no bundles.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, own_samples
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> model = get_peft_model(base, BundleConfig(task_type="CAUSAL_LM"))
        >>> rows = own_samples(model, tokens=32, max_length=8, batch_size=4)
        >>> len(rows), len(rows[0]["input_ids"])
        (4, 8)
    """
    state_of(model)  # raises ValueError if there are no bundles
    device = next(model.parameters()).device
    with _measuring(model, {}):
        batches = list(_own_samples(model, tokenizer, tokens, max_length, batch_size, seed, device, start=start))
    return [{"input_ids": row} for batch in batches for row in batch["input_ids"].tolist()]


class _Steps(BaseStreamer):
    """A progress bar over the tokens that `generate` makes for all rows at once."""

    def __init__(self, total: int, progress: bool) -> None:
        self.bar = tqdm(total=total, unit="step", desc="sample from the base model", disable=not progress)

    def put(self, value: Tensor) -> None:
        self.bar.update(1)

    def end(self) -> None:
        self.bar.close()


@torch.no_grad()
def plain_samples(model: Any, prompts: Tensor, length: int, progress: bool = False) -> Tensor:
    """Token ids (N, length): the prompts (N, P), continued with samples from the model's own distribution.

    The model's generation settings are overridden: those of instruct models would make all samples alike.
    """
    steps = length - prompts.shape[1]
    ends = model.generation_config.eos_token_id  # suppressed by min_new_tokens
    with own_distribution(model):
        return model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=ends,
            min_new_tokens=steps,
            max_new_tokens=steps,
            streamer=_Steps(steps + 1, progress),  # it gets the prompt too
            pad_token_id=int(prompts[0, 0]),  # never used: all rows have full length
        )


def _own_samples(
    model: Any,
    tokenizer: Any,
    tokens: int,
    max_length: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    progress: bool = False,
    start: list[int] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Batches of text that the base model generates from its start token, or from given ones."""
    config = model.config.get_text_config(decoder=True)
    starts = (config.bos_token_id, getattr(tokenizer, "bos_token_id", None), config.eos_token_id)
    first_token = next((t for t in starts if t is not None), 0)
    start = start or [first_token[0] if isinstance(first_token, list) else first_token]
    cuda = [device] if device.type == "cuda" else []
    rows = math.ceil(tokens / (batch_size * max_length)) * batch_size
    together = max(SAMPLED // batch_size, 1) * batch_size
    for first in range(0, rows, together):
        prompts = torch.tensor([start] * min(together, rows - first), device=device)
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed + first)
            samples = plain_samples(model, prompts, max_length, progress)
        for ids in samples.split(batch_size):
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

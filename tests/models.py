"""Tiny decoder models, one for every kind of block, built without network, and helpers for tests that use them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from peft_bundles import BundleConfig
from peft_bundles.core.layer import BundleLayer


VOCABULARY, HIDDEN, LAYERS, PAD, BOS, EOS = 100, 64, 2, 0, 1, 2

_SHAPE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_GPT = {
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_MIXTRAL = {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}
_OPT = {**_SHAPE, "word_embed_proj_dim": HIDDEN, "ffn_dim": 128, "dropout": 0.0}
_MAMBA = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 8}

# model type -> where its decoder blocks are, and the fields of its config
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.layers", _GROUPED),
    "gpt2": ("transformer.h", _GPT),
    "qwen2": ("model.layers", _GROUPED),
    "gemma2": ("model.layers", {**_GROUPED, "head_dim": 16}),
    "opt": ("model.decoder.layers", _OPT),
    "gpt_neox": ("gpt_neox.layers", _SHAPE),
    "mistral": ("model.layers", _GROUPED),
    "mixtral": ("model.layers", _MIXTRAL),  # a mixture of experts
    "mamba": ("backbone.layers", _MAMBA),  # no attention
    "gptj": ("transformer.h", {**_GPT, "rotary_dim": 8}),  # its blocks return tuples
}

BLOCKS = {name: blocks for name, (blocks, _) in _MODELS.items()}


def tiny(name: str, *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A model of that type with random weights, float32, in eval mode, no dropout; `fields` override its config's.

    It leaves torch's generator at the seed, so that adapters attached next start with the same weights.
    """
    special = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = AutoConfig.for_model(name, **{**special, **_MODELS[name][1], **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    return model


TINY: dict[str, Callable[..., PreTrainedModel]] = {name: partial(tiny, name) for name in _MODELS}


# test_at_linears.py sets it, and runs tests of bundles behind blocks again with the same bundles at other places.
at_linears: bool = False
LINEAR = {
    "b_mlp": {"rank": 3, "place": "all-linear", "kind": "mlp", "signals": {"lm": 1.0}},
    "b_linear": {"rank": 4, "place": "all-linear", "use_rslora": True, "signals": {"policy": 1.0}},
    "b_diag": {"rank": 4, "place": ["block", "all-linear"], "sub_bases": ["right"], "signals": {"lm": 0.5}},
}


def bundle_config(**fields: Any) -> BundleConfig:
    """Three bundles of different kinds that share a part of their support."""
    if at_linears:
        fields = {"bundles": LINEAR, **fields}
    defaults = {
        "sub_bases": {"left": 12, "right": 8},
        "bundles": {
            "b_mlp": {"rank": 8, "sub_bases": ["left"], "signals": {"lm": 1.0}},
            "b_linear": {"rank": 6, "sub_bases": ["left", "right"], "adapter": "linear", "signals": {"policy": 1.0}},
            "b_diag": {"rank": 4, "sub_bases": ["right"], "adapter": "diag", "signals": {"lm": 0.5}},
        },
        "bottleneck": 0.5,
        "task_type": "CAUSAL_LM",
    }
    return BundleConfig(**{**defaults, **fields})


def batch(rows: int = 3, length: int = 9, *, seed: int = 0) -> Tensor:
    """Token ids (rows, length) without special tokens."""
    return torch.randint(EOS + 1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def layers(model: nn.Module) -> list[BundleLayer]:
    return [m for m in model.modules() if isinstance(m, BundleLayer)]


def weights(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The bundle parameters of an adapter by name."""
    return {n: p for n, p in model.named_parameters() if ".bundle_" in n and f".{adapter}." in n}


def perturb(model: nn.Module, adapter: str = "default", *, scale: float = 0.3, seed: int = 0) -> nn.Module:
    """Add noise to an adapter's weights, so that it is not the identity; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    scale = scale / 5 if at_linears else scale  # seven layers of a block instead of one place
    found = weights(model, adapter)
    assert found, f"no bundle of adapter {adapter!r} to perturb"
    for parameter in found.values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


some = pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
every = pytest.mark.parametrize("name", list(TINY))


def reference(name: str) -> PreTrainedModel:
    """The base model as PEFT leaves it: frozen (Mamba takes another kernel then, which rounds differently)."""
    return TINY[name]().requires_grad_(False)


def attached(name: str = "llama", adapter: str = "default", **fields: Any) -> PeftModel:
    """A tiny model with an adapter that is not the identity."""
    return perturb(get_peft_model(TINY[name](), bundle_config(**fields), adapter_name=adapter), adapter).eval()


def two_adapters(name: str = "llama") -> PeftModel:
    """Adapters "one" (active) and "two", of different shape and weights."""
    model = attached(name, "one")
    model.add_adapter("two", bundle_config(bundles={"b_other": {"rank": 5, "sub_bases": ["right"]}}))
    return perturb(model, "two", scale=0.5, seed=1).eval()


def generated(model: nn.Module, ids: Tensor, **kwargs: Any) -> Any:
    """Five greedy tokens."""
    fixed = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    return model.generate(input_ids=ids, **{**fixed, **kwargs})


def train(model: nn.Module, *, steps: int = 4) -> list[float]:
    """The losses of some AdamW steps on one batch."""
    ids = batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def quietly_loaded(base: nn.Module, folder: Path, **kwargs: Any) -> PeftModel:
    """PEFT warns of tensors that a checkpoint lacks; a good one must not give that warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return PeftModel.from_pretrained(base, folder, **kwargs)


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in tensors.items()}


def unchanged(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    return before.keys() == now.keys() and all(torch.equal(before[k], now[k]) for k in before)

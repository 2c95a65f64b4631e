"""The models that benchmarks/speed.py times, and the memory they take: Llama shapes of random weights, with adapters.

Cells of a shape share the base model's weights. Bundles share one support of 0.75 d columns, and their hidden units add
up to LoRA r16's trainable parameters, however many bundles there are. Their calibration is made up: random numbers, and
one U for all layers.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import tempfile
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_bundles.core.bases
from peft_bundles import BundleConfig, BundleLayer
from peft_bundles.calibration import INPUTS
from peft_bundles.core.linears import LinearBundles


CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# hidden size, feed-forward, layers, heads, key-value heads, vocabulary
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 256),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "360m": (960, 2560, 32, 15, 5, 49152),
    "1.2b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
}
SIGNALS = ("lm", "preference", "policy", "value")
PLACES = {"mlp": ["gate_proj", "up_proj", "down_proj"], "out": ["o_proj", "down_proj"]}


def memory() -> float:
    """GiB in use now, without what is free to be given back; `peak` counts anew from here."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: its mark of the most resident memory goes down to now
    return resident("VmRSS")


def peak() -> float:
    """The most GiB in use since `memory` was called: on the GPU, or of this process."""
    return torch.cuda.max_memory_allocated() / 2**30 if CUDA else resident("VmHWM")


def resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


@cache
def some_basis(hidden_size: int, rank: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(hidden_size, rank, device=DEVICE)).Q.cpu().contiguous()


# Drawn in float64 on the CPU as it is, U takes longer than what is measured. (`load_adapter` draws none.)
peft_bundles.core.bases.draw_basis = lambda hidden_size, rank, seed, layer: some_basis(hidden_size, rank)


def lora_parameters(rank: int, shape: str) -> int:
    """Trainable parameters a layer of LoRA on all linears."""
    d, ff, _, heads, kv, _ = SHAPES[shape]
    side = d // heads * kv
    return rank * (2 * (d + d) + 2 * (d + side) + 3 * (d + ff))


def rank_at(place: str, shape: str) -> int:
    """The rank at the linear layers of a place that has LoRA r16's trainable parameters."""
    d, ff = SHAPES[shape][:2]
    return lora_parameters(16, shape) // {"mlp": 3 * (d + ff), "out": 2 * d + d + ff}[place]


def shared_out(total: int, count: int) -> tuple[list[int], list[tuple[str, ...]]]:
    """Hidden units of each bundle, and the signals that own it."""
    total = max(total, count)
    sizes = [total // count + (k < total % count) for k in range(count)]
    owned = [SIGNALS[k::count] if count < len(SIGNALS) else (SIGNALS[k % len(SIGNALS)],) for k in range(count)]
    return sizes, owned


def bundles(count: int, shape: str, quiet: float = 10.0, place: str | None = None) -> BundleConfig:
    if place is not None:
        sizes, owned = shared_out(rank_at(place, shape), count)
        return BundleConfig(
            task_type="CAUSAL_LM",
            place=PLACES[place],
            quiet=quiet,
            bundles={
                f"b_{k}": {"rank": r, "signals": dict.fromkeys(s, 1.0)} for k, (r, s) in enumerate(zip(sizes, owned))
            },
        )
    support = SHAPES[shape][0] * 3 // 4
    sizes, owned = shared_out(lora_parameters(16, shape) // (2 * support), count)
    return BundleConfig(
        task_type="CAUSAL_LM",
        sub_bases={"main": support},
        quiet=quiet,
        bundles={
            f"b_{k}": {"rank": support, "bottleneck": b, "sub_bases": ["main"], "signals": dict.fromkeys(s, 1.0)}
            for k, (b, s) in enumerate(zip(sizes, owned))
        },
    )


@cache
def base_model(shape: str) -> LlamaForCausalLM:
    d, ff, layers, heads, kv, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=d,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM._from_config(config, dtype=DTYPE).requires_grad_(False)


def xlora(shape: str, lora: LoraConfig) -> XLoraConfig:
    folder = tempfile.mkdtemp()  # X-LoRA reads its experts from files
    get_peft_model(copied(shape), lora).save_pretrained(folder)
    experts = {str(k): folder for k in range(4)}
    hidden = SHAPES[shape][0]
    return XLoraConfig(task_type="CAUSAL_LM", hidden_size=hidden, adapters=experts, use_trainable_adapters=True)


def copied(shape: str) -> Any:
    """The base model as modules of its own around the same weights."""
    base = base_model(shape)
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def calibrated(model: Any) -> Any:
    """As `calibrate` leaves a model, with made-up numbers."""
    model.peft_config["default"].calibration = {"tokens": 0, "source": "made up", "outliers": 0.0}
    for layer in model.modules():
        if isinstance(layer, LinearBundles):
            inputs = torch.randn(INPUTS, layer.in_features, device=DEVICE)
            layer.keep_inputs("default", inputs, torch.tensor(float(layer.out_features), device=DEVICE))
        elif isinstance(layer, BundleLayer) and layer.holds("default"):
            layer.bundle_mean["default"].normal_(0, 0.1)
            layer.keep_states("default", torch.randn(4096, layer.hidden_size, device=DEVICE))
    return model


def built(shape: str, name: str, inference: bool = False) -> Any:
    """The model of a cell; its adapter is float32, in inference of the base model's dtype."""
    model = copied(shape)
    kind, _, size = name.partition("_")
    autocast = not inference
    if kind == "lora":
        count, where = 1, PLACES.get(size, "all-linear")
        if size in PLACES:
            rank = rank_at(size, shape)
        else:
            count, rank = (int(n) for n in size.split("x")) if "x" in size else (1, int(size[1:]))
        config = LoraConfig(r=rank, target_modules=where, task_type="CAUSAL_LM")
        model = get_peft_model(model, config, autocast_adapter_dtype=autocast)
        for k in range(1, count):
            model.add_adapter(f"a{k}", copy.deepcopy(config), autocast_adapter_dtype=autocast)
        if count > 1:
            model.base_model.set_adapter(["default", *(f"a{k}" for k in range(1, count))])
    elif kind == "xlora":
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model.config.use_cache = False  # X-LoRA asks for it: its scalings come from a forward of their own
        model = get_peft_model(model, xlora(shape, lora))
    elif kind == "bundles":
        place = next((p for p in PLACES if size.startswith(p)), None)
        count, _, quiet = size.removeprefix(f"{place}_").partition("_quiet")
        config = bundles(int(count), shape, float(quiet or 10.0), place)
        model = get_peft_model(model, config, autocast_adapter_dtype=autocast)
        calibrated(model)
    return model.eval() if inference else model.train()


adapted = cache(built)  # for sections that can share a model


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def precision() -> Any:
    return torch.autocast("cuda", torch.bfloat16) if CUDA else nullcontext()


def tokens(shape: str, rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, SHAPES[shape][-1], (rows, length), device=DEVICE)

"""Bundles of kind "lora" as plain LoRA checkpoints of PEFT, and LoRA checkpoints as bundles. Both are exact."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from ..config import BundleConfig
from ..core.base import PEFT_PREFIX, base_shape
from ..core.checkpoints import Checkpoint, linear_site, plain_name, read_tensors, write
from ..core.gates import parse_alphas
from ..core.merge import check_linear
from ..core.places import CHILD, Site
from ..core.walking import active_adapters, adapter_layers, state_of
from ..specs import BundleSpec
from .cards import write_card
from .hub import lora_folder


# What a LoRA may have besides its two maps, and bundles have not: field of the config -> what it is called.
OTHER_LORA = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "target_parameters",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer_replication",
}
ON_ANOTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights that change the base


def to_lora(model: nn.Module, alphas: Mapping[str, Any] | None, folder: str | Path) -> Path:
    """Save the bundles that are on, at fixed alphas, as one plain LoRA checkpoint.

    Plain PEFT and vLLM load it, without this package: the ranks of all bundles side by side, their alphas and scales
    multiplied into B. It computes what the model computes, to rounding: in float64 within 1e-10, in bfloat16 within 2%
    of the norm of what the bundles change, since B is rounded once more.

    A router or keys are lost: in the export every bundle speaks all the time, at the alpha given here.

    Args:
        model: a model with bundles of kind "lora" at linear layers; all active adapters are exported together.
        alphas: bundle -> a number, or one number for each layer. Bundles not named keep their present alpha. A bundle
            at 0 is left out. {} or None: the present alphas.
        folder: folder to write `adapter_config.json` and `adapter_model.safetensors` to.

    Returns:
        The folder.

    Raises:
        ValueError: a bundle that is on is not linear (another kind, or behind blocks), an alpha differs between rows or
            tokens, all bundles are off, a norm budget is set, or an adapter trains other modules.

    Example:
        >>> import copy, tempfile
        >>> from peft import PeftModel, get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, to_lora
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> config = BundleConfig(bundles={"b_code": {"rank": 4, "place": "mlp"}}, task_type="CAUSAL_LM")
        >>> model = get_peft_model(copy.deepcopy(base), config)
        >>> folder = tempfile.TemporaryDirectory()
        >>> lora = PeftModel.from_pretrained(base, to_lora(model, {"b_code": 0.5}, folder.name))
        >>> lora.peft_config["default"].peft_type.value, lora.peft_config["default"].r
        ('LORA', 4)
        >>> folder.cleanup()
    """
    state, adapters = state_of(model), active_adapters(model)
    if os.path.isfile(folder):
        raise ValueError(f"folder={str(folder)!r} is a file; give a folder.")
    if state.budget is not None:
        raise ValueError("a norm budget is set, and LoRA has none; call set_norm_budget(model, None) first.")
    if other := [a for a in adapters if state.configs[a].modules_to_save or not state.configs[a].bundles]:
        raise ValueError(f"adapter(s) {other} train other modules too (modules_to_save, or the base model itself).")
    by_layer = {n: v for n, v in (alphas or {}).items() if isinstance(v, (list, tuple))}
    given = parse_alphas({n: v for n, v in (alphas or {}).items() if n not in by_layer}, state)
    given |= parse_alphas(by_layer, state, per="layer")
    given = {**state.set_alphas, **state.call.alphas, **given}
    current = {name: given.get(name) for name in state.bundle_names()}
    if varying := [name for name, value in current.items() if isinstance(value, Tensor)]:
        raise ValueError(
            f"the alphas of {varying} differ between rows or tokens; give one number, or one for each layer."
        )
    down: dict[str, list[Tensor]] = {}
    up: dict[str, list[Tensor]] = {}
    modules = {id(module): name for name, module in model.named_modules()}
    for adapter in adapters:
        config = state.configs[adapter]
        layers: list[Any] = adapter_layers(model, adapter)
        for layer in layers:
            for bundle in layer.packing(adapter).names:
                value = current[bundle] if current[bundle] is not None else config.bundles[bundle].alpha  # type: ignore[index]
                alpha = value[layer.index] if isinstance(value, tuple) else value
                if not alpha:
                    continue
                check_linear(layer, config, bundle, "cannot be exported")
                path = plain_name(modules[id(layer)]).removeprefix(PEFT_PREFIX).removesuffix(f".{CHILD}")
                scale = layer.packing(adapter).scales[bundle] * float(alpha)
                reads, writes = layer.bundle_down[adapter][bundle].detach(), layer.bundle_up[adapter][bundle].detach()
                used = reads.any(1) | writes.any(1)
                used[0] |= not used.any()  # ranks of zeros, as from_lora pads with, are left out, but one is kept
                down.setdefault(path, []).append(reads[used])
                up.setdefault(path, []).append(writes[used].T * scale)
    if not down:
        raise ValueError(
            f"all bundles are off, so there is nothing to export; give alphas such as {{{next(iter(current))!r}: 1.0}}."
        )
    ranks = {path: sum(len(each) for each in parts) for path, parts in down.items()}
    usual = max(ranks.values())
    first = state.configs[adapters[0]]
    lora = LoraConfig(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        r=usual,
        lora_alpha=usual,
        target_modules=sorted(ranks),
        rank_pattern={path: rank for path, rank in ranks.items() if rank != usual},
        alpha_pattern={path: rank for path, rank in ranks.items() if rank != usual},
        inference_mode=True,
    )
    tensors = {}
    for path in ranks:
        tensors[f"{PEFT_PREFIX}{path}.lora_A.weight"] = torch.cat(down[path]).cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{path}.lora_B.weight"] = torch.cat(up[path], 1).cpu().contiguous()
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        save_file(tensors, os.path.join(staging, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        lora.save_pretrained(staging)
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            os.replace(os.path.join(staging, name), os.path.join(folder, name))
    return Path(folder)


def from_lora(
    source: str | Path,
    folder: str | Path,
    *,
    name: str,
    base_model: nn.Module | None = None,
    signals: Mapping[str, float] | None = None,
    token: str | None = None,
) -> Path:
    """Turn a LoRA checkpoint of PEFT into a bundle folder, which `compose` and `load_bundle` take.

    Args:
        source: a folder, or a Hub repository ("repo" or "repo@revision"), with a LoRA adapter in safetensors.
        folder: folder to write the bundle to.
        name: name of the bundle.
        base_model: the model that the LoRA belongs to. None: its config is read from `base_model_name_or_path`.
        signals: as in `BundleSpec`, if the bundle is to be trained further.
        token: Hub token. None: the stored one.

    Returns:
        The folder.

    Raises:
        ValueError: not a LoRA, or one with parts that bundles do not have (DoRA, bias, `modules_to_save`, embeddings,
            trainable tokens, layers outside the decoder blocks, ...); the message names them.

    Example:
        >>> import copy, tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import compose, from_lora
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> folder = tempfile.TemporaryDirectory()
        >>> lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=["q_proj"]))
        >>> lora.save_pretrained(f"{folder.name}/lora")
        >>> bundle = from_lora(f"{folder.name}/lora", f"{folder.name}/bundle", name="b_code", base_model=base)
        >>> compose(base, [bundle]).peft_config["composed_0"].bundles["b_code"].place
        ['self_attn.q_proj']
        >>> folder.cleanup()
    """
    local = lora_folder(source, token)
    config = _lora_config(local, str(source))
    path = os.path.join(local, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        raise ValueError(f"{source} has no {SAFETENSORS_WEIGHTS_NAME}; pickled weights are never loaded. Save it anew.")
    tensors = read_tensors(path, str(source))[0]
    maps: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        head, _, tail = key.removesuffix(".weight").rpartition(".")
        if tail not in ("lora_A", "lora_B") or tensor.dim() != 2 or not key.endswith(".weight"):
            raise ValueError(f"{source} has {key!r}, which is no map of a linear layer; a bundle cannot hold it.")
        maps.setdefault(head, {})[tail] = tensor
    if not maps:
        raise ValueError(f"{source} has no tensors in {SAFETENSORS_WEIGHTS_NAME}; the file is damaged.")
    ranks = {head: len(of.get("lora_A", ())) for head, of in maps.items()}
    largest = max(ranks.values())
    scales = {head: _scale(config, head.removeprefix(PEFT_PREFIX), rank) for head, rank in ranks.items() if rank}
    usual = next((scale for scale in scales.values() if 1e-6 <= scale * largest <= 1e6), 1.0)  # the bundle's
    layers, heads = {}, {}
    for head, of in maps.items():
        if of.keys() != {"lora_A", "lora_B"} or len(of["lora_A"]) != of["lora_B"].shape[1]:
            raise ValueError(f"{source}: lora_A and lora_B of {head!r} do not fit; the file is damaged.")
        site, up = linear_site(head, str(source)), of["lora_B"].T
        if (factor := scales.get(head, usual) / usual) != 1.0:  # in float32 at least: PEFT's product is, too
            up = up.to(torch.promote_types(up.dtype, torch.float32)) * factor
        pad = (0, 0, 0, largest - ranks[head])  # a spec has one rank: rows of zeros change nothing
        layers[site] = {
            f"bundle_down.{name}": nn.functional.pad(of["lora_A"], pad),
            f"bundle_up.{name}": nn.functional.pad(up, pad).contiguous(),
        }
        heads[site] = head if head.startswith(PEFT_PREFIX) else PEFT_PREFIX + head
    shape = _shape_of(config, base_model, token)
    bundle = BundleConfig(
        bundles={
            name: BundleSpec(
                largest,
                place=sorted({site.path for site in layers}),
                kind="lora",
                lora_alpha=usual * largest,
                signals=dict(signals or {}),
            )
        },
        layers_to_transform=_blocks(layers, shape[1]),
        base_shape=shape,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        task_type=config.task_type or "CAUSAL_LM",
    )
    write(Checkpoint(bundle, layers, heads, str(source)), folder)
    return write_card(folder).parent


def _lora_config(folder: str, source: str) -> Any:
    """The config of a LoRA folder, without parts that bundles do not have."""
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        raise ValueError(f"{source} has no {CONFIG_NAME}; give a folder or repository of a LoRA adapter.")
    try:
        kind = json.loads(Path(path).read_text()).get("peft_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{source}: {CONFIG_NAME} is not valid JSON ({error}); the checkpoint is damaged.") from error
    if kind != "LORA":
        raise ValueError(f"{source} is an adapter of type {kind!r}, not LORA; a bundle is made of a LoRA.")
    config: Any = PeftConfig.from_pretrained(folder)
    parts = [called for field, called in OTHER_LORA.items() if getattr(config, field, None)]
    if config.bias != "none" or getattr(config, "lora_bias", False):
        parts.append("bias")
    if parts:
        raise ValueError(f"{source} has {', '.join(parts)}, which bundles do not have; merge it into its base model.")
    init = str(config.init_lora_weights).lower()
    if init.startswith(ON_ANOTHER_BASE):
        raise ValueError(
            f"{source} has init_lora_weights={init!r}, which changes the weights of the base model that its maps are "
            "added to; save it again with PEFT's path_initial_model_for_weight_conversion, or merge it into its base "
            "model."
        )
    return config


def _scale(config: Any, path: str, rank: int) -> float:
    """lora_alpha / r of one layer, as PEFT finds it."""

    def of(pattern: Mapping[str, Any], otherwise: float) -> float:
        return pattern.get(get_pattern_key(list(pattern), path), otherwise)

    alpha = of(config.alpha_pattern or {}, config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _shape_of(config: Any, base_model: nn.Module | None, token: str | None) -> list[int]:
    if base_model is not None:
        return base_shape(base_model)
    if not config.base_model_name_or_path:
        raise ValueError("the LoRA does not name its base model; give it as base_model=.")
    base = AutoConfig.from_pretrained(config.base_model_name_or_path, revision=config.revision, token=token)
    text = base.get_text_config(decoder=True)
    return [text.hidden_size, text.num_hidden_layers]


def _blocks(layers: Mapping[Site, Any], depth: int) -> list[int] | None:
    """Numbers of the blocks, None if they are all; every block has the same linear layers.

    Raises:
        ValueError: one block has other linear layers than the next.
    """
    paths: dict[int, set[str]] = {}
    for site in layers:
        paths.setdefault(site.block, set()).add(site.path)
    if len({frozenset(of) for of in paths.values()}) > 1:
        raise ValueError(
            "the LoRA is on other linear layers in one decoder block than in the next, where a bundle is on the same."
        )
    return sorted(paths) if len(paths) < depth else None

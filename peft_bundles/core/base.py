"""The base model: its decoder blocks, its shape, and a fingerprint of its weights."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from ..config import BundleConfig
from .places import CHILD, Site, bundles_at, check_unplaced, linears_of, place_targets


PEFT_PREFIX = "base_model.model."
SAMPLES = 16  # weights per tensor in the fingerprint
VOCABULARY = 64  # rows of the embeddings in the fingerprint: a larger vocabulary does not change these


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the decoder blocks, in order: those of the outermost list of modules inside the language model.

    Of several lists the one with `num_hidden_layers` entries is taken, then the one of modules that the model says must
    not be split (`_no_split_modules`). Failure modes of simpler rules: the longest list, or the first of the right
    length, may be a vision or audio tower.

    Raises:
        ValueError: no list of blocks, or several that fit; name the blocks with `target_modules`.
    """
    whole = set(getattr(model, "_no_split_modules", None) or ())
    depth = getattr(_text_config(model), "num_hidden_layers", None)
    lists = {n: list(m) for n, m in _language_model(model).items() if isinstance(m, nn.ModuleList) and len(m)}
    lists = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    unsplit = {name: m for name, m in lists.items() if all(type(block).__name__ in whole for block in m)}
    candidates: dict[str, list[nn.Module]] = {}
    for some in ({n: m for n, m in unsplit.items() if len(m) == depth}, unsplit, lists):
        found = {n: m for n, m in some.items() if some is not lists or len(m) == depth}
        found = {n: m for n, m in found.items() if len(found) == 1 or any(marks := _causal_marks(m)) or not marks}
        if len(found) == 1:
            ((name, blocks),) = found.items()
            return [f"{name}.{i}" for i in range(len(blocks))]
        candidates = candidates or found
    raise ValueError(
        f"{f'several lists of blocks ({sorted(candidates)})' if candidates else 'no decoder blocks'} found in "
        f"{type(model).__name__}; name the decoder blocks with target_modules, e.g. a regex such as "
        r"r'.*\.layers\.\d+'."
    )


def _language_model(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the language model by their names in the model; all modules where it is not known."""
    named = dict(model.named_modules())
    decoder: Any = cast(Any, model).get_decoder() if hasattr(model, "get_decoder") else None
    inside = set(decoder.modules()) if isinstance(decoder, nn.Module) else set()
    if not any(isinstance(module, nn.ModuleList) for module in inside):  # a head may be called "decoder", too
        return named
    return {name: module for name, module in named.items() if module in inside}


def _causal_marks(modules: Iterable[nn.Module]) -> list[bool]:
    """`is_causal` of the attention modules that have it."""
    return [bool(m.is_causal) for module in modules for m in module.modules() if hasattr(m, "is_causal")]


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def check_language_model(model: nn.Module) -> None:
    """Refuse models that are not causal language models, with or without other parts, as far as can be told.

    Raises:
        ValueError: an encoder-decoder model, or an encoder.
    """
    config, text = getattr(model, "config", None), _text_config(model)
    what = "but bundles sit on the decoder blocks of a causal language model; give one of AutoModelForCausalLM or such."
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model, {what}")
    if getattr(text, "is_decoder", False) or any(_causal_marks([model])):
        return
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    writes = any(type(c) in mapping for c in (config, text) for mapping in mappings)
    fills_gaps = type(text) in MODEL_FOR_MASKED_LM_MAPPING  # BERT and its kind write with `is_decoder` only
    if fills_gaps or (type(model).__module__.startswith("transformers.") and not writes):
        raise ValueError(f"{type(model).__name__} is an encoder, {what}")


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a model that is a `PeftModel`, or holds one: an adapter around another one could not be loaded again.

    Raises:
        ValueError: it is or holds one.
    """
    if any(isinstance(module, PeftModel) for module in model.modules()):
        raise ValueError(
            "the model is a PeftModel already, and an adapter around it could not be loaded again. For a second "
            "adapter of bundles call model.add_adapter(name, config) on it; for bundles beside LoRA call add_adapter "
            "of the transformers model for each."
        )


@dataclass
class Injection:
    """An adapter that is being attached: its name, its config, and the modules that get its bundles.

    Attributes:
        layers: name of every block that was found -> number of its layer.
        sites: name of every block and linear layer that may get bundles -> where it is in the model.
        bundles: site -> the bundles that sit there.
        matches: name of each of them -> whether it gets bundles, as PEFT reports it (true, false or excluded).
        depth: number of layers of the model.
    """

    adapter: str
    config: BundleConfig | None = None
    layers: dict[str, int] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    bundles: dict[Site, list[str]] = field(default_factory=dict)
    matches: dict[str, Any] = field(default_factory=dict)
    depth: int = 0

    def choose_sites(self, model: nn.Module, config: BundleConfig) -> None:
        """Fill in the sites. A config does not store them: their names differ between an AutoModel and a causal LM.

        Raises:
            ValueError: no blocks found, `target_modules` that are neither blocks nor linear layers inside them, a place
                without linear layers, or layers that the model does not have.
        """
        check_language_model(model)
        matcher = copy.copy(config)
        matcher.layers_to_transform = None  # PEFT would read the numbers as those of submodules
        try:
            layers = {name: number for number, name in enumerate(find_blocks(model))}
        except ValueError:
            if config.target_modules is None:
                raise
            layers = {}
        self.depth = len(layers)
        if config.target_modules is not None:
            names = [name for name, _ in model.named_modules() if name and f".{CHILD}." not in f".{name}."]
            named = [name for name in names if check_target_module_exists(matcher, name)]
            inside = {
                f"{block}.{path}" for block in layers for path in linears_of(model.get_submodule(block))
            }  # linear layers that may get bundles
            leaves = [name for name in named if not any(True for _ in model.get_submodule(name).children())]
            if config.target_modules == "all-linear":
                check_unplaced(config)
                config.place, config.target_modules = "all-linear", None
            elif not named:
                raise ValueError(
                    f"target_modules={config.target_modules!r} fits no module of {type(model).__name__}. Leave it out: "
                    "the blocks are found automatically."
                )
            elif lists := [name for name in named if isinstance(model.get_submodule(name), nn.ModuleList)]:
                raise ValueError(
                    f"target_modules={config.target_modules!r} names {lists[0]}, a list of modules; name those in it, "
                    rf"e.g. target_modules=r'.*\.{lists[0].rpartition('.')[2]}\.\d+'."
                )
            elif leaves or inside.issuperset(named):
                place_targets(config, layers, named)
            else:
                blocks_only = set(named) <= layers.keys()  # then a layer keeps its number, however few are named
                layers = {name: layers[name] if blocks_only else number for number, name in enumerate(named)}
                self.depth = self.depth if blocks_only else len(named)
        numbers, chosen = set(layers.values()), cast("list[int] | None", config.layers_to_transform)
        if chosen is not None and (wrong := sorted(set(chosen) - numbers)):
            raise ValueError(
                f"layers_to_transform has {wrong}, but the layers are {sorted(numbers)}; choose some of these."
            )
        blocks = {number: name for name, number in layers.items() if chosen is None or number in chosen}
        modules = {number: model.get_submodule(name) for number, name in blocks.items()}
        if config.bundles:
            self.bundles = bundles_at(config, modules)
        else:  # plain fine-tuning: empty layers keep the adapter's name
            self.bundles = {Site(number): [] for number in blocks}
        self.sites = {name: Site(number) for name, number in layers.items()}
        named_sites = {blocks[site.block] + (f".{site.path}" if site.path else ""): site for site in self.bundles}
        self.sites |= named_sites
        matcher.target_modules = list(named_sites)
        self.config, self.layers = config, layers
        self.matches = {name: check_target_module_exists(matcher, name) for name in self.sites}
        taken = {name for name, match in self.matches.items() if match}
        if not taken:
            raise ValueError(
                f"layers_to_transform={chosen} and exclude_modules={config.exclude_modules!r} leave no decoder block "
                f"of {len(layers)} and no linear layer for bundles; leave them out, or let them keep one."
            )
        ends = {
            name.removesuffix(f".{CHILD}")
            for name, layer in model.named_modules()
            if name.endswith(f".{CHILD}") and not layer.site.path  # type: ignore[union-attr]
        }
        places = sorted({name for name in taken if not self.sites[name].path} | ends)
        for outer, inner in itertools.combinations(places, 2):
            if inner.startswith(f"{outer}."):
                raise ValueError(
                    f"target_modules={config.target_modules!r}: bundles would sit on {outer} and on {inner} inside it; "
                    "name the decoder blocks alone, for all adapters of the model."
                )
        if _text_config(model) is not getattr(model, "config", None) and not taken <= _language_model(model).keys():
            raise ValueError(
                f"target_modules={config.target_modules!r} names blocks outside of the language model, such as "
                f"{min(taken - _language_model(model).keys())}; name its decoder blocks."
            )


def base_shape(model: nn.Module) -> list[int]:
    """Hidden size and number of layers.

    Raises:
        ValueError: it is not a transformers model.
    """
    if not hasattr(model, "config"):
        raise ValueError(f"{type(model).__name__} has no config; bundles need a transformers model.")
    config: Any = cast(Any, model).config.get_text_config(decoder=True)
    return [config.hidden_size, config.num_hidden_layers]


def check_base(config: BundleConfig, model: nn.Module, what: str = "this adapter") -> None:
    """Refuse an adapter that was made for another base model.

    Args:
        config: config of the adapter. What it does not record about the base model is not compared.
        model: the base model.
        what: how the message calls the adapter.

    Raises:
        ValueError: the base model has another shape, or other weights than those whose fingerprint is in the config.
    """
    check_unwrapped(model)
    name = config.base_model_name_or_path
    if config.base_shape is not None and config.base_shape != (shape := base_shape(model)):
        raise ValueError(
            f"{what} was made for a base model with (hidden size, layers) {tuple(config.base_shape)}, but "
            f"{type(model).__name__} has {tuple(shape)}; load it onto the base model it was trained on"
            + (f" ({name})." if name else ".")
        )
    provenance = config.provenance or {}
    recorded = provenance.get("base") or config.base_fingerprint
    if recorded and (difference := other_base(recorded, model)) is not None:
        revision = f" at revision {provenance['base_revision']}" if provenance.get("base_revision") else ""
        raise ValueError(
            f"{what} was trained on another base model or another revision of it: {difference}. Load "
            f"{name or 'the base model it was trained on'}{revision}."
        )


def _sampled_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The first rows of the embeddings, and the weights of the first, middle and last block."""
    try:
        embeddings: Any = cast(Any, model).get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # transformers does not find those of every model
        embeddings = None
    embeddings = getattr(embeddings, "original_module", embeddings)  # of `modules_to_save`
    if embeddings is not None and getattr(embeddings, "weight", None) is not None:
        yield "embeddings", embeddings.weight[:VOCABULARY]
    try:
        blocks = find_blocks(model)
    except ValueError:  # a model whose blocks the user has to name
        blocks = []
    for number in sorted({0, len(blocks) // 2, len(blocks) - 1} if blocks else ()):
        for name, parameter in model.get_submodule(blocks[number]).named_parameters():
            # LoRA adds ".base_layer" to the name, and `modules_to_save` adds ".original_module".
            yield f"{number}.{name.replace('.base_layer.', '.').replace('original_module.', '')}", parameter


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """A few weights of a model by tensor name, rounded to bfloat16, as hexadecimal bytes.

    They are rounded so that a model has the same fingerprint in float32 and in bfloat16. Quantised tensors, tensors on
    the meta device and adapters are left out.
    """
    sampled = {}
    for name, tensor in _sampled_tensors(model):
        adapter = any(part.startswith(("lora_", "bundle", "modules_to_save")) for part in name.split("."))
        special = type(tensor) not in (Tensor, nn.Parameter)  # quantised, or a shard of the whole
        if adapter or special or not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        flat = tensor.detach().reshape(-1)
        where = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long().to(flat.device)
        sampled[name] = flat[where].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes().hex()
    return sampled


def other_base(recorded: Mapping[str, str], model: nn.Module) -> str | None:
    """How a model differs from the one with the fingerprint `recorded`; None if it does not.

    A tensor differs if more than half of its samples do: float16 and bfloat16 may round a few differently.
    """
    present = base_fingerprint(model)
    if not present:  # all weights are quantised, sharded or not on this machine: there is nothing to compare
        return None
    common = [name for name in recorded if name in present]
    if not common:
        return f"it has none of the tensors that were recorded, such as {next(iter(recorded), None)!r}"

    def differs(name: str) -> bool:
        pairs = [(recorded[name][i : i + 4], present[name][i : i + 4]) for i in range(0, len(present[name]), 4)]
        return sum(a != b for a, b in pairs) > len(pairs) / 2

    different = [name for name in common if differs(name)]
    if not different:
        return None
    return f"{len(different)} of {len(common)} tensors that were compared have other weights, first {different[0]!r}"

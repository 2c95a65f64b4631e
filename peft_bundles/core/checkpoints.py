"""An adapter outside a model: its config and tensors, how they are read and checked, and how they are written."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import BundleConfig
from .base import PEFT_PREFIX
from .basis import (
    FINGERPRINT_TOLERANCE,
    SHARED,
    basis_rank,
    draw_basis,
    fingerprint,
    linear_shapes,
    sub_basis_columns,
    tensor_shapes,
)
from .places import CHILD, Site
from .state import REMEMBERED_WIDTH, Key


logger = logging.getLogger(__name__)
KEYS = "bundle_keys"  # a key of a router is under "bundle_keys.<bundle>.mean" and "... .remembered"
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors itself


@dataclass
class Checkpoint:
    """One adapter: its config and its tensors.

    Attributes:
        config: with `base_shape` and `basis_fingerprint` filled in.
        layers: site -> key ("bundle_up.<bundle>", "bundle_basis", ...) -> tensor (`tensor_shapes`).
        heads: site -> path of its module in the keys of PEFT's files.
        source: where it came from, for messages.
        keys: bundle -> its key for routers; those that have one.
    """

    config: BundleConfig
    layers: dict[Site, dict[str, Tensor]]
    heads: dict[Site, str]
    source: str
    keys: dict[str, Key] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the bundles."""
        return list(self.config.bundles or ())

    @property
    def hidden_size(self) -> int:
        assert self.config.base_shape is not None
        return self.config.base_shape[0]

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors under the keys of PEFT's files."""
        return {
            f"{self.heads[site]}.{CHILD}.{tail}": tensor
            for site, layer in self.layers.items()
            for tail, tensor in layer.items()
        } | named_keys(self.keys)

    def behind_blocks(self) -> dict[int, dict[str, Tensor]]:
        """Number of the block -> its tensors, for the blocks with bundles behind them."""
        return {site.block: layer for site, layer in self.layers.items() if not site.path}


def weights_digest(entries: Mapping[str, Tensor]) -> str:
    """SHA-256 of the bundles' tensors: their bytes, names, layer numbers and dtypes, but not the path of the block."""
    total = hashlib.sha256()
    parts = []
    behind = {key.rpartition(f".{CHILD}.")[0] for key in entries if key.endswith(".bundle_scale")}
    for key, tensor in entries.items():
        head, child, tail = key.rpartition(f".{CHILD}.")
        if child:
            where = ".".join(part for part in head.split(".") if part.isdigit())
            if head not in behind and not head.rpartition(".")[2].isdigit():  # a linear layer
                where = re.sub(r"^.*?\b(\d+\.)", r"\1", head)
            parts.append((f"{where}:{tail}:{tensor.dtype}", tensor))
        elif of_key := key_part(key):
            parts.append((f"{KEYS}:{of_key}:{tensor.dtype}", tensor))
    for name, tensor in sorted(parts, key=lambda part: part[0]):
        total.update(name.encode())
        _update(total, tensor)
    return total.hexdigest()


def named_keys(keys: Mapping[str, Key], prefix: str = PEFT_PREFIX) -> dict[str, Tensor]:
    """The tensors of keys (bundle -> key) under the names that they have in a file."""
    return {f"{prefix}{KEYS}.{b}.{what}": t for b, key in keys.items() for what, t in key.tensors().items()}


def key_part(name: str) -> tuple[str, str] | None:
    """(bundle, "mean" or "remembered") of a tensor that belongs to a key, by its name in a file; None for others."""
    head, _, tail = name.rpartition(f"{KEYS}.")
    bundle, _, what = tail.partition(".")
    return (bundle, what) if tail != name and what and head in ("", PEFT_PREFIX) else None


def split_keys(
    tensors: Mapping[str, Tensor], config: BundleConfig, source: str
) -> tuple[dict[str, Key], dict[str, Tensor]]:
    """(bundle -> its key, the other tensors) of a file; of the keys those that the config lists.

    Raises:
        ValueError: the config came with the file and lists other keys, or a key is not finite numbers of the base
            model's shape.
    """
    parts = {part: tensor for name, tensor in tensors.items() if (part := key_part(name))}
    listed, (d, blocks) = set(config.keys or ()), config.base_shape or (0, 0)
    expected = {(bundle, what) for bundle in listed for what in ("mean", "remembered")}
    if config.weights_digest is None:  # a model's own config: it is resumed, or a state dict is set
        listed = {bundle for bundle in listed if {(bundle, "mean"), (bundle, "remembered")} <= parts.keys()}
    elif parts.keys() != expected:
        have = sorted({bundle for bundle, _ in parts})
        raise ValueError(f"{source} has keys of {have}, but its config lists {sorted(listed)}; get both files again.")
    for (bundle, what), tensor in parts.items():
        size = (blocks + 1, d) if what == "mean" else (*tensor.shape[:1], min(REMEMBERED_WIDTH, d))
        if tuple(tensor.shape) != size or not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{source}: {what} of the key of {bundle!r} must hold finite numbers of shape {size}, and has "
                f"{tuple(tensor.shape)}; it belongs to another base model, or is damaged."
            )
    keys = {b: Key(parts[b, "mean"], parts[b, "remembered"]) for b in config.keys or () if b in listed}
    return keys, {name: tensor for name, tensor in tensors.items() if key_part(name) is None}


def size_in_words(entries: Mapping[str, Tensor]) -> str:
    """The size of a file of these tensors, and how much of it is U."""
    total, basis = (
        sum(t.nbytes for key, t in entries.items() if key.endswith(what)) / 1e6 for what in ("", "bundle_basis")
    )
    behind_blocks = any(key.endswith("bundle_scale") for key in entries)
    return f"{total:,.2f} MB" + (f", of which U takes {basis:,.2f} MB" if behind_blocks else "")


def _update(total: Any, tensor: Tensor) -> None:
    total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def basis_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The basis of an adapter: {"digest": ..., "sub_bases": [[name, number of columns], ...]}.

    For a part of an adapter, and for an adapter joined from such parts, it is the whole basis that they come from.
    """
    config = checkpoint.config
    if config.provenance is not None:
        return config.provenance["basis"]
    partition = [[n, len(c)] for n, c in sub_basis_columns(config, checkpoint.hidden_size).items()]
    standardised = config.input_norm == "standard" and config.calibration is not None
    digest = basis_digest(checkpoint.behind_blocks(), partition, standardised)
    return {"digest": digest, "sub_bases": partition}


def basis_digest(layers: Mapping[int, Mapping[str, Tensor]], partition: list[list[Any]], standardised: bool) -> str:
    """SHA-256 over U, mu and sigma of every layer, the sub-bases, and whether the stream is standardised."""
    total = hashlib.sha256(json.dumps([partition, standardised]).encode())
    for number, layer in sorted(layers.items()):
        total.update(str(number).encode())
        for what in SHARED:
            _update(total, layer[what].float())
    return total.hexdigest()


def changed(config: BundleConfig, **fields: Any) -> BundleConfig:
    """A copy of a config with some fields changed. It has no preset: it lists its bundles and sub-bases itself."""
    values = {"preset": None, "weights_digest": None, "bundles": config.bundles, "sub_bases": config.sub_bases}
    return replace(config, **{**values, **fields})


def read_config(folder: str | Path, source: str | None = None) -> BundleConfig:
    """Read the config of a bundle folder.

    Raises:
        ValueError: the folder has no config, or the config is not valid JSON, belongs to another type of adapter, was
            written by a newer version, or has a value out of range.
    """
    source, path = source or str(folder), os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        raise ValueError(
            f"{source} has no {CONFIG_NAME}: it holds no adapter, or is half-written. Give a folder that "
            "save_bundle or save_pretrained wrote."
        )
    values = BundleConfig.from_json_file(path)
    if (kind := values.get("peft_type")) != "BUNDLE":
        raise ValueError(f"{source} is an adapter of type {kind!r}, not a bundle; load it with peft.PeftModel.")
    try:
        config = BundleConfig.from_pretrained(str(folder))
    except TypeError as error:  # a field with the wrong kind of value
        raise ValueError(f"{source}: {CONFIG_NAME} does not fit a BundleConfig ({error}); it is damaged.") from error
    shape, provenance = config.base_shape, config.provenance
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)):
        raise ValueError(f"{source}: base_shape={shape!r} must be [hidden size, layers]; the config is damaged.")
    if provenance is not None and not _is_provenance(provenance):
        raise ValueError(f"{source}: provenance in {CONFIG_NAME} is not what save_bundle writes; it is damaged.")
    if not config.bundles:
        raise ValueError(f"{source} is an adapter without bundles (a fine-tuned base model); load it with PeftModel.")
    return config


def _is_provenance(value: Any) -> bool:
    basis = value.get("basis") if isinstance(value, dict) else None
    return (
        isinstance(basis, dict)
        and isinstance(basis.get("digest"), str)
        and isinstance(basis.get("sub_bases"), list)
        and all(isinstance(b, list) and len(b) == 2 and isinstance(b[0], str) for b in basis["sub_bases"])
        and isinstance(value.get("base", {}), dict)
        and all(isinstance(k, str) and isinstance(v, str) for k, v in value.get("base", {}).items())
        and isinstance(value.get("summaries", {}), dict)
    )


def read(
    folder: str | Path,
    source: str | None = None,
    basis: Callable[[str], tuple[dict[str, Any], dict[int, dict[str, Tensor]]]] | None = None,
) -> Checkpoint:
    """Read a bundle folder. Only safetensors are read, every tensor is checked, and the tensors are copies in memory.

    Args:
        folder: the folder.
        source: how messages call it.
        basis: reads the file that `basis_source` of the config names (`basis_files.read_basis`).

    Raises:
        ValueError: a file is missing, damaged or changed, or the adapter is of another type. The message names the
            source.
    """
    source = source or str(folder)
    config = read_config(folder, source)
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        pickle = f", only {WEIGHTS_NAME}, a pickle, which is never loaded. Save it with safe_serialization=True."
        pickled = os.path.isfile(os.path.join(folder, WEIGHTS_NAME))
        raise ValueError(f"{source} has no {SAFETENSORS_WEIGHTS_NAME}{pickle if pickled else ': it is half-written.'}")
    tensors = read_tensors(path, source)[0]
    check_digest(config, tensors, source)
    keys, tensors = split_keys(tensors, config, source)
    by_head: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        head, child, tail = key.rpartition(f".{CHILD}.")
        if not child:
            raise ValueError(
                f"{source} holds more than bundles, such as {key!r}; load it with PeftModel.from_pretrained."
            )
        by_head.setdefault(head, {})[tail] = tensor
    behind = [head for head, layer in by_head.items() if "bundle_scale" in layer]  # behind a block
    if config.basis_source is not None:
        behind = [head for head in by_head if head.rpartition(".")[2].isdigit()]
    behind.sort(key=lambda head: [int(n) for n in re.findall(r"\d+", head)])
    prints = config.basis_fingerprint or {}
    if not all(n.isdecimal() for n in prints) or len(prints) != len(behind):
        raise ValueError(
            f"{source} has tensors of {len(behind)} layers, but its config lists {sorted(prints)}; get both files "
            "again."
        )
    heads = {Site(number): head for number, head in zip(sorted(int(n) for n in prints), behind)}
    heads |= {linear_site(head, source): head for head in by_head if head not in behind}
    config.weights_digest = None
    layers = {site: by_head[head] for site, head in sorted(heads.items())}
    checkpoint = Checkpoint(config, layers, heads, source, keys)
    d = checkpoint.hidden_size
    if config.basis_source is not None:
        if basis is None:
            raise ValueError(f"{source} needs the basis of {config.basis_source!r}; load it with PeftModel or compose.")
        bases = basis(config.basis_source)[1]
        for number, layer in checkpoint.behind_blocks().items():
            layer.update(bases.get(number, {}))
    elif not config.save_basis:
        for number, layer in checkpoint.behind_blocks().items():
            layer["bundle_basis"] = draw_basis(d, basis_rank(config, d), config.basis_seed, number)
    check_tensors(layers, config, d, source)
    return checkpoint


def linear_site(head: str, source: str) -> Site:
    """The site of a linear layer by its path: the first number in it is that of the block."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", head)
    if match is None:
        raise ValueError(f"{source} has bundles at {head!r}, which is not inside a decoder block; it is damaged.")
    return Site(int(match[1]), match[2])


def read_tensors(path: str, source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; the tensors are copies in memory.

    Raises:
        ValueError: it is not a valid safetensors file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(MAX_HEADER, size - 8):
        raise ValueError(
            f"{source}: {os.path.basename(path)} claims a header of {header:,} bytes in a file of {size:,}; it is "
            "damaged, half-written or not a safetensors file."
        )
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: the file may be replaced while the model is in use, and tensors inside a file are not aligned.
            return {key: file.get_tensor(key).clone() for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{source}: {os.path.basename(path)} is not a valid safetensors file ({error}).") from error


def by_layer(
    state_dict: Mapping[str, Tensor], sites: Mapping[str, Site]
) -> tuple[dict[Site, dict[str, Tensor]], list[str]]:
    """Sort the tensors of a PEFT file.

    Args:
        state_dict: the file.
        sites: name of a bundle layer in the model -> its site.

    Returns:
        Site -> key -> tensor, and the names of tensors that belong to none of these layers.
    """
    sites = {plain_name(name.removeprefix(PEFT_PREFIX)): site for name, site in sites.items()}
    layers: dict[Site, dict[str, Tensor]] = {site: {} for site in sites.values()}
    others = []
    for key, tensor in state_dict.items():
        name = plain_name(key.removeprefix(PEFT_PREFIX))
        head, _, tail = name.rpartition(f".{CHILD}.")
        if (site := sites.get(f"{head}.{CHILD}")) is None:
            others.append(name)
        else:
            layers[site][tail] = tensor
    return layers, others


def plain_name(key: str) -> str:
    """A name without what LoRA adds to it where it wraps a linear layer with bundles."""
    return key.replace(f".base_layer.{CHILD}", f".{CHILD}")


def renamed(key: str, names: Mapping[str, str]) -> str:
    """The key of a tensor in a model, from its key in a file.

    Args:
        key: its key in a file, with the name of the adapter.
        names: plain name of a bundle layer -> its name in the model.
    """
    head, child, tail = key.rpartition(f".{CHILD}.")
    return f"{names.get(head + child[:-1], head + child[:-1])}.{tail}" if child else key


def check_digest(config: BundleConfig, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors other than those saved with a config.

    Raises:
        ValueError: the config has a digest, and the tensors have another.
    """
    if config.basis_source is not None:  # its basis is in another file, with a digest of its own
        tensors = {key: t for key, t in tensors.items() if key.rpartition(".")[2] not in SHARED}
    if config.weights_digest is not None and config.weights_digest != weights_digest(tensors):
        raise ValueError(
            f"{source}: the tensors are not those that were saved with its config; the folder is half-written, damaged "
            f'or has been changed. If you changed it yourself, remove "weights_digest" from {CONFIG_NAME}.'
        )


def check_tensors(
    layers: Mapping[Site, Mapping[str, Tensor]], config: BundleConfig, hidden_size: int, source: str
) -> None:
    """Refuse tensors that are not what the config says.

    Args:
        layers: site -> key -> tensor, as in `Checkpoint.layers`.
        config: what they are checked against; layers without an entry in `basis_fingerprint` may have any basis.
        hidden_size: of the base model.
        source: where they came from, for messages.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or not finite, sigma is not positive, or U is not
            the basis that the config names.
    """
    behind_a_block = tensor_shapes(config, hidden_size)
    for site, layer in layers.items():
        where = f"{source}: layer {site}"
        expected = _shapes_at(layer, config, hidden_size, where) if site.path else behind_a_block
        for what, keys in (
            ("lacks", expected.keys() - layer.keys()),
            ("has the unknown", layer.keys() - expected.keys()),
        ):
            if keys:
                raise ValueError(
                    f"{where} {what} tensor {min(keys)!r} ({len(keys)} in all); the file is damaged, or its config is "
                    "that of another adapter."
                )
        for key, tensor in layer.items():
            if tuple(tensor.shape) != expected[key]:
                raise ValueError(
                    f"{where} has {key!r} of shape {tuple(tensor.shape)}, not {expected[key]}; it belongs to "
                    "another base model or another config."
                )
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{where} has NaN or infinity, or values that are not floats, in {key!r}; the file is damaged."
                )
        if site.path:
            continue
        if not bool((layer["bundle_scale"] > 0).all()):
            raise ValueError(f"{where} has standard deviations (sigma) that are not positive; the file is damaged.")
        measured = fingerprint(layer["bundle_basis"])
        recorded = (config.basis_fingerprint or {}).get(str(site), measured)
        if not abs(measured - recorded) <= FINGERPRINT_TOLERANCE:
            raise ValueError(
                f"{where} has another basis than the one that its config names (fingerprint {measured:.6f}, not "
                f"{recorded:.6f}); was the seed or the file changed, or cast to a lower precision?"
            )


def _shapes_at(
    layer: Mapping[str, Tensor], config: BundleConfig, hidden_size: int, where: str
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors at one linear layer, whose own sizes are those of its first tensors.

    Raises:
        ValueError: a bundle that has no place at linear layers.
    """
    ranks = linear_shapes(config, hidden_size)
    shapes: dict[str, tuple[int, ...]] = {}
    for what in ("bundle_down", "bundle_up"):
        width = next((t.shape[-1] for key, t in layer.items() if key.startswith(f"{what}.") and t.dim() == 2), 0)
        for key in layer:
            bundle = key.partition(".")[2]
            if bundle not in ranks:
                raise ValueError(
                    f"{where} has {key!r}, but its config puts no such bundle there; the file is damaged, or its "
                    "config is that of another adapter."
                )
            shapes[f"{what}.{bundle}"] = (ranks[bundle][0], width)
    return shapes


def write(checkpoint: Checkpoint, folder: str | Path) -> None:
    """Write a PEFT adapter folder. A write that fails leaves the files that were there before.

    The files are written to a temporary folder and then moved, the config last. It has the digest of the tensors, so
    reading the folder in between raises an error and never mixes two checkpoints.

    Raises:
        ValueError: `folder` is a file.
    """
    if os.path.isfile(folder):
        raise ValueError(f"folder={str(folder)!r} is a file; give a folder.")
    os.makedirs(folder, exist_ok=True)
    # Copies: safetensors refuses tensors that share memory, as bundles of one basis do.
    tensors = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in checkpoint.state_dict().items()}
    config = changed(
        checkpoint.config,
        weights_digest=weights_digest(tensors),
        inference_mode=True,
        save_basis=True,
        basis_source=None,
    )
    logger.info("%s: %s", ", ".join(checkpoint.names), size_in_words(tensors))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        save_file(tensors, os.path.join(staging, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        config.save_pretrained(staging)
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            os.replace(os.path.join(staging, name), os.path.join(folder, name))

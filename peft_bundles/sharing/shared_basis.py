"""A basis with its calibration as a file of its own: people who train in one basis make bundles that share it.

`basis.safetensors` has U, mu and sigma of every layer, and in its metadata the sub-bases, the base model and the digest
that bundles name.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file
from torch import Tensor, nn

from ..calibration import is_trained
from ..config import BundleConfig
from ..core.base import check_base
from ..core.basis import fingerprint, sub_basis_columns
from ..core.checkpoints import SHARED, Checkpoint, basis_digest, basis_of, read_tensors
from ..core.layer import BundleLayer
from ..core.walking import state_of
from .cards import CARD, hub_id
from .hub import api_for, parse_source, upload
from .parts import from_model, with_base


BASIS = "basis.safetensors"
_FIELDS = ("sub_bases", "digest", "base_shape", "base_model_name_or_path", "provenance", "basis_init", "input_norm")


def save_basis(model: nn.Module, folder: str | Path, *, adapter: str | None = None) -> Path:
    """Save the basis of an adapter, with its calibration; returns the path of `basis.safetensors`.

    Args:
        model: with a calibrated adapter, fresh or trained.
        folder: where to.
        adapter: which one, if there are several.

    Raises:
        ValueError: no such adapter, or one that was composed and so holds only a part of its basis.
    """
    adapter = _only(model, adapter)
    checkpoint = with_base(from_model(model, adapter), model)
    config, basis = checkpoint.config, basis_of(checkpoint)
    if _partition(checkpoint) != basis["sub_bases"]:
        raise ValueError(
            f"adapter {adapter!r} has only the columns of its basis that its bundles use; save the basis from "
            "the model that was calibrated."
        )
    about = {
        **basis,
        "base_shape": config.base_shape,
        "base_model_name_or_path": config.base_model_name_or_path,
        "provenance": {k: v for k, v in (config.provenance or {}).items() if k != "summaries"},
        "basis_init": config.basis_init,
        "input_norm": config.input_norm,
        "calibration": config.calibration,
    }
    os.makedirs(folder, exist_ok=True)
    tensors = {
        f"{number}.{what}": layer[what].detach().float().to("cpu", copy=True).contiguous()
        for number, layer in checkpoint.layers.items()
        for what in SHARED
    }
    save_file(tensors, Path(folder) / BASIS, metadata={"format": "pt", "peft_bundles": json.dumps(about)})
    return Path(folder) / BASIS


def push_basis(
    model: nn.Module,
    repo_id: str,
    *,
    adapter: str | None = None,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Push a basis to a repository, in one commit; returns the repository's URL. Arguments: `hub.push_bundle`."""
    with tempfile.TemporaryDirectory() as staging:
        _, metadata = read_tensors(str(save_basis(model, staging, adapter=adapter)), repo_id)
        about = json.loads(metadata["peft_bundles"])
        base = about["base_model_name_or_path"]
        card = ModelCardData(library_name="peft", base_model=hub_id(base), tags=["peft_bundles", "basis"])
        text = (
            f"A basis for bundles (U, mu and sigma of every layer) of {hub_id(base) or 'its base model'}, digest "
            f"`{about['digest']}`. Train bundles in it with `peft_bundles.load_basis(model, {repo_id!r})`, in an "
            f"adapter with `sub_bases={dict(about['sub_bases'])}`.\n"
        )
        ModelCard(f"---\n{card.to_yaml()}\n---\n\n# Basis\n\n{text}").save(Path(staging) / CARD)
        return upload(staging, repo_id, holds=None, private=private, token=token, revision=revision)


def load_basis(
    model: nn.Module, source: str | Path, *, adapter: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """Put a basis into a fresh adapter, in place of calibrating it; returns its digest and sub-bases.

    The penalty `quiet` needs states of the model too: run `calibrate(..., states_only=True)` after it.

    Args:
        model: with an untrained adapter whose sub-bases are those of the file.
        source: `basis.safetensors`, a folder with it, a repository, or `repo@revision`.
        adapter: which one, if there are several.
        token: of the Hub.

    Raises:
        ValueError: no or a damaged file, another base model, other sub-bases.
        RuntimeError: the adapter was trained, in another basis.
    """
    adapter = _only(model, adapter)
    about, layers = _read(source, token)
    config = state_of(model).configs[adapter]
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    made_for = BundleConfig(base_shape=about["base_shape"], provenance=about["provenance"])
    made_for.base_model_name_or_path = about["base_model_name_or_path"]
    check_base(made_for, base, str(source))
    mine = [m for m in model.modules() if isinstance(m, BundleLayer) and adapter in m.bundle_basis]
    if (partition := _partition(from_model(model, adapter))) != about["sub_bases"]:
        raise ValueError(
            f"{source} has the sub-bases {about['sub_bases']}, adapter {adapter!r} has {partition}; use its."
        )
    if sorted(layers) != sorted(layer.index for layer in mine) or about["input_norm"] != config.input_norm:
        raise ValueError(
            f"{source} has layers {sorted(layers)} and input_norm={about['input_norm']!r}; adapter {adapter!r} has "
            f"{sorted(layer.index for layer in mine)} and {config.input_norm!r}."
        )
    for layer in mine:
        if is_trained(layer, adapter):
            raise RuntimeError(
                f"adapter {adapter!r} has been trained, its weights belong to another basis; use a fresh one."
            )
        for what in SHARED:
            if layers[layer.index][what].shape != getattr(layer, what)[adapter].shape:
                raise ValueError(
                    f"{source} has {what} of shape {tuple(layers[layer.index][what].shape)}, adapter {adapter!r} has "
                    f"{tuple(getattr(layer, what)[adapter].shape)}; use the basis_rank that it was made with."
                )
    for layer in mine:
        for what in SHARED:
            tensor = getattr(layer, what)[adapter]
            getattr(layer, what)[adapter] = layers[layer.index][what].to(tensor.device)
    config.basis_init, config.calibration, config.save_basis = about["basis_init"], about.get("calibration"), True
    config.basis_fingerprint = {str(layer.index): fingerprint(layer.bundle_basis[adapter]) for layer in mine}
    config.provenance = about["provenance"]
    return {"digest": about["digest"], "sub_bases": about["sub_bases"]}


def _only(model: nn.Module, adapter: str | None) -> str:
    names = list(state_of(model).configs)
    if adapter is None and len(names) != 1:
        raise ValueError(f"name the adapter, one of {sorted(names)}.")
    if adapter is not None and adapter not in names:
        raise ValueError(f"there is no bundle adapter {adapter!r}; there are {sorted(names)}.")
    return adapter or names[0]


def _partition(checkpoint: Checkpoint) -> list[list[Any]]:
    return [[n, len(c)] for n, c in sub_basis_columns(checkpoint.config, checkpoint.hidden_size).items()]


def _read(source: str | Path, token: str | None) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """What a basis file says about itself, and its tensors by layer, checked against its digest."""
    path = str(source)
    if not os.path.isfile(path):
        parsed = parse_source(source)
        if parsed.bundle is not None:
            raise ValueError(f"source {path!r} names a bundle; a basis is a repository or a folder by itself.")
        if parsed.folder is not None:
            path = os.path.join(parsed.folder, BASIS)
        else:
            assert parsed.repo is not None
            path = api_for(token).hf_hub_download(parsed.repo, BASIS, revision=parsed.revision)
    if not os.path.isfile(path):
        raise ValueError(f"{source} has no {BASIS}.")
    tensors, metadata = read_tensors(path, str(source))
    try:
        about = json.loads(metadata["peft_bundles"])
        assert all(field in about for field in _FIELDS)
        layers: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            number, what = key.split(".")
            layers.setdefault(int(number), {})[what] = tensor
        standardised = about["input_norm"] == "standard" and about.get("calibration") is not None
        whole = basis_digest(layers, about["sub_bases"], standardised) == about["digest"]
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"{source} is no basis that save_basis wrote.") from error
    if not whole:
        raise ValueError(
            f"{source}: U, mu and sigma are not those of the digest it names; it is damaged or was changed."
        )
    return about, layers

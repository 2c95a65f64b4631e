"""Save, push and load a basis with its calibration, so that several people can train bundles in the same basis.

Bundles of one basis share it in memory. `basis.safetensors` has U, mu and sigma of every layer; its metadata has the
sub-bases, the base model and the digest by which bundles name their basis.
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
from ..core.attaching import own_config
from ..core.base import check_base
from ..core.basis import fingerprint, sub_basis_columns
from ..core.basis_files import BASIS, read_basis
from ..core.checkpoints import SHARED, Checkpoint, basis_of, read_tensors
from ..core.walking import basis_layers, resolve_adapter, state_of
from .cards import CARD, hub_id
from .hub import parse_source, upload
from .parts import from_model, with_base


def save_basis(model: nn.Module, folder: str | Path, *, adapter: str | None = None) -> Path:
    """Save the basis of an adapter with its calibration.

    Args:
        model: a model with a calibrated adapter, fresh or trained.
        folder: folder to write `basis.safetensors` to.
        adapter: name of the adapter, if there are several.

    Returns:
        The path of `basis.safetensors`.

    Raises:
        ValueError: no such adapter, one without bundles behind blocks, which has no basis, or one from `compose`,
            which has only a part of its basis.

    Example:
        >>> import copy, tempfile
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, load_basis, save_basis
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> config = {"sub_bases": {"a": 8, "b": 8}}
        >>> style = {"b_style": {"rank": 4, "sub_bases": ["a"]}}
        >>> facts = {"b_facts": {"rank": 4, "sub_bases": ["b"]}}
        >>> first = get_peft_model(copy.deepcopy(base), BundleConfig(bundles=style, **config))  # calibrate it now
        >>> second = get_peft_model(base, BundleConfig(bundles=facts, basis_seed=1, **config))
        >>> folder = tempfile.TemporaryDirectory()
        >>> load_basis(second, save_basis(first, folder.name))["sub_bases"]
        [['a', 8], ['b', 8]]
        >>> folder.cleanup()
    """
    adapter = resolve_adapter(model, adapter)
    _check_has_basis(model, adapter)
    checkpoint = with_base(from_model(model, adapter), model)
    config, basis = checkpoint.config, basis_of(checkpoint)
    if _partition(checkpoint) != basis["sub_bases"]:
        raise ValueError(
            f"adapter {adapter!r} has only the columns of its basis that its bundles use; save the basis of the model "
            "that was calibrated."
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
        for number, layer in checkpoint.behind_blocks().items()
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
    """Push the basis of an adapter, with its calibration and a model card, to a Hub repository in one commit.

    Args:
        model: as in `save_basis`.
        repo_id: "owner/name". The repository is created if it does not exist.
        adapter: as in `save_basis`.
        private: make a new repository private.
        token: Hub token. None: the stored one.
        revision: branch to push to. It is created if it does not exist.

    Returns:
        The URL of the repository. `load_basis(model, repo_id)` loads it.

    Raises:
        ValueError: as in `save_basis`.
        RuntimeError: somebody else pushed at the same time; nothing was changed.
        huggingface_hub.errors.HfHubHTTPError: the Hub's refusal.

    Example (needs a Hub token):
        push_basis(model, "me/my-basis")
    """
    with tempfile.TemporaryDirectory() as staging:
        _, metadata = read_tensors(str(save_basis(model, staging, adapter=adapter)), repo_id)
        about = json.loads(metadata["peft_bundles"])
        base = about["base_model_name_or_path"]
        card = ModelCardData(library_name="peft", base_model=hub_id(base), tags=["peft_bundles", "basis"])
        text = (
            f"A basis for bundles of {hub_id(base) or 'its base model'}: U, mu and sigma of every layer, digest "
            f"`{about['digest']}`. To train bundles in it, attach an adapter with "
            f"`sub_bases={dict(about['sub_bases'])}` and call `peft_bundles.load_basis(model, {repo_id!r})`.\n"
        )
        ModelCard(f"---\n{card.to_yaml()}\n---\n\n# Basis\n\n{text}").save(Path(staging) / CARD)
        return upload(staging, repo_id, holds=None, private=private, token=token, revision=revision)


def load_basis(
    model: nn.Module, source: str | Path, *, adapter: str | None = None, token: str | None = None
) -> dict[str, Any]:
    """Load a basis with its calibration into a fresh adapter, instead of calibrating it.

    The penalty `quiet` also needs sample states of the model: run `calibrate(..., states_only=True)` afterwards.

    Args:
        model: a model with an untrained adapter that has the sub-bases of the file.
        source: `basis.safetensors`, a folder with it, `repo` or `repo@revision`.
        adapter: name of the adapter, if there are several.
        token: Hub token. None: the stored one.

    Returns:
        {"digest": of the basis, "sub_bases": [[name, columns], ...]}.

    Raises:
        ValueError: an adapter without bundles behind blocks; no file or a damaged one; a basis of another base model
            or with other sub-bases or layers.
        RuntimeError: the adapter has been trained in another basis.

    Example: see `save_basis`.
    """
    adapter = resolve_adapter(model, adapter)
    _check_has_basis(model, adapter)
    about, layers = _read(source, token)
    config = state_of(model).configs[adapter]
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    made_for = BundleConfig(base_shape=about["base_shape"], provenance=about["provenance"])
    made_for.base_model_name_or_path = about["base_model_name_or_path"]
    check_base(made_for, base, str(source))
    adapted = basis_layers(model, adapter)
    numbers = sorted(layer.index for layer in adapted)
    if (partition := _partition(from_model(model, adapter))) != about["sub_bases"]:
        raise ValueError(
            f"{source} has the sub-bases {about['sub_bases']}, but adapter {adapter!r} has {partition}; attach an "
            f"adapter with sub_bases={dict(about['sub_bases'])}."
        )
    if sorted(layers) != numbers or about["input_norm"] != config.input_norm:
        raise ValueError(
            f"{source} has layers {sorted(layers)} and input_norm={about['input_norm']!r}, but adapter {adapter!r} has "
            f"{numbers} and {config.input_norm!r}; attach an adapter with those of the file."
        )
    for layer in adapted:
        if is_trained(layer, adapter):
            raise RuntimeError(
                f"adapter {adapter!r} has been trained, so its weights belong to its own basis; use a fresh adapter."
            )
        for what in SHARED:
            if layers[layer.index][what].shape != getattr(layer, what)[adapter].shape:
                raise ValueError(
                    f"{source} has {what} of shape {tuple(layers[layer.index][what].shape)}, but adapter {adapter!r} "
                    f"has {tuple(getattr(layer, what)[adapter].shape)}; use the basis_rank that the file was made with."
                )
    for layer in adapted:
        for what in SHARED:
            tensor = getattr(layer, what)[adapter]
            getattr(layer, what)[adapter] = layers[layer.index][what].to(tensor.device)
    config = own_config(model, adapter)
    config.basis_init, config.calibration, config.save_basis = about["basis_init"], about.get("calibration"), True
    config.basis_fingerprint = {str(layer.index): fingerprint(layer.bundle_basis[adapter]) for layer in adapted}
    config.provenance = about["provenance"]
    return {"digest": about["digest"], "sub_bases": about["sub_bases"]}


def _check_has_basis(model: nn.Module, adapter: str) -> None:
    """Refuse an adapter whose bundles all sit at linear layers."""
    if not basis_layers(model, adapter):
        raise ValueError(
            f"all bundles of adapter {adapter!r} sit at linear layers, and a basis serves bundles behind blocks only; "
            'there is none to save or load. Use place="block" for a bundle that needs one.'
        )


def _partition(checkpoint: Checkpoint) -> list[list[Any]]:
    """[[sub-basis, columns], ...] of an adapter."""
    return [[n, len(c)] for n, c in sub_basis_columns(checkpoint.config, checkpoint.hidden_size).items()]


def _read(source: str | Path, token: str | None) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """`read_basis` of a source that names no bundle."""
    if not os.path.isfile(source) and parse_source(source).bundle is not None:
        raise ValueError(f"source {str(source)!r} names a bundle; give the folder or repository of a basis.")
    return read_basis(str(source), token)

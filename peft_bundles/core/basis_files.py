"""`basis.safetensors`: U, mu and sigma of every block, stored once for all adapters of one basis."""

from __future__ import annotations

import json
import os
from typing import Any

from huggingface_hub import HfApi
from torch import Tensor

from .basis import SHARED
from .checkpoints import basis_digest, read_tensors


BASIS = "basis.safetensors"
FIELDS = ("sub_bases", "digest", "base_shape", "base_model_name_or_path", "provenance", "basis_init", "input_norm")


def basis_path(source: str, token: str | None = None) -> str:
    """The path of the file of a source: a file, a folder, `repo` or `repo@revision`.

    Raises:
        ValueError: the folder has no such file.
        huggingface_hub.errors.HfHubHTTPError: the Hub's answer: no such repository, revision or file.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        path = os.path.join(path, BASIS)
    elif not os.path.isfile(path):
        repo, _, revision = source.partition("@")
        hub = HfApi(token=token, library_name="peft_bundles")
        path = hub.hf_hub_download(repo, BASIS, revision=revision or None)
    if not os.path.isfile(path):
        raise ValueError(f"{source} has no {BASIS}; give a file or folder that save_basis wrote.")
    return path


def read_basis(source: str, token: str | None = None) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """Metadata, and tensors by number of the block, of a basis file, checked against its digest.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    tensors, metadata = read_tensors(basis_path(source, token), source)
    try:
        about = json.loads(metadata["peft_bundles"])
        if lacking := [field for field in FIELDS if field not in about]:
            raise KeyError(lacking[0])
        layers: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            number, what = key.split(".")
            layers.setdefault(int(number), {})[what] = tensor
        standardised = about["input_norm"] == "standard" and about.get("calibration") is not None
        whole = basis_digest(layers, about["sub_bases"], standardised) == about["digest"]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is not a basis file; give one that save_basis wrote.") from error
    if not whole:
        raise ValueError(
            f"{source}: U, mu and sigma do not match the digest in the file; it was damaged, get it again."
        )
    return about, layers


def of_block(layers: dict[int, dict[str, Tensor]], number: int, source: str) -> dict[str, Tensor]:
    """U, mu and sigma of one block.

    Raises:
        ValueError: the file has none for it.
    """
    if layers.get(number, {}).keys() != set(SHARED):
        raise ValueError(f"{source} has no U, mu and sigma for block {number}; it is the basis of another adapter.")
    return layers[number]

"""A tiny model whose bundles have keys, with the router on, and rows that are like those of its bundles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import LINEAR, TINY, bundle_config, perturb
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_bundles import learn_keys, learn_null


RANGES = {"b_mlp": (3, 20), "b_linear": (40, 58), "b_diag": (75, 92)}  # of token ids, by bundle
HALVES = {"b_mlp": (40, 60), "b_linear": (70, 90)}
PLACES = {"block": {}, "linears": {"bundles": LINEAR}}
places = pytest.mark.parametrize("place", list(PLACES))


def ids_of(bundle: str, rows: int = 4, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(*RANGES[bundle], (rows, length), generator=torch.Generator().manual_seed(seed))


def nobodys(rows: int, length: int, seed: int = 0) -> Tensor:
    """Ids of no bundle."""
    free = torch.tensor([n for n in range(3, 100) if not any(low <= n < high for low, high in RANGES.values())])
    return free[torch.randint(len(free), (rows, length), generator=torch.Generator().manual_seed(seed))]


def mixed(seed: int = 9, part: int = 6) -> Tensor:
    """Rows that go from the ids of one bundle to those of another, or to those of none."""
    order = [("b_mlp", "b_diag"), ("b_linear", "b_mlp"), ("b_diag", "b_linear")]
    rows = [torch.cat([ids_of(name, 1, part, seed + n) for name in names], 1) for n, names in enumerate(order)]
    return torch.cat([*rows, nobodys(1, 2 * part, seed=seed)])


def routed(name: str = "llama", place: str = "block", **fields: Any) -> PeftModel:
    """A tiny model whose three bundles have keys, with the router on."""
    # Gentle bundles: a wrong, loud one moves the states that later depths read.
    model = perturb(
        get_peft_model(TINY[name](), bundle_config(**PLACES[place], **fields)), scale=0.05 if place == "block" else 0.01
    ).eval()
    learn_keys(model, {b: [{"input_ids": r} for r in ids_of(b, 16).tolist()] for b in RANGES}, progress=False)
    texts = [{"input_ids": row} for row in nobodys(64, 16, seed=3).tolist()]
    learn_null(model, texts, tokens=1024, progress=False)
    model.set_router("keys")
    return model

"""Four ways to turn a topic vector into an update, on one task: soft and hard masks, drawn ones, scaled learning rates.

    python -m studies.topics.masks

A byte-level Llama of two layers is trained on texts of three topics, frozen, and given a bundle for each topic. Half
the rows are of one topic, half are one topic's text behind another's (tau = 0.75 and 0.25). Writes
results/topic_masks.json: held-out loss of each topic with its own bundle alone, with another's, and with all, against
none; three seeds; minutes on a CPU.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import peft_bundles
from peft_bundles import BundleConfig
from peft_bundles.core.walking import bundle_parameters
from peft_bundles.routers.topics import MASKS, TopicRouting
from studies import records
from studies.data import load
from studies.tables import Table, mean_sd
from studies.training import Training


RESULTS = Path(__file__).parent / "results" / "topic_masks.json"
TOPICS = ["animals", "programming", "medical"]
LENGTH, ROWS, LR, SEEDS = 64, 24, 1e-2, (0, 1, 2)
SHARE = 0.75  # of a row of two topics, the first one's


def ids_of(text: str) -> list[int]:
    """Printable ASCII, a character an id; everything else is 0."""
    return [ord(c) - 31 if 32 <= ord(c) < 127 else 0 for c in text]


def windows(texts: list[str], count: int, seed: int) -> Tensor:
    """Rows of LENGTH characters from anywhere in the texts, (count, LENGTH)."""
    rng, joined = random.Random(seed), ids_of("\n".join(texts))
    starts = [rng.randrange(len(joined) - LENGTH) for _ in range(count)]
    return torch.tensor([joined[s : s + LENGTH] for s in starts])


def base_model(train: dict[str, Tensor], steps: int) -> Any:
    """A small Llama that has seen the mixture."""
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=96, **shape))
    rows = torch.cat(list(train.values()))

    def gradients(ids: Tensor) -> Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    batches = ((rows[torch.randint(len(rows), (ROWS,))],) for _ in range(steps))
    Training([model.parameters()], gradients, decay=0.01).run(batches, lambda step: [2e-3])
    return model.eval().requires_grad_(False)


def batch(train: dict[str, Tensor], rng: random.Random) -> tuple[Tensor, Tensor]:
    """ids (ROWS, LENGTH) and tau (ROWS, 3)."""
    rows, tau = [], torch.zeros(ROWS, len(TOPICS))
    for n in range(ROWS):
        a, b = rng.sample(range(len(TOPICS)), 2)
        first, second = (train[TOPICS[k]][rng.randrange(len(train[TOPICS[k]]))] for k in (a, b))
        if n % 2:
            cut = int(SHARE * LENGTH)
            rows.append(torch.cat([first[:cut], second[cut:]]))
            tau[n, a], tau[n, b] = SHARE, 1 - SHARE
        else:
            rows.append(first)
            tau[n, a] = 1
    return torch.stack(rows), tau


@torch.no_grad()
def loss_of(model: Any, ids: Tensor) -> float:
    logits = model(input_ids=ids).logits[:, :-1]
    return float(F.cross_entropy(logits.transpose(1, 2), ids[:, 1:]))


def cell(base: Any, mask: str, seed: int, steps: int, train: Any, test: Any, general: list[str]) -> dict[str, Any]:
    """Train with one mask; differences of held-out loss against none."""
    torch.manual_seed(seed)
    bundle = {"rank": 24, "bottleneck": 1.0, "role": "semantic", "signals": {"lm": 1.0}}
    config = BundleConfig(
        sub_bases=dict.fromkeys(TOPICS, 24),
        bundles={f"b_sem_{t}": {**bundle, "sub_bases": [t], "topic": t} for t in TOPICS},
        basis_seed=seed,
        quiet=0.0,  # at 10 the bundles of so small a model learn nothing that masks could differ in (-0.001)
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    peft_bundles.calibrate(model, general, Characters(), tokens=4000, max_length=LENGTH, progress=False, seed=seed)
    adapter: Any = model.peft_config["default"]
    routing = TopicRouting(TOPICS, mask, seed=seed)
    table = bundle_parameters(model)
    rng, updates = random.Random(seed), 0.0
    batches = [(step, *batch(train, rng)) for step in range(steps)]

    def gradients(step: int, ids: Tensor, tau: Tensor) -> Tensor:
        nonlocal updates
        weights = routing.weights(adapter, tau, step)
        with model.alphas(routing.alphas(adapter, tau)), model.route("lm", weights=weights):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        model.finalize_grads()
        updates += sum(float(w.sum()) for w in weights.values())
        return loss.detach()

    def rates(step: int) -> list[float]:
        factors = routing.rates(adapter, batches[step][2])
        return [LR * factors.get(name, 1.0) for _, name in table]

    model.train()
    Training(table.values(), gradients, decay=0.01, clip=lambda: model.clip_bundle_grads(1.0)).run(batches, rates)
    model.eval()
    off = {name: 0.0 for _, name in table}
    found: dict[str, list[float]] = {"own": [], "other": [], "all": []}
    for topic in TOPICS:
        with model.alphas(off):
            none = loss_of(model, test[topic])
        for name in off:
            with model.alphas({**off, name: 1.0}):
                kind = "own" if name == f"b_sem_{topic}" else "other"
                found[kind].append(loss_of(model, test[topic]) - none)
        found["all"].append(loss_of(model, test[topic]) - none)
    model.unload()
    means = {kind: statistics.fmean(values) for kind, values in found.items()}
    return {"mask": mask, "seed": seed, **means, "weight_per_row": updates / steps / ROWS}


class Characters:
    """`ids_of` as `calibrate` calls a tokenizer."""

    pad_token_id = eos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": ids_of(text)[:LENGTH]}


def table(results: dict[str, Any]) -> Table:
    """Held-out loss against no bundle, mean and deviation over seeds."""
    rows = []
    for mask in MASKS:
        cells = [c for c in results["cells"] if c["mask"] == mask]
        changes = [mean_sd([c[kind] for c in cells], sign=True) for kind in ("own", "other", "all")]
        rows.append([mask, *changes, f"{statistics.fmean(c['weight_per_row'] for c in cells):.2f}"])
    columns = ["mask", "own bundle alone", "another's alone", "all", "gradient weight a row"]
    return Table("Masks", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--base-steps", type=int, default=300)
    args = parser.parse_args()
    begin = time.perf_counter()
    texts = {t: {split: [row["text"] for row in load(t, split)] for split in ("train", "test")} for t in TOPICS}
    train = {t: windows(texts[t]["train"], 4000, 0) for t in TOPICS}
    test = {t: windows(texts[t]["test"], 300, 1) for t in TOPICS}
    general = [row["text"] for row in load("plays", rows=200)]
    base = base_model(train, args.base_steps)
    cells = []
    for seed in SEEDS:
        for mask in MASKS:
            cells.append(cell(base, mask, seed, args.steps, train, test, general))
            print(cells[-1], flush=True)
    results = {
        **records.made_by(" ".join(["python -m studies.topics.masks", *sys.argv[1:]]), device="cpu"),
        "seconds": round(time.perf_counter() - begin, 1),
        "base_loss": {t: loss_of(base, test[t]) for t in TOPICS},
        "cells": cells,
    }
    records.write(args.output, results)
    print(table(results).markdown())


if __name__ == "__main__":
    main()

"""One cell of semantic.py: topic bundles trained at one setting, and the matrix of held-out losses."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import peft_bundles
from peft_bundles import BundleConfig
from peft_bundles.core.walking import bundle_parameters
from peft_bundles.routers.topics import TopicRouting
from peft_bundles.specs import resolve_rank
from peft_bundles.taxonomy import TOPICS
from studies.measures.text import text_loss
from studies.semantic.texts import rows_of
from studies.training import Training, autocast


def bundle_config(setting: dict[str, Any], hidden_size: int) -> BundleConfig:
    """Topic bundles of equal size, each with columns of its own and the asked-for share of common ones."""
    topics, columns = TOPICS[: setting["topics"]], resolve_rank(float(setting["rank"]), hidden_size)
    common = round(setting["overlap"] * columns)
    if common >= columns:
        raise ValueError(f"overlap: {setting['overlap']} leaves a topic bundle no column of its own; take less than 1.")
    sub_bases: dict[str, int] = dict.fromkeys(topics, columns - common)
    bundles: dict[str, Any] = {
        f"b_sem_{topic}": {
            "rank": columns,
            "sub_bases": [topic],
            "overlap": common / columns,
            "signals": {"lm": peft_bundles.taxonomy.SIDE},
            "role": "semantic",
            "topic": topic,
        }
        for topic in topics
    }
    if common:
        sub_bases["common"] = common
    if setting["signal_rank"]:
        general = resolve_rank(float(setting["signal_rank"]), hidden_size)
        for name, sub_basis in (("b_mem_global", "mem"), ("b_abstraction", "abstraction")):
            sub_bases[sub_basis] = general
            bundles[name] = {"rank": general, "sub_bases": [sub_basis], "signals": {"lm": 1.0}}
    return BundleConfig(
        bundles=bundles,
        sub_bases=sub_bases,
        bottleneck=float(setting["size"]),
        basis_seed=setting["seed"],
        task_type="CAUSAL_LM",
    )


def columns_of(config: BundleConfig) -> dict[str, dict[str, float]]:
    """Column of the matrix -> alphas: the base model, no topic bundle, each alone, all."""
    bundles = config.bundles or {}
    semantic = [name for name, spec in bundles.items() if spec.role == "semantic"]
    off = dict.fromkeys(semantic, 0.0)
    alone = {f"{bundles[name].topic}": {**off, name: 1.0} for name in semantic}
    return {"base": dict.fromkeys(bundles, 0.0), "none": off, **alone, "all": {}}


def run_cell(
    setting: dict[str, Any], base: Any, tokenizer: Any, texts: dict[str, Any], own: list[str]
) -> dict[str, Any]:
    """Train the bundles of one setting and measure the matrix."""
    begun = time.perf_counter()
    device = base.device
    train, test = rows_of(setting, texts, tokenizer)
    topics = list(train)
    torch.manual_seed(setting["seed"])
    model: PeftModel = get_peft_model(base, bundle_config(setting, base.config.hidden_size))
    config: Any = model.peft_config["default"]
    general = [
        text
        for pair in zip(texts["train"]["other"], own * (len(texts["train"]["other"]) // len(own) + 1))
        for text in pair
    ]
    options = {"tokens": setting["calibration"]["tokens"], "max_length": setting["calibration"]["max_length"]}
    peft_bundles.calibrate(model, general, tokenizer, progress=False, **options)
    routing = TopicRouting(topics, setting["mask"], setting["gate_forward"], seed=setting["seed"])
    table = bundle_parameters(model)  # (block, bundle) -> its parameters
    rng, batches = random.Random(setting["seed"]), []
    for step in range(setting["steps"]):
        turn = [train[topics[n % len(topics)]] for n in range(setting["rows"])]
        picked = [(rows, rng.randrange(len(rows[0]))) for rows in turn]
        ids = torch.stack([rows[n] for (rows, _), n in picked])
        batches.append((step, ids, torch.stack([vectors[n] for (_, vectors), n in picked])))

    def gradients(step: int, ids: Tensor, tau: Tensor) -> Tensor:
        ids = ids.to(device)
        weights = routing.weights(config, tau, step)
        with model.alphas(routing.alphas(config, tau)), model.route("lm", weights=weights), autocast(device):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss  # with the quiet penalty
        loss.backward()
        model.finalize_grads()
        return loss.detach()

    def rates(step: int) -> list[float]:
        factors = routing.rates(config, batches[step][2])
        warm = min(1.0, (step + 1) / max(setting["warmup"], 1))
        return [setting["learning_rate"] * warm * factors.get(name, 1.0) for _, name in table]

    losses: list[float] = []
    training = Training(table.values(), gradients, clip=lambda: model.clip_bundle_grads(setting["max_grad_norm"]))
    model.train()
    training.run(batches, rates, lambda done, loss: losses.append(float(loss)))
    model.eval()
    matrix: dict[str, dict[str, float]] = {topic: {} for topic in test}
    for column, alphas in columns_of(config).items():
        with model.alphas(alphas), autocast(device):
            for topic, ids in test.items():
                matrix[topic][column] = text_loss(model, ids)
    record = {
        "matrix": matrix,
        "losses": [round(x, 4) for x in losses[:: max(len(losses) // 20, 1)]],
        "trainable": model.get_nb_trainable_parameters()[0],
        "seconds": round(time.perf_counter() - begun, 1),
    }
    model.unload()
    return record

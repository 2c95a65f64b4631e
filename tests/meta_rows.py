"""Rows for every signal of the taxonomy, and a tiny model with its bundles: what the tests of these signals share."""

from __future__ import annotations

from typing import Any

from models import TINY, perturb
from peft import PeftModel, get_peft_model
from training import completions, pairs, texts

from peft_bundles import BundleConfig
from peft_bundles.objectives import (
    LM,
    PPO,
    Calibration,
    Confusion,
    Consistency,
    Contrastive,
    MetaCorrectness,
    Objective,
    Preference,
    Temporal,
)


def judged(count: int = 12) -> list[dict[str, Any]]:
    """Sums, half of them wrong."""
    return [{"prompt": f"{i}+{i}=", "completion": f"{2 * i + i % 2}", "correct": i % 2 == 0} for i in range(count)]


def explained(count: int = 12) -> list[dict[str, Any]]:
    return [{**row, "explanation": "" if row["correct"] else "one too many"} for row in judged(count)]


def sides(count: int = 12) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+{i}=", "chosen": f"{2 * i}", "rejected": f"{2 * i + 1}"} for i in range(count)]


def statements(count: int = 12) -> list[dict[str, Any]]:
    """Three statements; the last of every other row contradicts the first."""
    return [
        {"statements": [f"a is {i}", f"b is {i + 1}", f"a is {i + i % 2}"], "contradicts": [False, False, i % 2 == 1]}
        for i in range(count)
    ]


def paraphrases(count: int = 12) -> list[dict[str, Any]]:
    return [{"anchor": f"{i} and {i * 7 % 11}", "positive": f"both {i}, {i * 7 % 11}"} for i in range(count)]


def plans(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"segments": [f"{i} {step} {chr(97 + i)}" for step in ("go", "on", "end")[: 2 + i % 2]]} for i in range(count)
    ]


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def made(scale: float = 0.1, **shape: Any) -> PeftModel:
    """A tiny Llama with the bundles of preset `taxonomy`, moved off the identity."""
    config = BundleConfig(preset="taxonomy", task_type="CAUSAL_LM")
    return perturb(get_peft_model(TINY["llama"](**shape), config), scale=scale)  # type: ignore[return-value]


HEADS: dict[str, Any] = {
    "confusion": lambda **f: Confusion(judged(), **f),
    "calibration": lambda **f: Calibration(judged(), **f),
    "meta_correctness": lambda **f: MetaCorrectness(explained(), **f),
    "meta_pairs": lambda **f: MetaCorrectness(sides(), **f),
    "consistency": lambda **f: Consistency(statements(), **f),
    "contrastive": lambda **f: Contrastive(paraphrases(), **f),
    "temporal": lambda **f: Temporal(plans(), **f),
}


def rl(**fields: Any) -> PPO:
    """PPO with all six of its signals."""
    options = {"max_completion_length": 5, "entropy_coef": 0.01, "epochs": 2, "advantage_coef": 1.0,
               "curiosity_coef": 1.0, "curiosity_reward": 0.1, **fields}  # fmt: skip
    return PPO([{"prompt": f"{i}:"} for i in range(8)], length, **options)


def whole_table() -> list[Objective]:
    """Objectives that emit every signal of the preset `taxonomy`."""
    objectives = [make() for name, make in HEADS.items() if name != "meta_pairs"]
    return [LM(texts()), LM(completions(), signal="logic"), *objectives, rl(), Preference(pairs())]

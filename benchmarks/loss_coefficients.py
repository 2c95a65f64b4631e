"""What does the coefficient of a loss do when the loss has a bundle of its own? One JSON record, a minute on a CPU.

    PYTHONPATH=tests python benchmarks/loss_coefficients.py --output benchmarks/results/loss_coefficients.json

PPO on a tiny Llama (16 tokens, 6 a completion; the reward is the share of one token, 1/16 at chance), 60 steps of 64
completions, AdamW 0.02: the entropy bonus in a bundle of its own with two coefficients a hundred times apart, with a
learning-rate multiplier, in the policy's bundle, and not at all.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from models import TINY
from peft import get_peft_model
from training import arguments, config, tokenizer

from peft_bundles.trainer import BundlePPOTrainer
from studies.records import made_by, write


def share(completions: list[str], **_: Any) -> list[float]:
    return [text.count("a") / 6 for text in completions]


def run(seed: int, coefficient: float, multiplier: float = 1.0, own: bool = True) -> dict[str, list[float]]:
    made = config()
    assert made.bundles is not None
    if not own:
        made.bundles["b_policy"].signals["entropy"] = made.bundles["b_entropy"].signals.pop("entropy")
    model = get_peft_model(TINY["llama"](vocab_size=16, initializer_range=0.2), made)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            Path(folder), max_steps=60, per_device_train_batch_size=64, learning_rate=0.02, seed=seed, logging_steps=20,
            lr_multipliers={"ppo": 0.1, "b_entropy": multiplier},
        )  # fmt: skip
        trainer = BundlePPOTrainer(
            model, share, args, [{"prompt": p} for p in "bcdefgh"], tokenizer("abcdefghijkl"), max_completion_length=6,
            kl_in="reward", kl_coef=0.001, value_coef=0.5, entropy_coef=coefficient, generation={"min_new_tokens": 6},
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "ppo/reward" in entry]
    return {name: [round(entry[f"ppo/{name}"], 4) for entry in logs] for name in ("reward", "entropy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    cells: dict[str, dict[str, Any]] = {
        "none": {"coefficient": 0.0},
        "own bundle, 1e-3": {"coefficient": 1e-3},
        "own bundle, 1e-1": {"coefficient": 1e-1},
        "own bundle, 1e-3, multiplier 0.01": {"coefficient": 1e-3, "multiplier": 0.01},
        "policy's bundle, 1e-3": {"coefficient": 1e-3, "own": False},
    }
    record = {
        **made_by(" ".join(["python", *sys.argv]), "trl", device="cpu"),
        "logged": "means of 20 steps each",
        "runs": {name: [run(seed, **cell) for seed in range(3)] for name, cell in cells.items()},
    }
    write(options.output, record)
    for name, runs in record["runs"].items():  # type: ignore[attr-defined]
        print(f"{name:36} reward of the last 20 steps: {[r['reward'][-1] for r in runs]}")


if __name__ == "__main__":
    main()

"""Should PPO's policy and its value share an adapter? Trained by PPO on sums, at equal trainable parameters.

    python benchmarks/value_bundles.py --cells all --workers 6 --model DIR --output results.jsonl
    python benchmarks/value_bundles.py --variant separate --seed 0 --model DIR --output results.jsonl
    python benchmarks/value_bundles.py --report --output results.jsonl

The question was asked of TRL in 2023 (issue 373) and left open. "separate": two bundles, one updated by the policy's
loss, one by the value's. "shared": one bundle with the hidden units of both, updated by both. All of them read and
write the same columns, the value head is the same, and the KL to the base model is part of the reward, so that there
is no third loss. Both bundles are on in every row: the value's bundle does move the policy's logits.

A cell is (variant, seed), a process of its own, and a line of the output; cells that are there are not run again. The
report compares reward and explained variance where the runs have the same KL to the base model, since more reward can
always be bought with more KL.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from rich import print
from rich.table import Table

import peft_bundles
from peft_bundles import BundleConfig
from peft_bundles.trainer import BundlePPOTrainer, BundleTrainingConfig
from studies.data.smollm import model_folder
from studies.data.split import split_by_document
from studies.data.text import docstrings
from studies.records import made_by
from studies.rl_separate import tasks


VARIANTS, SEEDS = ("separate", "shared"), (0, 1, 2)
COLUMNS = 0.30  # of the hidden size: what all bundles read and write
LOGGED = ("reward", "exact", "kl_per_completion", "explained_variance", "ended")  # of every rollout
SETTINGS = {
    "steps": 240,
    "rows": 64,
    "hidden": 160,
    "ppo": {
        "max_completion_length": 8,
        "epochs": 2,
        "minibatches": 2,
        "kl_in": "reward",
        "kl_coef": 0.02,
        "value_coef": 0.1,
    },
    "calibration": {"tokens": 30_000, "max_length": 128},
    "learning_rate": 5e-4,
    "quiet": 10.0,
    "held_out": 256,
}
SMOKE = {"steps": 8, "rows": 4, "hidden": 8, "calibration": {"tokens": 600, "max_length": 64}, "held_out": 8}
SMOOTH = 5  # rollouts whose mean is a point of the report's curves


def exact(completions: Any, answer: Any, **_: Any) -> list[float]:
    """1 if the completion is the right number and nothing else; logged, and no part of the reward."""
    return [float(b + n == 2) for b, n in zip(tasks.bare(completions), tasks.near(completions, answer))]


def bundle_config(variant: str, given: dict[str, Any], seed: int) -> BundleConfig:
    own = {"separate": {"b_policy": ["policy"], "b_value": ["value"]}, "shared": {"b_both": ["policy", "value"]}}
    bundles = {
        name: {
            "rank": COLUMNS,
            "bottleneck": given["hidden"] // len(own[variant]),
            "sub_bases": ["rl"],
            "signals": dict.fromkeys(signals, 1.0),
        }
        for name, signals in own[variant].items()
    }
    fields = {"quiet": given["quiet"], "basis_seed": seed, "task_type": "CAUSAL_LM"}
    return BundleConfig(sub_bases={"rl": COLUMNS}, bundles=bundles, **fields)


def base_model(source: Path | None, smoke: bool) -> tuple[Any, Any]:
    if smoke:
        from models import TINY
        from training import tokenizer

        return TINY["llama"](), tokenizer()
    folder = source or model_folder()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def run(variant: str, seed: int, given: dict[str, Any], source: Path | None, smoke: bool) -> dict[str, Any]:
    begun = time.perf_counter()
    cuda = torch.cuda.is_available() and not smoke
    base, tokenizer = base_model(source, smoke)
    transformers.set_seed(seed)
    model: Any = get_peft_model(base.to("cuda" if cuda else "cpu"), bundle_config(variant, given, seed))
    texts, _ = split_by_document(docstrings(), seed=0)
    peft_bundles.calibrate(model, texts, tokenizer, progress=False, **given["calibration"])
    train, held = tasks.sums(train=1500, held_out=given["held_out"])
    with tempfile.TemporaryDirectory() as folder:
        args = BundleTrainingConfig(
            folder,
            seed=seed,
            max_steps=given["steps"],
            per_device_train_batch_size=given["rows"],
            learning_rate=given["learning_rate"],
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            max_grad_norm=1.0,
            logging_steps=1,
            bf16=cuda,
            use_cpu=not cuda,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        functions, weights = [*tasks.REWARDS, exact], [*tasks.WEIGHTS, 0.0]
        trainer = BundlePPOTrainer(
            model, functions, args, train, tokenizer, eval_dataset=held, reward_weights=weights, **given["ppo"]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trained = time.perf_counter()
        trainer.train(resume_from_checkpoint=False)
        trained = time.perf_counter() - trained
        final = trainer.evaluate()
    entries = [e for e in trainer.state.log_history if "ppo/reward" in e]
    history = [
        {"step": e["step"], **{name: e[key] for name in LOGGED if (key := _key(name)) in e}, "kl": e["ppo/kl"]}
        for e in entries
    ]
    return {
        "variant": variant,
        "seed": seed,
        "smoke": smoke,
        "trainable_parameters": model.get_nb_trainable_parameters()[0]
        + sum(p.numel() for p in trainer.objectives["ppo"].head().parameters()),
        "settings": given,
        "final": {name: final[f"eval_{_key(name)}"] for name in LOGGED},
        "history": history,
        "training_seconds": round(trained, 1),
        "seconds": round(time.perf_counter() - begun, 1),
        **made_by(" ".join(["python", *sys.argv]), "trl", device="cuda" if cuda else "cpu"),
    }


def _key(name: str) -> str:
    return f"ppo/reward/{name}" if name == "exact" else f"ppo/{name}"


# ---- cells side by side ----


def records(output: Path, smoke: bool) -> list[dict[str, Any]]:
    lines = output.read_text().splitlines() if output.exists() else []
    return [record for record in map(json.loads, lines) if record["smoke"] == smoke]


def run_all(args: argparse.Namespace) -> int:
    """Every cell that the output lacks, `--workers` at a time, in turns over the GPUs; the worst exit status."""
    done = {(r["variant"], r["seed"]) for r in records(args.output, args.smoke)}
    cells = [cell for cell in itertools.product(VARIANTS, SEEDS) if cell not in done]
    gpus = torch.cuda.device_count()

    def start(numbered: tuple[int, tuple[str, int]]) -> int:
        number, (variant, seed) = numbered
        command = [sys.executable, __file__, "--variant", variant, "--seed", str(seed), "--output", str(args.output)]
        for flag, value in (("steps", args.steps), ("learning-rate", args.learning_rate), ("model", args.model)):
            command += [] if value is None else [f"--{flag}", str(value)]
        command += ["--smoke"] if args.smoke else []
        visible = {"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus else {}
        return subprocess.run(command, env={**os.environ, **visible}).returncode

    with ThreadPoolExecutor(args.workers) as pool:
        return max(pool.map(start, enumerate(cells)), default=0)


# ---- the report ----


def smoothed(record: dict[str, Any], name: str) -> list[float]:
    """Means over `SMOOTH` rollouts; every step that learns from a rollout logs it, and it counts once."""
    used = record["settings"]["ppo"]["epochs"] * record["settings"]["ppo"]["minibatches"]
    values = [entry[name] for entry in record["history"][::used]]
    return [statistics.fmean(values[i : i + SMOOTH]) for i in range(max(len(values) - SMOOTH + 1, 1))]


def at_kl(record: dict[str, Any], name: str, level: float) -> float:
    """A curve's value where the KL first reaches a level, linear between rollouts."""
    kl, values = smoothed(record, "kl_per_completion"), smoothed(record, name)
    after = next(i for i, k in enumerate(kl) if k >= level)
    if after == 0:
        return values[0]
    part = (level - kl[after - 1]) / (kl[after] - kl[after - 1])
    return values[after - 1] + part * (values[after] - values[after - 1])


def report(found: list[dict[str, Any]]) -> None:
    """Raises ValueError where the cells cannot be compared."""
    if len(counts := {r["trainable_parameters"] for r in found}) != 1:
        raise ValueError(f"the cells have {sorted(counts)} trainable parameters; they must be equal, and one at least.")
    least = min(max(smoothed(r, "kl_per_completion")) for r in found)
    levels = [least * part for part in (0.25, 0.5, 0.75, 1.0)]
    title = f"{counts.pop():,} trainable parameters; mean and standard deviation over seeds"
    drawn = Table("", *VARIANTS, title=title)

    def row(label: str, value: Any) -> None:
        cells = []
        for variant in VARIANTS:
            numbers = [value(r) for r in found if r["variant"] == variant]
            spread = f" ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else ""
            cells.append(f"{statistics.fmean(numbers):.3f}{spread}" if numbers else "-")
        drawn.add_row(label, *cells)

    row("seeds", lambda r: 1.0 * sum(o["variant"] == r["variant"] for o in found))
    for name in ("reward", "exact", "explained_variance"):
        for level in levels:
            row(f"{name} at KL {level:.3g}", lambda r, name=name, level=level: at_kl(r, name, level))
    for name in LOGGED:
        row(f"{name}, held-out prompts, at the end", lambda r, name=name: r["final"][name])
    row("mean explained variance", lambda r: statistics.fmean(smoothed(r, "explained_variance")))
    row("training seconds", lambda r: r["training_seconds"])
    print(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", choices=["all"], help="every variant and seed that the output lacks")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct; fetched if not given")
    parser.add_argument("--steps", type=int, help=f"optimizer steps, {SETTINGS['steps']} if not given")
    parser.add_argument("--learning-rate", type=float, help=f"{SETTINGS['learning_rate']} if not given")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and a few steps on the CPU")
    parser.add_argument("--report", action="store_true", help="print the table of what the output has")
    args = parser.parse_args()
    if args.report:
        return report(records(args.output, args.smoke))
    if args.cells:
        sys.exit(run_all(args))
    if args.variant is None:
        parser.error("give --variant, --cells all or --report")
    if (args.variant, args.seed) in {(r["variant"], r["seed"]) for r in records(args.output, args.smoke)}:
        print(f"{args.output} has {args.variant}, seed {args.seed} already")
        return None
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    given: dict[str, Any] = {**SETTINGS, **(SMOKE if args.smoke else {})}
    given |= {name: value for name in ("steps", "learning_rate") if (value := getattr(args, name)) is not None}
    record = run(args.variant, args.seed, given, args.model, args.smoke)
    with args.output.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(f"{args.variant}, seed {args.seed}: {record['final']}, {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()

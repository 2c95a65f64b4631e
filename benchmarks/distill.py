"""How close a static LoRA comes to one setting of the alphas: the demo's bundles on SmolLM2-135M.

    python benchmarks/distill.py --device cuda --seeds 0 1 2

A seed trains the demo's adapter (`examples/quickstart.py`, unless the folder is there), distils both bundles into a
LoRA of rank 16 on all linears, on the training halves of the demo's three kinds of text, and measures on the held-out
halves: KL to the bundled model, agreement of the likeliest token, loss of base, bundles and LoRA. On GPUs the seeds run
side by side. Writes `benchmarks/results/distill.json`, which has every seed and the mean and deviation over them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor

from peft_bundles.evaluation import negative_loss
from peft_bundles.evaluation.distillation import distill_to_lora
from studies.data.corpora import encode, load_texts
from studies.data.smollm import model_folder
from studies.records import made_by, write


ROOT = Path(__file__).parents[1]

SETTING = {"b_plays": 1.0, "b_docs": 1.0}
LENGTH = 64  # tokens of a row
ADDED = 50  # further rows that are tried for, where there may be fewer than asked for


def rows_of(tokenizer: Any, texts: list[str], rows: int) -> Tensor:
    """The first so many texts that fill a row, or as many as there are."""
    long = [
        text for text in texts[: ADDED * rows] if len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= LENGTH
    ]
    return encode(tokenizer, long, min(rows, len(long)), LENGTH)


def batches(rows: Tensor, size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in rows.split(size)]


def distilled(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One seed: of the demo, of the LoRA and of the order of its batches."""
    start = time.perf_counter()
    base, adapter = args.model or str(model_folder()), f"{args.adapter}_{seed}"
    if not (Path(adapter) / "adapter_config.json").is_file():
        demo = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output", adapter, "--device", args.device]
        subprocess.run([*demo, "--model", base, "--seed", str(seed)], check=True)
    trained = time.perf_counter() - start
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(args.device)
    model = PeftModel.from_pretrained(plain, adapter).eval()
    texts = load_texts(seed)
    each = -(-args.steps * args.rows // len(texts))  # of each kind, so that none is seen twice if there are so many
    train = torch.cat([rows_of(tokenizer, split[0], each) for split in texts.values()])
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))]
    held_out = {kind: rows_of(tokenizer, split[1], args.held_out) for kind, split in texts.items()}
    start = time.perf_counter()
    _, report = distill_to_lora(
        model,
        SETTING,
        batches(train, args.rows),
        held_out=batches(torch.cat([*held_out.values()]), args.rows),
        steps=args.steps,
        tasks={kind: {"input_ids": ids} for kind, ids in held_out.items()},
        eval_fn=negative_loss,
        seed=seed,
        progress=False,
    )
    return {
        "seed": seed,
        **report.to_dict(),
        "training_rows": len(train),
        "held_out_rows": {kind: len(ids) for kind, ids in held_out.items()},
        "seconds": {"demo": round(trained), "distil": round(time.perf_counter() - start)},
    }


def side_by_side(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A process a seed, on the GPUs in turn."""
    gpus, running = torch.cuda.device_count(), []
    for number, seed in enumerate(args.seeds):
        part = Path(args.output).with_suffix(f".{seed}.json")
        command = [sys.executable, __file__, "--seeds", str(seed), "--output", str(part), "--device", args.device]
        for name in ("model", "adapter", "steps", "rows", "held_out"):
            if (value := getattr(args, name)) is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus else None
        running.append((part, subprocess.Popen(command, env=environment)))
    found = []
    for part, process in running:
        if process.wait():
            raise RuntimeError(f"the process for {part.name} ended with {process.returncode}; its output is above.")
        found += json.loads(part.read_text())["seeds"]
        part.unlink()
    return found


def over_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and deviation of what every seed measured: name -> [mean, deviation], nested as in a seed's record."""

    def spread(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: spread([value[name] for value in values]) for name in values[0]}
        return [round(fmean(values), 4), round(stdev(values), 4) if len(values) > 1 else 0.0]

    return {name: spread([each[name] for each in found]) for name in ("kl", "agreement", "scores")}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", default="outputs/quickstart", help="folder of the demo's adapter, less _SEED")
    parser.add_argument("--model", help="folder or Hub id of the base model; the demo's by default")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch")
    parser.add_argument(
        "--held-out", type=int, default=64, help="held-out rows of each kind of text, if there are so many"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "distill.json"))
    args = parser.parse_args(argv)
    together = args.device == "cuda" and len(args.seeds) > 1
    found = side_by_side(args) if together else [distilled(args, seed) for seed in args.seeds]
    seeds = " ".join(map(str, args.seeds))
    record = {
        **made_by(
            f"python benchmarks/distill.py --device {args.device} --steps {args.steps} --seeds {seeds}",
            device=args.device,
        ),
        "row_tokens": LENGTH,
        "batch_rows": args.rows,
        "score": "minus the mean next-token loss, nats a token",
        "over_seeds": over_seeds(found),
        "seeds": found,
    }
    write(Path(args.output), record)
    print(json.dumps(record["over_seeds"], indent=2), f"recorded in {args.output}", sep="\n")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()

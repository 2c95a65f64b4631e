"""How close a static LoRA comes to one setting of the alphas: the demo's bundles on SmolLM2-135M, on a CPU.

    python benchmarks/distill.py

Takes the adapter of `examples/quickstart.py` (runs the demo first if there is none), distils the settings below into a
LoRA each, on the training halves of the demo's three kinds of text, and measures on the held-out halves. Writes
`benchmarks/results/distill.json`. The committed record is from one thread of two cores shared with nine other jobs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel
from torch import Tensor

import peft_bundles
from peft_bundles.distill import distill_to_lora
from peft_bundles.evaluation import negative_loss


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from _data import encode, load_texts, model_folder  # noqa: E402


SETTINGS = {"both": {"b_plays": 1.0, "b_docs": 1.0}}
ROWS, LENGTH, HELD_OUT = 2, 64, 8  # rows of a batch, tokens of a row, held-out rows of each kind


def batches(rows: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part} for part in rows.split(ROWS)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", default="outputs/quickstart", help="folder of the demo's adapter")
    parser.add_argument("--model", help="folder or Hub id of the base model; the demo's by default")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "distill.json"))
    args = parser.parse_args(argv)
    base = args.model or str(model_folder())
    if not (Path(args.adapter) / "adapter_config.json").is_file():
        demo = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output", args.adapter]
        subprocess.run([*demo, "--model", base, "--seed", str(args.seed)], check=True)

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args.adapter
    ).eval()
    texts = load_texts(args.seed)
    each = -(-args.steps * ROWS // len(texts))  # rows of each kind, so that none is seen twice
    train = torch.cat([encode(tokenizer, split[0], each, LENGTH) for split in texts.values()])
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))]
    held_out = {kind: encode(tokenizer, split[1], HELD_OUT, LENGTH) for kind, split in texts.items()}
    tasks = {kind: {"input_ids": ids} for kind, ids in held_out.items()}

    results = {}
    for name, alphas in SETTINGS.items():
        start = time.perf_counter()
        _, report = distill_to_lora(
            model,
            alphas,
            batches(train),
            held_out=batches(torch.cat([*held_out.values()])),
            steps=args.steps,
            tasks=tasks,
            eval_fn=negative_loss,
            seed=args.seed,
        )
        results[name] = {**report.to_dict(), "seconds": round(time.perf_counter() - start)}
        print(name, json.dumps(results[name], indent=2))
        record = {
            "command": f"python benchmarks/distill.py --steps={args.steps} --seed={args.seed}",
            "date": datetime.date.today().isoformat(),
            "device": f"CPU, {torch.get_num_threads()} threads",
            "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, peft_bundles)},
            "row_tokens": LENGTH,
            "batch_rows": ROWS,
            "held_out_rows_a_kind": HELD_OUT,
            "score": "minus the mean next-token loss, nats a token",
            "results": results,
        }
        Path(args.output).write_text(json.dumps(record, indent=2) + "\n")
    print(f"recorded in {args.output}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()

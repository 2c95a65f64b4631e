"""Do the heads of the meta and representation signals generalise? SmolLM2-135M with calibrated bundles of `taxonomy`.

    python benchmarks/meta_heads.py --prepare heads.json.gz [--gsm8k FOLDER]        # once, with a network
    python benchmarks/meta_heads.py --data heads.json.gz --model FOLDER --output results.jsonl --workers 16
    python benchmarks/meta_heads_report.py                                          # docs/signals.md, from its results

"frozen": final states of the model with fresh bundles (which change nothing) are computed once; then each objective's
head is trained on them with the objective's own loss, and measured on held-out questions, people, documents or
prompts. Beside the owners' subspace the same head on the whole state (d = 576) says what the subspace costs.
"trained": the head and the bundles that own the signal learn together for `--steps` steps; the same held-out rows.
Intervals are 95%, bootstrapped over questions, sequences, documents or prompts, not rows.

A cell is (part, mode, seed) and a line of the output; cells that are there are not run again. `--workers` processes
share them out, in turns over the GPUs; none starts a cell after `--limit` seconds.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
import _data  # noqa: E402
from meta_heads_bench import Bench  # noqa: E402
from meta_heads_data import prepare, read  # noqa: E402
from meta_heads_parts import ALONE, PARTS  # noqa: E402
from meta_heads_rollouts import rollouts  # noqa: E402

import peft_bundles  # noqa: E402
from peft_bundles import BundleConfig, calibrate  # noqa: E402


ROLLOUTS = "rollouts"
NAMES = (ROLLOUTS, *PARTS)
MODES = ("frozen", "trained")
CALIBRATION = {"tokens": 30_000, "max_length": 128, "own_samples": 0.5}


def cells(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(part, mode, seed) of this worker that the output lacks, whole seeds first."""
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    done = {(r["part"], r["mode"], r["seed"]) for r in map(json.loads, lines)}
    every = itertools.product(range(args.seeds), args.modes, args.parts)
    asked = [(part, mode, seed) for seed, mode, part in every if mode == "frozen" or part not in ALONE]
    return [cell for cell in asked[args.worker :: args.workers] if cell not in done]


def work(args: argparse.Namespace) -> None:
    """The cells of one worker, a line each as soon as it is done; exit status 1 if one of them failed."""
    start, failed = time.perf_counter(), 0
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32: the model is so small that casting to bf16 would cost time
    transformers.logging.set_verbosity_error()
    data, folder = read(args.data), args.model or _data.model_folder()
    for part, mode, seed in cells(args):
        name = f"{part}, {mode}, seed {seed}"
        if time.perf_counter() - start > args.limit:
            print(f"{name}: not started, the time is up", flush=True)
            continue
        try:
            record = run(part, mode, seed, args, data, folder)
        except Exception:  # the others may well work
            failed = 1
            print(f"{name}: failed\n{traceback.format_exc()}", flush=True)
            continue
        with args.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name}: {record['seconds']} s", flush=True)
    if failed:
        sys.exit(1)


def run(part: str, mode: str, seed: int, args: argparse.Namespace, data: Any, folder: Path) -> dict[str, Any]:
    """One cell, with a model of its own."""
    begun, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    transformers.set_seed(seed)
    model: Any = get_peft_model(base, BundleConfig(preset="taxonomy", task_type="CAUSAL_LM", basis_seed=seed))
    calibration = {
        **CALIBRATION,
        "tokens": max(int(CALIBRATION["tokens"] * min(args.scale, 1)), 2000),
        "batch_size": 64 if device == "cuda" else 8,
    }
    calibrate(model, data["calibration"], tokenizer, seed=seed, progress=False, **calibration)
    model.eval()
    bench = Bench(model, tokenizer, data, seed, args.scale, args.steps)
    trained = mode == "trained"
    return {
        "part": part, "mode": mode, "seed": seed,
        "signals": rollouts(bench, trained) if part == ROLLOUTS else {part: bench.run(PARTS[part], trained)},
        "steps": args.steps if trained else None, "scale": args.scale, "calibration": calibration,
        "seconds": round(time.perf_counter() - begun, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, peft, peft_bundles)},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, help="write the data to this file and stop", metavar="FILE")
    parser.add_argument(
        "--gsm8k", type=Path, help="folder of GSM8K's files, with --prepare: marked solutions of models"
    )
    parser.add_argument("--data", type=Path, help="a file that --prepare has written")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct; fetched if not given")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--parts", nargs="+", choices=NAMES, default=list(NAMES), metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--trained", dest="modes", action="store_const", const=["trained"], help="--modes trained")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of bundles and head, in the mode trained")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no cell is started")
    parser.add_argument("--scale", type=float, default=1.0, help="a part of the rows, to try it out")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        return prepare(args.prepare, args.gsm8k)
    if not args.data or not args.output:
        parser.error("give --prepare FILE, or --data and --output")
    if args.worker is not None or args.workers == 1:
        args.worker = args.worker or 0
        return work(args)
    gpus = torch.cuda.device_count()
    running = []
    for number in range(args.workers):
        visible = {"CUDA_VISIBLE_DEVICES": str(number % gpus)} if gpus else {}
        command = [sys.executable, *sys.argv, "--worker", str(number)]
        running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **visible}))
    sys.exit(max(process.wait() for process in running))


if __name__ == "__main__":
    main()

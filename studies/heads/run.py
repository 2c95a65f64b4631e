"""Do the heads of the meta and representation signals generalise? SmolLM2-135M with calibrated bundles of `taxonomy`.

    python -m studies.heads.run --prepare heads.json.gz [--gsm8k FOLDER]        # once, with a network
    python -m studies.heads.run --data heads.json.gz --model FOLDER --output results.jsonl --workers 16
    python -m studies.heads.report                                          # tables.md, from its results

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
import itertools
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_bundles import BundleConfig, calibrate
from studies import records
from studies.data.smollm import model_folder
from studies.heads.bench import Bench
from studies.heads.make_data import prepare, read
from studies.heads.parts import ALONE, PARTS
from studies.heads.rollouts import rollouts


ROLLOUTS = "rollouts"
NAMES = (ROLLOUTS, *PARTS)
MODES = ("frozen", "trained")
CALIBRATION = {"tokens": 30_000, "max_length": 128, "own_samples": 0.5}


def cells(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(part, mode, seed) of this worker that the output lacks: neighbours, so that it seldom needs another model."""
    done = records.done(args.output, lambda record: (record["part"], record["mode"], record["seed"]))
    every = itertools.product(range(args.seeds), args.parts, args.modes)
    asked = [(part, mode, seed) for seed, part, mode in every if mode == "frozen" or part not in ALONE]
    first, last = (len(asked) * n // args.workers for n in (args.worker, args.worker + 1))
    return [cell for cell in asked[first:last] if cell not in done]


def work(args: argparse.Namespace) -> None:
    """The cells of one worker, a line each as soon as it is done; exit status 1 if one of them failed."""
    start, failed = time.perf_counter(), 0
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32: the model is so small that casting to bf16 would cost time
    transformers.logging.set_verbosity_error()
    data, folder = read(args.data), args.model or model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, fresh, of = None, {}, None
    for part, mode, seed in cells(args):
        name = f"{part}, {mode}, seed {seed}"
        if time.perf_counter() - start > args.limit:
            print(f"{name}: not started, the time is up", flush=True)
            continue
        try:
            begun = time.perf_counter()
            if model is None or of != seed:
                model, of = calibrated(seed, args.scale, data, tokenizer, folder), seed
                fresh = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
                print(f"seed {seed}: calibrated, {time.perf_counter() - begun:.0f} s", flush=True)
            begun = time.perf_counter()
            transformers.set_seed(seed)
            bench = Bench(model, tokenizer, data, seed, args.scale, args.steps)
            trained = mode == "trained"
            found = rollouts(bench, trained) if part == ROLLOUTS else {part: bench.run(PARTS[part], trained)}
            with torch.no_grad():
                for parameter, p in model.named_parameters():
                    if parameter in fresh:
                        p.copy_(fresh[parameter])
        except Exception:  # the others may well work
            failed, model = 1, None
            print(f"{name}: failed\n{traceback.format_exc()}", flush=True)
            continue
        record = {
            "part": part, "mode": mode, "seed": seed, "signals": found,
            "steps": args.steps if trained else None, "scale": args.scale,
            "calibration": {**CALIBRATION, **(model.peft_config["default"].calibration or {})},
            "seconds": round(time.perf_counter() - begun, 1),
            **records.made_by(" ".join(["python -m studies.heads.run", *sys.argv[1:]]), "trl"),
        }  # fmt: skip
        records.append(args.output, record)
        print(f"{name}: {record['seconds']} s", flush=True)
    if failed:
        sys.exit(1)


def calibrated(seed: int, scale: float, data: dict[str, Any], tokenizer: Any, folder: Path) -> Any:
    """The model with fresh bundles, in a basis of the seed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    transformers.set_seed(seed)
    model: Any = get_peft_model(base, BundleConfig(preset="taxonomy", task_type="CAUSAL_LM", basis_seed=seed))
    size = {
        "tokens": max(int(CALIBRATION["tokens"] * min(scale, 1)), 2000),
        "batch_size": 128 if device == "cuda" else 32,
    }
    calibrate(model, data["calibration"], tokenizer, seed=seed, progress=False, **{**CALIBRATION, **size})
    return model.eval()


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
        command = [sys.executable, "-m", "studies.heads.run", *sys.argv[1:], "--worker", str(number)]
        running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **visible}))
    sys.exit(max(process.wait() for process in running))


if __name__ == "__main__":
    main()

